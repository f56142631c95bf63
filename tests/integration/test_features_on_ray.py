"""The feature cache over a real Ray cluster and a real S3 server: computed once, for new images alone, and mended where damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from infra import lease
from infra.committed_folder import commit, verify
from infra.lease import this_machine
from infra.object_store import S3ObjectStore, join_uri, object_store
from infra.progress import ignore
from infra.settings import user
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec
from tests import small_data

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours to mend
GROUPS, SIZE, LIMIT = 5, 32, 10**6


@pytest.fixture(scope="module")
def machine(s3_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray of two CPUs whose workers share this machine's cache folder and the S3 server."""
    import ray

    folder = tmp_path_factory.mktemp("machine")
    settings = {**s3_server, "UNFREEZE_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        object_store.cache_clear()
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": settings})
        yield folder
        ray.shutdown()
    object_store.cache_clear()


@pytest.fixture(scope="module")
def backbone(machine: Path) -> dict[str, Any]:
    from ray_jobs import backbone

    config = backbone.build(spec_of(machine, "x").backbone, image_size=SIZE, seed=0, folder=machine / "backbone", store=object_store())
    uri = f"s3://unfreeze/backbones/{config['digest']}"
    commit(object_store(), uri, {path.name: path for path in (machine / "backbone").iterdir()})
    return {**config, "uri": uri, "groups": len(config["groups"])}


@pytest.fixture
def lab(machine: Path, request: pytest.FixtureRequest) -> str:
    """A storage of its own for each test."""
    return f"s3://unfreeze/{request.node.name[:40]}"


def spec_of(folder: Path, storage: str, *, fit: dict[str, Any] | None = None, **search: Any) -> Spec:
    data = {"source": str(folder / "shapes"), "image_size": SIZE, "val_fraction": 0.3, "holdout_fraction": 0.2}
    return parse_spec({
        "name": "shapes", "data": data, "backbone": {"name": "resnet10t", "weights": "none"}, "fit": fit or {},
        "search": {"unfreeze_depth": [0, 1, GROUPS], **search}, "storage": storage if storage.startswith("s3://") else "s3://unfreeze",
    })  # fmt: skip


def prepared(spec: Spec, folder: Path, images_per_class: int) -> dict[str, Any]:
    from ray_jobs import prepare

    root = folder / "shapes"
    for number, label in enumerate(small_data.CLASSES):
        (root / label).mkdir(parents=True, exist_ok=True)
        for index in range(images_per_class):
            path = root / label / f"{index:03d}.png"
            if not path.exists():
                small_data.draw(label, 1000 * number + index).save(path)
    return prepare.prepare(spec, ignore)


def cached(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], said: list[str] | None = None) -> dict[str, Any]:
    from ray_jobs.features_on_ray import cache_features

    return cache_features(spec, dataset, backbone, ignore, say=(said if said is not None else []).append)


def images_of(dataset: dict[str, Any]) -> int:
    return int(dataset["train"] + dataset["val"])


def expected(dataset: dict[str, Any], backbone_record: dict[str, Any], depth: int, cache: Path) -> list[Any]:
    """The features computed plainly, in this process."""
    from infra.committed_folder import fetch
    from ray_jobs import backbone
    from ray_jobs.cuts import Cuts
    from ray_jobs.dataset import open_dataset
    from ray_jobs.features import FrozenPrefix, features_of, pixels_of

    data = open_dataset(dataset["uri"], object_store(), cache).images(["train", "val"])
    pixels_NHWC = pixels_of((content for _, content in data), image_size=SIZE, max_pixels=LIMIT)
    if depth == GROUPS:
        return [pixels_NHWC]
    model = backbone.load(fetch(object_store(), backbone_record["uri"], cache / "backbones"), num_classes=2, seed=0)
    prefix = FrozenPrefix(Cuts(model, [depth], SIZE))
    return features_of(prefix, pixels_NHWC, depths=[depth], mean=backbone_record["mean"], std=backbone_record["std"])[depth]


def test_a_new_dataset_computes_its_new_images_alone_and_another_search_nothing(
    machine: Path, lab: str, backbone: dict[str, Any], tmp_path: Path
) -> None:
    from ray_jobs.feature_cache import open_features

    spec = spec_of(tmp_path, lab)
    first = prepared(spec, tmp_path, 20)
    made = cached(spec, first, backbone)
    assert made["computed_images"] == images_of(first)
    again = cached(spec_of(tmp_path, lab, lr=[1e-3]), first, backbone)
    assert (again["computed_images"], again["features"]) == (0, made["features"])

    second = prepared(spec, tmp_path, 22)
    grown = cached(spec, second, backbone)
    assert 0 < grown["computed_images"] == images_of(second) - images_of(first)
    assert len(grown["batches"]) == 2 * len(made["batches"])
    for depth, uri in grown["features"].items():
        features = open_features(uri, object_store(), machine / "cache")
        for value, plain in zip(features.values, expected(second, backbone, int(depth), tmp_path / "plain"), strict=True):
            np.testing.assert_allclose(value, plain, atol=1e-5, rtol=1e-5)
    deeper = cached(spec_of(tmp_path, lab, unfreeze_depth=[0, 1, 2]), second, backbone)
    assert deeper["features"]["1"] == grown["features"]["1"]
    assert all(verify(object_store(), uri) == [] for uri in [*deeper["batches"], *deeper["features"].values()])


def test_whatever_is_damaged_on_s3_or_here_is_computed_anew(machine: Path, lab: str, backbone: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    from ray_jobs.feature_cache import open_features

    spec, store = spec_of(tmp_path, lab), object_store()
    dataset = prepared(spec, tmp_path, 15)
    made = cached(spec, dataset, backbone)
    before = [open_features(uri, store, machine / "cache").values[0].copy() for uri in made["features"].values()]
    for suffix, position in (("safetensors", -5), ("index.safetensors", 100), ("config.json", 5), ("MANIFEST.json", 0)):
        batch = made["batches"][0]
        uri = next(info.uri for info in store.list(batch) if info.uri.endswith(suffix))
        content = bytearray(store.read(uri))
        content[position] ^= 8
        store.write(uri, bytes(content))
        shutil.rmtree(machine / "cache" / "features")
        said: list[str] = []
        mended = cached(spec, dataset, backbone, said)
        assert mended["computed_images"] == images_of(dataset)
        assert batch in "".join(said)
        assert all(verify(store, one) == [] for one in mended["batches"])
        for uri, value in zip(mended["features"].values(), before, strict=True):
            np.testing.assert_array_equal(open_features(uri, store, machine / "cache").values[0], value)
    for path in (machine / "cache" / "features").glob("*/v0.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert cached(spec, dataset, backbone)["computed_images"] == 0
    for uri, value in zip(mended["features"].values(), before, strict=True):
        np.testing.assert_array_equal(open_features(uri, store, machine / "cache").values[0], value)


def test_two_searches_at_once_compute_once_and_the_one_that_waits_says_so(
    machine: Path, lab: str, backbone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "Waiting", partial(lease.Waiting, settle_s=2.0))  # a busy machine may be slow between two looks
    dataset = prepared(spec_of(tmp_path, lab), tmp_path, 15)
    made: list[dict[str, Any]] = []
    said: list[str] = []
    specs = spec_of(tmp_path, lab), spec_of(tmp_path, lab, lr=[1e-2])
    threads = [threading.Thread(target=lambda spec=spec: made.append(cached(spec, dataset, backbone, said))) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one["computed_images"] for one in made) == [0, images_of(dataset)]
    assert made[0]["features"] == made[1]["features"]
    (line,) = said
    assert line.startswith("Waiting since ")
    assert line.endswith(f" for process {os.getpid()} of {user()}, which computes features of the same backbone.")
    assert list(object_store().list(join_uri(lab, "leases"))) == []


def test_a_search_that_was_killed_at_work_is_not_waited_for(machine: Path, lab: str, backbone: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(tmp_path, lab)
    dataset = prepared(spec, tmp_path, 15)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    holder = {
        "token": "x",
        "machine": this_machine(),
        "host": "here",
        "pid": child.pid,
        "create_time": psutil.Process(child.pid).create_time(),
    }
    store = LeaseFirst(json.dumps(holder).encode())
    with pytest.MonkeyPatch.context() as patch:
        from ray_jobs import features_on_ray

        patch.setattr(features_on_ray, "object_store", lambda: store)
        patch.setattr(lease, "Waiting", partial(lease.Waiting, patience_s=600.0))  # its death alone ends the wait
        said: list[str] = []

        def hear(line: str) -> None:
            said.append(line)
            child.kill()

        made = features_on_ray.cache_features(spec, dataset, backbone, ignore, say=hear)
        assert made["computed_images"] == images_of(dataset)
    (line,) = said
    assert line.endswith(f" for process {child.pid}, which computes features of the same backbone.")
    assert child.poll() is not None


class LeaseFirst(S3ObjectStore):
    """A store in which another process has the lease before anyone asks."""

    def __init__(self, holder: bytes) -> None:
        super().__init__()
        self.holder: bytes | None = holder

    def read(self, uri: str) -> bytes:
        if "/leases/" in uri and self.holder:
            super().write(uri, self.holder)
            self.holder = None
        return super().read(uri)


def test_views_are_added_to_what_is_there_and_sixteen_bits_are_a_set_of_their_own(
    machine: Path, lab: str, backbone: dict[str, Any], tmp_path: Path
) -> None:
    from ray_jobs.feature_cache import open_features

    dataset = prepared(spec_of(tmp_path, lab), tmp_path, 15)
    one = cached(spec_of(tmp_path, lab), dataset, backbone)
    three = cached(spec_of(tmp_path, lab, views=3), dataset, backbone)
    assert three["computed_images"] == dataset["train"]
    assert set(one["batches"]) < set(three["batches"])
    for depth, uri in three["features"].items():
        features = open_features(uri, object_store(), machine / "cache")
        plain = open_features(one["features"][depth], object_store(), machine / "cache")
        assert len(features.values[0]) == images_of(dataset) + 2 * dataset["train"]
        np.testing.assert_array_equal(features.values[0][: images_of(dataset)], plain.values[0])
        assert len({features.values[0][features.row(0, view)].tobytes() for view in range(3)}) == 3
    half = cached(spec_of(tmp_path, lab, feature_dtype="bfloat16"), dataset, backbone)
    (stored,) = open_features(half["features"]["0"], object_store(), machine / "cache").tensors()
    (whole,) = open_features(one["features"]["0"], object_store(), machine / "cache").tensors()
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, whole.bfloat16())
    assert half["features"][str(GROUPS)] == one["features"][str(GROUPS)]

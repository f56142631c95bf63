"""Features once and a search over them, on a real Ray cluster and a real S3 server."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.committed_folder import commit, verify
from infra.errors import UserError
from infra.object_store import object_store
from ray_jobs.search_engine import OVER_BUDGET
from ray_jobs.spec import BackboneSpec, Spec
from ray_jobs.spec_file import parse_spec

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours
BUCKET = "unfreeze"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An S3 server and a Ray cluster of two CPUs, with this process connected to both."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "s3" / BUCKET).mkdir(parents=True)
    port, rclone = _free_port(), Path(sys.executable).with_name("rclone")
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "searchtest", "AWS_SECRET_ACCESS_KEY": "searchsecret",
        "AWS_DEFAULT_REGION": "us-east-1", "UNFREEZE_CACHE_DIR": str(folder / "cache"), "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        object_store.cache_clear()
        command = [rclone, "serve", "s3", "--auth-key", "searchtest,searchsecret", "--addr", f"127.0.0.1:{port}", folder / "s3"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        import ray

        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
            _wait_for(port)
            yield folder
        finally:
            ray.shutdown()
            server.terminate()
            server.wait()
            object_store.cache_clear()


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(port: int) -> None:
    import socket

    for _ in range(100):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the S3 server did not start")


@pytest.fixture(scope="module")
def prepared(machine: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dataset of three colours, and a small random backbone."""
    from ray_jobs.prepare_on_ray import prepare

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(machine / "colours.zip", "w") as archive:
        for name, colour in {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}.items():
            for i in range(24):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                data = io.BytesIO()
                Image.fromarray(pixels).save(data, "PNG")
                archive.writestr(f"{name}/{i:03d}.png", data.getvalue())
    spec = spec_of(machine)
    dataset = prepare(spec, ignore)
    return dataset, stored(machine, spec.backbone)


def stored(folder: Path, spec: BackboneSpec) -> dict[str, Any]:
    """A random backbone on the store."""
    from ray_jobs import backbone

    config = backbone.build(spec, image_size=32, seed=0, folder=folder / spec.name, store=object_store())
    uri = f"s3://{BUCKET}/backbones/{config['digest']}"
    commit(object_store(), uri, {path.name: path for path in (folder / spec.name).iterdir()})
    return {**config, "uri": uri, "groups": len(config["groups"])}


def spec_of(folder: Path, **search: Any) -> Spec:
    fixed = {"unfreeze_depth": [0, 1], "lr": [1e-3, 1e-2], "num_trials": 4, "max_epochs": 3, "scheduler": "fifo", "batch_size": 16}
    data = {"source": str(folder / "colours.zip"), "image_size": 32, "val_fraction": 0.3, "holdout_fraction": 0.2}
    return parse_spec({
        "name": "colours", "data": data, "backbone": {"name": "resnet10t", "weights": "none"}, "search": {**fixed, **search},
        "storage": f"s3://{BUCKET}",
    })  # fmt: skip


def ignore(done: float, total: float) -> None:
    pass


def run(machine: Path, prepared: tuple[dict[str, Any], dict[str, Any]], on_progress: Any = ignore, **search: Any) -> dict[str, Any]:
    from ray_jobs.features_on_ray import cache_features
    from ray_jobs.search_on_ray import run_search

    spec, (dataset, backbone) = spec_of(machine, **search), prepared
    features = cache_features(spec, dataset, backbone, ignore)["features"]
    return run_search(spec, dataset, [backbone], [features], on_progress)


def test_a_search_computes_features_once_and_ends_with_a_verified_leaderboard(machine: Path, prepared: Any, capfd: Any) -> None:
    from ray_jobs.features_on_ray import cache_features

    first = cache_features(spec_of(machine), *prepared, ignore)
    assert first["computed_images"] == prepared[0]["train"] + prepared[0]["val"]
    assert cache_features(spec_of(machine), *prepared, ignore)["computed_images"] == 0
    more = cache_features(spec_of(machine, unfreeze_depth=[0, 1, 2]), *prepared, ignore)
    assert {k: more["features"][k] for k in ("0", "1")} == first["features"]

    told: list[tuple[float, float]] = []
    result = run(machine, prepared, lambda done, total: told.append((done, total)))
    assert [detail["status"] for detail in result["trials_detail"]] == ["finished"] * 4
    assert {(d["unfreeze_depth"], d["lr"]) for d in result["trials_detail"]} == {(0, 1e-3), (0, 1e-2), (1, 1e-3), (1, 1e-2)}
    assert result["best"]["accuracy"] >= 0.8
    assert told[-1] == (12, 12)
    assert verify(object_store(), result["uri"]) == []
    assert capfd.readouterr().out == ""
    assert not (Path.home() / "ray_results" / "search").exists()

    assert run(machine, prepared) == result


def without_numbers(uri: str, cache: Path) -> str:
    """A copy of the features of one cut in which every value is NaN."""
    from ray_jobs.feature_batches import Selection, commit_batch, commit_selection, write_shards
    from ray_jobs.feature_cache import open_features

    features, store, copy = open_features(uri, object_store(), cache), object_store(), f"{uri}-nan"
    rows = len(features.labels)
    parts = write_shards(store, copy, 0, [np.full_like(value, np.nan) for value in features.values], "float32")
    batch = commit_batch(store, copy, [f"{row:064x}" for row in range(rows)], parts, {})
    places = np.zeros(rows, np.int32), np.arange(rows)
    selection = Selection([(batch.uri, batch.manifest_digest)], *places, features.labels, features.train, 1)
    return commit_selection(store, f"s3://{BUCKET}", selection, {})


def search_with_nan(machine: Path, prepared: Any, nan_depth: int, **search: Any) -> dict[str, Any]:
    from ray_jobs.features_on_ray import cache_features
    from ray_jobs.search_on_ray import run_search

    spec, (dataset, backbone) = spec_of(machine, **search), prepared
    features = cache_features(spec, dataset, backbone, ignore)["features"]
    features[str(nan_depth)] = without_numbers(features[str(nan_depth)], machine / "other-cache")
    return run_search(spec, dataset, [backbone], [features], ignore)


def test_trials_that_diverge_are_recorded_and_the_search_goes_on(machine: Path, prepared: Any) -> None:
    result = search_with_nan(machine, prepared, 1, seed=1)
    statuses = {(d["unfreeze_depth"], d["status"], d["accuracy"]) for d in result["trials_detail"] if d["unfreeze_depth"] == 1}
    assert statuses == {(1, "diverged", None)}
    assert [d["status"] for d in result["trials_detail"] if d["unfreeze_depth"] == 0] == ["finished"] * 2
    assert result["best"]["unfreeze_depth"] == 0


def test_a_search_whose_trials_all_diverge_says_why_and_commits_nothing(machine: Path, prepared: Any) -> None:
    with pytest.raises(UserError, match=r"All 2 trials of the search failed\. diverged: the loss became nan in epoch 1"):
        search_with_nan(machine, prepared, 1, unfreeze_depth=[1], seed=3)
    with pytest.raises(UserError, match="Every linear probe diverged"):
        search_with_nan(machine, prepared, 0, seed=4)


def test_asha_stops_weak_trials_on_per_epoch_metrics_and_the_trials_depend_on_the_seed_alone(machine: Path, prepared: Any) -> None:
    chosen = {"lr": {"low": 1e-7, "high": 1e-1}, "num_trials": 10, "scheduler": "asha", "searcher": "random", "max_epochs": 4}
    result = run(machine, prepared, **chosen)
    epochs = [detail["epochs"] for detail in result["trials_detail"]]
    assert "stopped" in {detail["status"] for detail in result["trials_detail"]}
    assert min(epochs) < 4
    for detail in result["trials_detail"]:
        assert [epoch["epoch"] for epoch in detail["curve"]] == list(range(1, detail["epochs"] + 1))


def test_optuna_proposes_as_many_trials_as_asked_for(machine: Path, prepared: Any) -> None:
    result = run(machine, prepared, lr={"low": 1e-4, "high": 1e-1}, num_trials=5, searcher="optuna", max_epochs=2)
    assert result["trials"] == 5
    assert all(1e-4 <= detail["lr"] <= 1e-1 for detail in result["trials_detail"])


def outcome(result: dict[str, Any]) -> Any:
    """All of a result that must not depend on when what ran."""
    result = {**result, "trials_detail": sorted(result["trials_detail"], key=lambda detail: str(detail["trial_id"]))}
    timeless = [
        {k: v for k, v in detail.items() if k not in ("seconds", "started_at", "curve", "epochs_run")} for detail in result["trials_detail"]
    ]
    curves = {d["trial_id"]: [(e["epoch"], e["val_accuracy"], e["val_loss"]) for e in d["curve"]] for d in result["trials_detail"]}
    return result["best"], timeless, curves


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_a_killed_worker_changes_nothing_in_the_outcome(machine: Path, prepared: Any) -> None:
    killed: list[int] = []

    def kill_one(done: float, total: float) -> None:
        if killed:
            return  # its zombie has no command line to read
        trials = [p for p in psutil.Process().children(recursive=True) if "Trainable" in _title(p)]
        if trials:
            killed.append(trials[0].pid)
            os.kill(trials[0].pid, signal.SIGKILL)

    chosen: dict[str, Any] = {"max_epochs": 12, "unfreeze_depth": [0, 1, 2], "seed": 2, "scheduler": "asha"}
    disturbed = run(machine, prepared, kill_one, **chosen)
    assert killed
    object_store().delete([info.uri for info in object_store().list(disturbed["uri"])])
    assert outcome(run(machine, prepared, **chosen)) == outcome(disturbed)


def test_a_search_stopped_at_any_moment_carries_on_to_the_same_outcome(machine: Path, prepared: Any) -> None:
    chosen: dict[str, Any] = {"max_epochs": 4, "unfreeze_depth": [0, 1, 2], "seed": 5, "scheduler": "asha"}
    told = 0

    def interrupt(done: float, total: float) -> None:
        nonlocal told
        told += 1
        if told in (2, 5):
            raise RuntimeError("stop here")

    for _ in range(2):
        with pytest.raises(Exception, match="stop here"):  # Tune wraps it
            run(machine, prepared, interrupt, **chosen)
    carried_on = run(machine, prepared, **chosen)
    assert not list(object_store().list(f"{carried_on['uri']}.journal"))
    object_store().delete([info.uri for info in object_store().list(carried_on["uri"])])
    assert outcome(run(machine, prepared, **chosen)) == outcome(carried_on)


def test_the_ladder_climbs_only_where_depth_pays_and_says_why(machine: Path, prepared: Any) -> None:
    result = run(machine, prepared, unfreeze_depth=[0, 1, 2, 3], scheduler="ladder", seed=6)
    assert result["decisions"]
    assert {detail["unfreeze_depth"] for detail in result["trials_detail"]} < {0, 1, 2, 3}


@pytest.mark.parametrize("scheduler", ["fifo", "ladder"])
def test_short_trials_share_the_first_actors(machine: Path, prepared: Any, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import state

    from ray_jobs import search_trial

    monkeypatch.setattr(search_trial, "MEETING_S", 600.0)  # there is room for both, however slowly they start
    before = set(state.actors())
    chosen: dict[str, Any] = {"lr": {"low": 1e-4, "high": 1e-1}, "num_trials": 24, "searcher": "random"}
    result = run(machine, prepared, unfreeze_depth=[1, 2], max_epochs=1, scheduler=scheduler, seed=9, **chosen)
    assert result["trials"] > 4
    assert len(set(state.actors()) - before) == 2


def test_a_budget_ends_the_search_with_what_it_has(machine: Path, prepared: Any) -> None:
    result = run(machine, prepared, max_epochs=500, unfreeze_depth=[0, 1], scheduler="fifo", budget_s=6.0, seed=7)
    assert ("stopped", OVER_BUDGET) in {(detail["status"], detail["reason"]) for detail in result["trials_detail"]}
    assert result["best"]["accuracy"] > 0


def test_a_search_of_two_backbones_is_that_of_each_in_one_even_when_it_is_interrupted(machine: Path, prepared: Any) -> None:
    """Every trial trains as in a search of its backbone alone, so from the features and the probe of its own."""
    from safetensors.numpy import load

    from ray_jobs.features_on_ray import cache_features
    from ray_jobs.search_on_ray import run_search

    def interrupt(done: float, total: float) -> None:
        raise RuntimeError("stop here")

    spec, (dataset, first) = spec_of(machine, backbone=["test_vit"], seed=8), prepared
    backbones = [first, stored(machine, spec.backbones[1])]
    features = [cache_features(spec, dataset, backbone, ignore)["features"] for backbone in backbones]
    with pytest.raises(Exception, match="stop here"):
        run_search(spec, dataset, backbones, features, interrupt)
    both = run_search(spec, dataset, backbones, features, ignore)
    alone = [
        run_search(spec.with_backbone(own), dataset, [backbone], [cuts], ignore)
        for own, backbone, cuts in zip(spec.backbones, backbones, features, strict=True)
    ]
    assert both["backbones"] == ["resnet10t", "test_vit"]
    assert [detail["status"] for detail in both["trials_detail"]] == ["finished"] * 8
    assert curves(both) == curves(alone[0]) | curves(alone[1])
    assert both["cost"]["flops"] == alone[0]["cost"]["flops"] + alone[1]["cost"]["flops"]

    winner = alone[both["backbones"].index(both["best"]["backbone"])]
    assert both["best"]["accuracy"] == max(one["best"]["accuracy"] for one in alone)
    assert {**both["probe"], "uri": ""} == {**winner["probe"], "uri": ""}
    head, expected = (load(object_store().read(one["probe"]["uri"])) for one in (both, winner))
    assert {name: value.shape for name, value in head.items()} == {name: value.shape for name, value in expected.items()}
    assert {value.shape[0] for value in head.values()} == {3}
    board = pq.read_table(io.BytesIO(object_store().read(both["leaderboard_uri"]))).to_pylist()
    assert [row["backbone"] for row in board] == [detail["backbone"] for detail in both["trials_detail"]]


def curves(result: dict[str, Any]) -> dict[Any, Any]:
    """What every trial measured, by its point."""
    return {
        (detail["backbone"], detail["unfreeze_depth"], detail["lr"]): [(e["val_accuracy"], e["val_loss"]) for e in detail["curve"]]
        for detail in result["trials_detail"]
    }


def test_a_worker_trains_without_ever_loading_torchs_compiler() -> None:
    script = """
import sys
from ray_jobs.light_timm import import_timm
import_timm()
import torch
from ray_jobs.cuts import Cuts
from ray_jobs.train_loop import OneCycle
from ray_jobs import features, trial
layer = torch.nn.Linear(2, 2)
optimizer = OneCycle(list(layer.parameters()), peak_lr=0.1, weight_decay=0.0, steps=2)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
import torch._dynamo
assert callable(torch._dynamo.disable) and torch._dynamo.__file__
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)

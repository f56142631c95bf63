"""Preparation over a real Ray cluster and a real S3 server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.committed_folder import verify
from infra.errors import UserError
from infra.object_store import S3ObjectStore, object_store
from ray_jobs.dataset import open_dataset
from ray_jobs.spec import Spec
from ray_jobs.spec_file import load_spec, parse_spec
from tests.strategies import SPLITS, below, png, two_classes, write_folder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours to mend
EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji.yaml"


@pytest.fixture(scope="module")
def store(s3_server: dict[str, str]) -> Iterator[S3ObjectStore]:
    """The S3 server as this process's own for the whole module, because its Ray workers keep it too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        object_store.cache_clear()
        yield object_store()
    object_store.cache_clear()


@pytest.fixture(scope="module")
def cluster(store: S3ObjectStore, s3_server: dict[str, str]) -> Iterator[None]:
    """A real two-CPU Ray on this machine whose workers know the S3 server."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": s3_server})
    yield
    ray.shutdown()


def prepared(spec: Spec) -> dict[str, Any]:
    from ray_jobs import prepare_on_ray

    return prepare_on_ray.prepare(spec, lambda done, total: None)


def spec_of(source: Path | str) -> Spec:
    data = {"source": str(source), "val_fraction": 0.2, "holdout_fraction": 0.2}
    return parse_spec({"name": "pets", "data": data, "backbone": {"name": "resnet18"}})


@pytest.mark.usefixtures("cluster")
def test_the_bundled_images_are_prepared_committed_and_read_back(store: S3ObjectStore, tmp_path: Path) -> None:
    result = prepared(load_spec(EXAMPLE))
    assert (result["images"], len(result["classes"]), result["quarantined"], result["duplicates"]) == (1892, 9, 0, 14)
    assert result["train"] + result["val"] + result["holdout"] == 1892
    assert verify(store, result["uri"]) == []
    dataset = open_dataset(result["uri"], store, tmp_path)
    assert all(hashlib.sha256(data).hexdigest() == row.sha256 for row, data in dataset.images(SPLITS))
    before = {info.uri: info.etag for info in store.list(result["uri"])}
    assert prepared(load_spec(EXAMPLE)) == result
    assert {info.uri: info.etag for info in store.list(result["uri"])} == before


@pytest.mark.usefixtures("cluster")
def test_tasks_read_an_s3_source_themselves_and_get_the_dataset_of_the_folder(store: S3ObjectStore, tmp_path: Path) -> None:
    files = two_classes() | {"cat/broken.png": png()[:40], "dog/papagáj 🦜+&.png": png(4242)}
    for uri, data in below("s3://unfreeze/sources/pets", files).items():
        store.write(uri, data)
    from_s3 = prepared(spec_of("s3://unfreeze/sources/pets"))
    assert verify(store, from_s3["uri"]) == []
    assert from_s3["quarantined"] == 1
    assert prepared(spec_of(write_folder(tmp_path / "pets", files))) == from_s3


@pytest.mark.usefixtures("cluster")
def test_a_users_mistake_found_by_a_task_arrives_as_one() -> None:
    from ray_jobs.prepare_on_ray import on_ray

    def refuse(number: int) -> int:
        if number == 3:
            raise UserError(f"number {number} is wrong", "mend it")
        return number

    with pytest.raises(UserError) as caught:
        list(on_ray(refuse, range(5)))
    assert (caught.value.what, caught.value.way_out, type(caught.value)) == ("number 3 is wrong", "mend it", UserError)


@pytest.mark.usefixtures("cluster")
def test_the_map_takes_no_more_jobs_than_it_may_have_in_flight_and_survives_a_killed_worker(tmp_path: Path) -> None:
    from ray_jobs.prepare_on_ray import MIN_IN_FLIGHT, on_ray

    def die_once(number: int) -> int:
        import os

        mark = tmp_path / str(number)
        if number == 5 and not mark.exists():
            mark.touch()
            os._exit(1)
        return number

    taken: list[int] = []
    results = []
    for result in on_ray(die_once, (taken.append(number) or number for number in range(20))):  # type: ignore[func-returns-value]
        results.append(result)
        assert len(taken) - len(results) <= MIN_IN_FLIGHT
    assert sorted(results) == list(range(20))

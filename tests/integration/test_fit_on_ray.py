"""The fit and the evaluation on a real Ray cluster with a real S3 server."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load as from_safetensors

from infra.committed_folder import commit, verify
from infra.errors import UserError
from infra.object_store import S3ObjectStore, object_store
from ray_jobs import backbone, checkpoint, fit_on_ray
from ray_jobs.evaluate_on_ray import evaluate
from ray_jobs.fit import Rank, train
from ray_jobs.fit_on_ray import run_fit
from ray_jobs.fit_plan import plan_fit
from ray_jobs.spec import Spec
from ray_jobs.watch import Watch
from tasks.evidence import gather
from tasks.gate import judge
from tests.fit_worlds import FitWorld, make_world

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours to mend


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
def world(store: S3ObjectStore, s3_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FitWorld]:
    """A real two-CPU Ray on this machine, and a fit for two workers."""
    import ray

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFREEZE_CACHE_DIR", str(cache))
        variables = {**s3_server, "UNFREEZE_CACHE_DIR": str(cache), "PYTHONPATH": os.getcwd()}
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
        yield make_world(tmp_path_factory.mktemp("fit"), store, num_workers=2)
        ray.shutdown()


def seeded(world: FitWorld, seed: int) -> Spec:
    return world.spec.model_copy(update={"search": world.spec.search.model_copy(update={"seed": seed})})


def fitted(world: FitWorld, spec: Spec, told: list[tuple[float, float]] | None = None) -> dict[str, Any]:
    seen = [] if told is None else told
    return run_fit(spec, world.dataset, world.backbone, world.search, Watch(lambda done, total: seen.append((done, total))))


def weights_at(uri: str) -> dict[str, torch.Tensor]:
    return from_safetensors(object_store().read(f"{uri}/model.safetensors"))


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "seconds": 0, "curve": [{**row, "seconds": 0} for row in result["curve"]]}


def test_two_workers_train_what_is_not_frozen_and_the_result_is_kept(
    world: FitWorld, store: S3ObjectStore, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[float, float]] = []
    result = fitted(world, world.spec, told)
    assert capfd.readouterr().out == ""
    assert result["workers"] == 2
    assert result["epochs"] == 3 == len(result["curve"])
    assert told[-1] == (3, 3)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert verify(store, result["fit_model_uri"]) == verify(store, result["probe_model_uri"]) == []
    assert verify(store, result["checkpoint_uri"]) == []
    before, after = weights_at(result["probe_model_uri"]), weights_at(result["fit_model_uri"])
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    model = backbone.create(world.backbone["name"], image_size=32, num_classes=3, seed=0)
    assert moved & {name for name, _ in model.named_parameters()} == backbone.trainable_names(model, 1)
    assert fitted(world, world.spec) == result


def test_a_fit_that_falls_short_of_its_trial_is_made_once_more_without_augmentation(world: FitWorld, store: S3ObjectStore) -> None:
    """At a learning rate of next to nothing neither fit comes near to the trial."""
    spec, best = seeded(world, 5), {**world.search["best"], "lr": 1e-9, "accuracy": 1.0}
    said: list[str] = []
    told: list[float] = []
    watch = Watch(lambda done, total: told.append(done / total), said.append)
    result = run_fit(spec, world.dataset, world.backbone, {**world.search, "best": best}, watch)
    (line,) = said
    assert line.startswith("The fit with augmentation photo falls short of its trial in the search")
    assert (result["fits"], result["falls_short"]) == (2, True)
    assert "with augmentation none" in result["chosen_reason"]
    assert 0.5 in told
    assert told[-1] == 1.0
    plain = spec.model_copy(update={"fit": spec.fit.model_copy(update={"augmentation": "none"})})
    for one in (spec, plain):
        plan = plan_fit(one, world.dataset, world.backbone, {**world.search, "best": best})
        assert store.exists(f"{plan.fit_uri}/result.json")
    assert run_fit(spec, world.dataset, world.backbone, {**world.search, "best": best}, Watch()) == result


def test_a_fit_whose_worker_is_killed_equals_an_undisturbed_one(world: FitWorld, store: S3ObjectStore) -> None:
    """The same spec twice: once left alone, once with rank 1's process killed after the first checkpoint."""
    spec = seeded(world, 1)
    spec = spec.model_copy(update={"fit": spec.fit.model_copy(update={"max_epochs": 12, "patience": 12})})  # the kill is not too late
    undisturbed = fitted(world, spec)
    weights = weights_at(undisturbed["fit_model_uri"])
    for info in list(store.list(undisturbed["uri"])):
        store.delete([info.uri])
    killed: list[int] = []

    def kill_a_worker() -> None:
        root, deadline = f"{undisturbed['uri']}/checkpoints", time.monotonic() + 300
        while time.monotonic() < deadline and not checkpoint.epochs(store, root):
            time.sleep(0.02)
        ours = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in _title(child)]
        ours[-1].kill()
        killed.append(ours[-1].pid)

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    said: list[str] = []
    again = run_fit(spec, world.dataset, world.backbone, world.search, Watch(say=said.append))
    thread.join()
    assert killed
    assert any(line.startswith("The fit goes on after") for line in said)
    assert without_times(again) == without_times(undisturbed)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_at(again["fit_model_uri"]).items())


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return ""


class DyingBackend(_TorchBackend):
    """A worker dies while the group starts, once."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if not backend_config.died.exists():
            backend_config.died.touch()
            worker_group.execute_single(1, os._exit, 1)
        super().on_start(worker_group, backend_config)


@dataclass
class DyingConfig(TorchConfig):
    died: Path = Path("died")

    @property
    def backend_cls(self) -> type[DyingBackend]:
        return DyingBackend


def test_a_worker_that_dies_while_its_group_starts_is_started_again(
    world: FitWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray alone would try for ever: what had started of the group keeps the places that the next one waits for."""
    make, died = fit_on_ray._trainer, tmp_path / "died"

    def trainer(*args: Any) -> Any:
        made = make(*args)
        made.backend_config = DyingConfig(died=died)
        return made

    monkeypatch.setattr(fit_on_ray, "_trainer", trainer)
    assert fitted(world, seeded(world, 2))["epochs"] == 3
    assert died.exists()


def test_a_fit_waits_for_a_full_cluster_and_says_so(world: FitWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    taken = placement_group([{"CPU": 1}])
    assert taken.wait(30)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        remove_placement_group(taken)

    result = run_fit(seeded(world, 3), world.dataset, world.backbone, world.search, Watch(lambda done, total: None, say))
    assert result["epochs"] == 3
    assert "The fit goes on after epoch 0: the cluster has no room for its workers yet." in said


def test_one_worker_in_the_place_of_two_trains_the_same_model_but_for_rounding(
    world: FitWorld, store: S3ObjectStore, tmp_path: Path
) -> None:
    """By its losses: Adam makes whole steps of the rounding where a gradient is nothing else, as of a bias before batch norm."""
    two, plan = fitted(world, world.spec), world.plan(fit_uri="s3://unfreeze/fits/one-for-two")
    train(plan, Rank(0, 1, torch.device("cpu")), store=store, cache=tmp_path)
    one = json.loads(store.read(f"{plan.fit_uri}/result.json"))
    assert [row["train_loss"] for row in one["curve"]] == pytest.approx([row["train_loss"] for row in two["curve"]], rel=1e-3)
    assert [row["val_loss"] for row in one["curve"]] == pytest.approx([row["val_loss"] for row in two["curve"]], rel=1e-3)


def test_more_workers_than_the_cluster_has_are_refused_by_name(world: FitWorld) -> None:
    spec = world.spec.model_copy(update={"fit": world.spec.fit.model_copy(update={"num_workers": 3})})
    with pytest.raises(UserError, match="3 workers of 1 CPU each, but the cluster has 2 CPUs"):
        fitted(world, spec)


def test_models_are_judged_on_the_same_images_and_equal_ones_only_once(world: FitWorld, store: S3ObjectStore) -> None:
    fit = fitted(world, world.spec)
    models = {"challenger": fit["fit_model_uri"], "probe": fit["probe_model_uri"], "champion": fit["fit_model_uri"]}
    found = evaluate(world.dataset, models, world.spec.storage, lambda done, total: None)
    scores = found["evaluation"]
    assert scores["champion"] == scores["challenger"] != scores["probe"]
    assert scores["challenger"]["images"] == world.dataset["holdout"] == found["holdout"]["images"]
    assert set(scores["challenger"]["per_class"]) == set(world.dataset["classes"])
    table = pq.read_table(io.BytesIO(store.read(found["predictions"]["challenger"]))).to_pylist()
    assert sum(row["true"] == row["predicted"] for row in table) / len(table) == pytest.approx(scores["challenger"]["accuracy"])
    assert found["labels"]["probe"] == world.dataset["classes"]
    assert all(max(row["probabilities"]) == pytest.approx(row["probability"]) for row in table)
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in table)
    gathered = gather(world.spec, world.dataset, found, {"challenger": [world.dataset["uri"]]}, is_champion=False)
    assert (gathered.overlap, gathered.unchecked, gathered.holdout["judged"]) == ([], [], world.dataset["holdout"])
    judgement = judge(gathered.evidence, world.spec.promotion)
    assert judgement.challenger == judgement.champion == pytest.approx(scores["challenger"]["accuracy"])
    wrong = [row["sha256"] for row in table if row["true"] != row["predicted"]]
    assert {row["sha256"] for row in found["mistakes"]} <= set(wrong)
    assert len(found["mistakes"]) == min(24, len(wrong))
    assert verify(store, found["uri"]) == []
    assert evaluate(world.dataset, models, world.spec.storage, lambda done, total: None) == found


def test_a_champion_with_fewer_labels_is_wrong_on_the_class_it_does_not_know(world: FitWorld, store: S3ObjectStore) -> None:
    fit = fitted(world, world.spec)
    uri = "s3://unfreeze/models/old/1"
    files = {info.uri.rsplit("/", 1)[1]: store.read(info.uri) for info in store.list(fit["fit_model_uri"])}
    del files["MANIFEST.json"]
    files["labels.json"] = files["labels.json"].replace(b"red", b"crimson")
    commit(store, uri, files)
    found = evaluate(world.dataset, {"challenger": fit["fit_model_uri"], "champion": uri}, world.spec.storage, lambda done, total: None)
    champion, challenger = found["evaluation"]["champion"], found["evaluation"]["challenger"]
    assert champion["per_class"]["red"]["recall"] == 0.0
    assert champion["per_class"]["blue"]["recall"] == challenger["per_class"]["blue"]["recall"]


def test_a_model_that_was_altered_is_named_and_judged_by_nobody(world: FitWorld, store: S3ObjectStore) -> None:
    fit = fitted(world, world.spec)
    uri = "s3://unfreeze/models/altered/1"
    files = {info.uri.rsplit("/", 1)[1]: store.read(info.uri) for info in store.list(fit["fit_model_uri"])}
    del files["MANIFEST.json"]
    files["labels.json"] = files["labels.json"].replace(b"red", b"scarlet")
    commit(store, uri, files)
    store.write(f"{uri}/model.safetensors", files["model.safetensors"][:-1] + b"x")
    with pytest.raises(UserError, match=r"models/altered/1/model\.safetensors does not match its MANIFEST") as caught:
        evaluate(world.dataset, {"challenger": uri}, world.spec.storage, lambda done, total: None)
    assert f"unfreeze verify {uri}" in caught.value.way_out


def test_a_model_that_is_not_there_is_named(world: FitWorld) -> None:
    with pytest.raises(UserError, match="no committed model at s3://unfreeze/nowhere"):
        evaluate(world.dataset, {"challenger": "s3://unfreeze/nowhere"}, world.spec.storage, lambda done, total: None)

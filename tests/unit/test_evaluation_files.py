"""What the evaluation writes is what the evidence reads; here without Ray, whose tasks call the same function."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from infra.committed_folder import commit
from infra.errors import UserError
from ray_jobs import evaluate_on_ray
from ray_jobs.fit import train
from tasks.evidence import gather
from tasks.gate import judge
from tests.fakes import MemoryObjectStore
from tests.fit_worlds import FitWorld, make_world
from tests.unit.test_fit import ALONE

Evaluate = Callable[[dict[str, str]], dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FitWorld:
    return make_world(tmp_path_factory.mktemp("world"), MemoryObjectStore(), max_epochs=1)


@pytest.fixture(scope="module")
def models(world: FitWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    plan = world.plan(fit_uri="s3://unfreeze/fits/judged")
    train(plan, ALONE, store=world.store, cache=tmp_path_factory.mktemp("cache"))
    result = json.loads(world.store.read(f"{plan.fit_uri}/result.json"))
    return {"challenger": result["fit_model_uri"], "probe": result["probe_model_uri"], "champion": result["probe_model_uri"]}


@pytest.fixture
def evaluate(world: FitWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    def score(dataset: dict[str, Any], models: dict[str, Any], on_progress: Any) -> Any:
        uris = {digest: model.uri for digest, model in models.items()}
        return evaluate_on_ray._score_range(dataset["uri"], uris, 0, dataset["holdout"])

    monkeypatch.setattr(evaluate_on_ray, "object_store", lambda: world.store)
    monkeypatch.setattr(evaluate_on_ray, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(evaluate_on_ray, "_score", score)
    return lambda models: evaluate_on_ray.evaluate(world.dataset, models, world.spec.storage, lambda done, total: None)


def test_every_probability_is_kept_in_the_order_of_the_models_labels(world: FitWorld, models: dict[str, str], evaluate: Evaluate) -> None:
    found = evaluate(models)
    assert found["labels"] == dict.fromkeys(models, world.dataset["classes"])
    for uri in found["predictions"].values():
        for row in pq.read_table(io.BytesIO(world.store.read(uri))).to_pylist():
            assert max(row["probabilities"]) == pytest.approx(row["probability"])
            assert row["predicted"] == world.dataset["classes"][row["probabilities"].index(max(row["probabilities"]))]


def test_the_gate_judges_by_the_figures_of_the_evaluation(
    world: FitWorld, models: dict[str, str], evaluate: Evaluate, tmp_path: Path
) -> None:
    found = evaluate(models)
    lineages = {"challenger": [world.dataset["uri"]], "champion": [world.dataset["uri"]]}
    gathered = gather(world.spec, world.dataset, found, lineages, is_champion=False, store=world.store, cache=tmp_path)
    assert (gathered.overlap, gathered.unchecked) == ([], [])
    judgement = judge(gathered.evidence, world.spec.promotion)
    for role in ("challenger", "champion"):
        assert getattr(judgement, role) == pytest.approx(found["evaluation"][role]["accuracy"])


def test_a_model_that_was_altered_is_named_and_judged_by_nobody(world: FitWorld, models: dict[str, str], evaluate: Evaluate) -> None:
    uri = "s3://unfreeze/models/altered/1"
    files = {info.uri.rsplit("/", 1)[1]: world.store.read(info.uri) for info in world.store.list(models["challenger"])}
    del files["MANIFEST.json"]
    files["labels.json"] = files["labels.json"].replace(b"red", b"scarlet")
    commit(world.store, uri, files)
    world.store.write(f"{uri}/model.safetensors", files["model.safetensors"][:-1] + b"x")
    with pytest.raises(UserError, match=r"altered/1/model\.safetensors does not match its MANIFEST") as caught:
        evaluate({"challenger": uri})
    assert f"unfreeze verify {uri}" in caught.value.way_out

"""A model whose versions are judged by the real gate and settled by the real steps, without training any: their answers are drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException

from infra import registry
from infra.committed_folder import commit
from infra.object_store import join_uri, object_store
from infra.tracking import client
from ray_jobs.spec import Spec
from tasks import champion, judging, promotion
from tasks.gate import Evidence, Scores, judge, plain_judgement
from tasks.lineage import LINEAGE, manifest_digest, weights_digest

IMAGES, CLASSES = 400, ("cat", "dog")


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """The embedded MLflow server on loopback; its URL."""
    arguments = (f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri(), str(port))
    command = [sys.executable, "-m", "infra.mlflow_server", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(url):
            assert process.poll() is None, "MLflow ended"
            assert time.monotonic() < deadline, "MLflow does not answer"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def spec_of(name: str, storage: str, **rules: Any) -> Spec:
    """A spec with these rules of promotion."""
    content = {"name": name, "data": {"source": "x"}, "backbone": {"name": "resnet18"}, "storage": storage, "promotion": rules}
    return Spec.model_validate(content)


def register(spec: Spec, skill: float, seed: int, *, before_ledgers: bool = False) -> str:
    """A published and registered version that answers `skill` of the images right; its version. Written as a retraining does."""
    store = object_store()
    with suppress(MlflowException):  # it exists
        client().create_registered_model(spec.name)
    found = client().create_model_version(spec.name, "s3://nowhere/model", tags={"skill": str(skill), "seed": str(seed)})
    uri = join_uri(spec.storage, "models", spec.name, str(found.version))
    lineage = {"spec": spec.model_dump(mode="json"), "dataset": {}, "trained_on": [], "probe_uri": None, "code": "c0de"}
    kept = {} if before_ledgers else {LINEAGE: json.dumps(lineage).encode()}
    commit(store, uri, {"model.safetensors": f"{skill} {seed}".encode(), **kept})
    version = registry.ModelVersion(spec.name, str(found.version), {}, "")
    registry.set_tags(version, {"unfreeze.artifact_uri": uri})
    return version.version


def scores(name: str, version: str) -> Scores:
    """The drawn answers of a version: the same wherever they are asked for."""
    found = registry.get(name, version)
    assert found is not None
    rng = np.random.default_rng(zlib.crc32(f"{found.tags['skill']} {found.tags['seed']}".encode()))
    skill, true_N = float(found.tags["skill"]), truth()
    answer_N = np.where(rng.random(IMAGES) < skill, true_N, 1 - true_N)
    probabilities_NK = np.full((IMAGES, 2), 1 - skill)
    probabilities_NK[np.arange(IMAGES), answer_N] = skill
    return Scores(probabilities_NK)


def truth() -> Any:
    return np.arange(IMAGES) % 2


def verdict_on(spec: Spec, version: str, against: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """What `judge_version` says, from drawn answers; its evidence is really kept."""
    champions = scores(spec.name, against) if against and against != version else None
    evidence = Evidence(CLASSES, truth(), scores(spec.name, version), champions, is_champion=against == version)
    judgement = plain_judgement(judge(evidence, spec.promotion))
    store, uri = object_store(), join_uri(spec.storage, "models", spec.name, version)
    found = {"version": version, "champion_version": against, "judgement": judgement}
    evaluation_uri = join_uri(spec.storage, "evaluations", f"{version}-{against}")
    commit(store, evaluation_uri, {"evaluation.json": b"{}"})
    found["evaluation"] = {"uri": evaluation_uri, "digest": manifest_digest(store, evaluation_uri)}
    evidence_uri = judging.keep_evidence(store, spec, found)
    digests = {
        "data": "d", "weights": weights_digest(store, uri), "evidence": manifest_digest(store, evidence_uri), "request": asked["request"],
    }  # fmt: skip
    status = judging.status_of(spec, judgement, is_champion=evidence.is_champion)
    return found | {
        "status": status, "is_champion": evidence.is_champion, "evidence_uri": evidence_uri, "digests": digests, "asked": asked,
    }  # fmt: skip


def promote(spec: Spec, version: str, by: str = "ada", request: str | None = None) -> dict[str, Any]:
    """What the flows do with a version, judged anew for as long as another comes first."""
    asked = {"request": request or f"question {by} {version}", "by": by, "reason": ""}
    while True:
        against = champion.find_champion.fn(spec, asked["request"])["version"]  # type: ignore[attr-defined]
        settled = promotion.settle.fn(spec, verdict_on(spec, version, against, asked))  # type: ignore[attr-defined]
        if settled is not None:
            answer: dict[str, Any] = settled
            return answer


def environment(mlflow_url: str, home: Path, database: str | None) -> dict[str, str]:
    """The variables of a process of this world."""
    kept = {"MLFLOW_TRACKING_URI": mlflow_url, "UNFREEZE_HOME": str(home), "PATH": os.environ["PATH"]}
    return kept | ({"UNFREEZE_LEDGER_URL": database} if database else {})

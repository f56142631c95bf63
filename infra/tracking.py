"""The seam to MLflow's runs: whole, finished runs, each written once under an identity made of content.

A run is created, filled and ended in one go by one process, so none stays RUNNING for longer than that takes. What a
killed process left half-written is found by its identity, deleted and written again.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infra.addresses import shown
from infra.errors import ServiceError
from infra.in_threads import in_threads

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

IDENTITY_TAG = "unfreeze.identity"
WRITERS = 8
BATCH_METRICS = 1000


@dataclass(frozen=True)
class Metric:
    """One value of a metric at a step (an epoch), at a time in ms since 1970."""

    name: str
    value: float
    step: int = 0
    at_ms: int = 0


@dataclass(frozen=True)
class RunRecord:
    """A whole run: who it is, what it was given, what it measured, when."""

    identity: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, object]
    metrics: Sequence[Metric]
    started_ms: int
    ended_ms: int
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"
    files: Mapping[str, Path] = field(default_factory=dict)
    """Local files or folders by their artifact folder ("" is the root)."""


@cache
def client() -> MlflowClient:
    """This process's MLflow client, with bounded retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # its remarks on each registration are for notebooks
    uri = os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


@contextmanager
def translated() -> Iterator[None]:
    """Turn MLflow's errors into ours."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        where = shown(os.environ.get("MLFLOW_TRACKING_URI", ""))
        raise ServiceError(
            f"MLflow at {where} refused or did not answer: {_reason(error)}", "Check MLFLOW_TRACKING_URI and that the server is up."
        ) from error


def _reason(error: BaseException) -> str:
    """What the operating system said where it was that; else MLflow's own words, which wrap it in half a page."""
    root = error
    while cause := root.__cause__ or root.__context__:
        root = cause
    return str(root if isinstance(root, ConnectionError | TimeoutError | socket.gaierror) else error)


TRAINING_PAGE = {"mlflow.experimentKind": "custom_model_development"}
"""Without it MLflow's page opens an experiment on its GenAI side, where neither searches nor trials are seen."""


def experiment_id(name: str) -> str:
    """The id of the experiment `name`, created where missing."""
    from mlflow.exceptions import MlflowException

    with translated():
        found = client().get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(client().create_experiment(name, tags=TRAINING_PAGE))
        except MlflowException:  # another process was faster
            found = client().get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)


def write_run(experiment: str, record: RunRecord) -> str:
    """Write one run, or find it written; its run id."""
    with translated():
        kept = _keep_finished(experiment, f"tags.`{IDENTITY_TAG}` = '{record.identity}'")
        return kept.get(record.identity) or _write(experiment, record, parent=None)


def add_file(run_id: str, path: Path, *, as_name: str) -> None:
    """Put a file beside a run that is written already, in place of one of that name."""
    with translated(), tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / as_name
        shutil.copyfile(path, copy)
        client().log_artifact(run_id, str(copy))


def link(experiment: str, run_id: str, name: str) -> str:
    """Where MLflow's page shows a file beside a run."""
    return f"{shown(os.environ['MLFLOW_TRACKING_URI']).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}/artifacts/{name}"


def write_children(experiment: str, parent_run_id: str, records: Sequence[RunRecord]) -> None:
    """Write the child runs of a run, side by side; those already written are left alone."""
    with translated():
        kept = _keep_finished(experiment, f"tags.`mlflow.parentRunId` = '{parent_run_id}'")
        missing = [record for record in records if record.identity not in kept]
        for _ in in_threads(lambda record: _write(experiment, record, parent=parent_run_id), missing, WRITERS):
            pass


@dataclass(frozen=True)
class Unfinished:
    """A run of ours that MLflow takes for RUNNING: half-written, or being written at this moment."""

    run_id: str
    name: str
    experiment: str
    tags: Mapping[str, str]


def unfinished() -> Iterator[Unfinished]:
    """Every run of ours that is RUNNING."""
    with translated():
        for experiment in client().search_experiments():
            for run in _search(experiment.experiment_id, "attributes.status = 'RUNNING'"):
                if IDENTITY_TAG in run.data.tags:
                    yield Unfinished(run.info.run_id, run.info.run_name or "", experiment.name, run.data.tags)


def is_unfinished(run_id: str) -> bool:
    """Whether the run is there, and RUNNING."""
    with translated():
        found = client().get_run(run_id).info
    return str(found.status) == "RUNNING" and str(found.lifecycle_stage) == "active"


def delete(run_id: str) -> None:
    """Delete a run; MLflow keeps it for a while, so that it can be restored."""
    with translated():
        client().delete_run(run_id)


def past_trials(experiment_name: str, backbone: str) -> Iterator[tuple[dict[str, str], dict[str, float]]]:
    """Parameters and last metrics of every finished trial of an experiment with this backbone, newest first."""
    with translated():
        found = client().get_experiment_by_name(experiment_name)
        if found is None:
            return
        query = f"tags.`unfreeze.kind` = 'trial' and params.backbone = '{backbone}' and attributes.status = 'FINISHED'"
        for run in _search(str(found.experiment_id), query):
            yield run.data.params, run.data.metrics


def _keep_finished(experiment: str, query: str) -> dict[str, str]:
    """Run ids by identity of the ended runs that match; half-written ones are deleted."""
    kept: dict[str, str] = {}
    for run in _search(experiment, query):
        if run.info.status == "RUNNING":
            client().delete_run(run.info.run_id)
        else:
            kept[run.data.tags[IDENTITY_TAG]] = run.info.run_id
    return kept


def _search(experiment: str, query: str) -> Iterator[Run]:
    token: str | None = None
    while True:
        page = client().search_runs([experiment], query, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _write(experiment: str, record: RunRecord, *, parent: str | None) -> str:
    import mlflow.entities as entities

    tags = {**record.tags, IDENTITY_TAG: record.identity} | ({"mlflow.parentRunId": parent} if parent else {})
    run = client().create_run(experiment, start_time=record.started_ms, tags=tags, run_name=record.name)
    run_id: str = run.info.run_id
    metrics = [entities.Metric(m.name, m.value, m.at_ms or record.ended_ms, m.step) for m in record.metrics]
    params = [entities.Param(key, str(value)) for key, value in record.params.items()]
    client().log_batch(run_id, metrics=metrics[:BATCH_METRICS], params=params)
    for start in range(BATCH_METRICS, len(metrics), BATCH_METRICS):
        client().log_batch(run_id, metrics=metrics[start : start + BATCH_METRICS])
    for folder, path in record.files.items():
        if path.is_dir():
            client().log_artifacts(run_id, str(path), folder or None)
        else:
            client().log_artifact(run_id, str(path), folder or None)
    client().set_terminated(run_id, record.status, record.ended_ms)
    return run_id

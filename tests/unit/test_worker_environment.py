"""Secrets on the way to servers and workers: in private files and in each tool's own variables, never in what is shown."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from infra import ray_cluster, worker_environment
from infra.local_stack import _credentials_apart
from infra.settings import load

SECRET = "a secret nobody may see"


def test_a_worker_on_this_machine_gets_the_callers_variables_from_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    told = ray_cluster.runtime_environment("127.0.0.1:6379")
    assert SECRET not in repr(told)
    assert told == ray_cluster.runtime_environment("127.0.0.1:6379")  # else no command would find another's warm workers
    path = Path(told["env_vars"][worker_environment.PATH])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv(worker_environment.PATH, str(path))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    worker_environment.take()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert os.environ["UNFREEZE_CACHE_DIR"] == json.loads(path.read_text())["UNFREEZE_CACHE_DIR"]


def test_other_variables_are_another_file(tmp_path: Path) -> None:
    first, second = (worker_environment.keep(tmp_path, {"AWS_SECRET_ACCESS_KEY": secret}) for secret in ("a", "b"))
    assert first != second
    assert sorted(path.name for path in first.parent.iterdir()) == sorted({first.name, second.name})


def test_the_password_in_an_address_moves_to_the_tools_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:p%40ss@mlflow.example")
    monkeypatch.setenv("PREFECT_API_URL", "https://ada:p%40ss@prefect.example/api")
    assert _credentials_apart([], load()) == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example", "MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "p@ss",
        "PREFECT_API_URL": "https://prefect.example/api", "PREFECT_API_AUTH_STRING": "ada:p@ss",
    }  # fmt: skip
    assert _credentials_apart(["mlflow", "prefect"], load()) == {}

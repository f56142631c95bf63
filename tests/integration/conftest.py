"""The embedded MLflow server alone, for as long as one file of tests runs."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests import promotion_worlds as worlds


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with worlds.mlflow_server(tmp_path_factory.mktemp("mlflow"), port) as url:
        yield url

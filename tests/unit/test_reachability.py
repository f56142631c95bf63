"""A server of the team's own that nobody reaches is said at the start, not when a search of hours has ended."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from infra import reachability
from infra.errors import ServiceError
from infra.services import HOST


class Refuses(BaseHTTPRequestHandler):
    """Answers, though not what was asked for."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody listens on, and nobody else is given."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind((HOST, 0))
        yield int(kept.getsockname()[1])


def test_who_does_not_answer_is_named_with_its_address_and_variable(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "ANSWERS_WITHIN_S", 0.1)
    with pytest.raises(ServiceError, match=rf"^MLflow at http://{HOST}:{port} does not answer: .*refused") as raised:
        reachability.require_answers({"prefect": None, "mlflow": f"http://me:secret@{HOST}:{port}"})
    assert "MLFLOW_TRACKING_URI" in raised.value.way_out


def test_a_name_that_nobody_knows_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "ANSWERS_WITHIN_S", 0.1)
    with pytest.raises(ServiceError, match=r"^Prefect at http://no-such-host\.invalid/api does not answer"):
        reachability.require_answers({"prefect": "http://no-such-host.invalid/api"})


def test_who_answers_anything_answers_and_what_is_no_web_address_is_not_asked() -> None:
    with HTTPServer((HOST, 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        reachability.require_answers(
            {"mlflow": f"http://{HOST}:{server.server_port}", "prefect": f"http://{HOST}:{server.server_port}/api"}
        )
        server.shutdown()
        thread.join()
    reachability.require_answers({"mlflow": "sqlite:///mlflow.db"})


def test_who_comes_back_in_time_is_waited_for(port: int) -> None:
    back: list[HTTPServer] = []

    def come_back() -> None:
        time.sleep(0.5)
        back.append(HTTPServer((HOST, port), Refuses))
        back[0].serve_forever()

    thread = threading.Thread(target=come_back)
    thread.start()
    reachability.require_answers({"mlflow": f"http://{HOST}:{port}"})
    (server,) = back
    server.shutdown()
    server.server_close()
    thread.join()

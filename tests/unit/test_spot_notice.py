"""EC2's notice that a spot machine will be taken away, asked of a server that answers as EC2's metadata do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from infra import spot_notice

TOKEN = "a-token"


class Metadata(BaseHTTPRequestHandler):
    """Answers only who has asked for a token first."""

    announced = b""

    def do_PUT(self) -> None:
        is_asked = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._answer(200 if is_asked else 400, TOKEN.encode())

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            self._answer(401, b"")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.announced:
            self._answer(200, self.announced)
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Metadata, "announced", b"")
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_without_a_notice_there_is_none(metadata: str) -> None:
    assert spot_notice.notice(metadata) is None


def test_a_notice_says_when(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metadata, "announced", b'{"action": "terminate", "time": "2026-11-22T08:22:00Z"}')
    assert spot_notice.notice(metadata) == datetime(2026, 11, 22, 8, 22, tzinfo=UTC)


def test_ray_is_told_when_the_notice_comes_even_after_a_silence(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_notice, "RAY", "true")
    answers = iter([OSError("silent"), None, datetime(2026, 1, 1, tzinfo=UTC)])

    def notice(_url: str) -> datetime | None:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(spot_notice, "notice", notice)
    monkeypatch.setattr(spot_notice, "POLL_S", 0.0)
    assert spot_notice.watch(metadata) == 0
    assert next(answers, "told") == "told"


def test_what_ray_is_told_is_a_command_that_it_has() -> None:
    from ray.scripts.scripts import drain_node

    options = {option for parameter in drain_node.params for option in parameter.opts}
    command = spot_notice.drain_command(-3)
    assert {word for word in command if word.startswith("--")} <= options
    assert command[-1] == "0"
    assert command[2:4] == ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]

"""The webhook against a real HTTP server: signed, tried again, given up with words, and never with a secret in them."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.webhook import Patience, notify, signature

SECRET = "a secret nobody may see"
DECISION: dict[str, Any] = {"verdict": "promoted", "model": "emoji", "to": "3", "reason": "besser, für alle 🙂", "digest": "d" * 64}
QUICK = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=0.02)


@dataclass
class Receiver:
    """A webhook that answers with the next of `statuses`, the last for ever, and keeps what it got."""

    url: str = ""
    statuses: list[int] = field(default_factory=lambda: [200])
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    told = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            status = told.statuses.pop(0) if len(told.statuses) > 1 else told.statuses[0]
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}/hooks/token-in-the-path"
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_receiver_can_check_who_sent_a_decision_and_when(receiver: Receiver) -> None:
    assert notify(receiver.url, DECISION, SECRET, patience=QUICK, clock=lambda: 1_700_000_000.9) is None
    ((headers, body),) = receiver.got
    assert json.loads(body) == DECISION
    assert headers["X-Unfreeze-Timestamp"] == "1700000000"
    told = hmac.new(SECRET.encode(), b"1700000000." + body, hashlib.sha256).hexdigest()
    assert headers["X-Unfreeze-Signature"] == f"sha256={told}"
    assert headers["X-Unfreeze-Delivery"] == DECISION["digest"]
    assert headers["Content-Type"] == "application/json"


def test_without_a_secret_nothing_is_signed(receiver: Receiver) -> None:
    assert notify(receiver.url, DECISION, None, patience=QUICK) is None
    assert "X-Unfreeze-Signature" not in receiver.got[0][0]


@pytest.mark.parametrize("first", [[503], [429], [500, 502]])
def test_a_receiver_that_recovers_gets_the_decision_once_more_under_the_same_name(receiver: Receiver, first: list[int]) -> None:
    receiver.statuses = [*first, 204]
    assert notify(receiver.url, DECISION, SECRET, patience=QUICK) is None
    assert len(receiver.got) == len(first) + 1
    assert len({(headers["X-Unfreeze-Delivery"], body) for headers, body in receiver.got}) == 1


def test_a_decision_without_a_digest_is_named_by_its_content(receiver: Receiver) -> None:
    for reason in ("one", "one", "two"):
        assert notify(receiver.url, {"reason": reason}, None, patience=QUICK) is None
    first, again, other = (headers["X-Unfreeze-Delivery"] for headers, _ in receiver.got)
    assert first == again != other


def test_a_receiver_that_never_recovers_is_given_up_with_words(receiver: Receiver) -> None:
    receiver.statuses = [500]
    said = notify(receiver.url, DECISION, SECRET, patience=QUICK)
    assert said == f"The webhook at {receiver.url.split('/')[2]} answers 500 (Internal Server Error) (tried 4 times)."
    assert len(receiver.got) == 4


@pytest.mark.parametrize(("status", "words"), [(404, "answers 404 (Not Found)."), (307, "redirects are not followed.")])
def test_what_another_attempt_cannot_change_is_not_tried_again(receiver: Receiver, status: int, words: str) -> None:
    receiver.statuses = [status]
    said = notify(receiver.url, DECISION, SECRET, patience=QUICK)
    assert said is not None
    assert words in said
    assert len(receiver.got) == 1


def test_the_deadline_ends_the_attempts(receiver: Receiver) -> None:
    receiver.statuses = [503]
    assert notify(receiver.url, DECISION, None, patience=Patience(attempts=9, first_wait_s=60, longest_wait_s=60, deadline_s=1)) is not None
    assert len(receiver.got) == 1


def _closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/token-in-the-path"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (_closed_port, "cannot be reached (ConnectError) (tried 4 times)."),
        (lambda: "http://no-such-host.invalid/token-in-the-path", "cannot be reached (ConnectError)"),
        (lambda: "ftp://no-web/token-in-the-path", "cannot be reached (UnsupportedProtocol)."),
        (lambda: "http://a:b/token-in-the-path", "has an address that is none."),
    ],
)
def test_a_wrong_address_is_told_without_its_secrets(address: Callable[[], str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said = notify(address(), DECISION, SECRET, patience=QUICK)
    assert said is not None
    assert words in said
    assert "token" not in said
    assert SECRET not in said


@given(st.binary(), st.text(min_size=1), st.integers(0, 2**40))
def test_the_signature_depends_on_every_part(content: bytes, secret: str, seconds: int) -> None:
    mine = signature(secret, str(seconds), content)
    others = [signature(secret + "x", str(seconds), content), signature(secret, str(seconds + 1), content)]
    assert mine not in [*others, signature(secret, str(seconds), content + b"x")]

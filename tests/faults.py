"""Faults by construction: an HTTP proxy in front of a real S3 server that fails as it is told to, a disk that can be full, a clock
that jumps. Nothing is random, each fault says how often it happens."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["status", "slow", "truncate", "lose_answer", "alter_upload", "alter_download", "hang_up"]
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
TICK_S = 0.05


@dataclass(frozen=True)
class Asked:
    """One request that came in."""

    method: str
    path: str

    @property
    def is_write(self) -> bool:
        return self.method in {"PUT", "POST", "DELETE"}


Matches = Callable[[Asked], bool]


@dataclass
class Fault:
    """What goes wrong with requests that match, `times` times, and no longer than `until` where that is set."""

    kind: Kind
    matches: Matches
    times: float = 1
    value: float = 0
    code: str = ""
    until: float | None = None

    def applies(self, asked: Asked) -> bool:
        return self.times > 0 and (self.until is None or time.monotonic() < self.until) and self.matches(asked)


def anything(asked: Asked) -> bool:
    return True


def writes(asked: Asked) -> bool:
    return asked.is_write


def reads(asked: Asked) -> bool:
    return asked.method == "GET"


class FaultProxy:
    """Forwards everything to `upstream` until told otherwise; `asked` is every request that came in, in order."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (str(parts.hostname), int(parts.port or 80))
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.hit = 0
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self._listen(0)
        self.port = self._address()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def answer(self, status: int, code: str = "", *, times: float = 1, seconds: float | None = None, when: Matches = anything) -> None:
        """Answer with this status and S3 error code instead of asking the server."""
        until = None if seconds is None else time.monotonic() + seconds
        self.faults.append(Fault("status", when, float("inf") if seconds is not None else times, status, code, until))

    def slow(self, bytes_per_s: float, *, times: float = 1, when: Matches = anything) -> None:
        """Send answers at this speed."""
        self.faults.append(Fault("slow", when, times, bytes_per_s))

    def truncate(self, after_bytes: int, *, times: float = 1, when: Matches = reads) -> None:
        """Hang up when so many bytes of an answer were sent; its header promises all of them."""
        self.faults.append(Fault("truncate", when, times, after_bytes))

    def lose_answer(self, *, times: float = 1, when: Matches = writes) -> None:
        """Hang up after the server did what it was asked, before a byte of its answer is sent."""
        self.faults.append(Fault("lose_answer", when, times))

    def hang_up(self, *, times: float = 1, when: Matches = anything) -> None:
        """Hang up before the server is asked."""
        self.faults.append(Fault("hang_up", when, times))

    def alter_uploads(self, *, times: float = 1, when: Matches = writes) -> None:
        """Change the first byte of what is sent to the server."""
        self.faults.append(Fault("alter_upload", when, times))

    def alter_downloads(self, *, times: float = 1, when: Matches = reads) -> None:
        """Change the last byte of what the server sends."""
        self.faults.append(Fault("alter_download", when, times))

    def refuse(self) -> None:
        """Refuse connections, and cut those that are open, until `accept`."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def accept(self) -> None:
        """Listen again, at the same address."""
        self._listen(self.port)

    def have(self) -> None:
        """Listen again where it does not."""
        if self._server is None:
            self.accept()

    def refuse_for(self, seconds: float) -> threading.Timer:
        """Refuse connections from now on for so long."""
        self.refuse()
        timer = threading.Timer(seconds, self.accept)
        timer.start()
        return timer

    def clear(self) -> None:
        """From here on nothing fails."""
        self.faults.clear()

    def fault_for(self, asked: Asked) -> Fault | None:
        """The fault that this request meets; counted."""
        with self._lock:
            self.asked.append(asked)
            fault = next((fault for fault in self.faults if fault.applies(asked)), None)
            if fault:
                fault.times -= 1
                self.hit += 1
            return fault

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _address(self) -> tuple[str, int]:
        assert self._server
        return "127.0.0.1", self._server.server_port

    def _listen(self, port: int) -> None:
        proxy = self

        class Handler(_Handler):
            control = proxy

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hung up is no news."""

        self._server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(TICK_S,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    """One connection from a client, and one to the server."""

    control: FaultProxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.control.opened(self.connection)
        self.server_side = http.client.HTTPConnection(*self.control.upstream, timeout=60)

    def finish(self) -> None:
        self.control.closed(self.connection)
        self.server_side.close()
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def forward(self) -> None:
        asked = Asked(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.control.fault_for(asked)
        kind = fault.kind if fault else None
        if kind == "hang_up":
            self._hang_up()
        elif fault and kind == "status":
            self._answer(int(fault.value), [("Content-Type", "application/xml")], _error(fault.code, int(fault.value)), fault=None)
        else:
            if kind == "alter_upload":
                body = _altered(body)
            answer = self._ask(body)
            if kind == "lose_answer":
                self._hang_up()
            else:
                data = (
                    _altered(answer[2][::-1])[::-1] if kind == "alter_download" else answer[2]
                )  # not the byte that an altered upload changed
                self._answer(answer[0], answer[1], data, fault=fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        self.server_side.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"connection", "expect", "transfer-encoding"}:
                self.server_side.putheader(name, value)  # Host among them, since it is signed
        self.server_side.endheaders(body or None)
        answer = self.server_side.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, fault: Fault | None) -> None:
        promised = next((value for name, value in headers if name.lower() == "content-length"), None)
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", promised if self.command == "HEAD" and promised else str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind == "truncate":
            self.wfile.write(body[: int(fault.value)])
            self._hang_up()
        elif fault and fault.kind == "slow":
            step = max(1, int(fault.value * TICK_S))
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(TICK_S)
        else:
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def _altered(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:] if body else body


def _error(code: str, status: int) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code or status}</Code><Message>told so</Message></Error>'.encode()


@contextmanager
def proxied(upstream: str) -> Iterator[FaultProxy]:
    """A proxy in front of the server at `upstream`, gone afterwards."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.refuse()


class SmallDisk:
    """A folder that is a file system of its own where root may make one, so that it can be full; `missing` says why it is none."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder, self.size_bytes, self.missing = folder, size_bytes, ""

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True)
        try:
            command = ["mount", "-t", "tmpfs", "-o", f"size={self.size_bytes},mode=0700", "unfreeze", str(self.folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            self.missing = done.stderr.strip()
        except OSError as error:
            self.missing = str(error)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.missing:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False, capture_output=True)

    def fill(self, room_bytes: int = 0) -> None:
        """Leave no byte free, or about so many: then what is written is cut off amid a file."""
        assert not self.missing, "this would fill the machine's own disk"
        with (self.folder / "filler").open("wb", buffering=0) as filler:
            for size in (2**20, 2**12):
                with suppress(OSError):
                    while True:
                        filler.write(bytes(size))
            filler.truncate(max(0, filler.tell() - room_bytes))

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


class JumpingClock:
    """The time of day of Python processes started with `environment` (tests/jumping_clock.c); `missing` says why it cannot be had."""

    def __init__(self, folder: Path) -> None:
        self._file, library, source = folder / "clock", folder / "clock.so", Path(__file__).with_name("jumping_clock.c")
        try:
            command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
            self.missing = subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()
        except OSError as error:
            self.missing = str(error)
        self.environment = {"LD_PRELOAD": str(library), "JUMPING_CLOCK": str(self._file)}
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """So far from the true time from now on."""
        aside = self._file.with_suffix(".new")
        aside.write_text(f"{seconds}\n")
        os.replace(aside, self._file)

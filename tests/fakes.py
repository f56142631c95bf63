"""Fakes beside the seams of infra/: they pass the same contract suites as the real things."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import md5
from pathlib import Path

from infra.object_store import ObjectInfo, split_uri


class MemoryObjectStore:
    """An object store in a dict; counts writes, and can be told to fail before one of them."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.modified_at: dict[str, float] = {}
        self.writes = 0
        self.one_at_a_time = threading.Lock()
        self.before_write: Callable[[str], None] = lambda uri: None

    def read(self, uri: str) -> bytes:
        try:
            return self.objects[uri]
        except KeyError:
            raise FileNotFoundError(uri) from None

    def write(self, uri: str, data: bytes) -> None:
        split_uri(uri)
        self.before_write(uri)
        self.writes += 1
        self.objects[uri] = data
        self.modified_at[uri] = time.time()

    def write_if_absent(self, uri: str, data: bytes) -> bool:
        with self.one_at_a_time:
            if uri in self.objects:
                return False
            self.write(uri, data)
            return True

    def download(self, uri: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.read(uri))

    def upload(self, path: Path, uri: str) -> None:
        self.write(uri, path.read_bytes())

    def exists(self, uri: str) -> bool:
        return uri in self.objects

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        folder = prefix_uri.rstrip("/") + "/"
        for uri, data in sorted(self.objects.items()):
            if uri.startswith(folder):
                yield ObjectInfo(uri, len(data), md5(data, usedforsecurity=False).hexdigest(), self.modified_at.get(uri, 0.0))

    def folders(self, start_uri: str) -> Iterator[str]:
        inside = (uri[len(start_uri) :] for uri in sorted(self.objects) if uri.startswith(start_uri))
        yield from dict.fromkeys(start_uri + rest.partition("/")[0] for rest in inside if "/" in rest)

    def delete(self, uris: Iterable[str]) -> None:
        for uri in uris:
            self.objects.pop(uri, None)

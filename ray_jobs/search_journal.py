"""The state of a running search on S3, written at every decision: a folder of segments, each the events since the one before.

A segment is one small object of JSON lines, written whole, so that a reader sees all of it or nothing. Writing happens in a thread
and takes what has come together meanwhile (group commit): a search of a thousand trials does not wait for the store. A segment
that cannot be written is tried again with the next; the search itself goes on, it would only have more to redo after a crash.
Events are numbered: one that was written twice counts once, and after a segment that a dying store cut off only what was written
anew counts.

The folder lies beside the search's own, and goes once that is committed. Crash order: results, manifest, then this is deleted.
"""

from __future__ import annotations

import json
import queue
import threading
import uuid
from typing import Any

from infra.errors import UnfreezeError
from infra.in_threads import in_threads
from infra.object_store import ObjectStore, join_uri

READERS = 8
STOP = None


class Journal:
    """The events of one search; `append` never blocks on the store."""

    def __init__(self, store: ObjectStore, uri: str) -> None:
        self.store, self.uri = store, uri
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._writer = uuid.uuid4().hex[:8]
        self._segment, self._events = 0, 0
        self._thread = threading.Thread(target=self._write_segments, name="search journal", daemon=True)

    def load(self) -> list[dict[str, Any]]:
        """Every event so far, in order; new ones will come after them."""
        uris = sorted(info.uri for info in self.store.list(self.uri) if info.uri.endswith(".jsonl"))
        texts = list(in_threads(self.store.read, uris, READERS))
        self._segment = int(uris[-1].rpartition("/")[2][:8]) if uris else 0
        found = [event for text in texts for event in _readable(text)]
        events: list[dict[str, Any]] = []
        for event in found:
            if event.pop("number", len(events)) == len(events):
                events.append(event)
        self._events = len(events)
        return events

    def start(self) -> None:
        self._thread.start()

    def append(self, event: dict[str, Any]) -> None:
        self._queue.put({**event, "number": self._events})
        self._events += 1

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(STOP)
        self._thread.join()

    def delete(self) -> None:
        self.store.delete([info.uri for info in self.store.list(self.uri)])

    def _write_segments(self) -> None:
        waiting: list[dict[str, Any]] = []
        going = True
        while going:
            event = self._queue.get()
            while event is not STOP:
                waiting.append(event)
                try:
                    event = self._queue.get_nowait()
                except queue.Empty:
                    break
            going = event is not STOP
            if waiting and self._wrote(waiting):
                waiting = []

    def _wrote(self, events: list[dict[str, Any]]) -> bool:
        self._segment += 1
        text = "".join(json.dumps(event) + "\n" for event in events)
        try:
            self.store.write(join_uri(self.uri, f"{self._segment:08d}-{self._writer}.jsonl"), text.encode())
        except (UnfreezeError, OSError):
            return False
        return True


def _readable(text: bytes) -> list[dict[str, Any]]:
    """The events of one segment, up to where it was cut off."""
    events = []
    for line in text.decode(errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events

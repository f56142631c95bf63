"""The objects through which a job and its caller speak, in one folder of the object store: request, progress, outcome. All small JSON.

The request is written before the job is submitted, the outcome as the job's last act; whoever has read the outcome deletes all three.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass, field
from typing import Any

from infra import errors
from infra.errors import UnfreezeError
from infra.object_store import ObjectStore, join_uri

REQUEST, PROGRESS, OUTCOME = "request.json", "progress.json", "outcome.json"
Plain = dict[str, Any]


class JobError(RuntimeError):
    """A bug of ours, met inside a job: with the traceback from there."""


@dataclass(frozen=True)
class Progress:
    """How far a job is, and every line it has said so far."""

    done: float = 0.0
    total: float = 0.0
    said: list[str] = field(default_factory=list)
    waits_for: str = ""
    waited_s: float = 0.0


@dataclass(frozen=True)
class JobObjects:
    """The objects of one job."""

    store: ObjectStore
    uri: str

    def ask(self, entry: str, arguments: Plain) -> None:
        """Write the request, where nothing of an older job of this name is left that could be taken for an answer."""
        self.store.delete([self._at(PROGRESS), self._at(OUTCOME)])
        self._write(REQUEST, {"entry": entry, "arguments": arguments})

    def request(self) -> tuple[str, Plain]:
        """The function to call, as module:name, and its arguments."""
        found = json.loads(self.store.read(self._at(REQUEST)))
        return found["entry"], found["arguments"]

    def tell(self, progress: Progress) -> None:
        """Write how far the job is."""
        self._write(PROGRESS, vars(progress))

    def told(self) -> Progress:
        """What the job told last."""
        found = self._read(PROGRESS)
        return Progress(**found) if found else Progress()

    def succeed(self, result: Plain, said: list[str], used: Plain) -> None:
        """Write the result, and what it cost."""
        self._write(OUTCOME, {"result": result, "said": said, "used": used})

    def fail(self, error: Exception, said: list[str]) -> None:
        """Write the error, ours as itself."""
        self._write(OUTCOME, {"error": _described(error), "said": said})

    def outcome(self) -> Plain | None:
        """{"result" and "used" or "error", "said"}; None where the job has not ended by itself, or the outcome was taken already."""
        return self._read(OUTCOME)

    def delete(self) -> None:
        """Everything; the outcome last, so that a caller that is killed here leaves one that can still be taken."""
        self.store.delete(self._at(name) for name in (REQUEST, PROGRESS, OUTCOME))

    def _at(self, name: str) -> str:
        return join_uri(self.uri, name)

    def _write(self, name: str, content: Plain) -> None:
        self.store.write(self._at(name), json.dumps(content).encode())

    def _read(self, name: str) -> Plain | None:
        try:
            return dict(json.loads(self.store.read(self._at(name))))
        except FileNotFoundError:
            return None


def _described(error: Exception) -> Plain:
    if isinstance(error, UnfreezeError):
        return {"kind": type(error).__name__, "what": error.what, "way_out": error.way_out}
    return {"kind": None, "what": "".join(traceback.format_exception(error))}


def error_of(described: Plain) -> Exception:
    """The error that a job met, to be raised by its caller."""
    kind = getattr(errors, described["kind"] or "", None)
    if kind is None:
        return JobError(described["what"])
    found: UnfreezeError = kind(described["what"], described["way_out"])
    return found

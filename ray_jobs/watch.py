"""How a step's work on Ray is called, and how it tells what it does, in whichever process it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[..., dict[str, Any]]
"""Called with a Watch and plain values by keyword, gives plain values: it can run in this process or in a job on any cluster."""


def _nothing(*_told: Any) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class Watch:
    """Whom the work tells how far it is (done, total), what a person should read, and what it waits for (and for how many seconds)."""

    on_progress: Callable[[float, float], None] = _nothing
    say: Callable[[str], None] = _nothing
    waits: Callable[[str, float], None] = _nothing

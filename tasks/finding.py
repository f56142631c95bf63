"""One thing that the doctor looked at, as a value; and mending: all findings are said first, then each is mended by itself.

A mend looks again before it does anything, since what was found may have changed, and returns what became of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape

from infra import progress
from infra.errors import UnfreezeError

LOOKS, PAUSE_S = 7, 10.0
"""A minute, which is six heartbeats of a flow run."""


@dataclass(frozen=True)
class Finding:
    """`ok`, a `note`, or `wrong` with what to do about it; `mend` does it, where a command can, and says what it did."""

    what: str
    state: Literal["ok", "note", "wrong"]
    words: str
    fix: str | None = None
    mend: Callable[[], str] | None = None


def plain(finding: Finding, outcome: str | None = None, *, fixed: bool = False) -> dict[str, Any]:
    """A finding as `doctor --json` prints it; `outcome` says what mending it came to."""
    known = {"what": finding.what, "state": finding.state, "words": finding.words, "fix": finding.fix}
    return known | {"fixable": finding.mend is not None, "fixed": fixed, "outcome": outcome}


def mend_all(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Say what would be done, then do it, one finding at a time; one that cannot be mended does not keep the others from it."""
    fixable = [finding for finding in findings if finding.mend is not None]
    progress.say(f"{len(fixable)} of {len(findings)} findings can be mended" + (":" if fixable else "."))
    for number, finding in enumerate(fixable, 1):
        progress.say(escape(f"  {number}. {finding.what}: {finding.words}\n     → {finding.fix}"))
    rows = []
    for finding in findings:
        if finding.mend is None:
            rows.append(plain(finding))
            continue
        outcome, fixed = _mended(finding.mend)
        progress.say(escape(f"{fixable.index(finding) + 1}/{len(fixable)} {finding.what}: {outcome}"))
        rows.append(plain(finding, outcome, fixed=fixed))
    return rows


def lasts(is_so: Callable[[], bool], *, looks: int = LOOKS, pause_s: float = PAUSE_S) -> bool:
    """Whether something stays so while it is looked at for a minute.

    Counted in looks and not by clocks: a laptop that slept, or a service that was away, has looked once.
    """
    for look in range(looks):
        if look:
            time.sleep(pause_s)
        if not is_so():
            return False
    return True


def _mended(mend: Callable[[], str]) -> tuple[str, bool]:
    try:
        return mend(), True
    except UnfreezeError as error:
        return f"not mended: {error}", False

"""How an attempt of a fit ends, and what to do then: go on or give up. Pure: facts in, a decision with its reason out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

RESTARTS = 2
"""How many attempts may fail, when a worker or its process dies; each carries on from the last checkpoint."""

DONE: Final = "done"
CALLED_AWAY: Final = "called away"
ROOM: Final = "room"
End = Literal["done", "called away", "room"]
"""How the workers of an attempt end by themselves: with the result; with a checkpoint, because a machine of theirs is about to be
taken away; with a checkpoint, because there is room for more of them."""


@dataclass(frozen=True)
class Outcome:
    """What is known of an attempt that has ended."""

    end: End | None = None
    """None: it failed."""
    is_mistake: bool = False
    """A UserError: the same again would end the same."""
    had_no_room: bool = False
    """The cluster was too full for its workers for so long that Ray gave up."""
    was_preempted: bool = False
    """Ray says that a machine was taken away which it had been told would be."""
    machines_gone: int = 0
    """Of those that were there when it began, how many are gone, or about to be."""
    progressed: bool = False
    """There is a later checkpoint than when it began."""


@dataclass(frozen=True)
class Decision:
    """Whether there is another attempt, and whether the last one counts as a failure."""

    again: bool
    is_failure: bool
    reason: str


def after(outcome: Outcome, failures: int) -> Decision:
    """What to do after an attempt, where `failures` attempts failed before it.

    A machine that went without a word was a spot machine as likely as not, so that is no failure either. But a fit that itself kills
    each machine it runs on would go on for ever: such an attempt must have got further.
    """
    if outcome.end == DONE:
        return Decision(again=False, is_failure=False, reason="it is done")
    if outcome.end == ROOM:
        return Decision(again=True, is_failure=False, reason="there is room for more workers")
    if outcome.end == CALLED_AWAY:
        return Decision(again=True, is_failure=False, reason="a machine is about to be taken away")
    if outcome.is_mistake:
        return Decision(again=False, is_failure=True, reason="the same again would end the same")
    if outcome.had_no_room:
        return Decision(again=True, is_failure=False, reason="the cluster has no room for its workers yet")
    if outcome.was_preempted or (outcome.machines_gone and outcome.progressed):
        return Decision(again=True, is_failure=False, reason="a machine was taken away")
    what = "a machine is gone" if outcome.machines_gone else "a worker failed"
    if failures < RESTARTS:
        return Decision(again=True, is_failure=True, reason=f"{what} (restart {failures + 1} of {RESTARTS})")
    return Decision(again=False, is_failure=True, reason=f"{what}, and there were {failures} restarts")

"""How long a service may stay away: try again with growing, jittered waits until a deadline, and tell the person once.

A wait ends at once where the work it belongs to was given up (`in_threads`), and on the main thread at Ctrl-C.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from infra import progress

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0
SAID_AFTER_S = 5.0
LOOKS_UP_EVERY_S = 0.1

T = TypeVar("T")

_limit_s: ContextVar[float | None] = ContextVar("limit_s", default=None)
_given_up: ContextVar[tuple[threading.Event, ...]] = ContextVar("given_up", default=())


class GaveUp(Exception):  # noqa: N818 - its name is what happened
    """The deadline passed; the last failure is the cause."""

    def __init__(self, attempts: int, seconds: float) -> None:
        super().__init__(attempts, seconds)
        self.attempts = attempts
        self.seconds = seconds


class Abandoned(Exception):  # noqa: N818 - its name is what happened
    """Nobody waits for this work any more."""


@dataclass
class Notice:
    """One line for a whole outage of one service, however many threads wait for it."""

    service: str
    after_s: float = SAID_AFTER_S
    said: bool = False

    def __post_init__(self) -> None:
        self._one_at_a_time = threading.Lock()

    def waiting(self, seconds: float, why: BaseException | None, deadline_s: float) -> None:
        """Called before each wait."""
        with self._one_at_a_time:
            if self.said or seconds < self.after_s:
                return
            self.said = True
        progress.say(f"Waiting for {self.service}, up to {deadline_s:.0f} s: {why}")

    def answered(self) -> None:
        """Called after each answer."""
        if not self.said:
            return
        with self._one_at_a_time:
            if not self.said:
                return
            self.said = False
        progress.say(f"{self.service} answers again.")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within the body no service is waited for longer than this: for what is tried again soon anyway, or not worth a wait."""
    outer = _limit_s.get()
    token = _limit_s.set(seconds if outer is None else min(seconds, outer))
    try:
        yield
    finally:
        _limit_s.reset(token)


@contextmanager
def until(given_up: threading.Event) -> Iterator[None]:
    """Within the body every wait ends when the event is set, with `Abandoned`."""
    token = _given_up.set((*_given_up.get(), given_up))
    try:
        yield
    finally:
        _given_up.reset(token)


def keep_trying(attempt: Callable[[], T], *, passes_by: Callable[[BaseException], bool], deadline_s: float, notice: Notice) -> T:
    """What `attempt` returns. A failure that passes by is tried again until the deadline, then raises GaveUp; others are raised at once."""
    limit_s = min(deadline_s, _limit_s.get() or deadline_s)

    def before_wait(state: RetryCallState) -> None:
        notice.waiting(state.seconds_since_start or 0.0, state.outcome.exception() if state.outcome else None, limit_s)

    def give_up(state: RetryCallState) -> T:
        raise GaveUp(state.attempt_number, state.seconds_since_start or 0.0) from (state.outcome.exception() if state.outcome else None)

    retrying = Retrying(
        retry=retry_if_exception(passes_by),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        stop=stop_after_delay(limit_s),
        sleep=_wait,
        before_sleep=before_wait,
        retry_error_callback=give_up,
    )
    answer = retrying(attempt)
    notice.answered()
    return answer


def _wait(seconds: float) -> None:
    ends_at = time.monotonic() + seconds
    while (left_s := ends_at - time.monotonic()) > 0:
        if any(event.is_set() for event in _given_up.get()):
            raise Abandoned
        time.sleep(min(left_s, LOOKS_UP_EVERY_S))

"""Work in a few threads: the order of the items, the first error, and waits that nobody waits for."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import patience
from infra.in_threads import in_threads


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_what_is_made_comes_in_the_order_of_the_items(items: list[int], threads: int) -> None:
    assert list(in_threads(lambda item: item * 2, items, threads)) == [item * 2 for item in items]


def test_no_more_threads_work_at_once_than_were_asked_for() -> None:
    working, most, counting = 0, 0, threading.Lock()
    meet = threading.Barrier(3)

    def work(item: int) -> None:
        nonlocal working, most
        with counting:
            working += 1
            most = max(most, working)
        meet.wait()
        with counting:
            working -= 1

    list(in_threads(work, range(9), 3))
    assert most == 3


def test_after_an_error_nothing_new_is_begun_and_what_is_under_way_has_ended() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise KeyError(item)
        ended.append(item)

    with pytest.raises(KeyError):
        list(in_threads(work, range(1000), 2))
    assert len(begun) < 1000
    assert len(ended) == len(begun) - 1


def test_a_wait_that_was_given_up_never_hides_why() -> None:
    """The first item waits for a service, the second one fails for another reason: that reason is what is raised."""
    waiting = threading.Event()

    def never() -> None:
        waiting.set()
        raise TimeoutError

    def work(item: int) -> None:
        if item == 1:
            waiting.wait()
            raise KeyError(item)
        patience.keep_trying(never, passes_by=lambda error: True, deadline_s=3600, notice=patience.Notice("it", after_s=3600))

    with pytest.raises(KeyError):
        list(in_threads(work, range(2), 2))


def test_the_limit_of_the_caller_holds_in_its_threads() -> None:
    def fail() -> None:
        raise TimeoutError

    def work(item: int) -> None:
        patience.keep_trying(fail, passes_by=lambda error: True, deadline_s=3600, notice=patience.Notice("it", after_s=3600))

    with pytest.raises(patience.GaveUp), patience.at_most(0.01):
        list(in_threads(work, range(3), 2))

"""What follows when an attempt of a fit has ended: what counts as a failure, and when there is no further attempt."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.fit_attempts import CALLED_AWAY, DONE, RESTARTS, ROOM, End, Outcome, after

FAILED = st.builds(
    Outcome, end=st.none(), is_mistake=st.booleans(), was_preempted=st.booleans(), machines_gone=st.integers(0, 3), progressed=st.booleans()
)


def ends(outcomes: list[Outcome]) -> int:
    """How many attempts there are, when they end like this."""
    failures = 0
    for number, outcome in enumerate(outcomes, 1):
        decision = after(outcome, failures)
        failures += decision.is_failure
        if not decision.again:
            return number
    return len(outcomes)


@pytest.mark.parametrize("end", [CALLED_AWAY, ROOM])
def test_an_attempt_that_is_called_away_or_grows_is_never_a_failure(end: End) -> None:
    assert ends([Outcome(end=end)] * 50) == 50
    assert not after(Outcome(end=end), RESTARTS).is_failure


def test_an_attempt_that_is_done_is_the_last() -> None:
    assert not after(Outcome(end=DONE), 0).again


def test_a_full_cluster_is_waited_for() -> None:
    assert ends([Outcome(had_no_room=True)] * 50) == 50


def test_a_mistake_of_the_users_is_not_tried_again() -> None:
    assert ends([Outcome(is_mistake=True)] * 5) == 1


def test_a_worker_that_fails_is_started_again_so_often_and_no_more() -> None:
    assert ends([Outcome(progressed=True)] * 9) == RESTARTS + 1


def test_a_machine_that_goes_without_a_word_is_no_failure_where_the_fit_got_further() -> None:
    assert ends([Outcome(machines_gone=1, progressed=True)] * 50) == 50
    assert ends([Outcome(machines_gone=1)] * 50) == RESTARTS + 1


@given(st.lists(FAILED.filter(lambda outcome: not outcome.was_preempted), min_size=RESTARTS + 1, max_size=12))
def test_a_fit_that_gets_no_further_and_is_not_called_away_ends(outcomes: list[Outcome]) -> None:
    stuck = [Outcome(is_mistake=outcome.is_mistake, machines_gone=outcome.machines_gone) for outcome in outcomes]
    assert ends(stuck) <= RESTARTS + 1


@given(st.lists(FAILED, max_size=6), st.integers(0, 5))
def test_being_called_away_in_between_changes_nothing_about_the_failures(outcomes: list[Outcome], calls: int) -> None:
    between = list(itertools.chain.from_iterable([*[Outcome(end=CALLED_AWAY)] * calls, outcome] for outcome in outcomes))
    assert ends(between) == ends(outcomes) * (calls + 1)


@given(FAILED, st.integers(0, RESTARTS))
def test_every_decision_has_a_reason(outcome: Outcome, failures: int) -> None:
    decision = after(outcome, failures)
    assert decision.reason
    assert decision.again or decision.is_failure


def test_a_worker_that_does_not_answer_says_nothing_of_why_and_one_that_died_does() -> None:
    """Ray says the first of a machine that is gone long before it says that; its peers then only tell that they lost it."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    from ray_jobs.fit_on_ray import _says_why

    def failed(*causes: Exception) -> Exception:
        error = Exception("the fit failed")
        error.worker_failures = dict(enumerate(causes))  # type: ignore[attr-defined]
        return error

    lost, silent, dead = RuntimeError("connection closed by peer"), ActorUnavailableError("no answer", None), ActorDiedError()
    assert not _says_why(failed(silent), 2)
    assert not _says_why(failed(lost, silent), 2)
    assert _says_why(failed(dead), 2)
    assert _says_why(failed(lost, dead), 2)

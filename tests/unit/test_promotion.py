"""The decision is a pure function with an answer for every case."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.promotion_spec import PromotionSpec
from tasks.promotion import decide

share = st.floats(0, 1)


def scores(accuracy: float | None) -> dict[str, float | None]:
    return {"accuracy": accuracy, "balanced_accuracy": 0.5, "macro_f1": 0.5}


def test_the_first_version_is_promoted() -> None:
    assert decide(PromotionSpec(), scores(0.1), None).status == "promoted"


@given(mine=share, theirs=share, min_gain=st.floats(-0.5, 0.5))
def test_a_later_version_is_promoted_exactly_when_it_gains_more_than_asked(mine: float, theirs: float, min_gain: float) -> None:
    decision = decide(PromotionSpec(min_gain=min_gain), scores(mine), scores(theirs))
    assert (decision.status == "promoted") == (mine - theirs > min_gain)
    assert (decision.challenger, decision.champion, decision.min_gain) == (mine, theirs, min_gain)


def test_a_tie_keeps_the_champion() -> None:
    assert decide(PromotionSpec(), scores(0.8), scores(0.8)).status == "kept"


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_challenger_without_a_figure_is_never_promoted(nothing: float | None) -> None:
    assert decide(PromotionSpec(), scores(nothing), scores(0.1)).status == "kept"
    assert decide(PromotionSpec(), scores(nothing), None).status == "kept"


def test_a_champion_without_a_figure_is_replaced() -> None:
    assert decide(PromotionSpec(), scores(0.5), scores(math.nan)).status == "promoted"


def test_the_very_model_that_serves_is_kept_whatever_is_asked() -> None:
    assert decide(PromotionSpec(min_gain=-1), scores(0.9), scores(0.1), is_champion=True).status == "kept"


def test_the_metric_of_the_spec_decides() -> None:
    challenger, champion = {"accuracy": 0.9, "macro_f1": 0.4}, {"accuracy": 0.1, "macro_f1": 0.5}
    assert decide(PromotionSpec(metric="macro_f1"), challenger, champion).status == "kept"
    assert decide(PromotionSpec(metric="accuracy"), challenger, champion).status == "promoted"

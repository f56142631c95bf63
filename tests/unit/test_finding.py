"""Mending: everything is said before anything is done, one finding's failure is its own, and what lasts is counted in looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ServiceError
from tasks import finding
from tasks.finding import Finding, lasts, mend_all


def test_the_dry_run_comes_first_and_one_that_fails_keeps_no_other_from_being_mended(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def fails() -> str:
        done.append("tried")
        raise ServiceError("MLflow is away.", "Wait.")

    def mends() -> str:
        assert "2. model b: [odd] words" in capsys.readouterr().err
        done.append("mended")
        return "put back"

    broken = Finding("model a", "wrong", "gone", "put it back", fails)
    rows = mend_all([Finding("s3", "ok", "fine"), broken, Finding("model b", "wrong", "[odd] words", "put it back", mends)])
    assert done == ["tried", "mended"]
    assert [(row["what"], row["fixed"], row["outcome"]) for row in rows] == [
        ("s3", False, None), ("model a", False, "not mended: MLflow is away.\nWait."), ("model b", True, "put back"),
    ]  # fmt: skip


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 9))
def test_what_is_not_so_at_one_look_does_not_last(seen: list[bool], looks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding.time, "sleep", lambda seconds: None)
        answers = iter([*seen, *[True] * looks])
        assert lasts(lambda: next(answers), looks=looks) == all(seen[:looks])

"""Schedules: what is none is refused before any server starts, and the next times are those of the zone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.cli import _run
from infra.errors import UserError
from tasks.cron import next_times

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def test_the_next_nights_are_told_in_the_zone_of_the_schedule() -> None:
    assert [time.isoformat() for time in next_times("0 2 * * *", "Europe/Berlin", NOW)] == [
        "2026-11-22T02:00:00+01:00",
        "2026-11-23T02:00:00+01:00",
        "2026-11-24T02:00:00+01:00",
    ]


@pytest.mark.parametrize("cron", ["", "0 2 * *", "0 2 * * * *", "99 2 * * *", "at night", "0 0 31 2 *", "0 2 * * R", "*/0 * * * *"])
def test_what_is_no_schedule_is_refused_with_an_example(cron: str) -> None:
    with pytest.raises(UserError, match="0 2"):
        next_times(cron, "UTC", NOW)


@pytest.mark.parametrize("timezone", ["Berlin", "", "../etc/passwd", "Europe", "CET+1 "])
def test_what_is_no_time_zone_is_refused_by_name(timezone: str) -> None:
    with pytest.raises(UserError, match="no time zone"):
        next_times("0 2 * * *", timezone, NOW)


@given(st.integers(0, 59), st.integers(0, 23), st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]))
def test_a_nightly_schedule_comes_about_once_a_day_and_never_in_the_past(minute: int, hour: int, timezone: str) -> None:
    times = next_times(f"{minute} {hour} * * *", timezone, NOW, count=10)
    assert times[0] > NOW
    assert times == sorted(times)
    assert {(later - earlier).total_seconds() for earlier, later in pairwise(times)} == {timedelta(days=1).total_seconds()}


def test_a_wrong_schedule_ends_with_exit_code_2_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path / "home"))
    assert _run(["deploy", "spec.yaml", "--cron", "tonight"]) == 2
    assert "five fields" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()

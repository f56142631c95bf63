"""Progress on a terminal stays there."""

from __future__ import annotations

import pickle
import time

import pytest

from infra import progress


def test_plain_lines_tell_the_share_done_and_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with progress.step("Baking") as on_progress:
        time.sleep(0.01)
        on_progress(1, 4)
    shown = capsys.readouterr()
    assert "Baking: 25 %" in shown.err
    assert "s left" in shown.err
    assert "done in" in shown.err
    assert shown.out == ""


def test_plain_lines_tell_a_wait_once_and_again_after_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.step("Baking") as watcher:
        for seconds in (5.0, 7.0, 36.0):
            watcher.waits("2 CPUs (retrain [pets] of alice holds 2 CPUs)", seconds)
        watcher.waits("", 0.0)
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    expected = "Baking: waiting for 2 CPUs (retrain [pets] of alice holds 2 CPUs), {} s"
    assert said == [expected.format(5), expected.format(36)]


def test_a_watcher_sent_to_another_process_shows_nothing_there(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.step("Baking") as on_progress:
        sent = pickle.loads(pickle.dumps(on_progress))
        capsys.readouterr()
        sent(1, 2)
        assert capsys.readouterr().err == ""

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


def test_a_watcher_sent_to_another_process_shows_nothing_there(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.step("Baking") as on_progress:
        sent = pickle.loads(pickle.dumps(on_progress))
        capsys.readouterr()
        sent(1, 2)
        assert capsys.readouterr().err == ""

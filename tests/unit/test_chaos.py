"""The pure parts of chaos: its checks find what they are there to find, and the same seed breaks the same things."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults import JumpingClock
from tests.unit.test_benchmarks import Load, load

__all__ = ["load"]

EPOCHS = [{"epoch": 1, "val_accuracy": 0.5, "seconds": 0.1}, {"epoch": 2, "val_accuracy": 0.6, "seconds": 0.2}]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, ns=(1, 1))
    return path


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """What a finished retraining leaves of its steps, its search and its fit."""
    root = tmp_path / "storage"
    write(root / "steps" / "prepare-data-1", {})
    write(root / "datasets" / "x" / "MANIFEST.json", {"objects": []})
    write(root / "searches" / "s" / "result.json", {"trials_detail": [{"trial_id": "00000", "epochs": 2, "curve": EPOCHS}]})
    events = [{"kind": "epoch", "index": 0, "epoch": row} for row in EPOCHS]
    write(root / "searches" / "s.journal" / "1.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    checkpoint = root / "fits" / "f" / "checkpoints" / "epoch-0001"
    write(checkpoint / "state.json", {"history": EPOCHS[:1]})
    write(checkpoint / "MANIFEST.json", {"objects": []})
    write(root / "fits" / "f" / "result.json", {"curve": EPOCHS})
    return root


def test_what_was_finished_and_is_the_same_was_not_done_again(load: Load, storage: Path) -> None:
    checks = load("chaos_checks")
    before = checks.finished(storage)
    assert str(before) == "1 steps, 2 folders, 2 + 1 epochs"
    assert checks.done_again(before, storage) == []
    (storage / "fits/f/checkpoints/epoch-0001/MANIFEST.json").unlink()  # an old one, thrown away
    assert checks.done_again(before, storage) == []


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("steps/prepare-data-1", {}, "step prepare-data-1 was recorded again"),
        ("datasets/x/MANIFEST.json", {"objects": []}, "datasets/x was written again"),
        ("searches/s/result.json", {"trials_detail": [{"trial_id": "0", "epochs": 1, "curve": EPOCHS[1:]}]}, "trial 0 ran again"),
        ("fits/f/result.json", {"curve": [{**EPOCHS[0], "seconds": 0.3}, EPOCHS[1]]}, "epochs of the fit ran again"),
    ],
)  # fmt: skip
def test_whatever_was_finished_and_is_another_was_done_again(load: Load, storage: Path, path: str, content: Any, said: str) -> None:
    checks = load("chaos_checks")
    before = checks.finished(storage)
    os.utime(write(storage / path, content), ns=(2, 2))
    assert checks.done_again(before, storage) == [said]


def test_half_written_objects_do_not_count_as_finished(load: Load, storage: Path) -> None:
    write(storage / "datasets" / "x" / "MANIFEST.json", '{"objects": [{"ke')
    write(storage / "searches" / "s.journal" / "2.jsonl", '{"kind": "epoch", "ind')
    assert str(load("chaos_checks").finished(storage)) == "1 steps, 1 folders, 2 + 1 epochs"


def test_an_object_that_is_read_before_its_manifest_is_written_is_found_and_no_other(load: Load) -> None:
    early, late, other = "/unfreeze/x/fits/f/fit/model.safetensors", "/unfreeze/x/fits/f/fit/deep/labels.json", "/unfreeze/y/fits/f/fit/a"
    requests = [
        ("PUT", early), ("GET", early), ("GET", other), ("GET", f"{late}?uploadId=1"), ("GET", "/unfreeze/x/fits/f/fit/MANIFEST.json"),
        ("GET", "/unfreeze/x/steps/s"),
        ("PUT", "/unfreeze/x/fits/f/fit/MANIFEST.json"), ("GET", late), ("GET", early),
    ]  # fmt: skip
    found = load("chaos_checks").read_too_early(requests, "x")
    assert found == ["x/fits/f/fit/model.safetensors was read before its MANIFEST.json was there"]


def test_what_is_sent_before_and_after_a_fault_is_counted_once(load: Load) -> None:
    before = [("PUT", "/unfreeze/x/a?x-id=PutObject"), ("PUT", "/unfreeze/x/b"), ("PUT", "/unfreeze/y/a"), ("GET", "/unfreeze/x/c")]
    after = [("PUT", "/unfreeze/x/a"), ("PUT", "/unfreeze/x/a"), ("PUT", "/unfreeze/y/a"), ("PUT", "/unfreeze/x/c")]
    assert load("chaos_checks").written_again(before, after, "x") == 1


def test_only_times_and_places_may_differ(load: Load) -> None:
    checks = load("chaos_checks")
    assert checks.timeless([{**EPOCHS[0], "uri": "s3://x/1"}]) == [{"epoch": 1, "val_accuracy": 0.5}]
    found, expected = {"a": 1, "b": [{"c": 1, "d": 2}]}, {"a": 1, "b": [{"c": 2, "d": 3}]}
    assert checks.differences(found, expected) == ["another b[0].c: 1 instead of 2, and 1 more"]
    assert checks.differences(found, found) == []


def test_the_same_seed_breaks_the_same_things_and_each_about_equally_often(load: Load) -> None:
    chaos = load("chaos")
    first, again, other = (list(itertools.islice(chaos.deck(list(chaos.FAULTS), seed), 50)) for seed in (1, 1, 2))
    assert first == again != other
    counts = {name: first.count(name) for name in chaos.FAULTS}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_steps_of_a_job_are_found_by_what_does_not_differ_in_their_titles(load: Load) -> None:
    lines = "Searching depth and learning rate, about 7 s ...\nSearching depth and learning rate, about 7 s: 58 %, 26 s left\n" \
        "Searching depth and learning rate, about 7 s: done in 9.5 s\nFitting depth 1, lr 0.01 on 2 workers: done in 20.1 s\n"  # fmt: skip
    assert load("chaos").steps_of(lines) == [("starting", 1.0), ("Searching depth and learning rate", 9.5), ("Fitting depth", 20.1)]


def test_a_clock_that_jumps_moves_the_time_of_day_alone(tmp_path: Path) -> None:
    clock = JumpingClock(tmp_path)
    if clock.missing:
        pytest.skip(clock.missing)
    clock.jump(-600)
    code = "import datetime, time; print(time.time(), datetime.datetime.now().timestamp(), time.monotonic()); time.sleep(0.01)"
    before = time.time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **clock.environment}, capture_output=True, text=True, check=True)
    told = [float(word) for word in done.stdout.split()]
    after = time.time(), time.monotonic()
    assert all(before[0] - 601 <= at <= after[0] - 599 for at in told[:2])
    assert before[1] <= told[2] <= after[1]

"""A command's log: whole JSON lines of ours, with the ids of what was under way, in the file of its flow run."""

from __future__ import annotations

import json
import logging
import logging.config
import os
from pathlib import Path
from typing import Any

from infra import logs, newest, progress

log = logging.getLogger("tasks.some_step")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_tells_what_and_where_with_the_ids_that_hold_then(tmp_path: Path) -> None:
    with logs.to_file(tmp_path / "logs" / "command.jsonl") as file, logs.within(flow_run_id="r1"):
        with logs.within(step="search", trial=3):
            log.info("an epoch", extra={"seconds": 1.5})
        log.warning("later")
        logging.getLogger("another_library").info("not ours")
    first, second = lines(file.path)
    assert {key: first[key] for key in ("flow_run_id", "step", "trial", "seconds", "what", "from", "level")} == {
        "flow_run_id": "r1", "step": "search", "trial": 3, "seconds": 1.5, "what": "an epoch", "from": "tasks.some_step", "level": "INFO",
    }  # fmt: skip
    assert first["at"].endswith("+00:00")
    assert (second["what"], second.get("step")) == ("later", None)


def test_a_flow_run_gives_the_log_its_name_and_a_second_attempt_goes_on_in_it(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        with logs.to_file(tmp_path / f"command-{attempt}.jsonl") as file:
            log.info("%s, before", attempt)
            file.name_after("r1")
            log.info("%s, after", attempt)
    assert [path.name for path in tmp_path.iterdir()] == ["r1.jsonl"]
    assert [line["what"] for line in lines(tmp_path / "r1.jsonl")] == ["first, before", "first, after", "second, before", "second, after"]


def test_a_library_that_sets_logging_up_anew_does_not_end_the_log(tmp_path: Path) -> None:
    with logs.to_file(tmp_path / "command.jsonl") as file:
        log.info("before")
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "root": {"level": "WARNING"}})  # as Prefect does
        log.info("after")
    assert [line["what"] for line in lines(file.path)] == ["before", "after"]


def test_a_bug_brings_its_traceback_in_one_line(tmp_path: Path) -> None:
    with logs.to_file(tmp_path / "command.jsonl") as file:
        try:
            raise KeyError("an odd key")
        except KeyError as error:
            log.error("ended", exc_info=error)
    (line,) = lines(file.path)
    assert "an odd key" in line["exc_info"]


def test_what_a_person_reads_is_in_the_log_without_its_colours(tmp_path: Path) -> None:
    with logs.to_file(tmp_path / "command.jsonl") as file, progress.step("Baking") as watcher:
        progress.say("[yellow]No flour:[/] bought some")
        watcher.waits("the oven", 7.0)
        watcher.waits("the oven", 9.0)
        watcher.waits("", 0.0)
    assert [line["what"] for line in lines(file.path)] == ["Baking ...", "No flour: bought some", "waits", "goes on"]
    assert lines(file.path)[2]["waits_for"] == "the oven"


def test_without_a_log_nothing_of_it_is_left(tmp_path: Path) -> None:
    before = [(logging.getLogger(name).handlers, logging.getLogger(name).level) for name in logs.OURS]
    with logs.to_file(tmp_path / "command.jsonl"):
        assert logs.current() is not None
    assert logs.current() is None
    assert [(logging.getLogger(name).handlers, logging.getLogger(name).level) for name in logs.OURS] == before


def test_a_folder_keeps_the_logs_of_the_last_runs(tmp_path: Path) -> None:
    for number in range(newest.KEPT):
        (tmp_path / f"old-{number}.jsonl").touch()
        os.utime(tmp_path / f"old-{number}.jsonl", (number, number))
    with logs.to_file(tmp_path / "command.jsonl"):
        log.info("the next")
    kept = {path.name for path in tmp_path.iterdir()}
    assert (len(kept), "old-0.jsonl" in kept, "command.jsonl" in kept) == (newest.KEPT, False, True)

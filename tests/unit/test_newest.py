"""What grows with every run stays small."""

from __future__ import annotations

import os
from pathlib import Path

from infra.newest import keep_newest


def test_the_files_written_last_are_kept_and_others_are_none_of_its_business(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / f"{number}.json"
        path.touch()
        os.utime(path, (number % 3 * 100 + number,) * 2)  # written in the order 0 3 1 4 2 5
    (tmp_path / "mlflow.log").touch()
    keep_newest(tmp_path, "*.json", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"4.json", "2.json", "5.json", "mlflow.log"}
    keep_newest(tmp_path, "*.json", 3)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    keep_newest(tmp_path / "runs", "*.json", 3)

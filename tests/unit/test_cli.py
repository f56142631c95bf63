"""What a mistake looks like that needs no server to be seen: one message, exit code 2, nothing started."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli import _run
from tests.small_data import write_folder

SPEC = "name: shapes\ndata: {{source: {source}, image_size: 32}}\nbackbone: {{name: resnet18, weights: none}}\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write_spec(folder: Path, source: str) -> str:
    path = folder / "spec.yaml"
    path.write_text(SPEC.format(source=source), encoding="utf-8")
    return str(path)


def test_a_missing_source_is_named(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["retrain", write_spec(tmp_path, "nowhere.zip")]) == 2
    assert "nowhere.zip" in capsys.readouterr().err
    assert not home.exists()


def test_an_empty_source_and_one_of_one_class_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert _run(["retrain", write_spec(tmp_path, "empty")]) == 2
    assert "empty" in capsys.readouterr().err
    write_folder(tmp_path / "images", images_per_class=3)
    for folder in sorted((tmp_path / "images").iterdir())[1:]:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert _run(["retrain", write_spec(tmp_path, "images")]) == 2
    assert "one class" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["retrain"], ["no-such-command"], ["retrain", "none.yaml"], ["predict", "a@b@c", "x"], ["verify", "/tmp"]]
)
def test_wrong_arguments_end_with_exit_code_2_and_without_a_traceback(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_the_schema_is_json_and_describes_the_spec(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert _run(["schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["required"]) == {"name", "data", "backbone"}


def test_nothing_is_running_before_anything_was_started(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert _run(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert {part["state"] for part in status.values()} == {"stopped"}

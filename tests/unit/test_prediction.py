"""What names a model, and which files are predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import UserError
from tasks.prediction import Reference, find_files, parse_reference


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("emoji", Reference("emoji", "champion", None)),
        ("emoji@challenger", Reference("emoji", "challenger", None)),
        ("emoji/3", Reference("emoji", None, "3")),
    ],
)
def test_a_model_is_named_by_alias_or_version_and_the_champion_is_meant_otherwise(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize("text", ["", "@champion", "emoji/", "emoji/three", "emoji@", "a@b@c"])
def test_what_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="NAME@alias"):
        parse_reference(text)


def test_a_folder_gives_its_images_and_a_file_itself(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([tmp_path, tmp_path / "notes.txt"])
    assert found == [tmp_path / "b.png", tmp_path / "sub" / "a.JPG", tmp_path / "notes.txt"]


def test_nothing_to_predict_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        find_files([tmp_path / "none.png"])
    with pytest.raises(UserError, match="holds no image"):
        find_files([tmp_path])

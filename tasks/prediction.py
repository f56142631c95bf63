"""Predicting with a registered version: files in, one row each out, in batches so that the first answers come early."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import local_stack, progress, registry
from infra.errors import UserError
from infra.tracking import client
from tasks.ledger_book import follow, open_book, tell

FILES_PER_BATCH = 32
MAX_FILE_BYTES = 512 * 2**20
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".avif", ".mpo"}


@dataclass(frozen=True)
class Reference:
    """A registered model and which of its versions."""

    name: str
    alias: str | None
    version: str | None


def parse_reference(text: str) -> Reference:
    """`NAME`, `NAME@alias` or `NAME/version`; the champion where nothing is said."""
    match = re.fullmatch(r"(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))?", text)
    if match is None:
        raise UserError(f"{text!r} does not name a model.", "Write NAME, NAME@alias or NAME/version, for example emoji@champion.")
    alias = match["alias"] or (None if match["version"] else registry.CHAMPION)
    return Reference(match["name"], alias, match["version"])


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` name: each file as it is, each folder as the images below it, sorted."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(found for found in path.rglob("*") if found.suffix.lower() in SUFFIXES and found.is_file())
            if not below:
                raise UserError(
                    f"The folder {str(path)!r} holds no image.", f"Images are known by their suffix: {' '.join(sorted(SUFFIXES))}."
                )
            files += below
        else:
            files.append(path)
    if not any(path.exists() for path in files):
        raise UserError(f"There is no file {str(files[0])!r}.", "Give the paths of images or of folders.")
    return files


def predict(reference: Reference, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """A row {"file", "class", "probability"} or {"file", "error"} for each file, in order."""
    with progress.step(f"Loading {reference.name}"):
        model = load(reference)
    for start in range(0, len(files), FILES_PER_BATCH):
        yield from _predict_batch(model, files[start : start + FILES_PER_BATCH])


def load(reference: Reference) -> Any:
    """The pyfunc model of a registered version. Raises UserError where there is none."""
    found = _find(reference)
    if found is None:
        which = f"the alias {reference.alias!r}" if reference.alias else f"version {reference.version}"
        raise UserError(f"There is no model {reference.name!r} with {which}.", "Register one with `unfreeze retrain`, or name another.")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    client()
    import mlflow.pyfunc

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mlflow.pyfunc.load_model(f"models:/{found.name}/{found.version}")


def _find(reference: Reference) -> registry.ModelVersion | None:
    """The champion is whoever serves by the ledger, also where the alias was moved by hand."""
    if reference.alias == registry.CHAMPION and registry.newest(reference.name) is not None:
        book = open_book(reference.name, local_stack.DEFAULT_STORAGE)
        version, notes = follow(book)
        tell(notes)
        if book.entries:
            return registry.get(reference.name, version) if version else None
    return registry.by_alias(reference.name, reference.alias) if reference.alias else registry.get(reference.name, reference.version or "")


def _predict_batch(model: Any, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    import pandas as pd

    contents = [_read(path) for path in files]
    readable = [content for content in contents if isinstance(content, bytes)]
    rows = iter(model.predict(pd.DataFrame({"image": readable})).to_dict("records")) if readable else iter(())
    for path, content in zip(files, contents, strict=True):
        if isinstance(content, str):
            yield {"file": str(path), "error": content}
            continue
        row = next(rows)
        if isinstance(row["error"], str):
            yield {"file": str(path), "error": row["error"]}
        else:
            yield {"file": str(path), "class": row["class"], "probability": row["probability"]}


def _read(path: Path) -> bytes | str:
    """The bytes of a file, or why it cannot be read."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return f"larger than {MAX_FILE_BYTES // 2**20} MiB"
        return path.read_bytes()
    except OSError as error:
        return error.strerror or str(error)

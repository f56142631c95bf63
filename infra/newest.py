"""Folders of small files that would grow for ever, one for each run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

KEPT = 365


def keep_newest(folder: Path, pattern: str, count: int = KEPT) -> None:
    """Delete all but the `count` files matching `pattern` that were written last. Others may do the same at the same time."""
    written: list[tuple[float, Path]] = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            written.append((path.stat().st_mtime, path))
    for _, path in sorted(written, reverse=True)[count:]:
        path.unlink(missing_ok=True)

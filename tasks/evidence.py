"""TEMPORARY."""

from __future__ import annotations

from typing import Any


class Gathered:
    evidence: Any
    holdout: dict[str, Any]
    rows: list[dict[str, Any]]

    def plain(self) -> dict[str, Any]:
        return {}


def gather(*a: Any, **k: Any) -> Gathered:
    raise NotImplementedError

"""What the promotion page is made from, as plain values, and which images it shows (pure; loads no drawing library)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks.report_words import Values, number

MOST_SHOWN = 24


@dataclass(frozen=True, kw_only=True)
class PromotionContent:
    """Everything the promotion page says, as plain values from the other steps.

    `status`: promoted, kept, awaiting_approval, rejected, expired or stale; `judgement` is tasks.gate.plain_judgement; `evaluation`
    has the metrics of ray_jobs.metrics.measure by role; `rows` one row a judged image; `pictures` a data URI by sha256.
    """

    name: str
    version: str
    status: str
    judgement: dict[str, Any]
    champion_version: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    holdout: dict[str, Any] = field(default_factory=dict)
    overlap: list[dict[str, Any]] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    requested: dict[str, Any] | None = None
    entry: dict[str, Any] | None = None

    @property
    def rival(self) -> str:
        """The role that the challenger is held against: the champion, or its own probe where none serves."""
        return "champion" if self.champion_version or self.evaluation.get("champion") else "probe"

    @property
    def removed(self) -> int:
        """How many holdout images were not judged on; one may be in `overlap` more than once."""
        whole, judged = number(self.holdout.get("images")), number(self.holdout.get("judged"))
        return len({one.get("file") for one in self.overlap}) if whole is None or judged is None else int(whole - judged)

    @property
    def created_at(self) -> str:
        """When it was decided, or asked for; empty where neither is known."""
        return str((self.entry or {}).get("at") or (self.requested or {}).get("at") or "")


@dataclass(frozen=True)
class Disagreements:
    """How challenger and rival answered the same images; `lost` and `won` are those to show, the surest answers of the challenger first."""

    rival: str
    lost: list[dict[str, Any]]
    won: list[dict[str, Any]]
    only_rival: int
    only_challenger: int
    both: int
    neither: int

    @property
    def images(self) -> int:
        return self.only_rival + self.only_challenger + self.both + self.neither

    @property
    def digests(self) -> set[str]:
        """The sha256 of each image whose picture the page shows."""
        return {str(row["sha256"]) for row in (*self.lost, *self.won)}


def disagreements(rows: Iterable[Values], most: int = MOST_SHOWN) -> Disagreements:
    """Images that one model gets right and the other wrong, at most so many of each kind; against the probe where no champion answered."""
    answered = [dict(row) for row in rows]
    rival = "champion" if any(row.get("champion") for row in answered) else "probe"
    groups: dict[tuple[bool, bool], list[dict[str, Any]]] = {(mine, theirs): [] for mine in (True, False) for theirs in (True, False)}
    for row in answered:
        if row.get("challenger") and row.get(rival):
            groups[_right(row, "challenger"), _right(row, rival)].append(row)
    lost, won = (sorted(groups[kind], key=_surest_first) for kind in ((False, True), (True, False)))
    return Disagreements(rival, lost[:most], won[:most], len(lost), len(won), len(groups[True, True]), len(groups[False, False]))


def _right(row: Values, role: str) -> bool:
    return bool(row[role].get("class") == row.get("true"))


def _surest_first(row: Values) -> tuple[float, str]:
    return -(number(row["challenger"].get("probability")) or 0.0), str(row.get("sha256"))

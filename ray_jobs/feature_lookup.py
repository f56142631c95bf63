"""Which rows of a dataset the cache has, which must be computed, and where each lies. Pure: no store, no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.feature_batches import Batch, Selection
from ray_jobs.feature_set import Cell

Place = tuple[int, int]
"""A batch's number and a row of it."""


@dataclass(frozen=True)
class Wanted:
    """The train and val rows of a dataset, in canonical order: sha256 of each image, its label, how many train, and their views."""

    images: list[str]
    labels: list[int]
    train: int
    views: int

    def rows(self, view: int) -> range:
        """The rows that have this view: val is judged on view 0 alone."""
        return range(len(self.images) if view == 0 else self.train)


def lookup(batches: Sequence[Batch]) -> dict[bytes, Place]:
    """Where each image's features lie; in the first batch that has them."""
    places: dict[bytes, Place] = {}
    for number, batch in enumerate(batches):
        for row, sha256 in enumerate(batch.images):
            places.setdefault(sha256, (number, row))
    return places


def work_of(wanted: Wanted, batches: Mapping[Cell, Sequence[Batch]]) -> dict[tuple[Cell, ...], list[int]]:
    """The rows that must be computed, by the cells that miss them: an image is decoded and computed once for all of those."""
    digests = [bytes.fromhex(sha256) for sha256 in wanted.images]
    missing: list[list[Cell]] = [[] for _ in digests]
    for cell, found in batches.items():
        places = lookup(found)
        for row in wanted.rows(cell.view):
            if digests[row] not in places:
                missing[row].append(cell)
    work: dict[tuple[Cell, ...], list[int]] = {}
    for row, cells in enumerate(missing):
        if cells:
            work.setdefault(tuple(cells), []).append(row)
    return work


def selection_of(wanted: Wanted, batches_by_view: Sequence[Sequence[Batch]]) -> Selection:
    """Where every row of one cut lies, view after view. The batches must have them all."""
    used: dict[str, int] = {}
    chosen: list[tuple[str, str]] = []
    batch_of: list[int] = []
    row_of: list[int] = []
    for view, batches in enumerate(batches_by_view):
        places = lookup(batches)
        for row in wanted.rows(view):
            number, found = places[bytes.fromhex(wanted.images[row])]
            batch = batches[number]
            if batch.uri not in used:
                used[batch.uri] = len(chosen)
                chosen.append((batch.uri, batch.manifest_digest))
            batch_of.append(used[batch.uri])
            row_of.append(found)
    labels = np.array(wanted.labels, dtype=np.int64)
    return Selection(chosen, np.array(batch_of, np.int32), np.array(row_of, np.int64), labels, wanted.train, len(batches_by_view))

"""Which holdout images a model may have seen in training: the same bytes, or the same picture, in any dataset that it was trained on.

What cannot be looked at is no error, since datasets are deleted; it is named, and whoever reads the judgement knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import UserError
from ray_jobs.dataset import Dataset
from ray_jobs.dataset_tables import slice_column
from ray_jobs.fingerprints import Pictures, near_duplicates

OpenDataset = Callable[[str], Dataset]
ALIKE = 0.1
"""Where more of the training images than this look like another one, looking alike tells nothing: only the same bytes count as seen."""
ALIKE_SAMPLE = 500
COLUMNS = ("sha256", "name", "label", "split", "width", "height")


@dataclass(frozen=True, eq=False)
class Images:
    """Some rows of a dataset's manifest with their fingerprints, where it has any."""

    version: str
    table: pa.Table
    pictures: Pictures | None

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self.table.column(name).to_pylist()
        return values


@dataclass(frozen=True)
class _Match:
    """A holdout image, by number, and an image of a training set that shows the same picture."""

    holdout: int
    how: str
    distance: float
    sha256: str
    file: str
    split: str
    version: str

    @property
    def rank(self) -> tuple[bool, float, str, str, str]:
        """Exact copies first, then the most alike: whatever the order in which the datasets were looked through."""
        return (self.how != "exact", self.distance, self.sha256, self.version, self.file)


@dataclass
class _Search:
    """What was found so far; a training image that many datasets share is looked at once."""

    matches: list[tuple[_Match, str]] = field(default_factory=list)
    looked_at: set[str] = field(default_factory=set)
    near: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)


def images_of(dataset: Dataset, splits: Sequence[str]) -> Images:
    """The rows of these splits, in canonical order."""
    manifest = dataset.manifest
    inside_N = np.asarray(pc.is_in(manifest.column("split"), pa.array(splits)))
    wanted = [name for name in manifest.column_names if name in COLUMNS or name.startswith(slice_column(""))]
    table = manifest.select(wanted).filter(pa.array(inside_N))
    fingerprints_NB = dataset.fingerprints()
    if fingerprints_NB is None:
        return Images(dataset.version, table, None)
    width_N, height_N = (table.column(name).to_numpy().astype(np.int64) for name in ("width", "height"))
    return Images(dataset.version, table, Pictures(fingerprints_NB[inside_N], width_N, height_N))


def seen_in_training(
    holdout: Images, lineages: Mapping[str, Sequence[str]], open_dataset: OpenDataset
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row a holdout image that a model may have seen (its closest copy, and who saw it), and what could not be checked.

    `lineages`: by role the URIs of the datasets that the model was trained on; what it chose trials by (val) counts as seen.
    """
    search = _Search()
    if holdout.pictures is None:
        search.unchecked.append(f"The holdout (version {holdout.version}) has no fingerprints, so only exact copies of it were looked for.")
    roles_of: dict[str, list[str]] = {}
    for role in sorted(lineages):
        for uri in lineages[role]:
            roles_of.setdefault(uri.rstrip("/"), []).append(role)
    for uri in sorted(roles_of):
        try:
            seen = images_of(open_dataset(uri), ("train", "val"))
        except (FileNotFoundError, ValueError) as error:
            why = error.what if isinstance(error, UserError) else "an object of it is missing or damaged."
            search.unchecked.append(f"{uri}: could not be checked. {why}")
            continue
        _look_through(search, holdout, seen, uri, roles_of[uri])
    return _rows(holdout, search.matches), search.unchecked


def _look_through(search: _Search, holdout: Images, seen: Images, uri: str, roles: Sequence[str]) -> None:
    digests, files, splits = (seen.column(name) for name in ("sha256", "name", "split"))
    number_of = {sha256: number for number, sha256 in enumerate(holdout.column("sha256"))}
    _look_closely(search, holdout, seen, digests)
    unseen = sum(sha256 not in search.looked_at for sha256 in digests)
    if unseen and holdout.pictures is not None:
        search.unchecked.append(f"{uri}: {unseen} images have no fingerprint, so only exact copies of them were looked for.")
    for sha256, file, split in zip(digests, files, splits, strict=True):
        copies = [(number, "near", distance) for number, distance in search.near.get(sha256, ())]
        if sha256 in number_of:
            copies.append((number_of[sha256], "exact", 0.0))
        for number, how, distance in copies:
            match = _Match(number, how, distance, sha256, file, split, seen.version)
            search.matches += [(match, role) for role in roles]


def _look_closely(search: _Search, holdout: Images, seen: Images, digests: Sequence[str]) -> None:
    """Compare what the pictures show, where no other dataset had the same image before."""
    if holdout.pictures is None or seen.pictures is None:
        return
    fresh = np.array([number for number, sha256 in enumerate(digests) if sha256 not in search.looked_at], np.int64)
    pairs = near_duplicates(holdout.pictures, seen.pictures.some(fresh))
    search.looked_at.update(digests)
    if len(pairs.mine_P) and (share := alike_share(seen.pictures)) > ALIKE:
        images = len(np.unique(pairs.mine_P))
        search.unchecked.append(
            f"{share:.0%} of the training images (dataset {seen.version[:8]}) look like another one of them, so likeness is no evidence: "
            f"{images} holdout images that look like one of it were judged. Only the same bytes were taken out; if there are copies, "
            "name a group for each in the manifest."
        )
        return
    for mine, other, distance in zip(pairs.mine_P.tolist(), pairs.other_P.tolist(), pairs.distance_P.tolist(), strict=True):
        search.near.setdefault(digests[fresh[other]], []).append((mine, distance))


def alike_share(pictures: Pictures) -> float:
    """The share of images (of an evenly spread sample) that have a near-duplicate among the others."""
    sample = np.unique(np.linspace(0, len(pictures) - 1, min(ALIKE_SAMPLE, len(pictures))).astype(np.int64))
    pairs = near_duplicates(pictures.some(sample), pictures)
    others = sample[pairs.mine_P] != pairs.other_P
    return len(np.unique(pairs.mine_P[others])) / len(sample)


def _rows(holdout: Images, matches: Sequence[tuple[_Match, str]]) -> list[dict[str, Any]]:
    best: dict[int, _Match] = {}
    seen_by: dict[int, set[str]] = {}
    for match, role in matches:
        seen_by.setdefault(match.holdout, set()).add(role)
        if match.holdout not in best or match.rank < best[match.holdout].rank:
            best[match.holdout] = match
    digests, files, labels = (holdout.column(name) for name in ("sha256", "name", "label"))
    return [
        {
            "sha256": digests[number], "file": files[number], "label": labels[number], "how": best[number].how,
            "with_file": best[number].file, "with_sha256": best[number].sha256, "dataset_version": best[number].version,
            "split": best[number].split, "seen_by": sorted(seen_by[number]),
        }
        for number in sorted(best, key=lambda number: digests[number])
    ]  # fmt: skip

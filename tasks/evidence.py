"""The evidence of a promotion: what each model says of the holdout images that neither can have seen in training (docs/adr/0012).

Not by itself a step: a caller computes the lineages and hands the evidence to the gate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra.committed_folder import fetch
from infra.errors import UserError
from infra.object_store import ObjectStore, object_store
from infra.settings import cache_dir
from ray_jobs.dataset import Dataset, open_dataset
from ray_jobs.dataset_tables import slice_column
from ray_jobs.metrics import aligned
from ray_jobs.spec import Spec
from tasks.gate_evidence import Evidence, Scores
from tasks.seen_in_training import Images, images_of, seen_in_training

ROLES = ("challenger", "champion", "probe")


@dataclass(frozen=True, eq=False)
class Gathered:
    """The evidence, and all that a person needs to check it."""

    evidence: Evidence
    holdout: dict[str, Any]
    overlap: list[dict[str, Any]]
    unchecked: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class _Answers:
    """What one model says of all holdout images."""

    table: pa.Table
    scores: Scores

    def of(self, number: int) -> dict[str, Any]:
        """Its class (None: no class of this data) and probability, as plain values."""
        probability = self.table.column("probability")[number].as_py()
        finite = probability is not None and math.isfinite(probability)
        return {"class": self.table.column("predicted")[number].as_py(), "probability": probability if finite else None}


def gather(
    spec: Spec,
    dataset: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    lineages: Mapping[str, Sequence[str]],
    *,
    is_champion: bool,
    store: ObjectStore | None = None,
    cache: Path | None = None,
) -> Gathered:
    """The evidence on the dataset's holdout, without the images that a model of `lineages` (dataset URIs by role) may have seen.

    `dataset` and `evaluation` are what the steps prepare_data and evaluate give. Raises UserError where a file of the
    evaluation is not what was written, or the dataset lacks a slice that the spec names.
    """
    store, cache = store or object_store(), cache or cache_dir()
    opened = partial(open_dataset, store=store, cache_folder=cache / "datasets")
    prepared = opened(dataset["uri"])
    holdout = images_of(prepared, ("holdout",))
    slices = _slices(prepared, holdout, spec.promotion.slices)
    answers = _answers(fetch(store, evaluation["uri"], cache / "evaluations"), evaluation, holdout, prepared.classes)
    overlap, unchecked = seen_in_training(holdout, lineages, opened)
    removed = {row["sha256"] for row in overlap}
    digests, labels = holdout.column("sha256"), holdout.column("label")
    kept_N = np.array([number for number, sha256 in enumerate(digests) if sha256 not in removed], np.int64)
    number_of = {label: number for number, label in enumerate(prepared.classes)}
    scores = {role: _only(answers[role].scores, kept_N) if role in answers else None for role in ROLES}
    assert scores["challenger"] is not None, "nothing to judge"
    evidence = Evidence(
        classes=prepared.classes,
        true_N=np.array([number_of[labels[number]] for number in kept_N], np.int64),
        challenger=scores["challenger"],
        champion=scores["champion"],
        probe=scores["probe"],
        slices={name: [values[number] for number in kept_N] for name, values in slices.items()} or None,
        removed=len(digests) - len(kept_N),
        images_before=len(digests),
        is_champion=is_champion,
    )
    described = {
        "uri": prepared.uri, "version": prepared.version, "digest": holdout_digest(digests, labels), "images": len(digests),
        "judged": len(kept_N),
    }  # fmt: skip
    return Gathered(evidence, described, overlap, unchecked, _rows(holdout, answers, slices, kept_N.tolist()))


def plain_gathered(gathered: Gathered) -> dict[str, Any]:
    """All but the arrays, ready for JSON."""
    evidence = gathered.evidence
    return {
        "holdout": gathered.holdout,
        "classes": list(evidence.classes),
        "removed": evidence.removed,
        "overlap": gathered.overlap,
        "unchecked": gathered.unchecked,
        "rows": gathered.rows,
        "is_champion": evidence.is_champion,
    }


def holdout_digest(digests: Sequence[str], labels: Sequence[str]) -> str:
    """Hex sha256 that pins the images and their labels, in whatever order they are listed."""
    lines = sorted(json.dumps([sha256, label]) for sha256, label in zip(digests, labels, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _slices(dataset: Dataset, holdout: Images, names: Sequence[str]) -> dict[str, list[str]]:
    absent = [name for name in names if slice_column(name) not in holdout.table.column_names]
    if absent:
        raise UserError(
            f"The dataset {dataset.uri} was prepared without the slices {', '.join(absent)} of promotion.slices.",
            "Run `unfreeze retrain` with this spec: it prepares the data with them.",
        )
    return {name: holdout.column(slice_column(name)) for name in names}


def _answers(folder: Path, evaluation: Mapping[str, Any], holdout: Images, classes: Sequence[str]) -> dict[str, _Answers]:
    """By role, from the checked copy of the evaluation's folder."""
    digests = holdout.column("sha256")
    answers = {}
    for role in ROLES:
        if role in evaluation["predictions"]:
            with pq.ParquetFile(folder / f"{role}.parquet") as file:
                table = file.read()
            assert table.column("sha256").to_pylist() == digests, "the evaluation is of other images"
            probabilities_NK, outside_N = aligned(_probabilities(table), evaluation["labels"][role], classes)
            answers[role] = _Answers(table, Scores(probabilities_NK, outside_N))
    return answers


def _probabilities(table: pa.Table) -> npt.NDArray[np.float32]:
    values_N = table.column("probabilities").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    probabilities_NC: npt.NDArray[np.float32] = values_N.astype(np.float32).reshape(table.num_rows, -1)
    return probabilities_NC


def _only(scores: Scores, kept_N: npt.NDArray[np.int64]) -> Scores:
    return Scores(scores.probabilities_NK[kept_N], None if scores.outside_N is None else scores.outside_N[kept_N])


def _rows(
    holdout: Images, answers: Mapping[str, _Answers], slices: Mapping[str, Sequence[str]], kept: Sequence[int]
) -> list[dict[str, Any]]:
    digests, files, labels = (holdout.column(name) for name in ("sha256", "name", "label"))
    return [
        {
            "sha256": digests[number],
            "file": files[number],
            "true": labels[number],
            **{role: said.of(number) for role, said in answers.items()},
            "slices": {name: values[number] for name, values in slices.items()},
        }
        for number in kept
    ]

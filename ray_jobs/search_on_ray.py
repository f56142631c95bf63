"""Run a search on a Ray cluster: linear probes first, then Ray Tune over unfreeze depth and learning rate in warm workers.

The folder searches/SEARCH_ID is committed at the end; a search that is already there is not run again.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from infra import ray_cluster, usage
from infra.committed_folder import commit, read_manifest
from infra.object_store import ObjectStore, join_uri, object_store
from infra.progress import OnProgress
from infra.usage import Usage
from ray_jobs.features_on_ray import num_groups_of
from ray_jobs.fidelity import Halving
from ray_jobs.probes_on_ray import PROBE_FIGURES, PROBE_HEAD, Probes
from ray_jobs.proposals import expected_trials, proposer_of
from ray_jobs.room import places, require_room, trial_resources
from ray_jobs.search import (
    best_of,
    best_trial,
    epochs_table,
    flops_counted,
    leaderboard_table,
    ranked,
    rungs_table,
    search_id,
    trial_detail,
)
from ray_jobs.search_engine import SearchEngine
from ray_jobs.search_journal import Journal
from ray_jobs.search_space import TrialConfig, backbone_in_points
from ray_jobs.spec import SearchSpec, Spec
from ray_jobs.warm_worker import prepare_worker
from ray_jobs.work import Work
from ray_jobs.workers import lanes, submit_to_each_lane

RESULT = "result.json"
log = logging.getLogger(__name__)


def run_search(
    spec: Spec, dataset: dict[str, Any], backbones: Sequence[dict[str, Any]], features: Sequence[Mapping[str, str]],
    on_progress: OnProgress, *, sources: Sequence[Mapping[str, int]] | None = None, warm: Sequence[TrialConfig] = (), fits: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run the search, carry on with one that was interrupted, or give the stored result of an equal one.

    For each of `backbones`, the spec's own first: `features` are URIs by cut, `sources` the cut from which each depth starts (by
    default its own). `warm` are points of past searches worth trying again. Raises UserError where every trial failed, and at once
    where the cluster has no room for a trial or, with `fits`, for the fit that comes after.
    """
    store = object_store()
    found_id = search_id(spec, backbone_digests=[one["digest"] for one in backbones], dataset_version=dataset["version"], warm=warm)
    uri = join_uri(spec.storage, "searches", found_id)
    journal = Journal(store, f"{uri}.journal")
    if read_manifest(store, uri):
        journal.delete()  # what a crash after the commit left
        return dict(json.loads(store.read(join_uri(uri, RESULT))))
    require_room(spec, ray_cluster.machines(), fits=fits)
    each = zip(backbones, features, sources or [{}] * len(backbones), strict=True)
    works = {backbone_in_points(spec, one["name"]): work_of(spec, dataset, one, cuts, starts) for one, cuts, starts in each}
    for work in works.values():
        submit_to_each_lane(prepare_worker, work)  # model, cuts and features, while Tune starts
    running = _Running(spec, works, dataset["val"], journal, warm)
    probes = running.run(on_progress)
    probe = probes[best_trial(running.engine.records).config.backbone]
    result = _result(spec, dataset, running, probes) | {
        "search_id": found_id, "uri": uri, "leaderboard_uri": join_uri(uri, "leaderboard.parquet"),
        "probe": {**probe["summary"], "uri": join_uri(uri, "probe", PROBE_HEAD)},
    }  # fmt: skip
    _write(store, uri, result, probe)
    journal.delete()
    return result


class _Running:
    """One search while it runs: the engine, the journal behind it, and the linear probes beside it.

    Works and probes are by backbone, as points name it.
    """

    def __init__(self, spec: Spec, works: Mapping[str, Work], val_images: int, journal: Journal, warm: Sequence[TrialConfig]) -> None:
        self.search, self.works, self.journal, self.started = spec.search, works, journal, time.perf_counter()
        events = journal.load()
        first = next((event for event in events if event["kind"] == "start"), None)
        slots, self.slot = _slots()
        self.lanes = len(lanes()) or slots
        in_order = first["lanes"] if first else self.lanes  # as at the first start, whatever the cluster has now
        self.already_s = max((event["spent_s"] for event in events), default=0.0)
        self.already_gpu_s = max((event["spent_gpu_s"] for event in events), default=0.0)
        proposer = proposer_of(spec.search, lanes=in_order, val_images=val_images, warm=warm)
        self.engine = SearchEngine(proposer, spec.search.max_epochs, _halving(spec.search), self._note)
        self.engine.restore(events)
        self.probes: dict[str, Any] = {}
        journal.start()
        if not first:
            self._note({"kind": "start", "lanes": self.lanes})

    @property
    def spent_s(self) -> float:
        return self.already_s + time.perf_counter() - self.started

    @property
    def spent_gpu_s(self) -> float:
        return self.already_gpu_s + self._trained_s() * self.slot.get("gpu", 0)

    def _trained_s(self) -> float:
        return sum(record.seconds for record in self.engine.records)

    def _look(self) -> None:
        """What is to be seen to while trials run: the budget."""
        limits = ((self.search.budget_s, self.spent_s), (self.search.budget_gpu_s, self.spent_gpu_s))
        self.engine.over_budget = any(most is not None and spent >= most for most, spent in limits)

    def run(self, on_progress: OnProgress) -> dict[str, Any]:
        """Every trial, and what came of the probes of each backbone."""
        try:
            probes = Probes(self.search, self.works, self.engine, self.journal)
            probes.start(self.slot)
            if self.search.needs_tune:
                importlib.import_module("ray.tune")  # takes seconds, in which the probes train
            self.probes = probes.take_in()
            if self.search.needs_tune:
                self._run_tune(on_progress)
            self.engine.close()
        finally:
            self.journal.close()
        return self.probes

    def _note(self, event: dict[str, Any]) -> None:
        logged = {key: value for key, value in event.items() if key not in ("kind", "index")}
        log.info("%s of a search", event["kind"], extra=logged | ({"trial": event["index"]} if "index" in event else {}))
        self.journal.append({**event, "spent_s": round(self.spent_s, 3), "spent_gpu_s": round(self.spent_gpu_s, 3)})

    def _run_tune(self, on_progress: OnProgress) -> None:
        from ray_jobs.search_trial import drive_tune

        heads = {name: ray.put(probe["head"]) for name, probe in self.probes.items()}
        shared = {"works": self.works, "heads": heads, "lanes": lanes()}
        before_s = self._trained_s()
        try:
            drive_tune(
                self.engine, shared, self.lanes, self.slot, look=self._look, on_progress=on_progress, expected=expected_trials(self.search)
            )
        finally:
            seconds = self._trained_s() - before_s
            usage.add(Usage(cpu_s=seconds * self.slot.get("cpu", 0.0), gpu_s=seconds * self.slot.get("gpu", 0.0)))


def _result(spec: Spec, dataset: dict[str, Any], running: _Running, probes: Mapping[str, Any]) -> dict[str, Any]:
    """What the search found and what it cost, as plain values."""
    engine, own = running.engine, spec.backbone.name
    best = best_trial(engine.records)
    details = [trial_detail(record, spec.search.max_epochs, own) for record in ranked(engine.records)]
    flops = unshared = 0
    for name, probe in probes.items():
        of_backbone = [detail for detail in details if detail["backbone"] == (name or own)]
        forward = {"suffix": probe["suffix_flops"], "whole": probe["whole_flops"]}
        counted = flops_counted(of_backbone, **forward, train=dataset["train"], val=dataset["val"])
        flops, unshared = flops + counted[0], unshared + counted[1]
    return {
        "trials": len(details), "best": best_of(best, own), "backbones": [name or own for name in probes],
        "seconds": running.spent_s, "trials_detail": details,
        "decisions": engine.proposer.notes, "rungs": [vars(judged) for judged in engine.halving.judged] if engine.halving else [],
        "cost": {"estimated_s": None, "measured_s": running.spent_s, "prefix_s": None,
                 "trials_s": sum(record.seconds for record in engine.records), "flops": flops, "flops_without_sharing": unshared},
    }  # fmt: skip


def work_of(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], features: Mapping[str, str], sources: Mapping[str, int]) -> Work:
    """What all trials of a backbone share, from the results of the steps before."""
    search = spec.search
    return Work(
        backbone=backbone["name"], backbones=len(spec.backbones),
        backbone_uri=backbone["uri"], mean=tuple(backbone["mean"]), std=tuple(backbone["std"]), image_size=spec.data.image_size,
        num_classes=len(dataset["classes"]), num_groups=num_groups_of(backbone),
        features=tuple(sorted((int(depth), uri) for depth, uri in features.items())),
        sources=tuple(sorted((int(depth), cut) for depth, cut in sources.items())), max_epochs=search.max_epochs,
        class_weights=search.class_weights, seed=search.seed, precision=search.precision,
    )  # fmt: skip


def _slots() -> tuple[int, dict[str, float]]:
    """Trials at a time, and what one of them occupies."""
    machines = ray_cluster.machines()
    slot = trial_resources(machines)
    at_a_time = sum(places(slot, machine) for machine in machines)
    return max(1, at_a_time), {name.lower(): amount for name, amount in slot.items()}


def _halving(search: SearchSpec) -> Halving | None:
    """asha compares all trials; the ladder those of one depth, as its depths follow one another."""
    if search.scheduler == "fifo":
        return None
    if search.scheduler == "ladder":
        return Halving(search.max_epochs, cohort_of=lambda record: record.config.unfreeze_depth)
    return Halving(search.max_epochs)


def _write(store: ObjectStore, uri: str, result: dict[str, Any], probe: dict[str, Any]) -> None:
    from safetensors.numpy import save

    files = {
        "trials.parquet": epochs_table(result["trials_detail"]), "leaderboard.parquet": leaderboard_table(result["trials_detail"]),
        "rungs.parquet": rungs_table(result["rungs"]),
        f"probe/{PROBE_HEAD}": save(probe["head"]), f"probe/{PROBE_FIGURES}": json.dumps(probe["summary"], indent=1).encode(),
        RESULT: json.dumps(result, indent=1).encode(),
    }  # fmt: skip
    commit(store, uri, files)

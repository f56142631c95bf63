"""The linear probes of a running search: trained in its workers, all of a backbone at once, and kept on S3 while the search runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ray

from infra.object_store import join_uri
from ray_jobs.features_on_ray import result_of
from ray_jobs.search_engine import SearchEngine
from ray_jobs.search_journal import Journal
from ray_jobs.search_space import TrialConfig, probe_configs
from ray_jobs.spec import SearchSpec
from ray_jobs.warm_worker import warm_worker
from ray_jobs.work import Work
from ray_jobs.workers import submit

PROBE_HEAD, PROBE_FIGURES = "probe.safetensors", "probe.json"


class Probes:
    """The probes of every backbone, by the name that points give it, and those trials of the search that are probes themselves."""

    def __init__(self, search: SearchSpec, works: Mapping[str, Work], engine: SearchEngine, journal: Journal) -> None:
        self.search, self.works, self.engine, self.journal = search, works, engine, journal
        self.heads: list[int] = []
        self.references: dict[str, Any] = {}

    def start(self, slot: Mapping[str, float]) -> None:
        """Train them in workers that have just computed the features; those of an interrupted search are taken from S3."""
        self.heads, all_known = self.engine.take_heads()
        for name, work in self.works.items():
            kept = _kept(self.journal, name) if all_known else None
            if kept:
                self.references[name] = ray.put(kept)
                continue
            trials = [self.engine.records[i].config for i in self._heads_of(name)]
            self.references[name] = submit(train, work, trials, probe_configs(self.search, name), name="probes", resources=slot)

    def take_in(self) -> dict[str, Any]:
        """What came of them, by backbone; their epochs are the search's."""
        found = {}
        for name, reference in self.references.items():
            probe = found[name] = result_of(reference)
            _keep(self.journal, name, probe)  # before the events that make them done
            for index, trained in zip(self._heads_of(name), probe["trials"], strict=bool(probe["trials"])):
                for epoch in trained.curve:
                    self.engine.report(index, epoch, started_at=trained.started_at, seconds=trained.seconds)
                if trained.status:
                    self.engine.end(index, trained.status, trained.reason)
        return found

    def _heads_of(self, name: str) -> list[int]:
        return [i for i in self.heads if self.engine.records[i].config.backbone == name]


def train(work: Work, trials: list[TrialConfig], probes: list[TrialConfig]) -> dict[str, Any]:
    """Runs on a worker: train all probes; the head of the best, at its best epoch, and what each suffix costs."""
    worker = warm_worker(work)

    from ray_jobs.probe import train_probes  # torch is loaded only now, and without its compiler

    found = train_probes(worker, trials, probes)
    flops = worker.forward_flops()
    return {"head": found.head, "summary": found.summary, "trials": found.trials, "whole_flops": flops.pop(-1), "suffix_flops": flops}


def _folder(journal: Journal, backbone: str) -> str:
    return join_uri(journal.uri, backbone) if backbone else journal.uri


def _keep(journal: Journal, backbone: str, probe: dict[str, Any]) -> None:
    from safetensors.numpy import save

    figures = {"summary": probe["summary"], "whole_flops": probe["whole_flops"], "suffix_flops": list(probe["suffix_flops"].items())}
    folder = _folder(journal, backbone)
    journal.store.write(join_uri(folder, PROBE_HEAD), save(probe["head"]))
    journal.store.write(join_uri(folder, PROBE_FIGURES), json.dumps(figures).encode())


def _kept(journal: Journal, backbone: str) -> dict[str, Any] | None:
    """None where there is nothing, or not the whole of it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = _folder(journal, backbone)
    try:
        figures = json.loads(journal.store.read(join_uri(folder, PROBE_FIGURES)))
        head = load(journal.store.read(join_uri(folder, PROBE_HEAD)))
    except (FileNotFoundError, ValueError, SafetensorError):
        return None
    return {**figures, "suffix_flops": dict(figures["suffix_flops"]), "head": head, "trials": []}

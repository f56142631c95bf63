"""The state of a running search: its records, what starts next, what stops when. Pure but for the journal that it is given.

Every change is told to `on_event` as plain values; `restore` makes the same state from them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_jobs.fidelity import Halving
from ray_jobs.proposals import Pause, Proposer
from ray_jobs.search import Epoch, Status, TrialRecord
from ray_jobs.search_space import TrialConfig

Event = dict[str, Any]
OVER_BUDGET = "the search's budget was spent"


@dataclass
class SearchEngine:
    """What runs, what is over, what comes next. Trials are named by their index in the order of start."""

    proposer: Proposer
    max_epochs: int
    halving: Halving | None
    on_event: Callable[[Event], None]
    records: list[TrialRecord] = field(default_factory=list)
    over_budget: bool = False
    _waiting: list[int] = field(default_factory=list)
    _heads: list[int] = field(default_factory=list)
    _heads_closed: bool = False

    def restore(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take up the state that these events left; trials that were under way will start again."""
        for event in events:
            match event["kind"]:
                case "trial" if event["index"] == len(self.records):
                    self.records.append(_new(event["index"], TrialConfig(**event["config"])))
                    self._heads += [event["index"]] if event["head"] else []
                    self._heads_closed = not event["head"]
                case "epoch" if event["index"] < len(self.records):
                    self._add(event["index"], Epoch(**event["epoch"]), event["started_at"], event["seconds"])
                case "end" if event["index"] < len(self.records):
                    self._end(event["index"], event["status"], event["reason"])
        self._judge()
        self._waiting = [i for i, record in enumerate(self.records) if not record.is_over(self.max_epochs)]

    def take_heads(self) -> tuple[list[int], bool]:
        """The linear probes that can be known at the start, which train together, and whether all of them are over already."""
        while not self.over_budget and not self._heads_closed:
            proposed = self.proposer.propose(self.records)
            if isinstance(proposed, Pause) or proposed.unfreeze_depth > 0:
                break
            self._heads.append(self._start(proposed, head=True))
        self._heads_closed = True
        self._waiting = [i for i in self._waiting if i not in self._heads]
        return list(self._heads), all(self.records[i].is_over(self.max_epochs) for i in self._heads)

    def next(self) -> int | Pause:
        """The index of the trial to start now."""
        while self._waiting:
            index = self._waiting.pop(0)
            if not self.records[index].is_over(self.max_epochs):
                return index
        if self.over_budget:
            return Pause.DONE
        proposed = self.proposer.propose(self.records)
        return proposed if isinstance(proposed, Pause) else self._start(proposed)

    def again(self, index: int) -> None:
        """The worker of a trial died: let it start anew, before any other."""
        if not self.records[index].is_over(self.max_epochs):
            self._waiting.insert(0, index)

    def _start(self, config: TrialConfig, *, head: bool = False) -> int:
        index = len(self.records)
        self.records.append(_new(index, config))
        self.on_event({"kind": "trial", "index": index, "config": asdict(config), "head": head})
        return index

    def report(self, index: int, epoch: Epoch, *, started_at: int, seconds: float) -> bool:
        """One epoch's metrics; True where the trial is over."""
        if self._add(index, epoch, started_at, seconds):
            self.on_event({"kind": "epoch", "index": index, "epoch": asdict(epoch), "started_at": started_at, "seconds": seconds})
            self._judge()
        record = self.records[index]
        if self.over_budget and not record.is_over(self.max_epochs):
            record.stopped_after, record.reason = len(record.curve), OVER_BUDGET
        return record.is_over(self.max_epochs) and epoch.epoch >= len(record.counted)

    def end(self, index: int, status: Status, reason: str) -> None:
        """A trial that failed."""
        self._end(index, status, reason)
        self.on_event({"kind": "end", "index": index, "status": status, "reason": reason})
        self._judge()

    def close(self) -> None:
        """What the budget left unfinished ends as stopped."""
        for record in self.records:
            if not record.is_over(self.max_epochs):
                record.stopped_after, record.reason = len(record.curve), OVER_BUDGET

    def _add(self, index: int, epoch: Epoch, started_at: int, seconds: float) -> bool:
        """Keep an epoch unless it is known: a trial that starts again repeats what it had."""
        record = self.records[index]
        if epoch.epoch != len(record.curve) + 1 or record.status is not None:
            return False
        record.curve.append(epoch)
        record.started_at, record.seconds = record.started_at or started_at, max(record.seconds, seconds)
        return True

    def _end(self, index: int, status: Status, reason: str) -> None:
        record = self.records[index]
        if record.stopped_after is None:
            record.status, record.reason = status, reason

    def _judge(self) -> None:
        if self.halving is not None:
            self.halving.judge(self.records)


def _new(index: int, config: TrialConfig) -> TrialRecord:
    return TrialRecord(f"{index:05d}", config)

"""What chaos asks of a round: the undisturbed result, nothing finished done again, nothing half-written read, nothing left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

MANIFEST = "MANIFEST.json"
TIMES = ("seconds", "started_at", "at")
OWN = ("uri", "leaderboard_uri", "checkpoint_uri", "run_id", "evidence_uri", "used", "metrics")
"""What tells a round's own place or moment, not what was found."""
IN_RAY = {"actors": "class_name", "placement_groups": "placement_group_id", "tasks": "name"}
OVER = ("DEAD", "REMOVED", "FINISHED", "FAILED", "NIL")
STAYS = ("Lane", "_AutoscalingCoordinatorActor")
"""The warm lanes, and what Ray Train starts once a cluster."""
SETTLE_S = 40.0
POLL_S = 0.5

Json = dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """What was finished on S3 at some moment, each with what would change if it were done again."""

    steps: Mapping[str, int]
    folders: Mapping[str, int]
    epochs: Mapping[int, Sequence[Json]]
    fit_epochs: Mapping[str, Sequence[Json]]

    def __str__(self) -> str:
        trials = sum(len(rows) for rows in self.epochs.values())
        return f"{len(self.steps)} steps, {len(self.folders)} folders, {trials} + {sum(map(len, self.fit_epochs.values()))} epochs"


def finished(root: Path) -> Finished:
    """What is finished below the storage `root`, read as files: the server may just have been killed."""
    steps = {path.name: path.stat().st_mtime_ns for path in root.glob("steps/*")}
    folders = {str(path.parent.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob(MANIFEST) if _json(path)}
    written = [path for path in sorted(root.glob("fits/*/checkpoints/epoch-*/state.json")) if (path.parent / MANIFEST).exists()]
    fits = {path.parents[2].name: state["history"] for path in written if (state := _json(path))}  # the last one's counts
    return Finished(steps, folders, _journal(root), fits)


def done_again(before: Finished, root: Path) -> list[str]:
    """What had been finished before and was computed anew."""
    now, found = finished(root), []
    found += [f"step {name[:24]} was recorded again" for name, at in before.steps.items() if now.steps.get(name) != at]
    for name, at in before.folders.items():
        gone = name not in now.folders and "/checkpoints/" in name  # old ones are thrown away
        if not gone and not name.startswith("models/") and now.folders.get(name) != at:  # a version's folder waits for its report
            found.append(f"{name} was written again")
    search, fits = _only(root, "searches/*/result.json"), _fits(root)
    trials = {int(trial["trial_id"]): trial for trial in search["trials_detail"]}
    found += [f"trial {i} ran again" for i, rows in before.epochs.items() if i not in trials or not _begins(trials[i], rows)]
    if any(fits.get(fit_id, [])[: len(rows)] != rows for fit_id, rows in before.fit_epochs.items()):
        found.append("epochs of the fit ran again")
    return found


def _fits(root: Path) -> dict[str, list[Json]]:
    """The epochs of each fit by its id; there are two where the first fell short of its trial."""
    return {path.parent.name: (_json(path) or {}).get("curve", []) for path in sorted(root.glob("fits/*/result.json"))}


def _begins(trial: Json, rows: Sequence[Json]) -> bool:
    """Whether these epochs, with their times, are those of the trial's result; a judgement that came late cuts some off."""
    return list(rows[: trial["epochs"]]) == list(trial["curve"][: len(rows)])


def _journal(root: Path) -> dict[int, list[Json]]:
    """The epochs of each trial that the search's journal knows."""
    found: dict[int, list[Json]] = {}
    for segment in sorted(root.glob("searches/*.journal/*.jsonl")):
        with suppress(FileNotFoundError, json.JSONDecodeError):
            for event in map(json.loads, segment.read_text().splitlines()):
                if event["kind"] == "epoch":
                    found.setdefault(event["index"], []).append(event["epoch"])
    return found


def outcome(answer: Json, root: Path) -> Json:
    """What a round found, without its times, names and places; with the digests of what it published."""
    search = _only(root, "searches/*/result.json")
    trials = sorted(search["trials_detail"], key=lambda trial: int(trial["trial_id"]))
    for trial in trials:
        trial.pop("epochs_run", None)  # how far a trial had come when it was judged is chance
    published = _json(root / "models" / answer["model"]["name"] / answer["model"]["version"] / MANIFEST) or {"objects": []}
    weights = {row["key"]: row["sha256"] for row in published["objects"] if row["key"] not in ("report.html", "lineage.json")}
    parts: Json = {
        "dataset": answer["dataset"], "search_id": answer["search"]["search_id"], "best": search["best"], "trials": trials,
        "fit": _fits(root), "chosen": [answer["fit"][key] for key in ("workers", "epochs", "accuracy", "chosen")],
        "evaluation": answer["evaluation"], "decision": answer["decision"],
        "version": [answer["model"]["version"], answer["model"]["champion_version"]], "published": weights,
    }  # fmt: skip
    return dict(timeless(parts))


def timeless(value: Any) -> Any:
    """The value without any time or place in it."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES + OWN}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def differences(found: Json, expected: Json) -> list[str]:
    """What differs, part by part: where first, and in how many places."""
    said = []
    for part, value in expected.items():
        if leaves := list(_unlike(found.get(part), value, part)):
            said.append(f"another {leaves[0]}" + (f", and {len(leaves) - 1} more" if len(leaves) > 1 else ""))
    return said


def _unlike(found: Any, expected: Any, path: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            yield from _unlike(found.get(key), expected.get(key), f"{path}.{key}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, pair in enumerate(zip(found, expected, strict=True)):
            yield from _unlike(*pair, f"{path}[{index}]")
    elif found != expected:
        yield f"{path}: {str(found)[:80]} instead of {str(expected)[:80]}"


def read_too_early(requests: Iterable[tuple[str, str]], name: str) -> list[str]:
    """Objects of folders with a manifest that were read before it was written, in the order of `requests` (method, path)."""
    seen = list(_below(requests, name))
    folders = {key.rpartition("/")[0] for method, key in seen if method == "PUT" and key.endswith(f"/{MANIFEST}")}
    committed: set[str] = set()
    early: dict[str, None] = {}
    for method, key in seen:
        folder, _, last = key.rpartition("/")
        while folder not in folders and "/" in folder:
            folder = folder.rpartition("/")[0]
        if folder not in folders:
            continue
        if method == "PUT" and last == MANIFEST:
            committed.add(folder)
        if method == "GET" and last != MANIFEST and folder not in committed:
            early[key] = None
    return [f"{key} was read before its {MANIFEST} was there" for key in early]


def written_again(before: Iterable[tuple[str, str]], after: Iterable[tuple[str, str]], name: str) -> int:
    """How many objects were sent both before and after a fault: the unfinished work that it cost, as far as S3 has seen it."""
    sent, again = ({key for method, key in _below(requests, name) if method == "PUT"} for requests in (before, after))
    return len(sent & again)


def _below(requests: Iterable[tuple[str, str]], name: str) -> Iterator[tuple[str, str]]:
    """(method, key) of the requests for objects of a round's storage, not of those that list: objects, or the parts of an upload."""
    for method, path in requests:
        parts = urlsplit(path)
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        lists = "list-type" in parts.query or (method == "GET" and "uploadId" in parts.query)
        if key.startswith(f"{name}/") and not lists:
            yield method, key


def verified(root: Path, bucket: str) -> list[str]:
    """What does not match its manifest, asked of the store as `unfreeze verify` asks it."""
    from infra.committed_folder import verify
    from infra.object_store import object_store

    found = []
    for path in root.rglob(MANIFEST):
        uri = f"s3://{bucket}/{path.parent.relative_to(root.parent)}"
        found += [f"{uri}/{problem.key} is {problem.what}" for problem in verify(object_store(), uri)]
    return found


def one_promotion(name: str, storage: str) -> list[str]:
    """What is wrong with the ledger, the versions and the alias: there is one of each."""
    from infra import registry
    from infra.ledger import verify
    from infra.ledger_choice import open_ledger

    kept = open_ledger(storage).kept(name)
    found = [str(problem) for problem in verify(kept.entries, kept.copies)]
    found += [] if len(kept.entries) == 1 else [f"the ledger has {len(kept.entries)} entries"]
    newest, champion = registry.newest(name), registry.champion(name)
    found += [] if newest and newest.version == "1" else [f"the newest version is {newest and newest.version}"]
    return found + ([] if champion and champion.version == "1" else ["the alias does not name version 1"])


def running_in_mlflow(name: str) -> list[str]:
    from infra.tracking import client

    experiment = client().get_experiment_by_name(name)
    found = client().search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'") if experiment else []
    return [f"{len(found)} runs are RUNNING in MLflow"] if found else []


def running_in_prefect(api_url: str) -> list[str]:
    """Flow runs that Prefect takes for RUNNING though no command runs, which the stack's worker or the next command may yet reap."""
    import httpx

    answer = httpx.post(f"{api_url}/flow_runs/filter", json={"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}, timeout=30)
    return [f"flow run {row['name']} is RUNNING in Prefect" for row in answer.raise_for_status().json()]


def left_in_ray(status: Json) -> list[str]:
    """Actors but the warm lanes, tasks at work and placement groups, by Ray's state API."""
    import httpx

    found = []
    headers = {"Authorization": f"Bearer {status['token']}"}
    for kind, name in IN_RAY.items():
        answer = httpx.get(f"{status['dashboard_url']}/api/v0/{kind}", headers=headers, params={"limit": 1000}, timeout=30)
        rows = answer.raise_for_status().json()["data"]["result"]["result"]
        left = [row for row in rows if row["state"] not in OVER and row[name] not in STAYS]
        found += [f"Ray still has {kind[:-1]} {row[name]} ({row['state']})" for row in left]
    return found


def settled(look: Callable[[], list[str]], within_s: float = SETTLE_S) -> list[str]:
    """What `look` still finds after this long; what is being cleaned up gets the time for it."""
    until = time.monotonic() + within_s
    while (found := look()) and time.monotonic() < until:
        time.sleep(POLL_S)
    return found


def _only(root: Path, pattern: str) -> Json:
    """The one object of this pattern."""
    found = [content for path in root.glob(pattern) if (content := _json(path))]
    assert len(found) == 1, f"{len(found)} objects {pattern}"
    return found[0]


def _json(path: Path) -> Json | None:
    """None where it is gone, or half-written at this moment."""
    try:
        found: Json = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found

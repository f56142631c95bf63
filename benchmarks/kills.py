"""Chaos of the search: kill -9 at random moments, the same command again, the same outcome: python benchmarks/kills.py [--small]

Each round is a search of its own (storage and name) over the same images, points and seed, so that all must end alike. It is
killed once, at a moment drawn from the seed: the driver, one of Ray's workers, or everything (driver and embedded stack). Then the
command runs again. Checked: the outcome is that of an undisturbed search; the epochs and times of every trial that had ended by the
kill, as the journal on S3 tells them, are those of the final result, so it was not run again; MLflow has no run that is RUNNING.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from bench import Figure, Options, home, options, report
from rich.console import Console
from rich.table import Table
from search_against_peers import write_images

UNFREEZE = str(Path(sys.executable).with_name("unfreeze"))
TARGETS, SCHEDULERS = ("driver", "worker", "everything"), ("asha", "ladder")
TIMEOUT_S = 600
TOO_LATE = "it had ended before the kill"
TIMES = ("seconds", "started_at", "at")


@dataclass(frozen=True)
class Round:
    """What was killed, when, and how it ended."""

    scheduler: str
    target: str
    moment: str
    known: str
    problems: list[str]


class Site:
    """One home with its stack, and the images."""

    def __init__(self, folder: Path, chosen: Options) -> None:
        self.folder, self.small, self.seed = folder, chosen.small, chosen.seed
        self.manifest = write_images(folder / "images", 12 if chosen.small else 40)
        self.env = {**os.environ, "UNFREEZE_HOME": str(folder / "home")}

    def spec(self, name: str, scheduler: str) -> Path:
        search: dict[str, Any] = {"unfreeze_depth": [0, 1, 2, 3], "lr": [1e-2, 3e-3, 1e-3, 3e-4], "max_epochs": 6, "batch_size": 16}
        if self.small:
            search |= {"unfreeze_depth": [0, 1, 2], "lr": [1e-2, 1e-3], "max_epochs": 4}
        content = {
            "name": name, "data": {"source": str(self.manifest), "image_size": 64}, "backbone": {"name": "resnet10t", "weights": "none"},
            "search": {**search, "scheduler": scheduler, "seed": self.seed}, "storage": f"s3://unfreeze/{name}",
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self, spec: Path) -> subprocess.Popen[bytes]:
        """The command, its lines in files beside the spec."""
        out, log = spec.with_suffix(".json").open("wb"), spec.with_suffix(".log").open("wb")
        with out, log:
            return subprocess.Popen([UNFREEZE, "search", str(spec), "--json"], env=self.env, stdout=out, stderr=log)

    def finish(self, spec: Path) -> tuple[dict[str, Any], float]:
        """The answer of the command run to its end, with the times that only the stored result has, and its seconds."""
        started = time.perf_counter()
        if code := self.start(spec).wait(TIMEOUT_S):
            raise RuntimeError(f"exit {code}: {spec.with_suffix('.log').read_text()[-3000:]}")
        return self.answer(spec), time.perf_counter() - started

    def answer(self, spec: Path) -> dict[str, Any]:
        text = spec.with_suffix(".json").read_text()
        try:
            answer = json.loads(text)
        except json.JSONDecodeError:
            raise RuntimeError(f"stdout is not one JSON object: {text[:1500]}") from None
        stored = self.on_s3(spec.stem) / answer["search"]["search_id"] / "result.json"
        return {**answer, "stored": json.loads(stored.read_text())}

    def on_s3(self, name: str) -> Path:
        """Where the embedded S3 keeps the searches of a storage; read as files, as it may have been killed."""
        return self.folder / "home" / "s3" / "unfreeze" / name / "searches"

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the journal holds now; a line that was being written does not count."""
        found = []
        for segment in sorted(self.on_s3(name).glob("*.journal/*.jsonl")):
            with suppress(FileNotFoundError, json.JSONDecodeError):
                found += [json.loads(line) for line in segment.read_text().splitlines()]
        return found

    def kill(self, target: str, driver: subprocess.Popen[bytes], rng: random.Random) -> bool:
        """Whether there was something to kill."""
        servers = json.loads((self.folder / "home" / "stack.json").read_text())["servers"]
        if target == "worker":
            family = psutil.Process(servers["ray"]["leader"]["pid"]).children(recursive=True)
            workers = [one for one in family if _name(one).startswith("ray::")]
            if workers:
                rng.choice(workers).kill()
            return bool(workers)
        victims = [psutil.Process(driver.pid)]
        for server in servers.values() if target == "everything" else ():
            for known in (server["leader"], *server["members"]):
                with suppress(psutil.NoSuchProcess):
                    process = psutil.Process(known["pid"])
                    if abs(process.create_time() - known["create_time"]) < 2:
                        victims += [process, *process.children(recursive=True)]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        return True

    def running_in_mlflow(self, name: str) -> int:
        from mlflow.tracking import MlflowClient

        address = json.loads(subprocess.run([UNFREEZE, "status", "--json"], env=self.env, check=True, capture_output=True).stdout)
        client = MlflowClient(address["mlflow"]["uri"])
        experiment = client.get_experiment_by_name(name)
        return len(client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")) if experiment else -1


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def timeless(value: Any) -> Any:
    """The value without any time in it."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def outcome(answer: dict[str, Any]) -> dict[str, Any]:
    trials = sorted(answer["stored"]["trials_detail"], key=lambda trial: trial["trial_id"])
    for trial in trials:
        trial.pop("epochs_run", None)  # a late judgement cuts what ran on beyond it: how far it had come is chance
    return {"search_id": answer["search"]["search_id"], "best": answer["stored"]["best"], "trials": timeless(trials)}


def ran_again(events: list[dict[str, Any]], answer: dict[str, Any]) -> list[str]:
    """Trials that had ended by the kill but whose epochs in the result are others than those in the journal then."""
    found = {int(trial["trial_id"]): trial for trial in answer["stored"]["trials_detail"]}
    before: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["kind"] == "epoch":
            before.setdefault(event["index"], []).append(event["epoch"])
    return [
        f"trial {i} ran again"
        for i, epochs in before.items()
        if i not in found or epochs[: found[i]["epochs"]] != found[i]["curve"][: len(epochs)]
    ]


def one_kill(site: Site, number: int, scheduler: str, rng: random.Random, expected: dict[str, Any], usual_s: float) -> Round:
    """Start one search, kill, start it again where the command died, and compare."""
    spec, target = site.spec(f"kill-{number:03d}", scheduler), TARGETS[number % len(TARGETS)]
    in_search, share = target == "worker" or rng.random() < 0.7, rng.random()
    log = spec.with_suffix(".log")
    driver = site.start(spec)
    if in_search:  # most moments lie in the search itself
        while driver.poll() is None and "Searching" not in log.read_text():
            time.sleep(0.02)
        usual_s = expected["stored"]["seconds"]
    delay_s = share * 0.9 * usual_s
    time.sleep(delay_s)
    done = driver.poll() is not None
    killed = not done and site.kill(target, driver, rng)
    if target != "worker":
        driver.wait(TIMEOUT_S)
    events = site.events(spec.stem)
    lines = [line for line in log.read_text().splitlines() if line.strip()] or ["before its first line"]
    moment = f"{delay_s:.1f} s into {'the search' if in_search else 'the command'}: {lines[-1][:48]}"
    problems = [] if killed else [TOO_LATE if done else "no worker to kill"]
    if driver.wait(TIMEOUT_S) and target == "worker":
        problems.append(f"the command ended with {driver.returncode}: {log.read_text()[-300:]}")
    try:
        answer = site.answer(spec) if driver.returncode == 0 else site.finish(spec)[0]
        problems += compare(answer, expected, events)
        running = site.running_in_mlflow(spec.stem)
        problems += [f"{running} runs RUNNING in MLflow"] if running else []
    except RuntimeError as error:
        problems.append(f"no answer: {error}")
    return Round(scheduler, target, moment, f"{sum(event['kind'] == 'epoch' for event in events)} epochs", problems)


def compare(answer: dict[str, Any], expected: dict[str, Any], events: list[dict[str, Any]]) -> list[str]:
    """What is wrong with an answer."""
    same = outcome(answer) == outcome(expected)
    return ran_again(events, answer) + ([] if same else [f"another outcome: {differences(outcome(answer), outcome(expected))}"])


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first few trials that differ."""
    pairs = zip(found["trials"], expected["trials"], strict=False)
    other = [f"{a} instead of {b}" for a, b in pairs if a != b]
    counts = f"{len(found['trials'])} trials instead of {len(expected['trials'])}; {len(other)} differ"
    return f"{counts}: {' | '.join(other[:2])}; best {found['best']}"


def main() -> None:
    chosen = options(__doc__, kills=(20, 3, "how many searches to kill"))
    rng, rounds = random.Random(chosen.seed), []
    table = Table(title="where each was killed")
    for column in ("scheduler", "killed", "moment", "journal then", "result"):
        table.add_column(column, overflow="fold")
    with home() as folder:
        site = Site(folder, chosen)
        subprocess.run([UNFREEZE, "up"], env=site.env, check=True, capture_output=True)
        try:
            site.finish(site.spec("warm-up", "fifo"))
            undisturbed = {scheduler: site.finish(site.spec(f"undisturbed-{scheduler}", scheduler)) for scheduler in SCHEDULERS}
            for number in range(2 * chosen.more.kills):
                if len(rounds) == chosen.more.kills:
                    break
                scheduler = SCHEDULERS[number // len(TARGETS) % 2] if chosen.more.kills > 3 else SCHEDULERS[number % 2]
                found = one_kill(site, number, scheduler, rng, *undisturbed[scheduler])
                if found.problems == [TOO_LATE]:
                    print(f"{number + 1}: {TOO_LATE}; another instead", flush=True)
                    continue
                rounds.append(found)
                table.add_row(found.scheduler, found.target, found.moment, found.known, "; ".join(found.problems) or "the same")
                print(f"{number + 1}: {found.scheduler}, {found.target}, {found.moment}: {found.problems or 'the same'}", flush=True)
        finally:
            subprocess.run([UNFREEZE, "down"], env=site.env, check=True, capture_output=True)
    Console(width=160).print(table)
    good = sum(not one.problems for one in rounds)
    figures = [Figure("killed searches that end as undisturbed", good, f" of {len(rounds)}", len(rounds))]
    report("Kill -9 at random moments", figures, chosen, rounds=[vars(one) for one in rounds])


if __name__ == "__main__":
    main()

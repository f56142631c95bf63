"""What the orchestration costs beside the work of its steps: python benchmarks/orchestration.py [--small]

A small retraining as its users start it: with nothing running (the command starts S3, MLflow, Prefect and Ray, and ends them), and on a
stack that is up; and a last time unchanged, when it skips. Wall seconds from outside, less the seconds of the steps' own work that the
run's metrics.json tells, is what the orchestration took: start-up, Prefect, connections, records, leaving. It hardly grows with the work,
so its share of a job of ten minutes is it divided by 600 s. What a step spends on Ray's own start (Ray Train's workers) is the step's.
Then empty steps: what one more step costs. The small size has only the stack that is up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from bench import Figure, home, medians, options, report
from search_against_peers import write_images

UNFREEZE = str(Path(sys.executable).with_name("unfreeze"))
JOB_S = 600.0
GOAL_SHARE = 5.0
TIMEOUT_S = 800
EMPTY = """
import pathlib, sys, time
from flows import commands
from ray_jobs.spec_file import load_spec

spec, count = load_spec(pathlib.Path(sys.argv[1]), []), int(sys.argv[2])
with commands.services(spec.storage, "a benchmark"):
    from prefect import flow
    from tasks.policies import effect, keep_results, step

    @effect(name="nothing", timeout_s=60)
    def nothing(spec, number):
        return None

    @step(name="kept", key=lambda spec, number: [number, sys.argv[3]], timeout_s=60)
    def kept(spec, number):
        return {"number": number}

    def timed(work):
        started = time.perf_counter()
        for number in range(count):
            work(spec, number)
        return 1000 * (time.perf_counter() - started) / count

    @flow(persist_result=False)
    def empty(spec):
        nothing(spec, -1)
        return [timed(nothing), timed(kept), timed(kept)]

    found = keep_results(empty, spec)(spec)
print("FOUND", *found)
"""


def write_spec(folder: Path, name: str, source: Path) -> Path:
    """A small job whose every step does something."""
    content = {
        "name": name, "data": {"source": str(source), "image_size": 64}, "backbone": {"name": "resnet10t", "weights": "none"},
        "search": {"unfreeze_depth": [0, 1], "lr": [1e-2, 1e-3], "max_epochs": 2}, "fit": {"num_workers": 1, "max_epochs": 2},
        "storage": f"s3://unfreeze/{name}",
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def retrain(spec: Path, folder: Path) -> dict[str, Any]:
    """One command: its wall seconds, and its own account."""
    started = time.perf_counter()
    done = subprocess.run([UNFREEZE, "retrain", str(spec), "--json"], capture_output=True, text=True, timeout=TIMEOUT_S)
    wall_s = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-3000:]}")
    answer = json.loads(done.stdout)
    account: dict[str, Any] = json.loads((folder / "home" / "runs" / f"{answer['flow_run_id']}.json").read_text())
    account["wall_s"] = wall_s
    account["overhead_s"] = wall_s - account["in_steps_s"]
    account["leaving_s"] = wall_s - account["seconds"]
    parts = account["orchestration"]
    told = ", ".join(f"{part} {parts[f'{part}_s']:.1f} s" for part in ("start", "services", "flow", "between_steps"))
    print(
        f"{answer['status']}: {wall_s:.1f} s, {account['in_steps_s']:.1f} s in steps; {told}, leaving {account['leaving_s']:.1f} s",
        flush=True,
    )
    return account


def empty_steps(spec: Path, count: int) -> list[float]:
    """ms of an effect, of a step that is computed, and of one that is kept, each with Prefect and the records on S3."""
    command = [sys.executable, "-c", EMPTY, str(spec), str(count), str(time.time())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() + done.stderr.splitlines() if line.startswith("FOUND"))
    return [float(word) for word in line.split()[1:]]


def main() -> None:
    chosen = options(__doc__, images=(40, 12, "images a class"), steps=(100, 20, "empty steps"))
    runs: dict[str, list[dict[str, Any]]] = {"nothing running": [], "stack up": [], "skipped, stack up": []}
    with home() as folder:
        source = write_images(folder / "images", chosen.more.images)
        for number in range(0 if chosen.small else chosen.rounds):
            runs["nothing running"].append(retrain(write_spec(folder, f"cold{number}", source), folder))
        subprocess.run([UNFREEZE, "up"], check=True, capture_output=True, timeout=TIMEOUT_S)
        try:
            for number in range(chosen.rounds):
                spec = write_spec(folder, f"warm{number}", source)
                runs["stack up"].append(retrain(spec, folder))
                runs["skipped, stack up"].append(retrain(spec, folder))
            an_effect, a_step, a_kept_step = empty_steps(spec, chosen.more.steps)
        finally:
            subprocess.run([UNFREEZE, "down"], check=True, capture_output=True, timeout=TIMEOUT_S)
    overhead = medians({name: [run["overhead_s"] for run in found] for name, found in runs.items() if found})
    goal = None if chosen.small else GOAL_SHARE
    figures = []
    for name in ("stack up",) if chosen.small else ("nothing running", "stack up"):
        figures.append(Figure(f"orchestration, {name}, of a job of 10 minutes", 100 * overhead[name] / JOB_S, " %", goal, higher=False))
        figures.append(Figure(f"  it is, of {len(runs[name][0]['steps'])} steps", overhead[name], " s"))
        for part in ("start", "services", "flow", "between_steps"):
            middle = medians({part: [run["orchestration"][f"{part}_s"] for run in runs[name]]})[part]
            figures.append(Figure(f"    {part.replace('_', ' ')}", middle, " s"))
        figures.append(Figure("    leaving", medians({"": [run["leaving_s"] for run in runs[name]]})[""], " s"))
    figures.append(
        Figure("a retraining that skips, stack up, wall", medians({"": [r["wall_s"] for r in runs["skipped, stack up"]]})[""], " s")
    )
    figures += [Figure("an empty effect", an_effect, " ms"), Figure("an empty step, computed", a_step, " ms")]
    figures.append(Figure("an empty step, kept", a_kept_step, " ms"))
    report("Orchestration", figures, chosen, runs=runs)


if __name__ == "__main__":
    main()

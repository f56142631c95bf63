"""A search of a thousand trials, as a user runs it: python benchmarks/many_trials.py [--small]

Heads and shallow depths of a small backbone on the bundled images. While `unfreeze search` runs, its memory is read every second.
Checked: the memory does not grow with the trials, MLflow is written in batches (seconds for all child runs), the report stays small.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from bench import Figure, home, options, report
from search_against_peers import write_images

UNFREEZE = str(Path(sys.executable).with_name("unfreeze"))
GROWTH_MB = 50.0


def watched(command: list[str], env: dict[str, str], out: Path, log: Path) -> tuple[list[tuple[float, float, str]], float]:
    """Run it; (seconds, MB of the driver, last line of its progress) once a second, and its seconds."""
    started, seen = time.perf_counter(), []
    with out.open("wb") as answer, log.open("wb") as lines:
        driver = subprocess.Popen(command, env=env, stdout=answer, stderr=lines)
        process = psutil.Process(driver.pid)
        while driver.poll() is None:
            with suppress(psutil.NoSuchProcess, IndexError):
                seen.append((time.perf_counter() - started, process.memory_info().rss / 1e6, log.read_text().splitlines()[-1]))
            time.sleep(1)
    if driver.returncode:
        raise SystemExit(log.read_text()[-3000:])
    return seen, time.perf_counter() - started


def growth_mb(seen: list[tuple[float, float, str]]) -> float:
    """From the first to the last fifth of the seconds in which trials ran (the imports before and after are not the trials')."""
    running = [mb for _, mb, line in seen if line.startswith("Searching") and "%" in line]
    part = max(1, len(running) // 5)
    return statistics.median(running[-part:]) - statistics.median(running[:part]) if running else float("nan")


def step_seconds(log: Path, name: str) -> float:
    """What the progress says a step took."""
    line = next(line for line in log.read_text().splitlines() if line.startswith(name) and "done in" in line)
    return float(line.rsplit("done in ", 1)[1].split()[0])


def main() -> None:
    chosen = options(__doc__, trials=(1000, 100, "trials in the search"))
    with home() as folder:
        env = {**os.environ, "UNFREEZE_HOME": str(folder / "home")}
        search: dict[str, Any] = {
            "unfreeze_depth": [0, 1], "num_trials": chosen.more.trials, "max_epochs": 4, "scheduler": "asha", "weight_decay": [1e-4, 1e-2],
            "label_smoothing": [0.0, 0.1], "lr": {"low": 1e-4, "high": 1e-2}, "searcher": "random", "seed": chosen.seed,
        }  # fmt: skip
        content = {
            "name": "many", "data": {"source": str(write_images(folder / "images", 30)), "image_size": 32},
            "backbone": {"name": "test_efficientnet", "weights": "none"}, "search": search,
        }  # fmt: skip
        spec, out, log = folder / "many.yaml", folder / "many.json", folder / "many.log"
        spec.write_text(yaml.safe_dump(content))
        subprocess.run([UNFREEZE, "up"], env=env, check=True, capture_output=True)
        try:
            seen, seconds = watched([UNFREEZE, "search", str(spec), "--json"], env, out, log)
        finally:
            subprocess.run([UNFREEZE, "down"], env=env, check=True, capture_output=True)
        answer = json.loads(out.read_text())
        trials, page = answer["trials_detail"], next((folder / "home" / "reports").glob("many-search-*.html"))
        figures = [
            Figure("trials", len(trials), "", chosen.more.trials),
            Figure("memory of the driver, growth over the trials", growth_mb(seen), " MB", GROWTH_MB, higher=False),
            Figure("  at most", max(mb for _, mb, _ in seen), " MB"),
            Figure("the whole command", seconds, " s"),
            Figure("  of it writing to MLflow", step_seconds(log, "Recording the search"), " s"),
            Figure("  of it the report", step_seconds(log, "Rendering the report"), " s"),
            Figure("the report's page", page.stat().st_size / 1e6, " MB"),
        ]
        print(log.read_text())
        report("A search of many trials", figures, chosen, memory=[(round(at, 1), round(mb, 1)) for at, mb, _ in seen])


if __name__ == "__main__":
    main()

"""Every benchmark, one after the other, and one table of the goals at the end: make bench [ARGS=--small]

Writes a JSON for each into benchmarks/results/. One that fails is a row of the table, and ends this with 1; the others still run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import ROOT, Figure, print_figures

RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = (
    "prefix", "decode_and_resize", "new_images", "trial_overhead", "planner", "warm_start", "marginal_trial", "many_trials", "views",
    "gate", "transfers", "orchestration",
)  # fmt: skip
CASES = ("last-blocks", "all-depths", "heads")
PEER_GOALS = {
    "last-blocks": {"fifo": 10.0, "asha": 3.0}, "all-depths": {"fifo": 8.0, "asha": 1.5}, "heads": {"fifo": 100.0, "sequential": 3.0}
}  # fmt: skip
DECODE_GOAL = 1.5


def commands() -> dict[str, list[str]]:
    """What to run, by the name of its result."""
    found = {name: [f"{name}.py"] for name in SCRIPTS}
    return {**found, **{f"search_{case}": ["search_against_peers.py", "--case", case] for case in CASES}}


def figures_of(name: str, content: dict[str, Any], *, small: bool) -> list[Figure]:
    """The figures of one result that have a goal."""
    if name == "decode_and_resize":
        ratios = {what: ms["torchvision v1"] / ms["ours"] for what, ms in content.items()}
        return [Figure(f"decode and resize: {what}", ratio, "x", DECODE_GOAL) for what, ratio in ratios.items()]
    if name.startswith("search_"):
        case, ratios = content["case"], content["ratios"]
        goals = {} if small else PEER_GOALS[case]
        return [Figure(f"search, {case}: against {arm}", ratio, "x", goals.get(arm)) for arm, ratio in ratios.items() if arm != "ours"]
    kept = ({key: value for key, value in row.items() if key != "met"} for row in content["figures"])
    return [figure for figure in (Figure(**row) for row in kept) if small or figure.goal is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="little data, one round: ten minutes in all, to see that everything works")
    parser.add_argument("--only", default="", help="comma-separated results, e.g. prefix,search_heads")
    chosen = parser.parse_args()
    wanted = commands() if not chosen.only else {name: commands()[name] for name in chosen.only.split(",")}
    RESULTS.mkdir(exist_ok=True)
    figures: list[Figure] = []
    failed: list[str] = []
    for name, command in wanted.items():
        result = RESULTS / f"{name}{'-small' if chosen.small else ''}.json"
        result.unlink(missing_ok=True)
        print(f"\n=== {name}", flush=True)
        started = time.perf_counter()
        arguments = [*(["--small"] if chosen.small else []), "--json", str(result)]
        done = subprocess.run([sys.executable, "-W", "ignore", str(Path(__file__).with_name(command[0])), *command[1:], *arguments])
        print(f"=== {name}: {time.perf_counter() - started:.0f} s", flush=True)
        if done.returncode or not result.exists():
            failed.append(name)
            continue
        figures += figures_of(name, json.loads(result.read_text()), small=chosen.small)
    print_figures(f"All benchmarks{', small size: not figures to quote' if chosen.small else ''}", figures)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

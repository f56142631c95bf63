"""The planned cuts against "materialise all" and "materialise none": python benchmarks/planner.py [--small]

The wall time of the cache step and the search together, each arm in a storage of its own, so that nothing is there yet; lanes are
warm, and the machine is calibrated before the clock starts. A plan that is one of the other two arms is not run a second time.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

from bench import LITE0, Figure, in_turns, options, prepared, report, seconds, stack
from search_against_peers import write_images

GOAL, PLANNING_GOAL_S = 1.05, 1.0
FOUR = [1e-2, 3e-3, 1e-3, 3e-4]
WORKLOADS: dict[str, dict[str, Any]] = {
    "many epochs": {"unfreeze_depth": [0, 1, 2], "lr": FOUR[:2], "max_epochs": 8},
    "one trial, one epoch": {"unfreeze_depth": [2], "lr": FOUR[2:3], "max_epochs": 1},
    "deep only": {"unfreeze_depth": [5, 7], "lr": FOUR[2:], "max_epochs": 2},
    "two views": {"unfreeze_depth": [0, 2], "lr": FOUR[2:], "max_epochs": 4, "views": 2},
}
Source = dict[str, int]
NUMBERS = itertools.count()


class Workload:
    """One search, to be run with one or another choice of cuts."""

    def __init__(self, name: str, manifest: Any, seed: int, image_size: int) -> None:
        self.name = name
        search = {"scheduler": "fifo", "searcher": "grid", "seed": seed, **WORKLOADS[name]}
        data = {"source": str(manifest), "image_size": image_size}
        self.content = {"name": "planner", "data": data, "backbone": LITE0, "search": search, "fit": {"augmentation": "symbol"}}
        self.spec = self.spec_in("s3://unfreeze/planned")
        self.dataset, self.backbone = prepared(self.spec)

    def spec_in(self, storage: str) -> Any:
        from ray_jobs.spec_file import parse_spec

        return parse_spec({**self.content, "storage": storage})

    def plan(self) -> dict[str, Any]:
        from ray_jobs.plan_on_ray import plan_search

        return plan_search(self.spec, self.dataset, self.backbone)

    def run(self, source: Source) -> float:
        """Seconds of the features and the search when every depth starts from the cut that `source` says."""
        from infra.progress import ignore
        from ray_jobs.features_on_ray import cache_features
        from ray_jobs.search_on_ray import run_search

        spec = self.spec_in(f"s3://unfreeze/arm-{next(NUMBERS)}")
        cuts = sorted(set(source.values()))

        def both() -> None:
            features = cache_features(spec, self.dataset, self.backbone, ignore, depths=cuts)["features"]
            run_search(spec, self.dataset, [self.backbone], [features], ignore, sources=[source])

        return seconds(both)


def measure(work: Workload, rounds: int, goal: float | None) -> tuple[list[Figure], dict[str, Any]]:
    """The figures of one workload."""
    work.plan()  # measures the machine, where no workload before did
    planned = work.plan()
    groups = work.backbone["groups"]
    depths = list(planned["source"])
    sources = {"planned": planned["source"], "all": {depth: int(depth) for depth in depths}, "none": dict.fromkeys(depths, groups)}
    same = next((arm for arm in ("all", "none") if sources[arm] == sources["planned"]), None)
    found = in_turns({arm: functools.partial(work.run, source) for arm, source in sources.items() if arm != "planned" or not same}, rounds)
    typical = {arm: statistics.median(values) for arm, values in found.items()}
    ours_s = typical[same or "planned"]
    better = min(("all", "none"), key=lambda arm: typical[arm])
    what = f"{work.name}: cuts {planned['materialise']}{f' (= {same})' if same else ''} against {better}"
    figures = [
        Figure(what, ours_s / typical[better], "x", goal, higher=False),
        Figure(f"  all {typical['all']:.1f} s, none {typical['none']:.1f} s, planned", ours_s, " s"),
        Figure("  planning, calibrated", planned["planning_s"], " s", PLANNING_GOAL_S, higher=False),
        Figure(f"  estimated {planned['estimated_s']:.1f} s; estimate against real", planned["estimated_s"] / ours_s, "x"),
    ]
    return figures, {"plan": planned, "seconds": found, "same_as": same}


def main() -> None:
    chosen = options(__doc__)
    figures, detail = [], {}
    with stack() as folder:
        manifest = write_images(folder / "images", 16 if chosen.small else None)
        size = 64 if chosen.small else 96
        Workload("one trial, one epoch", manifest, chosen.seed, size).run({"0": 0, "2": 2})  # Tune is imported, the workers are known
        for name in ("many epochs", "deep only") if chosen.small else WORKLOADS:
            rows, detail[name] = measure(Workload(name, manifest, chosen.seed, size), chosen.rounds, None if chosen.small else GOAL)
            figures += rows
            print(f"{name}: {detail[name]['seconds']}", flush=True)
    report("Planned cuts against all and none", figures, chosen, workloads=detail)


if __name__ == "__main__":
    main()

"""What a trial of a search costs beyond its own training: python benchmarks/trial_overhead.py [--small]

Trivial trials (a tiny backbone, a few images of 32 px, depth 1, one epoch) through run_search, and so through Ray Tune, the engine and
the journal on S3. A trial's own training is the seconds of its epoch alone; all else counts as overhead, also putting the weights
back, reading the result and what the search does once (importing Tune, the probes, writing the results). Then a real search.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench import LITE0, Figure, options, prepared, report, seconds, stack
from search_against_peers import write_images

GOAL_MS, GOAL_SHARE = 30.0, 5.0


class Search:
    """One search after another over the same images, each in a storage of its own, so that none is found finished."""

    def __init__(self, name: str, manifest: Any, image_size: int, backbone: dict[str, str], **search: Any) -> None:
        self.content = {
            "name": name, "data": {"source": str(manifest), "image_size": image_size}, "backbone": backbone,
            "search": {"searcher": "random", "scheduler": "fifo", **search},
        }  # fmt: skip
        self.number = 0

    def run(self, seed: int) -> dict[str, float]:
        """Wall seconds of run_search on features that are cached, and the trials' own."""
        from infra.progress import ignore
        from ray_jobs.features_on_ray import cache_features
        from ray_jobs.search_on_ray import run_search
        from ray_jobs.spec_file import parse_spec
        from ray_jobs.workers import lanes

        self.number += 1
        storage = f"s3://unfreeze/{self.content['name']}-{self.number}"
        spec = parse_spec({**self.content, "storage": storage, "search": {**self.content["search"], "seed": seed}})
        dataset, backbone = prepared(spec)
        features = cache_features(spec, dataset, backbone, ignore)["features"]
        found: dict[str, Any] = {}
        wall_s = seconds(lambda: found.update(run_search(spec, dataset, [backbone], [features], ignore)))
        trials = [trial for trial in found["trials_detail"] if trial["unfreeze_depth"]]
        own_s = sum(epoch["seconds"] for trial in trials for epoch in trial["curve"])
        return {"wall_s": wall_s, "own_s": own_s, "trials": len(trials), "lanes": len(lanes())}


def beyond_ms(one: dict[str, float]) -> float:
    """Wall milliseconds a trial in which its lane does not train."""
    return 1000 * (one["wall_s"] - one["own_s"] / one["lanes"]) / one["trials"]


def main() -> None:
    chosen = options(__doc__, trials=(200, 40, "trivial trials in one search"))
    tiny = {"name": "test_efficientnet", "weights": "none"}
    trivial: list[dict[str, float]] = []
    few: list[dict[str, float]] = []
    real: list[dict[str, float]] = []
    with stack() as folder:
        small, whole = write_images(folder / "few", 8), write_images(folder / "all", 40 if chosen.small else None)
        count = chosen.more.trials
        settings: dict[str, Any] = {"unfreeze_depth": [1], "max_epochs": 1}
        many = Search("many", small, 32, tiny, num_trials=count, **settings)
        some = Search("some", small, 32, tiny, num_trials=count // 5, **settings)
        rates = {"unfreeze_depth": [0, 1, 2], "lr": [1e-2, 3e-3, 1e-3, 3e-4], "max_epochs": 8}
        if chosen.small:
            rates = {"unfreeze_depth": [0, 1], "lr": [1e-2, 1e-3], "max_epochs": 2}
        usual = Search("real", whole, 96, LITE0, **{**rates, "searcher": "grid"})
        some.run(chosen.seed)  # Tune is imported, the workers are known
        for number in range(chosen.rounds):
            few.append(some.run(chosen.seed + number))
            trivial.append(many.run(chosen.seed + number))
            real.append(usual.run(chosen.seed + number))
    overhead_ms = statistics.median(beyond_ms(one) for one in trivial)
    further = [(b["wall_s"] - a["wall_s"] - (b["own_s"] - a["own_s"]) / b["lanes"]) for a, b in zip(few, trivial, strict=True)]
    further_ms = 1000 * statistics.median(further) / (trivial[0]["trials"] - few[0]["trials"])
    share = statistics.median(overhead_ms / 1000 * one["trials"] / one["wall_s"] for one in real)
    idle = statistics.median(1 - one["own_s"] / one["lanes"] / one["wall_s"] for one in real)
    figures = [
        Figure(f"a trial beyond its own training, {count} trials", overhead_ms, " ms", None if chosen.small else GOAL_MS, higher=False),
        Figure("  of which grows with the trials", further_ms, " ms"),
        Figure("overhead of the trials, share of a real search", 100 * share, " %", None if chosen.small else GOAL_SHARE, higher=False),
        Figure("  lanes not training a trial: probes, start and end included", 100 * idle, " %"),
    ]
    report("Overhead of a trial", figures, chosen, trivial=trivial, few=few, real=real)


if __name__ == "__main__":
    main()

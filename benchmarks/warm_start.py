"""What a warm start saves: trial-epochs to within 0.5 point of the cold search's best: python benchmarks/warm_start.py [--small]

For each seed: a search over yesterday's images (every 20th is missing) is recorded in MLflow; then, over today's, one search knows nothing
and one takes the best points of that history first. Epochs count in the order in which they ended, over all trials.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench import LITE0, Figure, options, prepared, report, stack
from new_images import without_the_new
from search_against_peers import write_images

GOAL, WITHIN = 1 / 3, 0.005
YESTERDAY_SEED = 1000


class Night:
    """The searches of one seed; a model name, and so a history, of their own."""

    def __init__(self, seed: int, small: bool) -> None:
        space = (
            {"unfreeze_depth": [1, 2], "num_trials": 4, "max_epochs": 2}
            if small
            else {"unfreeze_depth": [1, 2, 3], "num_trials": 16, "max_epochs": 8}
        )
        self.search = {**space, "lr": {"low": 1e-5, "high": 1e-1}, "searcher": "random", "scheduler": "asha"}
        self.seed, self.image_size = seed, 64 if small else 96

    def spec(self, manifest: Any, seed: int, *, warm_start: bool = False) -> Any:
        from ray_jobs.spec_file import parse_spec

        return parse_spec({
            "name": f"night-{self.seed}", "data": {"source": str(manifest), "image_size": self.image_size}, "backbone": LITE0,
            "search": {**self.search, "seed": seed, "warm_start": warm_start},
        })  # fmt: skip

    def run(self, spec: Any, *, record: bool = False) -> list[dict[str, Any]]:
        """The trials of a search; recorded in MLflow where it is to be history."""
        from infra.progress import ignore
        from ray_jobs.features_on_ray import cache_features
        from ray_jobs.search_on_ray import run_search
        from ray_jobs.search_space import TrialConfig
        from tasks.search import past_points, record_search

        dataset, backbone = prepared(spec)
        points = past_points.fn(spec, dataset, [backbone])["points"]
        features = cache_features(spec, dataset, backbone, ignore)["features"]
        found = run_search(spec, dataset, [backbone], [features], ignore, warm=[TrialConfig(**point) for point in points])
        if record:
            record_search.fn(spec, dataset, [backbone], found)
        trials: list[dict[str, Any]] = found["trials_detail"]
        return trials


def epochs_to(trials: list[dict[str, Any]], accuracy: float) -> tuple[int, bool]:
    """Trial-epochs until one reached this val accuracy, and whether any did; all of them where none did."""
    ended = []
    for trial in trials:
        at_s = trial["started_at"] / 1000
        for epoch in trial["curve"]:
            at_s += epoch["seconds"]
            ended.append((at_s, epoch["val_accuracy"]))
    reached = [number for number, (_, found) in enumerate(sorted(ended), 1) if found >= accuracy]
    return (reached[0], True) if reached else (len(ended), False)


def one_seed(seed: int, manifest: Any, before: Any, small: bool) -> dict[str, Any]:
    night = Night(seed, small)
    night.run(night.spec(before, YESTERDAY_SEED + seed), record=True)
    arms = {"cold": False, "warm": True}
    order = list(arms) if seed % 2 == 0 else list(reversed(arms))
    trials = {arm: night.run(night.spec(manifest, seed, warm_start=arms[arm])) for arm in order}
    best = {arm: max(trial["accuracy"] or 0 for trial in found) for arm, found in trials.items()}
    epochs = {arm: epochs_to(found, best["cold"] - WITHIN) for arm, found in trials.items()}
    total = {arm: sum(trial["epochs"] for trial in found) for arm, found in trials.items()}
    return {"seed": seed, "best": best, "epochs": {arm: n for arm, (n, _) in epochs.items()}, "reached": epochs["warm"][1], "total": total}


def main() -> None:
    chosen = options(__doc__, seeds=(5, 1, "searches with and without a history"))
    rounds = []
    with stack("mlflow") as folder:
        manifest = write_images(folder / "images", 24 if chosen.small else None)
        before = without_the_new(manifest)
        for number in range(chosen.more.seeds):
            rounds.append(one_seed(chosen.seed + number, manifest, before, chosen.small))
            print(rounds[-1], flush=True)
    ratio = statistics.median(one["epochs"]["warm"] / one["epochs"]["cold"] for one in rounds)
    pooled = sum(one["epochs"]["warm"] for one in rounds) / sum(one["epochs"]["cold"] for one in rounds)
    figures = [
        Figure("trial-epochs to within 0.5 point, warm against cold (median)", ratio, "x", None if chosen.small else GOAL, higher=False),
        Figure("  over all seeds together", pooled, "x"),
        Figure("  seeds in which the warm search came there", sum(one["reached"] for one in rounds), f" of {len(rounds)}"),
        Figure(
            "  best val accuracy, warm less cold (mean)",
            100 * statistics.fmean(o["best"]["warm"] - o["best"]["cold"] for o in rounds),
            " points",
        ),
    ]
    report("A warm-started search", figures, chosen, seeds=rounds)


if __name__ == "__main__":
    main()

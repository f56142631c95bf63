"""A retraining with 5 % new images against a cold one: python benchmarks/new_images.py [--small]

Each round has two storages: one holds what yesterday's 95 % of the images left and gets all of them now; the other gets all of them from
nothing. The bundled images at 96 px, tf_efficientnet_lite0, cuts 0 to 3 in one pass. Lanes are warm and have the model traced, as
both arms would wait for that alike. "decode + prefix" is the pass over the missing images with its shards written to S3.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

from bench import LITE0, Figure, medians, options, prepared, report, seconds, stack
from search_against_peers import write_images

NEW_EVERY = 20
DEPTHS = (0, 1, 2, 3)
GOAL = 12.0


class PassClock:
    """Adds up the seconds of the passes over images, which lie inside the cache step."""

    def __init__(self) -> None:
        from ray_jobs import features_on_ray

        self.plain, self.spent_s = features_on_ray._compute, 0.0
        features_on_ray._compute = self

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.plain(*arguments)
        finally:
            self.spent_s += time.perf_counter() - started


def without_the_new(manifest: Path) -> Path:
    """A manifest beside it without every 20th image."""
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    before = manifest.with_name("before.csv")
    with before.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row for number, row in enumerate(rows, 1) if number % NEW_EVERY)
    return before


class Retraining:
    """The steps up to the features, in one storage."""

    def __init__(self, storage: str, backbone: dict[str, Any], clock: PassClock) -> None:
        self.storage, self.backbone, self.clock = storage, backbone, clock

    def spec(self, manifest: Path) -> Any:
        from ray_jobs.spec_file import parse_spec

        data = {"source": str(manifest), "image_size": 96}
        search = {"unfreeze_depth": list(DEPTHS)}
        return parse_spec({"name": "new", "data": data, "backbone": LITE0, "search": search, "storage": self.storage})

    def run(self, manifest: Path) -> dict[str, float]:
        """Seconds of the steps, of the pass within, and the images computed."""
        from infra.progress import ignore
        from ray_jobs.features_on_ray import cache_features
        from ray_jobs.prepare_on_ray import prepare

        spec, made = self.spec(manifest), {}
        prepare_s = seconds(lambda: made.update(prepare(spec, ignore)))
        self.clock.spent_s = 0.0
        cached: dict[str, Any] = {}
        cache_s = seconds(lambda: cached.update(cache_features(spec, made, self.backbone, ignore)))
        return {"prepare": prepare_s, "cache": cache_s, "pass": self.clock.spent_s, "images": cached["computed_images"]}


def main() -> None:
    chosen = options(__doc__)
    found: dict[str, list[dict[str, float]]] = {"cold": [], "new": [], "nothing new": []}
    with stack() as folder:
        manifest = write_images(folder / "images", 40 if chosen.small else None)
        before, clock = without_the_new(manifest), PassClock()
        first = Retraining("s3://unfreeze/warm-up", {}, clock)
        _, first.backbone = prepared(first.spec(manifest))
        first.run(manifest)
        for number in range(chosen.rounds):
            grown = Retraining(f"s3://unfreeze/grown-{number}", first.backbone, clock)
            grown.run(before)
            found["new"].append(grown.run(manifest))
            found["cold"].append(Retraining(f"s3://unfreeze/cold-{number}", first.backbone, clock).run(manifest))
            found["nothing new"].append(grown.run(manifest))
    typical = {arm: medians({key: [one[key] for one in rounds] for key in rounds[0]}) for arm, rounds in found.items()}
    ratio = {key: typical["cold"][key] / typical["new"][key] for key in ("pass", "cache", "prepare")}
    figures = [
        Figure("decode + prefix, cold against 5 % new", ratio["pass"], "x", None if chosen.small else GOAL),
        Figure("  images, cold against 5 % new: the bound", typical["cold"]["images"] / typical["new"]["images"], "x"),
        Figure("the whole cache step, cold against 5 % new", ratio["cache"], "x"),
        Figure("the prepare step, cold against 5 % new", ratio["prepare"], "x"),
    ]
    for key in ("pass", "cache", "prepare"):
        figures += [Figure(f"{key}: {arm}", typical[arm][key], " s") for arm in typical if arm != "nothing new" or key != "pass"]
    report("A retraining with 5 % new images", figures, chosen, rounds=found)


if __name__ == "__main__":
    main()

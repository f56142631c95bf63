"""What fixed augmented views are worth in a search: python benchmarks/views.py [--small]

The same grid over depths 0, 1 and 2 on the bundled images, with K fixed views of each train image standing for fresh augmentation;
K = 1 is the image as it is. Prints, a K, the best and the mean val accuracy by depth over the seeds, and what the features cost.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench import LITE0, Figure, options, prepared, report, stack
from search_against_peers import write_images

VIEWS = (1, 2, 4, 8)
DEPTHS = (0, 1, 2)


def run(manifest: Any, views: int, seed: int, *, small: bool) -> dict[str, Any]:
    """Val accuracies by depth, and the cost of the features."""
    from infra.progress import ignore
    from ray_jobs.features_on_ray import cache_features
    from ray_jobs.search_on_ray import run_search
    from ray_jobs.spec_file import parse_spec

    search = {
        "unfreeze_depth": list(DEPTHS), "lr": [1e-2, 3e-3, 1e-3], "max_epochs": 2 if small else 8, "scheduler": "fifo", "searcher": "grid",
        "seed": seed, "views": views,
    }  # fmt: skip
    spec = parse_spec({
        "name": "views", "data": {"source": str(manifest), "image_size": 96}, "backbone": LITE0, "search": search,
        "fit": {"augmentation": "symbol"}, "storage": f"s3://unfreeze/views-{views}-{seed}",
    })  # fmt: skip
    dataset, backbone = prepared(spec)
    features = cache_features(spec, dataset, backbone, ignore)
    found = run_search(spec, dataset, [backbone], [features["features"]], ignore)
    accuracies = {depth: [t["accuracy"] for t in found["trials_detail"] if t["unfreeze_depth"] == depth] for depth in DEPTHS}
    return {"views": views, "seed": seed, "accuracies": accuracies, "features_s": features["seconds"], "bytes": features["bytes"]}


def main() -> None:
    chosen = options(__doc__, seeds=(2, 1, "seeds of the search"))
    rows, compared = [], VIEWS[:2] if chosen.small else VIEWS
    with stack() as folder:
        manifest = write_images(folder / "images", 24 if chosen.small else None)
        for number in range(chosen.more.seeds):
            for views in compared:
                rows.append(run(manifest, views, chosen.seed + number, small=chosen.small))
                print(rows[-1], flush=True)
    figures = []
    for views in compared:
        some = [row for row in rows if row["views"] == views]
        for depth in DEPTHS:
            best = statistics.fmean(max(row["accuracies"][depth]) for row in some)
            mean = statistics.fmean(statistics.fmean(row["accuracies"][depth]) for row in some)
            figures.append(Figure(f"K = {views}, depth {depth}: best val {best:.3f}, mean", mean))
        figures.append(
            Figure(f"K = {views}: features, {some[0]['bytes'] / 1e6:.0f} MB", statistics.fmean(r["features_s"] for r in some), " s")
        )
    report("Fixed views instead of fresh augmentation", figures, chosen, rows=rows)


if __name__ == "__main__":
    main()

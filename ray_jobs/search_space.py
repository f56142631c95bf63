"""The search space of a spec, and its trials as a grid or a stratified random sample. Pure: no Ray, no torch."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_jobs.spec import Optimizer, Range, SearchSpec, Spec

Values = Range | tuple[Any, ...]


@dataclass(frozen=True)
class TrialConfig:
    """One point of the search space: everything in which two trials may differ."""

    unfreeze_depth: int
    lr: float
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    layer_decay: float = 1.0
    optimizer: Optimizer = "adamw"
    batch_size: int = 32
    augmentation_strength: float = 1.0
    backbone: str = ""
    """A name from search.backbone; none is the spec's own, as in every record from before there could be others."""


def point_of(values: Mapping[str, Any]) -> TrialConfig:
    """The point in a trial's record; dimensions that came after it was written are at their defaults, by which it was trained."""
    return TrialConfig(**{name: values[name] for name in TrialConfig.__dataclass_fields__ if name in values})


def dimensions(search: SearchSpec) -> dict[str, Values]:
    """Every dimension by name, the fixed ones as tuples of one value."""
    found: dict[str, Values] = {}
    for name in TrialConfig.__dataclass_fields__:
        value = getattr(search, name)
        found[name] = value if isinstance(value, Range | tuple) else (value,)
    further = (one if isinstance(one, str) else one.name for one in search.backbone)
    return found | {"unfreeze_depth": tuple(sorted(search.unfreeze_depth)), "backbone": ("", *further)}


def backbone_in_points(spec: Spec, name: str) -> str:
    """What the points of a search call the backbone of this name."""
    return "" if name == spec.backbone.name else name


def varied(configs: Sequence[TrialConfig]) -> list[str]:
    """The dimensions in which these trials differ, depth and learning rate always among them."""
    rows = [asdict(config) for config in configs]
    return [name for name in TrialConfig.__dataclass_fields__ if name in ("unfreeze_depth", "lr") or len({row[name] for row in rows}) > 1]


def trial_configs(search: SearchSpec, *, warm: Sequence[TrialConfig] = ()) -> list[TrialConfig]:
    """The trials of a grid or random search in the order in which they start, the same for the same spec.

    Linear probes come first. Then, where trials may be stopped early, cheap depths, so that there is evidence before a deep one
    is paid for; where none is, deep ones, so that no long trial starts last. `warm` are points worth trying again: they take the
    places of as many sampled ones, up to the share that the spec leaves them.
    """
    deep_first = search.scheduler == "fifo"
    if search.resolved_searcher == "grid":
        space = dimensions(search)
        rows = itertools.product(*space.values())
        return _ordered([TrialConfig(**dict(zip(space, row, strict=True))) for row in rows], deep_first)
    again = list(dict.fromkeys(warm))[: warm_places(search)]
    return _ordered([*again, *sampled(search, search.num_trials - len(again))], deep_first)


def warm_places(search: SearchSpec) -> int:
    """How many of the trials may repeat points of past searches."""
    return search.num_trials - math.ceil(search.num_trials * search.fresh_share)


def sampled(search: SearchSpec, count: int) -> list[TrialConfig]:
    """A random sample, stratified: depths get equal shares, and the values of a range within a depth fall one into each of equal
    parts of it, so that few trials still cover the space."""
    rng = random.Random(search.seed)
    space = dimensions(search)
    depths = space.pop("unfreeze_depth")
    assert isinstance(depths, tuple)
    shares = _shares(count, depths, rng)
    return [config for depth in depths for config in _of_depth(depth, space, shares[depth], rng)]


def _ordered(configs: list[TrialConfig], deep_first: bool) -> list[TrialConfig]:
    return sorted(configs, key=lambda c: (c.unfreeze_depth > 0, -c.unfreeze_depth if deep_first else c.unfreeze_depth))


def _shares(count: int, depths: Sequence[int], rng: random.Random) -> dict[int, int]:
    each, left = divmod(count, len(depths))
    lucky = set(rng.sample(depths, left))
    return {depth: each + (depth in lucky) for depth in depths}


def _of_depth(depth: int, space: dict[str, Values], count: int, rng: random.Random) -> list[TrialConfig]:
    columns = {name: _column(values, count, rng) for name, values in space.items()}
    return [TrialConfig(unfreeze_depth=depth, **{name: column[i] for name, column in columns.items()}) for i in range(count)]


def _column(values: Values, count: int, rng: random.Random) -> list[Any]:
    if isinstance(values, Range):
        shares = [(part + rng.random()) / count for part in range(count)]
        rng.shuffle(shares)
        return [values.at(share) for share in shares]
    if len(values) == 1:
        return [values[0]] * count
    rounds = math.ceil(count / len(values))
    return [value for _ in range(rounds) for value in rng.sample(values, len(values))][:count]


def probe_configs(search: SearchSpec, backbone: str = "") -> list[TrialConfig]:
    """The linear probes of one backbone that run before every search.

    A head alone bears a higher rate than the layers below it, so a grid over a range is shifted up; see docs/LOG.md for the measurement.
    """
    first: dict[str, Any] = {
        name: values.at(0.5) if isinstance(values, Range) else values[0] for name, values in dimensions(search).items()
    }
    plain = TrialConfig(**(first | {"unfreeze_depth": 0, "lr": 1.0, "layer_decay": 1.0, "backbone": backbone}))
    return [replace(plain, lr=lr) for lr in probe_learning_rates(search.lr)]


PROBE_SHIFT = 3.0
PROBE_LR_CAP = 0.1
PROBE_POINTS = 4


def probe_learning_rates(lr: Range | tuple[float, ...]) -> list[float]:
    """A list as it is; over a range, a few rates above it."""
    if isinstance(lr, tuple):
        return sorted(lr)
    low, high = min(lr.low * PROBE_SHIFT, PROBE_LR_CAP), min(lr.high * PROBE_SHIFT, PROBE_LR_CAP)
    return sorted({low * (high / low) ** (i / (PROBE_POINTS - 1)) for i in range(PROBE_POINTS)})

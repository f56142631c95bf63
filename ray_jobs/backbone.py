"""Backbones: any timm model by name, checked, built once with its pretrained weights, and loaded by every worker.

A backbone folder holds model.safetensors (timm's names, without the classifier) and config.json.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from infra.errors import UserError
from infra.object_store import ObjectStore
from ray_jobs.groups import (
    freeze,
    group_names,
    group_titles,
    head_names,
    head_tensor_names,
    init_head,
    lr_scales,
    num_groups,
    require_depth,
    set_mode,
    trainable_names,
)
from ray_jobs.light_timm import without_compiler
from ray_jobs.spec import BackboneSpec, digest_of
from ray_jobs.tracing import trace
from ray_jobs.weights import has_same_shapes, hub_within_reach, matched, read_state

__all__ = [
    "build",
    "check",
    "create",
    "freeze",
    "group_names",
    "group_titles",
    "head_names",
    "init_head",
    "load",
    "lr_scales",
    "num_groups",
    "set_mode",
    "trainable_names",
]
MODEL, CONFIG = "model.safetensors", "config.json"


def check(name: str, image_size: int, depths: Sequence[int]) -> None:
    """Raise UserError for an unknown backbone, an image size it cannot take, a depth beyond its groups, or one that cannot be split."""
    _require_known(name)
    try:
        with without_compiler(), torch.device("meta"):  # shapes alone: quick for the largest models too
            model = _create_for_size(name, image_size)
            _forward(model, image_size)
    except Exception:  # not every model supports it; the real thing decides
        model = _create_for_size(name, image_size)
        _try_forward(model, name, image_size)
    groups = num_groups(model)
    for depth in depths:
        require_depth(depth, groups, f"the backbone {name!r}")
    trace(model)


def create(name: str, *, image_size: int | None, num_classes: int | None, seed: int, **options: Any) -> nn.Module:
    """A timm model for this image size, random from the seed; image_size None keeps the model's own."""
    if num_classes is not None:
        options["num_classes"] = num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if image_size is not None:
            try:
                return timm.create_model(name, img_size=image_size, **options).eval()
            except TypeError as error:  # convolutional models take any size and know no such argument
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, **options).eval()


def build(spec: BackboneSpec, *, image_size: int, seed: int, folder: Path, store: ObjectStore) -> dict[str, Any]:
    """Write the backbone folder, with the weights that the spec asks for; returns its config.

    The digest covers what computes, not where it came from. UserError where weights are missing, out of reach or do not fit.
    """
    _require_known(spec.name)
    model = _pretrained(spec, image_size, seed, store)
    head = head_tensor_names(model)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items() if name not in head}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, folder / MODEL)
    given: Any = model.pretrained_cfg
    config = {
        "name": spec.name,
        "image_size": image_size,
        "mean": [float(value) for value in given["mean"]],
        "std": [float(value) for value in given["std"]],
        "interpolation": "bicubic",
        "groups": group_titles(model),
        "num_features": int(model.num_features),  # type: ignore[arg-type]
        "weights": spec.weights,
        "parameters": sum(tensor.numel() for name, tensor in model.named_parameters() if name not in head),
        "gmacs_by_group": None,
    }
    same_everywhere = {key: config[key] for key in ("name", "image_size", "mean", "std", "interpolation")}
    config["digest"] = digest_of({**same_everywhere, "tensors": _sha256(folder / MODEL)})
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return config


def load(folder: Path, *, num_classes: int, seed: int) -> nn.Module:
    """The timm model of a backbone folder, in eval mode, with a new classifier drawn from the seed."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model = create(config["name"], image_size=config["image_size"], num_classes=num_classes, seed=seed)
    result = model.load_state_dict(safetensors.torch.load_file(folder / MODEL), strict=False)
    missing = set(result.missing_keys) - head_tensor_names(model)
    odd = missing | set(result.unexpected_keys)
    assert not odd, f"{folder} does not match its config: {sorted(odd)}"
    init_head(model, seed)
    return model


def _pretrained(spec: BackboneSpec, image_size: int, seed: int, store: ObjectStore) -> nn.Module:
    model = _create_for_size(spec.name, image_size, seed)
    if spec.weights == "none":
        return model
    if spec.weights == "timm":
        with hub_within_reach(model.pretrained_cfg, spec.name):  # type: ignore[arg-type]
            return create(spec.name, image_size=image_size, num_classes=None, seed=seed, pretrained=True)
    own = create(spec.name, image_size=None, num_classes=None, seed=seed)
    state = matched(read_state(spec.weights, store), own.state_dict(), head_tensor_names(own), spec.weights)
    if has_same_shapes(model, state):
        model.load_state_dict(state, strict=False)
        return model
    full = {**own.state_dict(), **state}
    try:  # timm knows how each family's position tables are resized to another image size
        return create(
            spec.name,
            image_size=image_size,
            num_classes=None,
            seed=seed,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": full, "custom_load": False},
        )
    except RuntimeError as error:
        raise UserError(
            f"The weights {spec.weights} do not fit {spec.name} at image size {image_size}: {str(error)[:300]}",
            f"Set data.image_size to {_own_size(model)}, the size they were made for.",
        ) from error


def _require_known(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture.lower(), timm.list_models(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists all names."
        raise UserError(f"There is no timm model {name!r}.", hint)
    if tag and name not in (known := timm.list_models(f"{architecture}.*", pretrained=True)):
        way_out = f"Known: {', '.join(known)}." if known else f"Use {architecture!r} with weights from a file."
        raise UserError(f"timm's {architecture!r} has no pretrained weights {tag!r}.", way_out)


def _create_for_size(name: str, image_size: int, seed: int = 0) -> nn.Module:
    try:
        return create(name, image_size=image_size, num_classes=None, seed=seed)
    except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise _wrong_size(name, image_size, None, error) from error


def _forward(model: nn.Module, image_size: int) -> None:
    with torch.no_grad():
        model(torch.zeros(1, 3, image_size, image_size))


def _try_forward(model: nn.Module, name: str, image_size: int) -> None:
    try:
        _forward(model, image_size)
    except (AssertionError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise _wrong_size(name, image_size, _own_size(model), error) from error


def _wrong_size(name: str, image_size: int, own_size: int | None, error: Exception) -> UserError:
    size = own_size or _own_size(create(name, image_size=None, num_classes=None, seed=0))
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return UserError(
        f"The backbone {name!r} cannot take images of {image_size} x {image_size} pixels: {reason}", f"Set data.image_size to {size}."
    )


def _own_size(model: nn.Module) -> int:
    given: Any = model.pretrained_cfg
    return int(given["input_size"][-1])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

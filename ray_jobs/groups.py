"""Which parameters train at which unfreeze depth: timm's coarse groups, the classifier, freezing and modes.

Depth d: the classifier and the last d groups train. A group that holds only the classifier is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn

from infra.errors import UserError

HEAD_STD = 0.01


def group_names(model: nn.Module) -> list[list[str]]:
    """The parameter names of each counted group, front to back; the classifier's own are in none."""
    head = head_names(model)
    group_of = _group_of(model)
    groups: dict[int, list[str]] = {}
    for name, _ in model.named_parameters():
        if name not in head:
            groups.setdefault(group_of[name], []).append(name)
    return [groups[number] for number in sorted(groups)]


def group_titles(model: nn.Module) -> list[str]:
    """A short name for each group, made of the modules it holds, such as `conv_stem+bn1` or `blocks.3`."""
    return [_title(names) for names in group_names(model)]


def num_groups(model: nn.Module) -> int:
    return len(group_names(model))


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier modules: one, or two for a distilled model."""
    found: Any = model.get_classifier()  # type: ignore[operator]  # every timm model has it
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def head_names(model: nn.Module) -> set[str]:
    """The names of the classifier's parameters."""
    head = {id(parameter) for module in classifiers(model) for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in head}


def head_tensor_names(model: nn.Module) -> set[str]:
    """The names of the classifier's parameters and buffers, as the state dict has them."""
    own = {id(module) for module in classifiers(model)}
    prefixes = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in own]
    return {name for name in model.state_dict() if any(name.startswith(f"{prefix}.") for prefix in prefixes)}


def lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The factor on the learning rate of each parameter: 1 for the classifier, `layer_decay` for the last group, its square for the
    one before, and so on (Clark et al. 2020, arXiv:2003.10555)."""
    groups = group_names(model)
    scales = {name: layer_decay ** (len(groups) - number) for number, names in enumerate(groups) for name in names}
    return scales | dict.fromkeys(head_names(model), 1.0)


def trainable_names(model: nn.Module, depth: int) -> set[str]:
    """The names of the parameters that train at this depth: the classifier and the last `depth` groups."""
    groups = group_names(model)
    require_depth(depth, len(groups))
    return head_names(model).union(*groups[len(groups) - depth :])


def require_depth(depth: int, groups: int, backbone: str = "this backbone") -> None:
    if not 0 <= depth <= groups:
        raise UserError(
            f"Unfreeze depth {depth} is beyond {backbone}: it has {groups} groups.",
            f"Give depths from 0 (linear probe) to {groups} (full fine-tuning) under search.unfreeze_depth.",
        )


def freeze(model: nn.Module, depth: int) -> None:
    """Let gradients reach exactly what trains at this depth."""
    names = trainable_names(model, depth)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def set_mode(model: nn.Module, depth: int, training: bool) -> None:
    """train() or eval(), with every frozen part always in eval mode, so that its BatchNorm statistics do not move."""
    model.eval()
    for module in live_modules(model, depth):
        module.training = training


def live_modules(model: nn.Module, depth: int) -> list[nn.Module]:
    """The modules that follow train() at this depth."""
    names = trainable_names(model, depth)
    trainable = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    return list(_live(model, trainable, inherited=True))


def init_head(model: nn.Module, seed: int) -> None:
    """A new classifier: small random weights, zero biases, norms at identity; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    names = head_names(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in names or parameter.is_meta:
                continue
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * HEAD_STD)
            elif parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _live(module: nn.Module, trainable: set[int], inherited: bool) -> Iterator[nn.Module]:
    """A module lives by its own parameters; without any, by those below it; without those, as the module around it."""
    own = list(module.parameters(recurse=False))
    below = own or list(module.parameters())
    within = any(id(parameter) in trainable for parameter in module.parameters()) if below else inherited
    if any(id(parameter) in trainable for parameter in below) if below else inherited:
        yield module
    for child in module.children():
        yield from _live(child, trainable, within)


def _group_of(model: nn.Module) -> dict[str, int]:
    try:
        matcher: Any = model.group_matcher(coarse=True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError):  # a few families have none, or no coarse one
        return _group_of_children(model)
    mapping: dict[str, int] = timm.models.group_parameters(model, matcher, reverse=True)
    return mapping


def _group_of_children(model: nn.Module) -> dict[str, int]:
    """For models without a group matcher: what comes before the stages, then each stage; what follows belongs to the last."""
    no_stage = {name.split(".")[0] for name in head_names(model)} | {"stem", "patch_embed"}
    stages = [name for name, child in model.named_children() if isinstance(child, nn.Sequential | nn.ModuleList) and name not in no_stage]
    units = [f"{name}.{part}" for name in stages for part, _ in model.get_submodule(name).named_children()]
    order = [name for name, _ in model.named_children()]
    last = max((order.index(name) for name in stages), default=-1)
    mapping = {}
    for name, _ in model.named_parameters():
        path = name.split(".")
        stage = ".".join(path[:2])
        after = path[0] in order and order.index(path[0]) > last
        mapping[name] = 1 + units.index(stage) if stage in units else (len(units) if after else 0)
    return mapping


def _title(names: list[str]) -> str:
    """The shortest module paths that tell: a numbered stage keeps its number."""
    parts = []
    for name in names:
        path = name.split(".")
        numbered = next((i for i, part in enumerate(path) if part.isdigit()), None)
        part = ".".join(path[: numbered + 1]) if numbered is not None and numbered <= 2 else path[0]
        if part not in parts:
            parts.append(part)
    shared = {part.split(".")[0] for part in parts}
    if len(shared) == 1 and len(parts) > 1:
        parts = [shared.pop()]
    return "+".join(parts[:3]) + ("+..." if len(parts) > 3 else "")

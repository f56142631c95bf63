"""What crosses a cut, and how it is handed over image by image, so that a cache can keep it and batches can be mixed anew.

Found out by running the prefix on batches of two and three: per-image tensors (handed over with the batch first), constants
(baked into the suffix), multiples of the batch size (computed anew in the suffix).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infra.errors import UserError

CHOOSE_ANOTHER = "Choose another depth or backbone."


@dataclass(frozen=True)
class Value:
    """One value handed over at a cut: its shape for one image, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PerImage:
    """A tensor whose dimension `dim` is `times` entries an image, image after image unless `interleaved`."""

    dim: int
    times: int
    interleaved: bool
    value: Value


@dataclass(frozen=True)
class Constant:
    value: Any


@dataclass(frozen=True)
class TimesBatch:
    times: int


@dataclass(frozen=True)
class Device:
    """The device of the values, which is not known before they are there."""


@dataclass(frozen=True)
class Several:
    kind: type
    parts: tuple[Any, ...]


Recipe = PerImage | Constant | TimesBatch | Device | Several


def recipe_of(two: Any, three: Any, name: str) -> Recipe:
    """How to hand over one crossing value, from what it was at batches of two and three."""
    if isinstance(two, Tensor):
        return _tensor_recipe(two, three, name)
    if isinstance(two, torch.device):
        return Device()
    if isinstance(two, tuple | list):
        return Several(type(two), tuple(recipe_of(a, b, name) for a, b in zip(two, three, strict=True)))
    if two == three:
        return Constant(two)
    if isinstance(two, int) and two % 2 == 0 and two // 2 * 3 == three:
        return TimesBatch(two // 2)
    raise UserError(
        f"The backbone cannot be split here: the value {name} ({two!r}, {three!r}) depends on the batch in an unknown way.", CHOOSE_ANOTHER
    )


def _tensor_recipe(two: Tensor, three: Tensor, name: str) -> Recipe:
    if two.shape == three.shape:
        return Constant(two.detach())
    dims = [dim for dim, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    dim = dims[0]
    times = two.shape[dim] // 2
    if len(dims) == 1 and two.shape[dim] == 2 * times and three.shape[dim] == 3 * times:
        for interleaved in (False, True) if times > 1 else (False,):
            first, second = (_to_images(tensor, batch, dim, times, interleaved) for tensor, batch in ((two, 2), (three, 3)))
            if two.is_meta or torch.allclose(first, second[:2], rtol=1e-2, atol=1e-3, equal_nan=True):
                return PerImage(dim, times, interleaved, Value(tuple(first.shape[1:]), two.dtype))
    raise UserError(
        f"The backbone cannot be split here: the value {name} of shape {tuple(two.shape)} cannot be taken apart by image.", CHOOSE_ANOTHER
    )


def _to_images(value: Tensor, batch: int, dim: int, times: int, interleaved: bool) -> Tensor:
    """Bring the batch to the front: [..., B*k, ...] to [B, k, ...]."""
    value_first = value.movedim(dim, 0)
    if times == 1:
        return value_first
    rest = value_first.shape[1:]
    return value_first.reshape(times, batch, *rest).movedim(1, 0) if interleaved else value_first.reshape(batch, times, *rest)


def _from_images(value: Tensor, dim: int, times: int, interleaved: bool) -> Tensor:
    """The way back of _to_images."""
    if times > 1:
        value = (value.movedim(0, 1) if interleaved else value).flatten(0, 1)
    return value.movedim(0, dim).contiguous() if dim else value


def per_image(recipes: Sequence[Recipe]) -> list[PerImage]:
    """The tensors that are handed over, in order."""
    found: list[PerImage] = []
    for recipe in recipes:
        if isinstance(recipe, Several):
            found += per_image(recipe.parts)
        elif isinstance(recipe, PerImage):
            found.append(recipe)
    return found


def hand_over(graph: fx.Graph, recipes: Sequence[Recipe], nodes: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """In the prefix, each per-image tensor with the batch first."""
    for recipe, node in zip(recipes, nodes, strict=True):
        if isinstance(recipe, Several):
            parts = [graph.call_function(operator.getitem, (node, i)) for i in range(len(recipe.parts))]
            yield from hand_over(graph, recipe.parts, parts)
        elif isinstance(recipe, PerImage):
            if recipe.times == 1 and recipe.dim == 0:
                yield node
                continue
            size = graph.call_method("size", (node, recipe.dim))
            batch = graph.call_function(operator.floordiv, (size, recipe.times))
            yield graph.call_function(_to_images, (node, batch, recipe.dim, recipe.times, recipe.interleaved))


def rebuild(graph: fx.Graph, recipes: Sequence[Recipe], inputs: list[fx.Node], constants: dict[str, Tensor]) -> list[Any]:
    """In the suffix, each crossing value as the model had it."""
    left = iter(inputs)

    def one(recipe: Recipe) -> Any:
        match recipe:
            case PerImage(dim=0, times=1):
                return next(left)
            case PerImage():
                return graph.call_function(_from_images, (next(left), recipe.dim, recipe.times, recipe.interleaved))
            case Constant(value=Tensor() as value):
                name = f"_constant_{len(constants)}"
                constants[name] = value
                return graph.get_attr(name)
            case Constant():
                return graph.call_function(_constant, (recipe.value,))
            case TimesBatch():
                return graph.call_function(operator.mul, (graph.call_method("size", (inputs[0], 0)), recipe.times))
            case Device():
                return graph.call_function(getattr, (inputs[0], "device"))
            case Several():
                return graph.call_function(recipe.kind, ([one(part) for part in recipe.parts],))

    return [one(recipe) for recipe in recipes]


def _constant(value: Any) -> Any:
    return value

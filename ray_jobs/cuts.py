"""Split a backbone at group boundaries into one shared prefix and a trainable suffix a depth, with torch.fx.

A node's level is the highest group it depends on: 0 the input, 1 the first group, ..., num_groups the last, above it the
classifier. The cut of depth d lies above level num_groups - d: the prefix is every node up to there, and every value
that crosses is handed over (crossing.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ray_jobs.crossing import Recipe, Value, hand_over, per_image, rebuild, recipe_of
from ray_jobs.groups import freeze, group_names, init_head, live_modules, require_depth, trainable_names
from ray_jobs.tracing import is_impure, mutated, trace


class Prefix(fx.GraphModule):
    """The frozen part: forward(images_BCHW) gives the values of every cut, by depth. Always in eval mode."""

    def train(self, mode: bool = True) -> Prefix:
        super().train(False)
        return self


class Suffix(fx.GraphModule):
    """The part that trains at one depth: forward(*values) gives logits_NK. Parameters are the model's own objects and names."""

    trainable: frozenset[str] = frozenset()
    live: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Suffix:
        super().train(False)
        self.training = mode
        for module in self.live:
            module.training = mode
        return self

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable ones alone: an optimizer or a checkpoint made from them holds nothing frozen."""
        for name, parameter in super().named_parameters("", recurse, remove_duplicate):
            if name in self.trainable:
                yield (f"{prefix}.{name}" if prefix else name), parameter


class Cuts:
    """All cuts of one model: one prefix for every wanted depth, one suffix a depth. The model's tensors are shared, not copied."""

    def __init__(self, model: nn.Module, depths: Sequence[int], image_size: int) -> None:
        groups = group_names(model)
        for depth in depths:
            require_depth(depth, len(groups))
        self.model = model
        self.num_groups = len(groups)
        self.depths = tuple(sorted(set(depths)))
        self._graph = trace(model)
        self._sides = {depth: _prefix_nodes(model, self._graph, groups, depth) for depth in self.depths}
        self._crossing = {depth: _crossing_nodes(self._graph, self._sides[depth]) for depth in self.depths}
        model.eval()
        self._level = _levels(model, self._graph, groups)
        self._recipes: dict[int, list[Recipe]] = {}
        self.prefix = self._build_prefix(image_size)
        self._suffixes: dict[tuple[int, int], Suffix] = {}
        self._pristine = _snapshot(model, max(self.depths))

    def values(self, depth: int) -> tuple[Value, ...]:
        """What crosses at this depth, for one image: the order of the prefix's outputs and of the suffix's arguments."""
        return tuple(recipe.value for recipe in per_image(self._recipes[depth]))

    def suffix(self, depth: int, source: int | None = None) -> Suffix:
        """The suffix of this depth, in eval mode; it also freezes the model to this depth, so use one suffix at a time.

        `source` is a cut at this depth or a larger one, whose values it takes instead; what lies between stays frozen and in eval mode.
        """
        start = depth if source is None else source
        assert start >= depth, f"the values at depth {start} are computed from those at depth {depth}"
        if (depth, start) not in self._suffixes:
            self._suffixes[depth, start] = self._build_suffix(depth, start)
        freeze(self.model, depth)
        suffix = self._suffixes[depth, start]
        suffix.eval()
        return suffix

    def reset(self, seed: int) -> None:
        """Put every parameter and buffer back to where it was when the cuts were made, with a new classifier."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, value in self._pristine.items():
                tensors[name].copy_(value)
        init_head(self.model, seed)
        for parameter in self.model.parameters():
            parameter.grad = None

    def _build_prefix(self, image_size: int) -> Prefix:
        """Nodes in order of level, so that each cut is complete at one point, where it is tapped before anything deeper runs."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        taps: dict[int, list[fx.Node]] = {}
        wanted = set().union(*self._sides.values())
        wanted = _needed(wanted, {node for nodes in self._crossing.values() for node in nodes}, self.model)
        left = sorted(self.depths, reverse=True)
        for node in sorted((n for n in self._graph.nodes if n in wanted), key=lambda n: self._level[n]):
            while left and self._level[node] > self.num_groups - left[0]:
                taps.update(self._tap(graph, copies, left.pop(0), wanted))
            copies[node] = graph.node_copy(node, copies.__getitem__)
        for depth in left:
            taps.update(self._tap(graph, copies, depth, wanted))
        order = sorted(taps)
        output = graph.output([taps[depth] for depth in order])
        prefix = Prefix(self.model, graph, "Prefix")
        prefix.eval()
        probes = [dict(zip(order, values, strict=True)) for values in _probe(prefix, self.model, image_size)]
        for depth in order:
            crossing = zip(*(probe[depth] for probe in probes), self._crossing[depth], strict=True)
            self._recipes[depth] = [recipe_of(two, three, node.name) for two, three, node in crossing]
        with graph.inserting_before(output):
            handed = {depth: tuple(hand_over(graph, self._recipes[depth], taps[depth])) for depth in order}
        graph.erase_node(output)
        graph.output(handed)  # type: ignore[arg-type]  # keys of any plain kind are fine
        graph.eliminate_dead_code(is_impure_node=lambda node: is_impure(node, prefix))
        prefix.recompile()
        return prefix

    def _tap(self, graph: fx.Graph, copies: dict[fx.Node, fx.Node], depth: int, wanted: set[fx.Node]) -> dict[int, list[fx.Node]]:
        nodes = [copies[node] for node in self._crossing[depth]]
        if any(node in wanted for node in _mutators(self._graph, self._sides[depth], self.model)):
            nodes = [graph.call_function(_cloned, (node,)) for node in nodes]
        return {depth: nodes}

    def _build_suffix(self, depth: int, source: int) -> Suffix:
        side, recipes = self._sides[source], self._recipes[source]
        graph = fx.Graph()
        constants: dict[str, Tensor] = {}
        inputs = [graph.placeholder(f"v{i}") for i in range(len(self.values(source)))]
        if _mutators(self._graph, side, self.model):  # never write into what the caller keeps for the next epoch
            inputs = [graph.call_function(_cloned, (node,)) for node in inputs]
        rebuilt = rebuild(graph, recipes, inputs, constants)
        copies = dict(zip(self._crossing[source], rebuilt, strict=True))
        for node in self._graph.nodes:
            if node not in side:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        for name, value in constants.items():
            self.model.register_buffer(name, value, persistent=False)
        suffix = Suffix(self.model, graph, "Suffix")
        for name in constants:
            delattr(self.model, name)
        suffix.graph.eliminate_dead_code(is_impure_node=lambda node: is_impure(node, suffix))
        suffix.delete_all_unused_submodules()
        suffix.recompile()
        inside = {id(module) for module in suffix.modules()}
        suffix.trainable = frozenset(trainable_names(self.model, depth))
        suffix.live = tuple(module for module in live_modules(self.model, depth) if id(module) in inside)
        return suffix


def _levels(model: nn.Module, graph: fx.Graph, groups: list[list[str]]) -> dict[fx.Node, int]:
    """The highest group that each node depends on; the classifier is above all groups."""
    level_of = {name: number for number, names in enumerate(groups, start=1) for name in names}
    by_id = {id(parameter): level_of.get(name, len(groups) + 1) for name, parameter in model.named_parameters()}
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        own = [by_id.get(id(parameter), 0) for parameter in _parameters(model, node)]
        levels[node] = max([*own, *(levels[before] for before in node.all_input_nodes)], default=0)
    return levels


def _parameters(model: nn.Module, node: fx.Node) -> list[Any]:
    if node.op == "call_module":
        return list(model.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        return [operator.attrgetter(str(node.target))(model)]
    return []


def _prefix_nodes(model: nn.Module, graph: fx.Graph, groups: list[list[str]], depth: int) -> set[fx.Node]:
    """The nodes before the cut. Dropout right at the cut goes behind it, where it can live."""
    if depth == len(groups):
        return {node for node in graph.nodes if node.op == "placeholder"}
    levels = _levels(model, graph, groups)
    side = {node for node in graph.nodes if levels[node] <= len(groups) - depth and node.op != "output"}
    for node in reversed(graph.nodes):
        if node in side and node.op == "call_module" and not any(user in side for user in node.users):
            module = model.get_submodule(str(node.target))
            if isinstance(module, _DropoutNd) and module.p > 0:
                side.discard(node)
    return side


def _crossing_nodes(graph: fx.Graph, side: set[fx.Node]) -> list[fx.Node]:
    return [node for node in graph.nodes if node in side and any(user not in side for user in node.users)]


def _needed(nodes: set[fx.Node], ends: set[fx.Node], model: nn.Module) -> set[fx.Node]:
    """Those of `nodes` that the ends depend on, and what writes into them."""
    needed: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
            stack += [user for user in node.users if user in nodes and mutated(user, model) is node]
    return needed


def _mutators(graph: fx.Graph, side: set[fx.Node], model: nn.Module) -> list[fx.Node]:
    """The nodes behind a cut that write into what crosses it."""
    return [node for node in graph.nodes if node not in side and mutated(node, model) in side]


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _snapshot(model: nn.Module, depth: int) -> dict[str, Tensor]:
    """Copies of all that training at this depth can move."""
    live = {id(tensor) for module in live_modules(model, depth) for tensor in module.buffers(recurse=False)}
    names = trainable_names(model, depth)
    moved = {name: tensor for name, tensor in model.named_buffers() if id(tensor) in live}
    moved |= {name: tensor for name, tensor in model.named_parameters() if name in names}
    return {name: tensor.detach().clone() for name, tensor in moved.items()}


def _probe(prefix: Prefix, model: nn.Module, image_size: int) -> list[Any]:
    """The crossing values of the same images in batches of two and three."""
    images_BCHW = torch.randn((3, 3, image_size, image_size), generator=torch.Generator().manual_seed(0))
    images_BCHW = images_BCHW.to(next(model.parameters()).device)
    with torch.no_grad():
        return [prefix(images_BCHW[:2]), prefix(images_BCHW)]

"""One torch.fx graph of a backbone that serves train and eval mode alike.

The trace is made in train mode with DropPath, dropout and norms as leaves, and functional dropout becomes a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.patch_dropout import PatchDropout
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from infra.errors import UserError

MODE_DEPENDENT = (DropPath, DropBlock2d, PatchDropout, _DropoutNd, _BatchNorm)
RANDOM = {
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "randint",
    "randperm",
    "bernoulli",
    "bernoulli_",
    "uniform_",
    "normal_",
    "multinomial",
}
DROPOUTS = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
}


class _Tracer(fx.Tracer):
    """timm's leaves, and every module whose behaviour depends on the mode, stay whole."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))  # type: ignore[no-untyped-call]
        self._leaves = (*get_notrace_modules(), *MODE_DEPENDENT)  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "images_BCHW", (), {})]  # other arguments keep their defaults


def trace(model: nn.Module) -> fx.Graph:
    """The model as one graph that serves both modes. Raises UserError where it does not trace."""
    model.train()
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # fx raises nearly anything where Python control flow depends on the data
        raise UserError(
            f"The backbone {type(model).__name__} cannot be split: torch.fx does not trace it "
            f"({type(error).__name__}: {str(error)[:200]}).",
            "Choose another backbone; nearly all of timm's families trace.",
        ) from error
    finally:
        model.eval()
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_assert":
            graph.erase_node(node)  # checks of the image size, done once beforehand
    _make_dropout_follow_the_mode(model, graph)
    _drop_what_does_nothing(model, graph)
    _make_writes_explicit(model, graph)
    random = [node.name for node in graph.nodes if node.op != "call_module" and _target_name(node) in RANDOM]
    if random:
        raise UserError(
            f"The backbone {type(model).__name__} cannot be split: it draws random numbers outside a module ({random[0]}).",
            "Choose another backbone.",
        )
    graph.eliminate_dead_code(is_impure_node=lambda node: is_impure(node, model))
    return graph


class _AttentionDropout(nn.Module):
    """Attention whose dropout follows the mode."""

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["dropout_p"] = self.dropout_p if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _make_dropout_follow_the_mode(model: nn.Module, graph: fx.Graph) -> None:
    """A trace bakes `training=self.training` in; turn such calls into modules."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in DROPOUTS:
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            module: nn.Module = DROPOUTS[node.target](float(p))
            args, kwargs = (node.args[0] if node.args else node.kwargs["input"],), {}
        elif node.target is nn.functional.scaled_dot_product_attention and node.kwargs.get("dropout_p"):
            module = _AttentionDropout(float(node.kwargs["dropout_p"]))
            args, kwargs = node.args, {key: value for key, value in node.kwargs.items() if key != "dropout_p"}
        else:
            continue
        name = f"_functional_{node.name}"
        model.add_module(name, module)
        node.op, node.target, node.args, node.kwargs = "call_module", name, args, kwargs


def _drop_what_does_nothing(model: nn.Module, graph: fx.Graph) -> None:
    """Identities hide that two values crossing a cut are the same one."""
    for node in list(graph.nodes):
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and _does_nothing(module) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _make_writes_explicit(model: nn.Module, graph: fx.Graph) -> None:
    """Who reads a tensor after a write into it depends on the write: let the graph say so."""
    for node in list(graph.nodes):
        target = mutated(node, model)
        if not isinstance(target, fx.Node):
            continue
        order = {other: position for position, other in enumerate(graph.nodes)}
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)


def _does_nothing(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return not module.p
    return isinstance(module, nn.Identity) or (isinstance(module, DropPath) and not module.drop_prob)


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def mutated(node: fx.Node, model: nn.Module) -> Any:
    """The argument that this node writes into, if any."""
    in_place = (
        (node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"))
        or (node.op == "call_function" and bool(node.kwargs.get("inplace")))
        or (node.op == "call_module" and bool(getattr(model.get_submodule(str(node.target)), "inplace", False)))
    )
    return node.args[0] if in_place and node.args else None


def is_impure(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node must stay although nothing uses its value."""
    return node.op in ("placeholder", "output") or (node.op != "call_module" and mutated(node, model) is not None)

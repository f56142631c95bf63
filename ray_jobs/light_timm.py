"""Import timm without torch's compiler, which nothing here uses: 4 s less CPU time for each process that starts.

torchvision and timm each ask torch._dynamo for one small thing while they are imported, and an optimizer does when it is
made; that loads the compiler, its symbolic algebra and half of torch.distributed. A stand-in answers meanwhile. Anything that
compiles later imports the real one as usual.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COMPILER = "torch._dynamo"


def import_timm() -> None:
    """Import torch, torchvision and timm; call it first in a worker. Harmless where they, or the compiler, are loaded already."""
    import torch

    if "timm" not in sys.modules:
        with without_compiler():
            importlib.import_module("timm")
            importlib.import_module("torchvision.transforms.v2")  # of the augmentations
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None and COMPILER not in sys.modules:
            plain.__dynamo_disable = plain  # what torch keeps there after its first call, had it asked the compiler


@contextmanager
def without_compiler() -> Iterator[None]:
    """For the body, torch meets a stand-in where it would load its compiler; nothing happens where that is loaded already."""
    import torch

    if COMPILER in sys.modules:
        yield
        return

    compiler, its_utils = types.ModuleType(COMPILER), types.ModuleType(f"{COMPILER}.utils")
    compiler.__dict__.update(__path__=[], disable=_leave_as_it_is, utils=its_utils)
    its_utils.__dict__.update(is_compile_supported=lambda device_type: False)
    sys.modules.update({COMPILER: compiler, f"{COMPILER}.utils": its_utils})
    torch._dynamo = compiler
    try:
        yield
    finally:
        del sys.modules[COMPILER], sys.modules[f"{COMPILER}.utils"], torch._dynamo


def _leave_as_it_is(function: Callable[..., Any] | None = None, recursive: bool = True, **_: Any) -> Any:
    """torch.compiler.disable, where nothing compiles."""
    return function if function is not None else _leave_as_it_is

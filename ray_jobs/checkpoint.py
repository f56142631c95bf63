"""A fit's checkpoints: committed folders without pickle (safetensors and JSON), enough to carry on as if never stopped.

epoch-0003/ holds trainable.safetensors (what trains, and the buffers), best.safetensors (the same of the best epoch so far,
where that is another one), optimizer.safetensors and state.json. epoch-0003-step-00012/ is written amid the epoch after, when the
machine is about to be taken away; its shares.safetensors has the buffers of each share. MANIFEST.json comes last, so a writer killed
at any write leaves a folder that no reader sees.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from infra.committed_folder import MANIFEST, commit, read_manifest
from infra.object_store import ObjectStore, join_uri

log = logging.getLogger(__name__)

NAME = re.compile(r"epoch-(\d{4,})(?:-step-(\d{5,}))?/(.+)")
STATE = "state.json"
KEPT = 2

Tensors = dict[str, Tensor]
Position = tuple[int, int]
"""How far a fit is: whole epochs, and steps of the next one."""


@dataclass(frozen=True)
class Checkpoint:
    """What a fit is after `epoch` and `step` more steps: every tensor on the CPU, and the plain values of `state`."""

    epoch: int
    trainable: Tensors
    best: Tensors
    optimizer: Tensors
    state: dict[str, Any]
    step: int = 0
    shares: Tensors = field(default_factory=dict)


def uri_of(root_uri: str, epoch: int, step: int = 0) -> str:
    return join_uri(root_uri, f"epoch-{epoch:04d}" + (f"-step-{step:05d}" if step else ""))


def save(store: ObjectStore, root_uri: str, checkpoint: Checkpoint) -> str:
    """Commit the checkpoint below `root_uri` and return its address."""
    files: dict[str, bytes] = {
        "trainable.safetensors": _bytes(checkpoint.trainable),
        "optimizer.safetensors": _bytes(checkpoint.optimizer),
        STATE: json.dumps({"epoch": checkpoint.epoch, "step": checkpoint.step, **checkpoint.state}).encode(),
    }
    if checkpoint.shares:
        files["shares.safetensors"] = _bytes(checkpoint.shares)
    if checkpoint.best is not checkpoint.trainable:
        files["best.safetensors"] = _bytes(checkpoint.best)
    uri = uri_of(root_uri, checkpoint.epoch, checkpoint.step)
    commit(store, uri, files)
    return uri


def positions(store: ObjectStore, root_uri: str) -> list[Position]:
    """Where the committed checkpoints below `root_uri` are, ascending."""
    found = (NAME.fullmatch(info.uri[len(root_uri.rstrip("/")) + 1 :]) for info in store.list(root_uri))
    return sorted((int(match[1]), int(match[2] or 0)) for match in found if match and match[3] == MANIFEST)


def epochs(store: ObjectStore, root_uri: str) -> list[int]:
    """The epochs after which there is a committed checkpoint, ascending."""
    return [epoch for epoch, step in positions(store, root_uri) if not step]


def latest(store: ObjectStore, root_uri: str) -> Checkpoint | None:
    """The last committed checkpoint that is whole; a damaged one is passed over for the one before, and the log says so."""
    for epoch, step in reversed(positions(store, root_uri)):
        try:
            return load(store, uri_of(root_uri, epoch, step))
        except (ValueError, KeyError, FileNotFoundError) as error:
            log.warning("the checkpoint of epoch %d is damaged (%s); taking the one before", epoch, error)
    return None


def load(store: ObjectStore, uri: str) -> Checkpoint:
    """The checkpoint at `uri`, each object checked. Raises FileNotFoundError or ValueError where it is not whole."""
    manifest = read_manifest(store, uri)
    if manifest is None:
        raise FileNotFoundError(join_uri(uri, MANIFEST))
    objects = {entry.key: store.read(join_uri(uri, entry.key)) for entry in manifest.objects}
    for entry in manifest.objects:
        if hashlib.sha256(objects[entry.key]).hexdigest() != entry.sha256:
            raise ValueError(f"{join_uri(uri, entry.key)} does not match its {MANIFEST}")
    state = json.loads(objects[STATE])
    trainable = from_safetensors(objects["trainable.safetensors"])
    best = from_safetensors(objects["best.safetensors"]) if "best.safetensors" in objects else trainable
    shares = from_safetensors(objects["shares.safetensors"]) if "shares.safetensors" in objects else {}
    epoch, step = state.pop("epoch"), state.pop("step", 0)
    return Checkpoint(epoch, trainable, best, from_safetensors(objects["optimizer.safetensors"]), state, step, shares)


def prune(store: ObjectStore, root_uri: str, *, newest: int, best: int | None) -> None:
    """Delete every checkpoint but the newest ones and the best epoch's; the manifest first, so that none is ever half there."""
    known = positions(store, root_uri)
    for epoch, step in set(known[:-newest]) - {(best, 0)}:
        uri = uri_of(root_uri, epoch, step)
        store.delete([join_uri(uri, MANIFEST)])
        store.delete([info.uri for info in store.list(uri)])


def trainable_tensors(model: nn.Module) -> Tensors:
    """Copies on the CPU of every parameter that trains, and of every buffer (running statistics move without gradients)."""
    named = [*((n, p) for n, p in model.named_parameters() if p.requires_grad), *model.named_buffers()]
    known = model.state_dict().keys()
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named if name in known}


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `trainable_tensors` back; raises ValueError where the model's trainable tensors have other names."""
    expected = trainable_tensors(model).keys()
    if expected != tensors.keys():
        raise ValueError(f"the checkpoint's tensors are not the model's: {sorted(expected ^ tensors.keys())[:4]}")
    model.load_state_dict(dict(tensors), strict=False)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Tensors:
    """The optimizer's state by parameter name: `layer.weight|exp_avg` and so on."""
    return {
        f"{names[parameter]}|{key}": value.detach().to("cpu", copy=True).contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` back, laid out in memory as the parameters are: a fused step goes by memory, not by index."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        parameter = by_name[name]
        if value.shape == parameter.shape:
            optimizer.state[parameter][slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            device = parameter.device if optimizer.defaults.get("fused") else value.device
            optimizer.state[parameter][slot] = value.to(device, copy=True)


def _bytes(tensors: Tensors) -> bytes:
    data: bytes = to_safetensors(tensors)
    return data


class CheckpointWriter:
    """Writes checkpoints beside training, one at a time; one that cannot be written is logged and costs nothing else.

    Keeps the last two and the best epoch's: two, because a writer may be killed while it replaces one.
    """

    def __init__(self, store: ObjectStore, root_uri: str) -> None:
        self._store, self._root_uri = store, root_uri
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True)

    def write(self, checkpoint: Checkpoint, best_epoch: int | None) -> None:
        """Start writing; waits for the one before, so that a slow store slows training instead of filling the memory."""
        if self._pending:
            self._pending.result()
        self._pending = self._thread.submit(self._write, checkpoint, best_epoch)

    def _write(self, checkpoint: Checkpoint, best_epoch: int | None) -> None:
        try:
            save(self._store, self._root_uri, checkpoint)
            prune(self._store, self._root_uri, newest=KEPT, best=best_epoch)
        except Exception as error:  # whatever a store raises: training is worth more than one checkpoint
            log.warning("the checkpoint of epoch %d could not be written: %s", checkpoint.epoch, error)

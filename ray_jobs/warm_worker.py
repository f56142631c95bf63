"""The warm workers of a process: model, cuts and features, made at a backbone's first trial and kept for all later ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.object_store import object_store
from infra.settings import cache_dir
from ray_jobs.light_timm import import_timm
from ray_jobs.work import Work

if TYPE_CHECKING:
    from ray_jobs.trial import WarmWorker

_kept: dict[Work, WarmWorker] = {}
"""One for each backbone of a search, the least recently used first; those of the search before make room."""


def warm_worker(work: Work) -> WarmWorker:
    """This process's model and features for one backbone of this search."""
    found = _kept.pop(work, None)
    if found is None:
        while len(_kept) >= work.backbones:
            del _kept[next(iter(_kept))]  # before the new one needs the memory
        found = _made(work)
    _kept[work] = found
    return found


def _made(work: Work) -> WarmWorker:
    import_timm()
    import torch

    from ray_jobs.trial import WarmWorker

    torch.set_num_threads(1)
    return WarmWorker(work, object_store(), cache_dir())


def prepare_worker(work: Work) -> None:
    """Make them now, ahead of the first trial."""
    warm_worker(work)

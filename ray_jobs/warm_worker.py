"""The one warm worker of a process: model, cuts and features, made at the first trial and kept for all later ones."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from infra.object_store import object_store
from infra.settings import cache_dir
from ray_jobs.light_timm import import_timm
from ray_jobs.work import Work

if TYPE_CHECKING:
    from ray_jobs.trial import WarmWorker


@functools.lru_cache(maxsize=1)
def warm_worker(work: Work) -> WarmWorker:
    """This process's model and features for this search."""
    import_timm()
    import torch

    from ray_jobs.trial import WarmWorker

    torch.set_num_threads(1)
    return WarmWorker(work, object_store(), cache_dir())


def prepare_worker(work: Work) -> None:
    """Make them now, ahead of the first trial."""
    warm_worker(work)

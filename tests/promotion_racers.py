"""Processes that promote different versions of one model at once, by the steps that the flows use, until they end or are killed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ray_jobs.spec import Spec

CONTEXT = get_context("forkserver")  # a clean process that has loaded boto3 and MLflow once, and forks the others
CONTEXT.set_forkserver_preload(["tests.promotion_racers", "tests.promotion_worlds", "boto3", "psycopg", "mlflow.tracking"])
SKILL = (0.6, 0.9)


def race(spec: Spec, racer: int, pipe: Connection, variables: Mapping[str, str]) -> None:
    """For each round that the pipe names: register a version of some skill and promote it; answer with what was settled."""
    os.environ.update(variables)
    from tests import promotion_worlds as worlds

    pipe.send("ready")
    while True:
        number = pipe.recv()
        seed = 1000 * number + racer
        version = worlds.register(spec, float(np.random.default_rng(seed).uniform(*SKILL)), seed)
        settled: dict[str, Any] = worlds.promote(spec, version, by=f"racer {racer}")
        pipe.send((version, settled["entry"]))

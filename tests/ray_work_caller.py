"""A process that has work done, as another command: `python -m tests.ray_work_caller ENTRY FOLDER`."""

from __future__ import annotations

import sys

from infra import logs
from ray_jobs.watch import Watch
from tasks.ray_work import run_on_ray
from tests import ray_work_entries

PACKAGES = ("ray_jobs", "infra", "tests")

if __name__ == "__main__":
    entry, folder = getattr(ray_work_entries, sys.argv[1]), sys.argv[2]
    with logs.within(command="retrain pets"):
        run_on_ray(entry, {"folder": folder}, storage="s3://unfreeze", watch=Watch(), packages=PACKAGES)

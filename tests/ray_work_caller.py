"""A process that does the work `waits`, to be killed: `python -m tests.ray_work_caller FOLDER`."""

from __future__ import annotations

import sys

from ray_jobs.watch import Watch
from tasks.ray_work import run_on_ray
from tests import ray_work_entries

PACKAGES = ("ray_jobs", "infra", "tests")

if __name__ == "__main__":
    run_on_ray(ray_work_entries.waits, {"folder": sys.argv[1]}, storage="s3://unfreeze", watch=Watch(), packages=PACKAGES)

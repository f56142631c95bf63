"""The way to S3 for the processes of a submitted job: in a file beside the code that travels, so that no dashboard and no log shows it.

Ray calls `take` first in every worker, so this module imports next to nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

FILE = "environment.json"
HOOK = "ray_jobs.job_environment.take"
OWN_TO_A_MACHINE = ("AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")
TRAVELS = ("AWS_", "UNFREEZE_CACHE_")
KEY = "AWS_ACCESS_KEY_ID"
PYTHON = "UNFREEZE_JOB_PYTHON"


def given(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the caller's variables goes with a job: nothing that names a file of its machine, but for the cache, which was asked for."""
    return {name: value for name, value in environment.items() if name.startswith(TRAVELS) and name not in OWN_TO_A_MACHINE}


def take() -> None:
    """Set them in this process, and say which Python it is: the one on the cluster's PATH may be another."""
    os.environ[PYTHON] = sys.executable
    try:
        variables: dict[str, str] = json.loads((Path(__file__).parents[1] / FILE).read_text())
    except FileNotFoundError:  # not in a job
        return
    if KEY in variables:  # the machine's own credentials must not mix with the caller's
        for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
            del os.environ[name]
    os.environ.update(variables)
    os.environ.setdefault("UNFREEZE_CACHE_DIR", str(Path.home() / ".cache" / "unfreeze"))

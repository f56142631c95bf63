"""The embedded stack's worker: starts again what the last one left behind, then becomes Prefect's own. Run by `unfreeze up`.

A team's own Prefect has workers of its own: `prefect worker start --pool unfreeze`, in this project's environment.
"""

from __future__ import annotations

import os
import shlex
import sys

from tasks.deployments import POOL, have_pool_of_one_worker, prefect_client, start_again_what_was_lost
from tasks.reaper import Watch, reap


def main() -> None:
    """Never returns: Prefect's worker has this process from here on, so that whoever knows its id ends the worker."""
    with prefect_client() as client:
        have_pool_of_one_worker(client, shlex.join([sys.executable, "-m", "prefect.engine"]))
        start_again_what_was_lost(client)
        reap(client, Watch())  # what a command was killed at, which no worker starts again
    start = ["-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", POOL, "--install-policy", "never"]
    os.execv(sys.executable, [sys.executable, *start])


if __name__ == "__main__":
    main()

"""Work for the contract of `tasks.ray_work`: small functions that a real Ray carries out, in this process or in a job."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from typing import Any

from infra.errors import ServiceError, UserError
from infra.object_store import join_uri, object_store
from ray_jobs.watch import Watch

Plain = dict[str, Any]


def doubled(_watch: Watch, *, numbers: list[int]) -> Plain:
    """Computed by Ray's workers, each of which finds our code."""
    import ray

    task = ray.remote(num_cpus=1)(_double)
    return {"doubled": ray.get([task.remote(number) for number in numbers])}


def _double(number: int) -> int:
    from ray_jobs.spec import digest_of

    return 2 * number * bool(digest_of(number))


def refuses(_watch: Watch, *, what: str) -> Plain:
    raise UserError(what, "Mend it.")


def gives_up(_watch: Watch, *, what: str) -> Plain:
    raise ServiceError(what, "Wait.")


def stumbles(_watch: Watch, *, what: str) -> Plain:
    raise KeyError(what)


def tells(watch: Watch, *, lines: list[str]) -> Plain:
    for number, line in enumerate(lines):
        watch.on_progress(number + 1, len(lines))
        watch.say(line)
    return {}


def lingers(_watch: Watch) -> Plain:
    """Leaves a thread for which its process waits at its end."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    return {"done": True}


def dies(_watch: Watch) -> Plain:
    sys.stderr.write("these are its last words\n")
    sys.stderr.flush()
    os._exit(7)


def waits(watch: Watch, *, folder: str) -> Plain:
    """Leaves an object each time it is done, and ends once there is an object `go`."""
    store = object_store()
    store.write(join_uri(folder, "started", uuid.uuid4().hex), b"")
    while not store.exists(join_uri(folder, "go")):
        watch.on_progress(1, 2)
        time.sleep(0.1)
    store.write(join_uri(folder, "ended", uuid.uuid4().hex), b"")
    return {"ended": True}


def holds(_watch: Watch, *, folder: str) -> Plain:
    """Takes both CPUs until there is an object `go`."""
    import ray

    ray.get(ray.remote(num_cpus=2)(_hold).remote(folder))
    return {}


def _hold(folder: str) -> None:
    waits(Watch(), folder=folder)


def stores(_watch: Watch, *, folder: str, size: int) -> Plain:
    object_store().write(join_uri(folder, "bytes"), bytes(size))
    return {}


def sees(_watch: Watch) -> Plain:
    """Where the code is, and whether a worker of Ray knows the way to S3."""
    import ray

    import ray_jobs

    here, there = _seen(), ray.get(ray.remote(num_cpus=1)(_seen).remote())
    return {"code": ray_jobs.__file__, "here": here, "there": there}


def _seen() -> Plain:
    return {name: os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")}

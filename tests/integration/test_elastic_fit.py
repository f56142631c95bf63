"""A fit on machines that go and come: several raylets on this machine, of which some are killed or drained as a cloud does it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import ray_cluster
from infra.committed_folder import verify
from infra.object_store import S3ObjectStore, object_store
from ray_jobs import checkpoint
from ray_jobs.fit_on_ray import run_fit
from ray_jobs.fit_plan import plan_fit
from ray_jobs.watch import Watch
from tests.fit_worlds import FitWorld, make_world

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours to mend

PATIENCE_S = 300
EPOCHS = 40


class Machines:
    """A head without CPUs, where the driver is, and machines of one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args=self._node(0, include_dashboard=False))
        self.raylets: dict[str, Any] = {}

    def _node(self, cpus: int, **more: Any) -> dict[str, Any]:
        return {"num_cpus": cpus, "node_ip_address": "127.0.0.1", **more}

    def add(self) -> str:
        """The id of another machine."""
        before = set(ray_cluster.living())
        node = self.cluster.add_node(**self._node(1))
        until(lambda: set(ray_cluster.living()) > before)
        (node_id,) = set(ray_cluster.living()) - before
        self.raylets[node_id] = node
        return node_id

    def kill(self, node_id: str) -> None:
        """As when its plug is pulled: raylet and workers at once."""
        node = self.raylets.pop(node_id)
        with suppress(psutil.NoSuchProcess):  # one that was drained may have ended by itself
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in [raylet, *raylet.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node_id: str) -> None:
        """As a cloud announces that it will take the machine away."""
        command = ["drain-node", "--address", self.cluster.address, "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        message = ["--reason-message", "the cloud wants it back", "--deadline-remaining-seconds", "120"]
        subprocess.run([str(Path(sys.executable).with_name("ray")), *command, *message], check=True, capture_output=True)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def store(s3_server: dict[str, str]) -> Iterator[S3ObjectStore]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        object_store.cache_clear()
        yield object_store()
    object_store.cache_clear()


@pytest.fixture(scope="module")
def machines(s3_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    import ray

    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFREEZE_CACHE_DIR", cache)
        patch.setenv(ray_cluster.LOOPBACK_ONLY, "0")
        ray_cluster.see_todays_variables()
        found = Machines()
        variables = {**s3_server, "UNFREEZE_CACHE_DIR": cache, "PYTHONPATH": os.getcwd()}
        ray.init(address=found.cluster.address, log_to_driver=False, runtime_env={"env_vars": variables})
        yield found
        ray.shutdown()
        found.cluster.shutdown()
    ray_cluster.see_todays_variables()


class Fit:
    """A fit that runs in a thread, and what it said."""

    def __init__(self, world: FitWorld, store: S3ObjectStore) -> None:
        self.said: list[str] = []
        self.result: dict[str, Any] = {}
        plan = plan_fit(world.spec, world.dataset, world.backbone, world.search)
        self.checkpoints = lambda: checkpoint.positions(store, f"{plan.fit_uri}/checkpoints")

        def run() -> None:
            self.result = run_fit(world.spec, world.dataset, world.backbone, world.search, Watch(say=self.said.append))

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def reaches(self, epoch: int) -> None:
        until(lambda: max(self.checkpoints(), default=(0, 0)) >= (epoch, 0) or not self.thread.is_alive())

    def says(self, count: int, words: str) -> str:
        """The line of that number, which has these words."""
        until(lambda: len(self.said) >= count or not self.thread.is_alive())
        assert words in self.said[count - 1]
        return self.said[count - 1]

    def position(self) -> tuple[int, int]:
        return max(self.checkpoints())


def test_a_fit_goes_on_when_a_machine_is_lost_grows_when_one_comes_and_leaves_one_that_is_called_away(
    machines: Machines, store: S3ObjectStore, tmp_path: Path
) -> None:
    _, second = machines.add(), machines.add()
    world = make_world(tmp_path, store, each=300, num_workers=2, patience=EPOCHS, max_epochs=EPOCHS)
    fit = Fit(world, store)

    fit.reaches(1)
    machines.kill(second)
    fit.says(1, "a machine was taken away")
    fit.reaches(fit.position()[0] + 1)

    third = machines.add()
    fit.says(2, "there is room for more workers")
    fit.reaches(fit.position()[0] + 1)

    before = fit.position()
    machines.drain(third)
    fit.says(3, "a machine is about to be taken away")
    assert fit.position() > before
    machines.kill(third)

    fit.thread.join(PATIENCE_S)
    assert len(fit.said) == 3, fit.said
    assert [row["epoch"] for row in fit.result["curve"]] == list(range(1, EPOCHS + 1))
    assert verify(store, fit.result["fit_model_uri"]) == []

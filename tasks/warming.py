"""What runs ahead of the steps: workers load torch while the driver still loads Prefect, and stay for the next command where they may."""

from __future__ import annotations

from collections.abc import Collection

from infra import ray_cluster
from infra.local_stack import Claim
from infra.ray_cluster import Cluster


def claims_nothing(_names: Collection[str]) -> set[str]:
    """Of a stack that ends with its command."""
    return set()


def warm_up(cluster: Cluster, claim: Claim = claims_nothing) -> None:
    """Let the cluster's workers load what every step needs; call it with a connection to Ray."""
    from ray_jobs import warm_up as on_ray

    on_ray.warm_up(cluster, claim)


def await_warm_workers() -> None:
    """Return when they have loaded it."""
    from ray_jobs.workers import await_lanes

    with ray_cluster.connect():
        await_lanes()


def leave_warm(claim: Claim) -> None:
    """Where the command has ended its workers, start those of the next one; nobody waits for them."""
    from ray_jobs.workers import lanes

    with ray_cluster.connect() as cluster:
        if not lanes():
            warm_up(cluster, claim)

"""What runs ahead of the steps: the workers load torch while the driver still prepares."""

from __future__ import annotations

from infra.local_stack import Claim
from infra.ray_cluster import Cluster
from ray_jobs.workers import open_lanes


def warm_up(cluster: Cluster, claim: Claim) -> None:
    """Open a lane a CPU on this machine's own cluster. Elsewhere, and where there are GPUs to share, Ray places the work itself."""
    if cluster.on_this_machine and not cluster.gpus:
        open_lanes(max(1, int(cluster.cpus)), cluster.address, claim)

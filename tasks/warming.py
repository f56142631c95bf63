"""What runs ahead of the steps: workers load torch while the driver still loads Prefect."""

from __future__ import annotations

from infra.ray_cluster import Cluster


def warm_up(cluster: Cluster) -> None:
    """Let the cluster's workers load what every step needs; call it with a connection to Ray."""
    from ray_jobs import warm_up as on_ray

    on_ray.warm_up(cluster)

"""What runs ahead of the steps: workers load torch while the driver still loads Prefect."""

from __future__ import annotations


def warm_up() -> None:
    """Let the cluster's workers load what every step needs; call it with a connection to Ray."""
    from ray_jobs import warm_up as on_ray

    on_ray.warm_up()

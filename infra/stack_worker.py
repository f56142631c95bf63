"""The embedded stack's worker: Prefect's own, which carries out what no command waits for. It lives as long as a stack that is up.

It is no fifth service: whoever needs none of its work never notices it. It is told where Prefect is and where the home is, and of the
team's own services; the embedded ones it finds through the home when it works, as a command does, wherever they are by then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

from infra import services, settings
from infra.services import Site
from infra.settings import ServiceName

GRACE_S = 5.0
"""Between TERM and KILL."""
QUERY_S = 5.0
"""How often it asks Prefect for work: the wait after an answer on Prefect's page."""


def command() -> list[str]:
    """What registers the deployments and becomes the worker (`flows/worker.py`)."""
    return [sys.executable, "-m", "flows.worker"]


def environment(site: Site, embedded: Collection[ServiceName]) -> dict[str, str]:
    """This command's variables, without those that name an embedded service: it may have moved when the worker looks."""
    known = [service for service in embedded if services.PORTS[service][0] in site.ports]
    ours = {name for service in known for name in services.client_environment(service, site)}
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PREFECT_")}
    prefect = {name: value for name, value in services.client_environment("prefect", site).items() if value is not None}
    return {
        **kept,
        **services.NO_PHONING_HOME,
        **prefect,
        "PREFECT_WORKER_QUERY_SECONDS": str(QUERY_S),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # without its server it fails, rather than start one of its own
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": services.no_proxy(),
        "no_proxy": services.no_proxy(),
        "UNFREEZE_HOME": str(site.home),
        "UNFREEZE_CACHE_DIR": str(settings.cache_dir()),  # it works in another folder: a relative path would be another place there
    }


def log(home: Path) -> Path:
    """Where it writes."""
    return home / "logs" / "worker.log"

"""How the way to S3 reaches Ray's workers on this machine: through a private file, of which Ray is told the path alone.

What Ray itself hands to a worker stands on a command line for a moment, and in its logs. The file is named by its content, so that
commands with the same variables share their workers; it goes when the embedded Ray does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

FOLDER = "workers"
PATH = "UNFREEZE_WORKER_ENVIRONMENT"
HOOK = "infra.worker_environment.take"


def keep(home: Path, variables: Mapping[str, str]) -> Path:
    """Write the variables where only their owner reads them; the path."""
    data = json.dumps(variables, sort_keys=True).encode()
    folder = home / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.json"
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        aside.replace(path)
    return path


def take() -> None:
    """Set them in this process; Ray calls it first in each worker."""
    os.environ.update(json.loads(Path(os.environ[PATH]).read_text()))

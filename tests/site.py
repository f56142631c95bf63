"""One UNFREEZE_HOME with small data, and the command line in processes of its own, as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import yaml

from tests.small_data import write_folder

UNFREEZE = Path(sys.executable).with_name("unfreeze")
TIMEOUT_S = 600


class Site:
    """One UNFREEZE_HOME with its embedded stack up, and the small data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "UNFREEZE_HOME": str(folder / "home")}
        self.images = write_folder(folder / "images")
        self.status: dict[str, Any] = {}

    def attempt(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(UNFREEZE), *map(str, arguments)]
        return subprocess.run(command, env=self.env | env, cwd=self.folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    def run(self, *arguments: object, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = self.attempt(*arguments, **env)
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    def json(self, *arguments: object, **env: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run(*arguments, "--json", **env).stdout)
        return answer

    def spec(self, name: str, parts: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        """A small spec with further parts, and with single values changed: `search__seed=1`."""
        content: dict[str, Any] = {
            "name": name,
            "data": {"source": str(self.images), "image_size": 32, "val_fraction": 0.2, "holdout_fraction": 0.25},
            "backbone": {"name": "resnet18", "weights": "none"},
            "search": {"unfreeze_depth": [0, 1], "lr": [1e-3, 1e-2], "max_epochs": 2},
            "fit": {"num_workers": 1, "max_epochs": 2},
            **(parts or {}),
        }
        for path, value in changes.items():
            part, _, key = path.partition("__")
            content[part][key] = value
        path_of = self.folder / f"{name}.yaml"
        path_of.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path_of

    def s3(self) -> Any:
        found = self.status["s3"]
        return boto3.session.Session().client(
            "s3",
            endpoint_url=found["endpoint"],
            aws_access_key_id=found["access_key"],
            aws_secret_access_key=found["secret_key"],
            region_name="us-east-1",
        )

"""The file for `ray up` on AWS: read by Ray's own code, and its machines by Amazon's own model of the call that starts them."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator

from tests import manifests
from tests.unit.test_manifests import parse


@pytest.fixture
def cluster() -> dict[str, Any]:
    said: dict[str, Any] = yaml.safe_load(manifests.AWS.read_text())
    return said


def test_ray_takes_the_file(cluster: dict[str, Any]) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(cluster, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    prepared = prepare_config(cluster)
    validate_config(prepared)  # asks for what only the defaults say, too
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 4


def test_amazon_takes_each_machine(cluster: dict[str, Any]) -> None:
    client = boto3.client("ec2", region_name=cluster["provider"]["region"], aws_access_key_id="none", aws_secret_access_key="none")
    shape = client.meta.service_model.operation_model("RunInstances").input_shape
    for name, kind in cluster["available_node_types"].items():
        report = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def test_the_head_stays_and_the_others_are_spot_machines_that_go_when_idle_but_for_one(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert "InstanceMarketOptions" not in kinds[cluster["head_node_type"]]["node_config"]
    for name in ("cpu", "gpu"):
        assert kinds[name]["min_workers"] == 1
        assert kinds[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(kinds[name]["max_workers"] for name in ("cpu", "gpu")) <= cluster["max_workers"]


def test_every_worker_listens_for_the_notice_that_it_will_be_taken_away(cluster: dict[str, Any]) -> None:
    [listens] = [command for command in cluster["worker_start_ray_commands"] if "spot_notice" in command]
    [module] = re.findall(r"\.venv/bin/python -m (\S+)", listens)
    assert find_spec(module)
    assert subprocess.run(["bash", "-n", "-c", listens], check=False).returncode == 0


def test_the_machines_run_the_locked_versions_from_the_checkout(cluster: dict[str, Any]) -> None:
    commands = "\n".join(cluster["setup_commands"])
    assert "--requirement requirements.txt" in commands
    assert f"--python {manifests.PROJECT['project']['requires-python'].removeprefix('>=').split(',')[0]} " in commands
    assert "/home/ubuntu/unfreeze" in cluster["file_mounts"]
    assert {"**/infra/.env", "**/.git", "**/.unfreeze"} <= set(cluster["rsync_exclude"])


def test_ray_starts_with_options_that_it_knows_behind_its_token_and_on_loopback(cluster: dict[str, Any]) -> None:
    starts = [cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]]
    for start in starts:
        [arguments] = re.findall(r"RAY_AUTH_MODE=token ~/unfreeze/\.venv/bin/(ray start .*)$", start)
        parse(arguments.split())
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(path.endswith("/.ray/auth_token") for path in cluster["file_mounts"])

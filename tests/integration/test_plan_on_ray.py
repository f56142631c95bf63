"""A search is planned from a measurement on the cluster, which the next search finds ready."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.plan import TRIAL_S, Calibration
from tests.integration.test_search_on_ray import machine, prepared, spec_of  # noqa: F401 - fixtures

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours


def test_a_plan_is_measured_once_and_covers_every_depth(machine: Path, prepared: tuple[dict[str, Any], dict[str, Any]]) -> None:  # noqa: F811
    from ray_jobs.plan_on_ray import plan_search, trials_by_depth

    dataset, backbone = prepared
    spec = spec_of(machine, unfreeze_depth=[0, 1, backbone["groups"]])
    found = plan_search(spec, dataset, backbone)
    assert set(found["source"]) == {"0", "1", str(backbone["groups"])}
    assert found["estimated_s"] == pytest.approx(found["prefix_s"] + found["trials_s"])
    assert found["estimated_s"] > 0
    assert json.loads(json.dumps(found)) == found
    again = plan_search(spec.model_copy(update={"search": spec.search.model_copy(update={"max_epochs": 6})}), dataset, backbone)
    assert Calibration.from_plain(again["calibration"]) == Calibration.from_plain(found["calibration"])
    beside_s = TRIAL_S * sum(trials_by_depth(spec, backbone).values())
    assert again["trials_s"] - beside_s == pytest.approx(2 * (found["trials_s"] - beside_s))

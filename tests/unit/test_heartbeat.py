"""A flow that beats is the same flow: its parameters are read and checked as before, and outside a flow run it is the plain function."""

from __future__ import annotations

import threading

import pytest
from prefect import flow
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema

from ray_jobs.spec import Spec
from tasks.heartbeat import with_heartbeat

SPEC = {"name": "shapes", "data": {"source": "images"}, "backbone": {"name": "resnet18"}}


def name_of(spec: Spec) -> str:
    """The name."""
    return spec.name


def test_the_parameters_of_a_flow_that_beats_are_those_of_its_function() -> None:
    beating = flow(name="retrain", validate_parameters=True)(with_heartbeat(name_of))
    assert beating.validate_parameters({"spec": SPEC}) == {"spec": Spec.model_validate(SPEC)}
    assert parameter_schema(with_heartbeat(name_of)) == parameter_schema(name_of)
    with pytest.raises(ParameterTypeError, match="source"):
        beating.validate_parameters({"spec": {**SPEC, "data": {}}})


def test_outside_a_flow_run_nothing_beats() -> None:
    threads = with_heartbeat(lambda: [thread.name for thread in threading.enumerate()])
    assert "heartbeat" not in threads()

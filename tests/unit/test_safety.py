"""What no line of ours does: unpickle, run text, open a shell; and what a job may be asked to run."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from ray_jobs import job
from tests.conftest import ROOT

PACKAGES = ("flows", "tasks", "ray_jobs", "infra")
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUNS_TEXT = {"eval", "exec", "os.system", "os.popen"}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Where each call stands, what is called, and the call."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def imports() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                yield from ((f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", name) for name in names)


def option(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def test_nothing_is_ever_unpickled() -> None:
    assert [place for place, name in imports() if name.partition(".")[0] in PICKLES] == []
    loads = [(place, option(call, "weights_only")) for place, name, call in calls() if name in ("torch.load", "torch.hub.load")]
    assert loads
    assert {given for _, given in loads} == {"True"}, loads
    assert [place for place, _, call in calls() if option(call, "allow_pickle") not in (None, "False")] == []


def test_yaml_makes_no_objects_and_no_text_becomes_code_or_a_shells_command() -> None:
    assert [place for place, name, _ in calls() if name in ("yaml.load", "yaml.full_load", "yaml.unsafe_load")] == []
    assert [place for place, name, _ in calls() if name in RUNS_TEXT] == []
    assert [place for place, _, call in calls() if option(call, "shell") not in (None, "False")] == []


def test_archives_are_read_and_never_unpacked_to_a_disk() -> None:
    assert [place for place, name, _ in calls() if name.rpartition(".")[2] in ("extractall", "extract", "unpack_archive")] == []


@pytest.mark.parametrize("entry", ["os:system", "subprocess:run", "builtins:exec", "..ray_jobs:x", ":x", "", "/tmp:x", "ray:init"])
def test_who_may_write_to_s3_cannot_make_a_job_call_any_function_of_python(entry: str) -> None:
    with pytest.raises(ValueError, match="no work of ours"):
        job.find(entry)
    assert job.find("ray_jobs.step_work:evaluate")

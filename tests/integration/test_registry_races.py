"""Many commands write one thing to MLflow's registry at one moment, and each of them succeeds."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest

from infra import registry
from infra.tracking import client
from tests import promotion_worlds as worlds

pytestmark = pytest.mark.slow
WRITERS, ROUNDS = 16, 6


@pytest.fixture
def model(mlflow_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in worlds.environment(mlflow_url, tmp_path / "home", None).items():
        monkeypatch.setenv(name, value)
    client.cache_clear()
    made = client().create_registered_model(f"model-{secrets.token_hex(4)}")
    yield str(made.name)
    client.cache_clear()


def all_at_once(write: Callable[[], object]) -> None:
    """Raises what any of the writers raised."""
    start = Barrier(WRITERS)

    def one() -> None:
        start.wait()
        write()

    with ThreadPoolExecutor(WRITERS) as writers:
        for written in [writers.submit(one) for _ in range(WRITERS)]:
            written.result()


def test_one_new_tag_of_a_model(model: str) -> None:
    for number in range(ROUNDS):
        all_at_once(partial(registry.set_model_tag, model, f"key-{number}", "same"))
    assert registry.model_tags(model) == {f"key-{number}": "same" for number in range(ROUNDS)}


def test_one_new_tag_of_a_version(model: str) -> None:
    made = client().create_model_version(model, "s3://nowhere/model")
    version = registry.ModelVersion(model, str(made.version), {}, "")
    for number in range(ROUNDS):
        all_at_once(partial(registry.set_tags, version, {f"key-{number}": "same"}))
    found = registry.get(model, version.version)
    assert found is not None
    assert found.tags == {f"key-{number}": "same" for number in range(ROUNDS)}


def test_one_alias_is_made_and_taken_away(model: str) -> None:
    version = str(client().create_model_version(model, "s3://nowhere/model").version)
    for _ in range(ROUNDS):
        all_at_once(partial(registry.set_alias, model, registry.CHAMPION, version))
        assert registry.by_alias(model, registry.CHAMPION) is not None
        all_at_once(partial(registry.delete_alias, model, registry.CHAMPION))
        assert registry.by_alias(model, registry.CHAMPION) is None

"""`unfreeze cache`: what is shown, what pruning throws away, and that nothing half lives on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import answers, cli
from infra.errors import UserError
from infra.object_store import join_uri
from ray_jobs.feature_batches import Selection, batch_uri, commit_batch, commit_selection, write_shards
from ray_jobs.feature_cache import open_features
from ray_jobs.feature_set import Cell, Transform, feature_set
from tasks import cache
from tests.fakes import MemoryObjectStore

STORAGE = "s3://bucket/lab"
facts = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=10).map(sorted)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryObjectStore:
    """The cache of two depths: one of two batches and last used just now, one of pixels and not used for ten days."""
    store = MemoryObjectStore()
    monkeypatch.setenv("UNFREEZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "object_store", lambda: store)
    for depth, age_days in ((1, 0), (4, 10)):
        features = feature_set(
            Cell(depth, 0), backbone_digest="b" * 32, num_groups=4, transform=Transform(96, (0.5,) * 3, (0.25,) * 3), augmentation="photo",
            dtype="float32",
        )  # fmt: skip
        batches = []
        for number in range(2):
            images = [f"{4 * number + i:064x}" for i in range(4)]
            uri = batch_uri(STORAGE, features, images)
            parts = write_shards(store, uri, 0, [np.ones((4, 8), np.float32)], "float32")
            batches.append(commit_batch(store, uri, images, parts, {"backbone": "resnet18", "set": features.plain}))
        places = np.repeat(np.arange(2, dtype=np.int32), 4), np.tile(np.arange(4), 2)
        selection = Selection([(batch.uri, batch.manifest_digest) for batch in batches], *places, np.arange(8), 6, 1)
        open_features(commit_selection(store, STORAGE, selection, {}), store, tmp_path)
        use = join_uri(STORAGE, "uses", "features", features.digest)
        store.write(use, b"{}")
        store.modified_at[use] -= age_days * 86400
    return store


def test_both_tiers_are_shown_the_last_used_first(store: MemoryObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    answer = cache.show(STORAGE)
    assert [(row["backbone"], row["unfreeze_depth"], row["images"], row["batches"]) for row in answer["sets"]] == [
        ("resnet18", 1, 8, 2),
        (None, None, 8, 2),
    ]
    assert answer["bytes"] == sum(row["bytes"] for row in answer["sets"]) > 512
    assert len(answer["local"]) == 2
    assert json.loads(json.dumps(answer)) == answer
    answers.show(answer, as_json=False, render=answers.cache)
    shown = capsys.readouterr().out
    assert "10 days" in shown
    assert "resnet18" in shown


def test_what_is_older_goes_with_its_selection_and_what_is_younger_stays(store: MemoryObjectStore, tmp_path: Path) -> None:
    before = dict(store.objects)
    limits: dict[str, Any] = {"older_than_days": 5, "to_bytes": None}
    planned = cache.prune(STORAGE, **limits, dry_run=True)
    assert store.objects == before
    assert cache.prune(STORAGE, **limits, dry_run=False) == planned | {"dry_run": False}
    assert planned["freed_bytes"] > 0
    answer = cache.show(STORAGE)
    assert [row["unfreeze_depth"] for row in answer["sets"]] == [1]
    assert answer["bytes"] == planned["left_bytes"]
    assert len({uri.split("/")[5] for uri in store.objects if "/features/" in uri and "/uses/" not in uri}) == 3  # two batches, a selection


def test_what_a_killed_pass_left_goes_once_it_is_a_day_old(store: MemoryObjectStore) -> None:
    shard = join_uri(STORAGE, "features", "abc-def", "00000.safetensors")
    store.write(shard, b"half")
    limits: dict[str, Any] = {"older_than_days": 100, "to_bytes": None, "dry_run": False}
    cache.prune(STORAGE, **limits)
    assert store.exists(shard)
    store.modified_at[shard] -= 2 * 86400
    cache.prune(STORAGE, **limits)
    assert not store.exists(shard)
    assert len(cache.show(STORAGE)["sets"]) == 2


def test_a_selection_that_cannot_be_read_any_more_keeps_nothing_from_being_pruned_and_goes(store: MemoryObjectStore) -> None:
    selections = {
        uri.split("/")[5] for uri in store.objects if "/features/" in uri and "/uses/" not in uri and "-" not in uri.split("/")[5]
    }
    for name in selections:
        for uri in [uri for uri in store.objects if f"/features/{name}/" in uri and not uri.endswith("MANIFEST.json")]:
            store.objects[uri] = b"x" * len(store.objects[uri])
    cache.prune(STORAGE, older_than_days=5, to_bytes=None, dry_run=False)
    assert [row["unfreeze_depth"] for row in cache.show(STORAGE)["sets"]] == [1]
    assert not {uri.split("/")[5] for uri in store.objects if "/features/" in uri} & selections


def test_pruning_this_machine_leaves_s3(store: MemoryObjectStore) -> None:
    before = dict(store.objects)
    assert len(cache.prune(None, older_than_days=None, to_bytes=0, dry_run=False)["removed"]) == 2
    assert cache.show(STORAGE)["local"] == []
    assert store.objects == before


def test_pruning_needs_a_limit(store: MemoryObjectStore) -> None:
    with pytest.raises(UserError, match="--older-than"):
        cache.prune(STORAGE, older_than_days=None, to_bytes=None, dry_run=False)


@given(facts, st.none() | st.floats(0, 100), st.none() | st.integers(0, 300))
def test_pruning_frees_the_old_and_then_just_enough(facts: list[tuple[float, int]], older: float | None, to_bytes: int | None) -> None:
    gone = set(cache.chosen(facts, now=100.0, older_than_s=older, to_bytes=to_bytes))
    kept = [fact for number, fact in enumerate(facts) if number not in gone]
    assert kept == facts[len(gone) :]
    assert older is None or all(100.0 - used_at <= older for used_at, _ in kept)
    assert to_bytes is None or sum(size for _, size in kept) <= to_bytes
    if gone:
        used_at, size = facts[len(gone) - 1]
        too_old = older is not None and 100.0 - used_at > older
        assert too_old or (to_bytes is not None and size + sum(size for _, size in kept) > to_bytes)


def test_sizes_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from infra.settings import bytes_of, cache_bytes

    monkeypatch.setenv("UNFREEZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("UNFREEZE_CACHE_BYTES", "1.5GB")
    assert (bytes_of("5GB"), bytes_of("0"), cache_bytes()) == (5 * 10**9, 0, 1_500_000_000)
    assert cli._run(["cache", "prune", "--local", "--to-bytes", "plenty"]) == 2
    assert "no size" in capsys.readouterr().err
    assert cli._run(["cache", "prune", "--local"]) == 2
    monkeypatch.setattr("infra.local_stack.session", lambda *args, **kwargs: pytest.fail("a local cache needs no server"))
    assert cli._run(["cache", "prune", "--local", "--to-bytes", "1MB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == []

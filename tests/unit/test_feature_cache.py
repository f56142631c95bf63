"""The feature cache: its key, its crash order, and that training from it equals training without it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.committed_folder import Entry
from ray_jobs.feature_cache import FeatureIdentity, commit_features, open_features, write_shard
from tests.fakes import MemoryObjectStore

URI = "s3://bucket/features/key"
IDENTITY = FeatureIdentity("b" * 32, 1, 96, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "d" * 32)


def write_all(store: MemoryObjectStore) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    whole = [rng.normal(size=(7, 3, 2)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)]
    entries: list[Entry] = []
    for i, rows in enumerate((slice(0, 3), slice(3, 5), slice(5, 7))):
        entries.append(write_shard(store, URI, i, [value[rows] for value in whole], np.arange(7, dtype=np.int64)[rows]))
    commit_features(store, URI, entries, {"train": 5, "val": 2})
    return whole


@pytest.mark.parametrize("change", [
    {"backbone_digest": "c" * 32}, {"unfreeze_depth": 2}, {"image_size": 64}, {"mean": (0.4, 0.5, 0.5)}, {"std": (0.2, 0.25, 0.25)},
    {"dataset_version": "e" * 32}, {"view": "flip"}, {"dtype": "bfloat16"},
])  # fmt: skip
def test_whatever_changes_the_features_changes_the_key(change: dict[str, Any]) -> None:
    assert replace(IDENTITY, **change).key != IDENTITY.key


def test_every_part_of_the_identity_is_covered_by_the_test_above_and_equal_ones_share_a_key() -> None:
    assert set(vars(IDENTITY)) == {"backbone_digest", "unfreeze_depth", "image_size", "mean", "std", "dataset_version", "view", "dtype"}
    assert replace(IDENTITY).key == IDENTITY.key


def test_shards_come_back_as_the_rows_that_were_written_mapped_and_ready_for_torch(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    whole = write_all(store)
    features = open_features(URI, store, tmp_path)
    assert (features.train, features.val) == (5, 2)
    np.testing.assert_array_equal(features.labels, np.arange(7))
    for value, expected in zip(features.values, whole, strict=True):
        np.testing.assert_array_equal(value, expected)
        assert isinstance(value, np.memmap)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = torch.from_numpy(value)
        assert tensor.data_ptr() == value.ctypes.data
        tensor += 1  # a trial that writes into its features spoils them for nobody else
    np.testing.assert_array_equal(open_features(URI, store, tmp_path).values[0], whole[0])


def test_a_machine_fetches_the_shards_once(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    write_all(store)
    open_features(URI, store, tmp_path)
    store.objects = {uri: data for uri, data in store.objects.items() if uri.endswith("MANIFEST.json")}
    assert open_features(URI, store, tmp_path).train == 5


def test_a_crash_at_any_write_leaves_no_readable_cache(tmp_path: Path) -> None:
    whole = MemoryObjectStore()
    write_all(whole)
    for crash_at in range(whole.writes):
        store = MemoryObjectStore()
        left = iter(range(crash_at))

        def crash(uri: str, left: Any = left) -> None:
            if next(left, None) is None:
                raise ConnectionAbortedError(uri)

        store.before_write = crash
        with pytest.raises(ConnectionAbortedError):
            write_all(store)
        with pytest.raises(FileNotFoundError):
            open_features(URI, store, tmp_path / str(crash_at))
        store.before_write = lambda uri: None
        write_all(store)
        assert open_features(URI, store, tmp_path / str(crash_at)).val == 2


def test_an_altered_shard_is_never_read(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    write_all(store)
    key = f"{URI}/00001.safetensors"
    store.objects[key] = store.objects[key][:-1] + bytes([store.objects[key][-1] ^ 1])
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        open_features(URI, store, tmp_path)

"""The feature cache: its crash order, that nothing damaged is ever read, and the copy that all workers of a machine share."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.committed_folder import MANIFEST, verify
from infra.errors import UserError
from ray_jobs import feature_batches, feature_cache
from ray_jobs.feature_batches import (
    Batch,
    DamagedError,
    Selection,
    batch_uri,
    commit_batch,
    commit_selection,
    drop,
    find_batches,
    stored_as,
    write_shards,
)
from ray_jobs.feature_cache import Features, LocalCopy, evict, local_copies, open_features, remove
from ray_jobs.feature_set import Cell, FeatureSet, Transform, feature_set
from tests.fakes import MemoryObjectStore
from tests.faults import SmallDisk

STORAGE = "s3://bucket/lab"
SET = feature_set(
    Cell(1, 0), backbone_digest="b" * 32, num_groups=4, transform=Transform(96, (0.5,) * 3, (0.25,) * 3), augmentation="photo",
    dtype="float32",
)  # fmt: skip
RNG = np.random.default_rng(0)
WHOLE = [RNG.normal(size=(7, 3, 2)).astype(np.float32), RNG.integers(0, 255, (7, 5), dtype=np.uint8)]
IMAGES = [f"{i:064x}" for i in range(7)]
BATCHES = ([0, 2, 4, 6], [5, 1, 3])  # the rows of WHOLE that each batch holds, in its order


def write_batch(store: MemoryObjectStore, rows: list[int], dtype: str = "float32") -> Batch:
    images = [IMAGES[row] for row in rows]
    uri = batch_uri(STORAGE, SET, images)
    parts = [
        part
        for number, some in enumerate((rows[:2], rows[2:]))
        for part in write_shards(store, uri, number, [v[some] for v in WHOLE], dtype)
    ]
    return commit_batch(store, uri, images, parts, {})


def write_all(store: MemoryObjectStore, dtype: str = "float32") -> str:
    """Two batches, and a selection of all rows in order: five of train, two of val."""
    batches = [write_batch(store, rows, dtype) for rows in BATCHES]
    place = {row: (number, at) for number, rows in enumerate(BATCHES) for at, row in enumerate(rows)}
    places = [place[row] for row in range(7)]
    batch_of, row_of = np.array([p[0] for p in places], np.int32), np.array([p[1] for p in places])
    selection = Selection([(b.uri, b.manifest_digest) for b in batches], batch_of, row_of, np.arange(7), 5, 1)
    return commit_selection(store, STORAGE, selection, {})


def damage(error: DamagedError) -> None:
    raise error


def found_in(store: MemoryObjectStore, features: FeatureSet = SET) -> list[Batch]:
    return find_batches(store, STORAGE, features, damage)


def test_rows_of_several_batches_come_back_in_order_mapped_and_ready_for_torch(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    uri = write_all(store)
    features = open_features(uri, store, tmp_path)
    assert (features.train, features.val, features.views) == (5, 2, 1)
    np.testing.assert_array_equal(features.labels, np.arange(7))
    for value, expected in zip(features.values, WHOLE, strict=True):
        np.testing.assert_array_equal(value, expected)
        assert isinstance(value, np.memmap)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = features.tensors()
    assert [tensor.data_ptr() for tensor in tensors] == [value.ctypes.data for value in features.values]
    tensors[0] += 1  # a trial that writes into its features spoils them for nobody else
    np.testing.assert_array_equal(open_features(uri, store, tmp_path).values[0], WHOLE[0])


def test_all_batches_of_a_set_are_found_and_those_of_no_other(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    uri = write_all(store)
    assert sorted(image.hex() for batch in found_in(store) for image in batch.images) == IMAGES
    assert found_in(store, FeatureSet(**{**vars(SET), "unfreeze_depth": 2})) == []
    assert [verify(store, folder) for folder in [uri, *(batch.uri for batch in found_in(store))]] == [[], [], []]


def test_a_machine_assembles_its_copy_once_and_then_needs_no_store(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    uri = write_all(store)
    open_features(uri, store, tmp_path)
    assert open_features(uri, MemoryObjectStore(), tmp_path).train == 5


def test_a_disk_too_full_for_the_copy_says_so_and_leaves_none(tmp_path: Path) -> None:
    """Written through a mapping, it would be a SIGBUS that ends the process."""
    store = MemoryObjectStore()
    value = RNG.normal(size=(7, 100_000)).astype(np.float32)
    uri = batch_uri(STORAGE, SET, IMAGES)
    batch = commit_batch(store, uri, IMAGES, write_shards(store, uri, 0, [value], "float32"), {})
    rows = Selection([(batch.uri, batch.manifest_digest)], np.zeros(7, np.int32), np.arange(7), np.arange(7), 5, 1)
    selection = commit_selection(store, STORAGE, rows, {})
    with SmallDisk(tmp_path / "disk", 2**20) as disk:
        if disk.missing:
            pytest.skip(disk.missing)
        with pytest.raises(OSError, match="No space left"):
            open_features(selection, store, disk.folder)
        assert local_copies(disk.folder) == []
    np.testing.assert_array_equal(open_features(selection, store, tmp_path).values[0], value)


def test_what_was_never_committed_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_features(f"{STORAGE}/features/none", MemoryObjectStore(), tmp_path)


def test_a_crash_at_any_write_leaves_no_batch_and_no_selection_that_looks_finished(tmp_path: Path) -> None:
    whole = MemoryObjectStore()
    uri = write_all(whole)
    for crash_at in range(whole.writes):
        store = MemoryObjectStore()
        left = iter(range(crash_at))

        def crash(uri: str, left: Any = left) -> None:
            if next(left, None) is None:
                raise ConnectionAbortedError(uri)

        store.before_write = crash
        with pytest.raises(ConnectionAbortedError):
            write_all(store)
        for batch in found_in(store):
            assert verify(store, batch.uri) == []
        with pytest.raises(FileNotFoundError):
            open_features(uri, store, tmp_path / str(crash_at))
        store.before_write = lambda uri: None
        assert write_all(store) == uri
        assert open_features(uri, store, tmp_path / str(crash_at)).val == 2


@given(st.data())
def test_no_flipped_bit_on_s3_is_ever_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Each either does no harm (white space of a manifest), or is found by name, and computing that batch again mends it."""
    store = MemoryObjectStore()
    write_all(store)
    key = data.draw(st.sampled_from(sorted(store.objects)))
    position = data.draw(st.integers(0, len(store.objects[key]) - 1))
    content = bytearray(store.objects[key])
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    store.objects[key] = bytes(content)
    folder = tmp_path_factory.mktemp("cache")
    dropped = []

    def forget(error: DamagedError) -> None:
        dropped.append(error.uri)
        drop(store, error.uri)

    for _ in range(3):
        try:
            find_batches(store, STORAGE, SET, forget)
            features = open_features(write_all(store), store, folder)
            break
        except DamagedError as error:
            forget(error)
    for value, expected in zip(features.values, WHOLE, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert all(key.startswith(folder) for folder in dropped)


def test_a_missing_shard_is_damage_too(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    uri = write_all(store)
    gone = next(key for key in store.objects if "00001-000" in key)
    del store.objects[gone]
    with pytest.raises(DamagedError, match="is missing") as caught:
        open_features(uri, store, tmp_path)
    assert gone.startswith(caught.value.uri)
    drop(store, caught.value.uri)
    assert len(found_in(store)) == 1
    with pytest.raises(DamagedError, match="it is gone"):
        open_features(uri, store, tmp_path)


@given(st.data())
def test_no_flipped_bit_of_the_local_copy_is_ever_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store, folder = MemoryObjectStore(), tmp_path_factory.mktemp("cache")
    uri = write_all(store)
    open_features(uri, store, folder)
    path = data.draw(st.sampled_from(sorted((folder / "features").glob("*/*"))))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    features = open_features(uri, store, folder)
    for value, expected in zip(features.values, WHOLE, strict=True):
        np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(features.labels, np.arange(7))


def test_a_copy_half_made_by_a_killed_process_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryObjectStore()
    uri = write_all(store)

    def killed(folder: Path) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_digests", killed)
        with pytest.raises(KeyboardInterrupt):
            open_features(uri, store, tmp_path)
    assert open_features(uri, store, tmp_path).train == 5


def test_many_openers_at_once_assemble_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = MemoryObjectStore(), []
    uri = write_all(store)
    assemble = feature_cache._assemble
    monkeypatch.setattr(feature_cache, "_assemble", lambda *arguments: (made.append(1), assemble(*arguments))[1])
    found: list[Features] = []
    threads = [threading.Thread(target=lambda: found.append(open_features(uri, store, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(made)) == (6, 1)


def test_the_least_recently_used_copies_go_first_and_what_is_mapped_stays_valid(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    uri = write_all(store)
    features = open_features(uri, store, tmp_path)
    other = commit_selection(store, STORAGE, feature_batches.open_selection(store, uri), {"another": True})
    open_features(other, store, tmp_path, budget_bytes=1)
    (copy,) = local_copies(tmp_path)
    assert copy.size_bytes > 0
    np.testing.assert_array_equal(features.values[0], WHOLE[0])
    assert open_features(uri, store, tmp_path).train == 5
    assert len(local_copies(tmp_path)) == 2
    assert remove(copy)
    assert len(local_copies(tmp_path)) == 1


def test_a_copy_goes_though_somebody_was_killed_while_throwing_away_an_earlier_one(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    open_features(write_all(store), store, tmp_path)
    (copy,) = local_copies(tmp_path)
    left = copy.path.with_suffix(".gone")
    left.mkdir()
    (left / "v0.npy").write_bytes(b"x")
    assert remove(copy)
    assert not copy.path.exists()
    assert not left.exists()


@given(st.lists(st.integers(1, 100)), st.integers(-10, 500))
def test_eviction_frees_what_it_must_and_no_more(sizes: list[int], budget: int) -> None:
    copies = [LocalCopy(Path(str(i)), size, float(i)) for i, size in enumerate(sizes)]
    gone = evict(copies, budget)
    kept = copies[len(gone) :]
    assert copies == [*gone, *kept]
    assert not kept or sum(copy.size_bytes for copy in kept) <= budget
    assert not gone or sum(copy.size_bytes for copy in [gone[-1], *kept]) > budget


def test_each_view_of_a_train_row_has_its_row_in_the_arrays() -> None:
    features = Features([], np.arange(7), train=5, val=2, views=3)
    rows = [features.row(train_row, view) for view in range(3) for train_row in range(5)]
    assert rows == [*range(5), *range(7, 12), *range(12, 17)]
    assert features.row(torch.tensor([4, 4]), torch.tensor([0, 2])).tolist() == [4, 16]


@pytest.mark.parametrize(("dtype", "kind"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_sixteen_bit_storage_halves_the_floats_leaves_pixels_and_rounds_as_torch_does(
    dtype: str, kind: torch.dtype, tmp_path: Path
) -> None:
    store = MemoryObjectStore()
    floats, pixels = open_features(write_all(store, dtype), store, tmp_path).tensors()
    assert floats.dtype == kind
    assert torch.equal(floats, torch.from_numpy(WHOLE[0]).to(kind))
    np.testing.assert_array_equal(pixels.numpy(), WHOLE[1])


@given(st.lists(st.floats(width=32, allow_subnormal=True), min_size=1))
def test_bfloat16_is_rounded_to_the_bit_as_torch_does(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    ours = torch.from_numpy(stored_as(values, "bfloat16")).view(torch.bfloat16).float()
    np.testing.assert_array_equal(ours.numpy(), torch.from_numpy(values).bfloat16().float().numpy())


def test_a_value_that_float16_cannot_hold_is_the_users_to_decide_on() -> None:
    with pytest.raises(UserError, match="70000 does not fit float16"):
        stored_as(np.array([[1.0, 7e4]], np.float32), "float16")


def test_large_shards_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_batches, "SHARD_BYTES", 64)
    store = MemoryObjectStore()
    parts = write_shards(store, f"{STORAGE}/features/x", 3, WHOLE, "float32")
    assert sum(part.rows for part in parts) == 7
    assert [part.entry.key[:9] for part in parts] == ["00003-000", "00003-001", "00003-002", "00003-003"]
    assert MANIFEST not in str(list(store.objects))

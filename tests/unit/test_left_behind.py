"""What a killed process left on S3 is told from what is committed, or still written, by a listing alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.object_store import ObjectInfo, join_uri
from tasks.left_behind import DAY_S, abandoned, clock_of, folders
from tests.fakes import MemoryObjectStore

STORAGE = "s3://bucket/lab"
NOW = 1e9
keys = st.sampled_from(["MANIFEST.json", "model.safetensors", "deep/MANIFEST.json", "deep/er/0.bin"])
written = st.dictionaries(st.tuples(st.sampled_from(["1", "2", "3"]), keys), st.floats(0, NOW), max_size=9)


@given(written)
def test_only_what_nobody_committed_or_wrote_to_for_a_day_is_abandoned(objects: dict[tuple[str, str], float]) -> None:
    infos = [ObjectInfo(join_uri(STORAGE, "models", "pets", version, key), 1, "", at) for (version, key), at in objects.items()]
    gone = {folder.uri for folder in abandoned(folders("models", STORAGE, infos), NOW)}
    for version in {version for version, _ in objects}:
        times = [at for (one, _), at in objects.items() if one == version]
        is_old = NOW - max(times) > DAY_S
        is_committed = (version, "MANIFEST.json") in objects
        assert (join_uri(STORAGE, "models", "pets", version) in gone) == (is_old and not is_committed)


def test_a_folder_of_each_kind_is_found_and_what_lies_beside_folders_is_none() -> None:
    below = {
        "fits": {"fits/f/checkpoints/epoch-0001", "fits/f/fit"},
        "features": {"features/set-batch"},
        "evidence": {"evidence/pets/abc"},
        "jobs": {"jobs/unfreeze-search-1"},
    }
    for kind, places in below.items():
        infos = [ObjectInfo(join_uri(STORAGE, place, "x"), 2, "", 1.0) for place in sorted(places)]
        beside = ObjectInfo(join_uri(STORAGE, kind, "result.json"), 2, "", 1.0)
        assert {folder.uri for folder in folders(kind, STORAGE, [*infos, beside])} == {join_uri(STORAGE, place) for place in places}


def test_a_fits_result_and_a_searchs_journal_belong_to_no_folder_that_could_be_deleted() -> None:
    infos = [ObjectInfo(join_uri(STORAGE, "fits/f/result.json"), 2, "", 1.0)]
    assert folders("fits", STORAGE, infos) == []


def test_the_time_is_the_stores_own_and_not_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryObjectStore()
    monkeypatch.setattr("tests.fakes.time.time", lambda: 7.0)
    assert clock_of(store, STORAGE) == 7.0

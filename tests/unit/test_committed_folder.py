"""A folder is whole or absent, whenever its writer dies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.committed_folder import MANIFEST, Manifest, Problem, commit, fetch, read_manifest, verify
from infra.errors import UserError
from tests.fakes import MemoryObjectStore

URI = "s3://bucket/folder"
FILES: dict[str, Path | bytes] = {"a": b"alpha", "b/c": b"beta", "d": b""}


class KilledError(Exception):
    """Stands for the process that dies."""


@given(dies_at=st.integers(0, 3))
def test_a_crash_at_any_write_leaves_no_committed_folder_and_the_next_commit_completes_it(dies_at: int) -> None:
    store = MemoryObjectStore()

    def die(uri: str) -> None:
        if store.writes >= dies_at:
            raise KilledError

    store.before_write = die
    with pytest.raises(KilledError):
        commit(store, URI, FILES)
    assert read_manifest(store, URI) is None
    store.before_write = lambda uri: None
    commit(store, URI, FILES)
    assert verify(store, URI) == []


def test_the_manifest_is_the_last_write() -> None:
    store = MemoryObjectStore()
    order: list[str] = []
    store.before_write = order.append
    commit(store, URI, FILES)
    assert order[-1] == f"{URI}/{MANIFEST}"
    assert len(order) == len(FILES) + 1


def test_a_second_commit_of_the_same_content_writes_nothing() -> None:
    store = MemoryObjectStore()
    assert commit(store, URI, FILES).transferred == len(FILES)
    writes = store.writes
    assert commit(store, URI, FILES).transferred == 0
    assert store.writes == writes


def test_changing_one_object_sends_that_one_and_removes_what_is_no_longer_wanted() -> None:
    store = MemoryObjectStore()
    commit(store, URI, FILES)
    assert commit(store, URI, {"a": b"new", "d": b""}).transferred == 1
    assert verify(store, URI) == []
    assert not store.exists(f"{URI}/b/c")


def test_a_crash_while_changing_a_committed_folder_leaves_it_uncommitted() -> None:
    store = MemoryObjectStore()
    commit(store, URI, FILES)

    def die(uri: str) -> None:
        raise KilledError

    store.before_write = die
    with pytest.raises(KilledError):
        commit(store, URI, {**FILES, "a": b"new"})
    assert read_manifest(store, URI) is None


def test_verify_names_what_is_missing_altered_and_extra() -> None:
    store = MemoryObjectStore()
    commit(store, URI, FILES)
    store.delete([f"{URI}/a"])
    store.write(f"{URI}/b/c", b"BETA")  # same size, other content
    store.write(f"{URI}/more", b"x")
    assert set(verify(store, URI)) == {Problem("a", "missing"), Problem("b/c", "altered"), Problem("more", "extra")}


def test_verifying_what_was_never_published_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=MANIFEST):
        verify(MemoryObjectStore(), URI)


def test_a_local_copy_is_made_once_and_never_from_altered_objects(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    commit(store, URI, FILES)
    folder = fetch(store, URI, tmp_path)
    assert (folder / "b" / "c").read_bytes() == b"beta"
    store.write(f"{URI}/a", b"ALPHA")
    assert fetch(store, URI, tmp_path) == folder
    with pytest.raises(ValueError, match="does not match"):
        fetch(store, URI, tmp_path / "elsewhere")


def test_a_folder_whose_manifest_is_damaged_is_written_again() -> None:
    store = MemoryObjectStore()
    manifest = commit(store, URI, FILES).manifest
    for damaged in (b"{", b"[1]", b'{"objects": [{}]}', b"\xff"):
        store.write(f"{URI}/{MANIFEST}", damaged)
        assert commit(store, URI, FILES).transferred == len(FILES)
        assert (read_manifest(store, URI), verify(store, URI)) == (manifest, [])


def test_a_fetch_that_was_killed_carries_on_with_what_is_here(tmp_path: Path) -> None:
    store, fetched = MemoryObjectStore(), []
    commit(store, "s3://bucket/folder", {f"{number}.bin": bytes([number]) for number in range(5)})
    download = store.download

    def dies_at_the_third(uri: str, path: Path) -> None:
        fetched.append(uri)
        if len(fetched) == 3:
            raise KeyError(uri)
        download(uri, path)

    store.download = dies_at_the_third  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        fetch(store, "s3://bucket/folder", tmp_path)
    here = len(list(tmp_path.glob("*.partial/*")))
    fetched.extend(["", "", ""])
    before = len(fetched)
    copy = fetch(store, "s3://bucket/folder", tmp_path)
    assert len(fetched) - before == 5 - here < 5
    assert sorted(path.read_bytes() for path in copy.iterdir()) == [bytes([number]) for number in range(5)]


@pytest.mark.parametrize("key", ["../evil", "a/../../evil", "/etc/evil", "a//b", "./a", "", "..", "a\\..\\evil", "a\0b", 7, None])
def test_a_manifest_that_names_anything_outside_its_folder_is_none_and_nothing_is_written_by_it(tmp_path: Path, key: object) -> None:
    store = MemoryObjectStore()
    entry = {"key": key, "size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    store.write(f"{URI}/{MANIFEST}", json.dumps({"objects": [entry]}).encode())
    store.write(f"{URI}/{key}", b"evil")
    for read in (lambda: fetch(store, URI, tmp_path / "here"), lambda: verify(store, URI)):
        with pytest.raises(UserError, match=r"MANIFEST\.json at .* is damaged"):
            read()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_a_manifest_whose_digest_is_none_is_refused() -> None:
    entry = {"key": "a", "size": 4, "sha256": "../../evil"}
    with pytest.raises(ValueError, match="no key of a folder with its digest"):
        Manifest.from_json(json.dumps({"objects": [entry]}).encode())


def test_a_folder_with_a_damaged_manifest_is_simply_written_again() -> None:
    store = MemoryObjectStore()
    store.write(f"{URI}/{MANIFEST}", b'{"objects": [{"key": "../evil", "size": 1, "sha256": "0"}]}')
    commit(store, URI, FILES)
    assert verify(store, URI) == []


def test_what_another_commits_meanwhile_stays_committed_where_it_is_the_same() -> None:
    store, manifests = MemoryObjectStore(), []

    def another_commits(uri: str) -> None:
        store.before_write = lambda uri: manifests.append(store.exists(f"{URI}/{MANIFEST}"))
        commit(store, URI, FILES)
        assert read_manifest(store, URI) is not None

    store.before_write = another_commits
    commit(store, URI, FILES)
    assert manifests[-1]  # when the slower one writes its own manifest, the faster one's is still there
    assert verify(store, URI) == []


def test_what_another_commits_meanwhile_goes_where_it_is_something_else() -> None:
    store, manifests = MemoryObjectStore(), []

    def another_commits(uri: str) -> None:
        store.before_write = lambda uri: manifests.append(store.exists(f"{URI}/{MANIFEST}"))
        commit(store, URI, {"a": b"other"})

    store.before_write = another_commits
    commit(store, URI, FILES)
    assert not manifests[-1]

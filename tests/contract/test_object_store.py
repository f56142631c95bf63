"""The laws of the object store seam, over the real server and over the fake."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.awsrequest import AWSRequest, AWSResponse

from infra.errors import ServiceError, UserError
from infra.object_store import ObjectStore, S3ObjectStore, enforces_write_if_absent, join_uri, split_uri
from infra.s3_client import new_client
from tests.fakes import MemoryObjectStore


@pytest.fixture(params=["rclone", "memory"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    if request.param == "memory":
        return MemoryObjectStore()
    request.getfixturevalue("s3")
    return S3ObjectStore()


@pytest.fixture
def base(request: pytest.FixtureRequest) -> str:
    return join_uri("s3://unfreeze", "contract", request.node.name.replace("[", "-").rstrip("]"))


def test_what_was_written_is_read_and_overwritten(store: ObjectStore, base: str) -> None:
    store.write(join_uri(base, "a"), b"one")
    store.write(join_uri(base, "a"), b"two")
    assert store.read(join_uri(base, "a")) == b"two"


def test_a_missing_object_is_file_not_found_and_does_not_exist(store: ObjectStore, base: str, tmp_path: Path) -> None:
    assert not store.exists(join_uri(base, "none"))
    with pytest.raises(FileNotFoundError):
        store.read(join_uri(base, "none"))
    with pytest.raises(FileNotFoundError):
        store.download(join_uri(base, "none"), tmp_path / "none")


def test_a_listing_holds_the_folder_alone_with_sizes_in_key_order(store: ObjectStore, base: str) -> None:
    for name in ("x/b", "x/a/deep", "xy/other"):
        store.write(join_uri(base, name), name.encode())
    listed = list(store.list(join_uri(base, "x")))
    assert [info.uri for info in listed] == [join_uri(base, "x/a/deep"), join_uri(base, "x/b")]
    assert [info.size_bytes for info in listed] == [8, 3]


def test_files_go_up_and_come_down_unchanged(store: ObjectStore, base: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(bytes(range(256)) * 50_000)  # more than one part of a multipart upload
    store.upload(tmp_path / "up", join_uri(base, "file"))
    store.download(join_uri(base, "file"), tmp_path / "new" / "down")
    assert (tmp_path / "new" / "down").read_bytes() == (tmp_path / "up").read_bytes()


def test_deleting_is_harmless_to_repeat(store: ObjectStore, base: str) -> None:
    store.write(join_uri(base, "a"), b"1")
    store.delete([join_uri(base, "a")])
    store.delete([join_uri(base, "a")])
    assert not store.exists(join_uri(base, "a"))


def test_a_missing_bucket_is_the_users_mistake_and_names_it(s3: dict[str, str]) -> None:
    with pytest.raises(UserError, match="nowhere"):
        S3ObjectStore().require_bucket("s3://nowhere/prefix")
    with pytest.raises(UserError, match="nowhere"):
        S3ObjectStore().write("s3://nowhere/a", b"")


def test_refused_credentials_are_the_users_mistake(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(UserError, match="refused the credentials"):
        S3ObjectStore().read("s3://unfreeze/a")


def test_a_server_that_is_down_is_a_service_error_after_bounded_retries(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("UNFREEZE_S3_DEADLINE_S", "0.5")
    with pytest.raises(ServiceError, match="AWS_ENDPOINT_URL") as failed:
        S3ObjectStore().read("s3://unfreeze/a")
    assert re.search(r"S3 at http://127.0.0.1:9 .* GetObject of s3://unfreeze/a: .* \(\d+ attempts? in \d+ s\)", failed.value.what)


@pytest.mark.parametrize("uri", ["http://bucket/key", "bucket/key", "s3://", "s3:///key"])
def test_what_is_no_s3_address_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        split_uri(uri)


def test_keys_may_hold_question_marks_and_hashes() -> None:
    assert split_uri("s3://bucket/a#b?c") == ("bucket", "a#b?c")


def test_folders_are_found_by_how_their_names_begin(store: ObjectStore, base: str) -> None:
    for key in ("features/ab-1/x", "features/ab-1/y", "features/ab-2/deep/z", "features/abc-3/x", "features/ab-not-a-folder"):
        store.write(join_uri(base, key), b"x")
    assert list(store.folders(join_uri(base, "features", "ab-"))) == [join_uri(base, "features", key) for key in ("ab-1", "ab-2")]
    assert list(store.folders(join_uri(base, "features", "z"))) == []


def test_a_listing_tells_when_each_object_was_written(store: ObjectStore, base: str) -> None:
    store.write(join_uri(base, "a"), b"x")
    (info,) = store.list(base)
    assert abs(info.modified_at - time.time()) < 60


@pytest.fixture(params=["moto", "memory"])
def enforcing(request: pytest.FixtureRequest) -> ObjectStore:
    if request.param == "memory":
        return MemoryObjectStore()
    request.getfixturevalue("enforcing_s3")
    return S3ObjectStore()


def test_a_store_that_enforces_conditional_writes_keeps_what_was_first(enforcing: ObjectStore, base: str) -> None:
    assert enforcing.write_if_absent(join_uri(base, "a"), b"one")
    assert not enforcing.write_if_absent(join_uri(base, "a"), b"two")
    assert enforcing.read(join_uri(base, "a")) == b"one"


def test_a_probe_tells_which_stores_enforce_conditional_writes_however_often_it_is_asked(
    enforcing: ObjectStore, base: str, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [enforces_write_if_absent(enforcing, join_uri(base, "probe")) for _ in range(2)] == [True, True]
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    assert [enforces_write_if_absent(S3ObjectStore(), join_uri(base, "probe")) for _ in range(2)] == [False, False]


def _answering(*statuses: int) -> tuple[S3ObjectStore, list[dict[str, str]]]:
    """A store whose S3 gives these answers to one write after another, and what it was sent."""
    store, sent, answers = S3ObjectStore(new_client()), [], iter(statuses)

    def answer(request: AWSRequest, **_: object) -> AWSResponse:
        sent.append({name: request.headers[name] for name in request.headers})
        return AWSResponse(request.url, next(answers), {}, SimpleNamespace(stream=lambda: [b""]))

    store.client.meta.events.register("before-send.s3", answer)
    return store, sent


def test_who_wins_is_asked_again_where_s3_could_not_decide_it(s3: dict[str, str]) -> None:
    assert _answering(409, 409, 200)[0].write_if_absent("s3://unfreeze/a", b"x")
    assert not _answering(409, 412)[0].write_if_absent("s3://unfreeze/a", b"x")
    with pytest.raises(ServiceError, match="decide"):
        _answering(*[409] * 20)[0].write_if_absent("s3://unfreeze/a", b"x")


def test_a_store_that_refuses_the_condition_itself_is_one_that_ignores_it(s3: dict[str, str]) -> None:
    store, sent = _answering(501, 200, 501, 200)
    assert not enforces_write_if_absent(store, "s3://unfreeze/a")
    assert ["If-None-Match" in headers for headers in sent] == [True, False, True, False]

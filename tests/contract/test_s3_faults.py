"""The object store over a real S3 server behind a proxy that fails: what passes by leaves no trace, and no wait is forever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from infra import object_store, patience, s3_upload
from infra.errors import ServiceError, UserError
from infra.in_threads import in_threads
from infra.object_store import S3ObjectStore, join_uri
from infra.s3_client import new_client
from tests.faults import Asked, FaultProxy, SmallDisk, proxied, writes

MIB = 2**20
BASE = "s3://unfreeze/faults"


@pytest.fixture
def proxy(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    yield from _in_front_of(s3_server, monkeypatch)


@pytest.fixture
def enforcing_proxy(enforcing_s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    yield from _in_front_of(enforcing_s3, monkeypatch)


def _in_front_of(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with proxied(server["AWS_ENDPOINT_URL"]) as proxy:
        for name, value in {**server, "AWS_ENDPOINT_URL": proxy.endpoint, "UNFREEZE_S3_DEADLINE_S": "60"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(patience, "LONGEST_WAIT_S", 0.5)
        yield proxy


def says_why(asked: Asked) -> bool:
    return asked.method != "HEAD"  # its answers have no body to say it in


FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "503 SlowDown": lambda proxy: proxy.answer(503, "SlowDown", times=4),
    "500": lambda proxy: proxy.answer(500, "InternalError", times=2),
    "429": lambda proxy: proxy.answer(429, "TooManyRequests", times=2),
    "400 that means later": lambda proxy: proxy.answer(400, "RequestTimeout", times=2, when=says_why),
    "hung up": lambda proxy: proxy.hang_up(times=3),
    "answer lost": lambda proxy: proxy.lose_answer(times=2, when=lambda asked: True),
    "answer cut short": lambda proxy: proxy.truncate(3, times=2, when=lambda asked: True),
    "slow": lambda proxy: proxy.slow(2_000, times=2),
    "altered on the way up": lambda proxy: proxy.alter_uploads(times=2),
    "altered on the way down": lambda proxy: proxy.alter_downloads(times=1),
    "connection refused": lambda proxy: (proxy.refuse_for(1.0), None)[1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_outlives_what_passes_by(proxy: FaultProxy, fault: str, tmp_path: Path) -> None:
    store, base = S3ObjectStore(), join_uri(BASE, fault.replace(" ", "-"))
    store.write(join_uri(base, "there"), b"before")
    (tmp_path / "up").write_bytes(b"a file")
    for operation in (
        lambda: store.write(join_uri(base, "new"), b"content"),
        lambda: store.read(join_uri(base, "there")),
        lambda: store.upload(tmp_path / "up", join_uri(base, "file")),
        lambda: store.download(join_uri(base, "file"), tmp_path / "down"),
        lambda: store.exists(join_uri(base, "there")),
        lambda: list(store.list(base)),
        lambda: store.delete([join_uri(base, "there")]),
    ):
        FAULTS[fault](proxy)
        operation()
        proxy.clear()
    assert store.read(join_uri(base, "new")) == b"content"
    assert (tmp_path / "down").read_bytes() == b"a file"
    assert [info.uri for info in store.list(base)] == [join_uri(base, "file"), join_uri(base, "new")]
    assert proxy.hit or fault == "connection refused"


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_what_the_store_will_not_do_is_asked_once(proxy: FaultProxy, status: int) -> None:
    store = S3ObjectStore()
    proxy.answer(status, "NoSuchKey" if status == 404 else "AccessDenied" if status == 403 else "MethodNotAllowed", times=10)
    with pytest.raises((UserError, ServiceError, FileNotFoundError)):
        store.read(f"{BASE}/refused")
    assert len(proxy.asked) == 1


def test_who_gives_up_says_what_was_asked_of_whom_how_often_and_how_long(proxy: FaultProxy) -> None:
    store = S3ObjectStore(deadline_s=0.3)
    proxy.answer(503, "SlowDown", seconds=600)
    with pytest.raises(ServiceError) as failed:
        store.read(f"{BASE}/never")
    for said in (proxy.endpoint, "GetObject", f"{BASE}/never", "attempt", "SlowDown"):
        assert said in failed.value.what
    assert len(proxy.asked) > 1


def test_a_conditional_write_whose_answer_was_lost_is_no_conflict(enforcing_proxy: FaultProxy) -> None:
    store = S3ObjectStore()
    enforcing_proxy.lose_answer(times=1)
    assert store.write_if_absent(f"{BASE}/mine", b"ours")
    assert store.read(f"{BASE}/mine") == b"ours"
    enforcing_proxy.hang_up(times=1)  # this time somebody else's object is what refuses it
    assert not store.write_if_absent(f"{BASE}/mine", b"another's")
    assert store.read(f"{BASE}/mine") == b"ours"
    assert not store.write_if_absent(f"{BASE}/mine", b"ours")  # no answer was lost: it was there before


@pytest.mark.parametrize("address", ["a refused connection", "an unknown host"])
def test_an_address_that_nobody_answers_at_is_named_long_before_the_deadline(
    proxy: FaultProxy, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = proxy.endpoint if address == "a refused connection" else "http://no-such-host.invalid"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(object_store, "REACHED_IN_S", 0.3)
    proxy.refuse()
    with pytest.raises(ServiceError) as failed:
        S3ObjectStore(deadline_s=3600).require_bucket(BASE)
    assert endpoint in failed.value.what
    assert "AWS_ENDPOINT_URL" in failed.value.way_out


def test_a_store_that_answers_503_at_first_is_waited_for(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "REACHED_IN_S", 0.3)
    proxy.answer(503, "SlowDown", seconds=1.5)
    S3ObjectStore(deadline_s=60).require_bucket(BASE)
    assert proxy.hit > 1


def test_a_wait_is_said_once_however_many_threads_wait(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(patience.progress, "say", said.append)
    store = S3ObjectStore()
    store.access._notice.after_s = 0.0
    proxy.answer(503, "SlowDown", times=12)
    list(in_threads(lambda number: store.write(f"{BASE}/said/{number}", b"x"), range(4), 4))
    assert said[0].startswith(f"Waiting for S3 at {proxy.endpoint}, up to 60 s: ")
    assert said[-1] == f"S3 at {proxy.endpoint} answers again."
    assert all(said[i].startswith("Waiting") != said[i + 1].startswith("Waiting") for i in range(len(said) - 1))


def test_one_error_ends_the_waits_of_the_other_threads(proxy: FaultProxy) -> None:
    store = S3ObjectStore(deadline_s=600)
    waits = threading.Event()

    def refuses_later(asked: Asked) -> bool:
        if asked.path.endswith("waits"):
            waits.set()
        return asked.path.endswith("waits")

    proxy.answer(503, "SlowDown", seconds=600, when=refuses_later)

    def work(name: str) -> None:
        if name == "fails":
            waits.wait()
            raise KeyError(name)
        store.write(f"{BASE}/{name}", b"x")

    with pytest.raises(KeyError, match="fails"):
        list(in_threads(work, ["waits", "fails"], 2))


def test_credentials_that_expired_are_read_again(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OLDKEY")
    store = S3ObjectStore()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTKEY")  # as a file of credentials or a role has new ones
    proxy.answer(400, "ExpiredToken")
    store.write(f"{BASE}/renewed", b"x")
    assert store.read(f"{BASE}/renewed") == b"x"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 5 MiB, S3's smallest, so that a few of them are little work."""
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(s3_upload, "WHOLE_BYTES", 5 * MIB)
    monkeypatch.setattr("infra.s3_download.WHOLE_BYTES", 5 * MIB)


def _is_part(asked: Asked) -> bool:
    return asked.method == "PUT" and "partNumber=" in asked.path


def _large(path: Path) -> bytes:
    data = b"".join(sha256(str(number).encode()).digest() for number in range(17 * MIB // 32))
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("server", ["rclone", "moto"])
def test_an_upload_that_was_cut_off_carries_on_from_the_parts_that_arrived(
    request: pytest.FixtureRequest, server: str, small_parts: None, tmp_path: Path
) -> None:
    proxy: FaultProxy = request.getfixturevalue("proxy" if server == "rclone" else "enforcing_proxy")
    data, uri = _large(tmp_path / "up"), f"{BASE}/large"
    proxy.answer(403, "AccessDenied", when=lambda asked: _is_part(asked) and "partNumber=4" in asked.path)
    with pytest.raises(UserError):
        S3ObjectStore().upload(tmp_path / "up", uri)
    arrived = len([asked for asked in proxy.asked if _is_part(asked)])
    assert not S3ObjectStore().exists(uri)
    proxy.asked.clear()
    S3ObjectStore().upload(tmp_path / "up", uri)
    sent = len([asked for asked in proxy.asked if _is_part(asked)])
    assert sent < 4, (arrived, sent)
    assert S3ObjectStore().read(uri) == data


def test_an_upload_of_another_content_takes_none_of_its_parts(proxy: FaultProxy, small_parts: None, tmp_path: Path) -> None:
    data, uri = bytearray(_large(tmp_path / "up")), f"{BASE}/other-content"
    proxy.answer(403, "AccessDenied", when=lambda asked: _is_part(asked) and "partNumber=4" in asked.path)
    with pytest.raises(UserError):
        S3ObjectStore().upload(tmp_path / "up", uri)
    data[7] ^= 1
    (tmp_path / "up").write_bytes(data)
    S3ObjectStore().upload(tmp_path / "up", uri)
    assert S3ObjectStore().read(uri) == bytes(data)


@pytest.mark.parametrize("fault", ["answer lost", "altered on the way up", "hung up", "503 SlowDown"])
def test_an_upload_in_parts_outlives_what_passes_by(proxy: FaultProxy, fault: str, small_parts: None, tmp_path: Path) -> None:
    data, uri = _large(tmp_path / "up"), f"{BASE}/parts-{fault.replace(' ', '-')}"
    FAULTS[fault](proxy)
    S3ObjectStore().upload(tmp_path / "up", uri)
    assert S3ObjectStore().read(uri) == data


def test_the_lost_answer_to_the_last_request_of_an_upload_sends_nothing_again(
    enforcing_proxy: FaultProxy, small_parts: None, tmp_path: Path
) -> None:
    data, uri = _large(tmp_path / "up"), f"{BASE}/last-answer"
    enforcing_proxy.lose_answer(when=lambda asked: asked.method == "POST" and "uploadId=" in asked.path)
    S3ObjectStore().upload(tmp_path / "up", uri)
    assert enforcing_proxy.hit == 1
    assert len([asked for asked in enforcing_proxy.asked if _is_part(asked)]) == 4
    assert S3ObjectStore().read(uri) == data


def test_a_download_that_was_cut_off_fetches_only_what_is_missing(proxy: FaultProxy, small_parts: None, tmp_path: Path) -> None:
    data, uri = _large(tmp_path / "up"), f"{BASE}/large-down"
    S3ObjectStore().upload(tmp_path / "up", uri)
    proxy.asked.clear()
    ranges = iter(range(100))
    proxy.answer(403, "AccessDenied", when=lambda asked: asked.method == "GET" and next(ranges) == 4)
    with pytest.raises(UserError):
        S3ObjectStore().download(uri, tmp_path / "down")
    assert not (tmp_path / "down").exists()
    proxy.asked.clear()
    S3ObjectStore().download(uri, tmp_path / "down")
    assert len(proxy.asked) < 5  # one asks which object it is
    assert (tmp_path / "down").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["down", "up"]


@pytest.mark.parametrize("room", [6 * MIB, 10 * MIB + 12_345])
def test_a_disk_that_gets_full_amid_a_download_says_so_and_it_carries_on(
    proxy: FaultProxy, small_parts: None, tmp_path: Path, room: int
) -> None:
    """It takes a part of a write without a word; what it did not take must not count as arrived."""
    data, uri = _large(tmp_path / "up"), f"{BASE}/full-disk"
    S3ObjectStore().upload(tmp_path / "up", uri)
    with SmallDisk(tmp_path / "disk", 18 * MIB) as disk:
        if disk.missing:
            pytest.skip(disk.missing)
        disk.fill(room)
        with pytest.raises(OSError, match="No space left"):
            S3ObjectStore().download(uri, disk.folder / "down")
        assert not (disk.folder / "down").exists()
        disk.free()
        S3ObjectStore().download(uri, disk.folder / "down")
        assert (disk.folder / "down").read_bytes() == data


def test_what_was_replaced_between_two_attempts_is_not_mixed(proxy: FaultProxy, small_parts: None, tmp_path: Path) -> None:
    data, uri = bytearray(_large(tmp_path / "up")), f"{BASE}/replaced"
    S3ObjectStore().upload(tmp_path / "up", uri)
    ranges = iter(range(100))
    proxy.answer(403, "AccessDenied", when=lambda asked: asked.method == "GET" and next(ranges) == 4)
    with pytest.raises(UserError):
        S3ObjectStore().download(uri, tmp_path / "down")
    data[7] ^= 1
    (tmp_path / "up").write_bytes(data)
    S3ObjectStore().upload(tmp_path / "up", uri)
    S3ObjectStore().download(uri, tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == bytes(data)


def test_uploads_that_nobody_carried_on_are_ended_after_a_day(enforcing_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    client = new_client()
    client.create_multipart_upload(Bucket="unfreeze", Key="stale/a")
    store = S3ObjectStore()  # moto says that every upload was begun in 2010
    monkeypatch.setattr(s3_upload.time, "time", lambda: 1.2e9)
    assert store.abort_stale_uploads("s3://unfreeze/stale") == 0
    monkeypatch.undo()
    assert store.abort_stale_uploads("s3://unfreeze/stale") == 1
    assert not client.list_multipart_uploads(Bucket="unfreeze", Prefix="stale/").get("Uploads")


def test_writes_are_what_is_lost_when_their_answers_are(proxy: FaultProxy) -> None:
    """The proxy itself: the server has done what the client does not learn of."""
    proxy.lose_answer(times=2, when=writes)
    with pytest.raises(ServiceError), patience.at_most(0.001):
        S3ObjectStore().write(f"{BASE}/lost", b"x")
    proxy.clear()
    assert S3ObjectStore().read(f"{BASE}/lost") == b"x"

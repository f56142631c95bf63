"""What is built on S3, over a real server that fails for a while: the results of a quiet hour, and a kill costs what was under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from infra import patience
from infra.committed_folder import commit, fetch, verify
from infra.lease import Waiting, hold
from infra.ledger_on_s3 import S3Ledger
from infra.object_store import S3ObjectStore
from ray_jobs.feature_cache import open_features
from tests.faults import Asked, FaultProxy, proxied
from tests.ledger_worlds import MODEL, content
from tests.unit import test_feature_cache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FILES = {f"part-{number}.bin": sha256(str(number).encode()).digest() * 4_000 for number in range(12)}
SECONDS = 6.0

FAULTS: dict[str, Callable[[FaultProxy], object]] = {
    "connections are refused for a while": lambda proxy: proxy.refuse_for(SECONDS),
    "503 for a while": lambda proxy: proxy.answer(503, "SlowDown", seconds=SECONDS),
    "slow": lambda proxy: proxy.slow(100_000, times=10),
    "answers cut short": lambda proxy: proxy.truncate(5, times=6, when=lambda asked: True),
    "answers lost": lambda proxy: proxy.lose_answer(times=6),
    "altered both ways": lambda proxy: (proxy.alter_uploads(times=4, when=_is_put), proxy.alter_downloads(times=1)),
}


def _is_put(asked: Asked) -> bool:
    return asked.method == "PUT" and "ledger" not in asked.path  # what alters a write that cannot be written again is no fault to mend


@pytest.fixture
def proxy(enforcing_s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the server that enforces conditional writes."""
    with proxied(enforcing_s3["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_the_ledger_and_the_features_come_through(
    proxy: FaultProxy, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"s3://unfreeze/{fault.replace(' ', '-')}"
    monkeypatch.setattr(test_feature_cache, "STORAGE", storage)
    store = S3ObjectStore()
    FAULTS[fault](proxy)
    commit(store, f"{storage}/folder", FILES)
    copy = fetch(store, f"{storage}/folder", tmp_path / "copies")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == FILES
    assert verify(store, f"{storage}/folder") == []
    proxy.clear()

    FAULTS[fault](proxy)
    ledger = S3Ledger(store, storage)
    entries = [ledger.append(MODEL, content(str(number)), number) for number in (1, 2)]
    assert ledger.entries(MODEL) == entries
    proxy.clear()

    FAULTS[fault](proxy)
    features = open_features(test_feature_cache.write_all(store), store, tmp_path / "cache")
    for value, expected in zip(features.values, test_feature_cache.WHOLE, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_a_lease_is_kept_through_an_outage_that_is_longer_than_the_patience_of_those_who_wait(proxy: FaultProxy) -> None:
    mine, theirs = S3ObjectStore(), S3ObjectStore()
    uri, waiting = "s3://unfreeze/leases/outage", Waiting(renew_s=0.3, patience_s=2.0, poll_s=0.1)
    with hold(mine, uri, lambda holder: None, waiting):
        proxy.answer(503, "SlowDown", seconds=4.0)
        before = theirs.read(uri)  # a waiter's own request is what takes so long
        time.sleep(1.0)
        assert theirs.read(uri) != before  # renewed: the outage did not end it


UPLOAD = """
import sys
from pathlib import Path
from infra import s3_upload
from infra.object_store import S3ObjectStore
s3_upload.PART_BYTES = s3_upload.WHOLE_BYTES = 5 * 2**20
S3ObjectStore().upload(Path(sys.argv[1]), sys.argv[2])
"""


def _upload(path: Path, uri: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", UPLOAD, str(path), uri], cwd=ROOT, stderr=subprocess.PIPE)


def _parts_sent(proxy: FaultProxy) -> list[str]:
    return [asked.path for asked in proxy.asked if asked.method == "PUT" and "partNumber=" in asked.path]


def test_an_upload_whose_process_was_killed_sends_only_what_had_not_arrived(proxy: FaultProxy, tmp_path: Path) -> None:
    path, uri = tmp_path / "large", "s3://unfreeze/killed/large"
    data = b"".join(sha256(str(number).encode()).digest() for number in range(32 * 2**20 // 32))
    path.write_bytes(data)
    proxy.answer(503, "SlowDown", seconds=600, when=lambda asked: any(f"partNumber={n}&" in asked.path + "&" for n in (5, 6, 7)))
    killed = _upload(path, uri)
    while not (len(set(_parts_sent(proxy))) >= 5 and proxy.hit >= 3):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    proxy.clear()
    proxy.asked.clear()
    again = _upload(path, uri)
    assert again.wait() == 0, again.communicate()[1]
    again.communicate()
    assert len(_parts_sent(proxy)) <= 4
    assert S3ObjectStore().read(uri) == data


def test_ctrl_c_ends_a_transfer_that_waits_for_the_store(proxy: FaultProxy, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(12 * 2**20))
    proxy.answer(503, "SlowDown", seconds=3600)
    os.environ["UNFREEZE_S3_DEADLINE_S"] = "3600"
    try:
        waits = _upload(path, "s3://unfreeze/interrupted/large")
    finally:
        del os.environ["UNFREEZE_S3_DEADLINE_S"]
    while proxy.hit < 2:
        assert waits.poll() is None
        time.sleep(0.05)
    waits.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in waits.communicate()[1]  # and not after the hour that it may wait


def test_the_deadline_outlasts_a_minute_of_503() -> None:
    """The promise of the default setting; the faults above are shorter, to spare the tests' time."""
    from infra.settings import Settings

    assert Settings.model_fields["s3_deadline_s"].default >= 90
    assert patience.LONGEST_WAIT_S < 30

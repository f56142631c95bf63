"""What work used is counted where it happens, and adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import usage
from infra.object_store import S3ObjectStore
from infra.usage import Usage

numbers = st.integers(0, 10**9)
usages = st.builds(Usage, numbers, numbers, numbers, numbers, numbers.map(float), numbers.map(float))


@given(usages, usages)
def test_what_was_added_is_the_difference(before: Usage, more: Usage) -> None:
    assert (before + more) - before == more
    assert before + Usage() == before


def test_held_devices_count_for_as_long_as_the_work_takes_also_when_it_fails() -> None:
    before = usage.so_far()
    with pytest.raises(KeyError), usage.holding({"CPU": 2, "gpu": 0.5}, count=2):
        raise KeyError
    used = usage.so_far() - before
    assert 0 < used.gpu_s * 4 == pytest.approx(used.cpu_s)


def test_metered_work_gives_its_result_and_what_it_used() -> None:
    result, used = usage.metered(lambda size: usage.add(Usage(s3_read_bytes=size)) or size, {"cpu": 1}, 7)
    assert (result, used.s3_read_bytes) == (7, 7)
    assert used.cpu_s > 0


@pytest.mark.usefixtures("s3")
def test_every_byte_to_and_from_s3_is_counted_once(tmp_path: Path) -> None:
    store, base = S3ObjectStore(), "s3://unfreeze/usage"
    large = 17 * 2**20 + 1
    (tmp_path / "large").write_bytes(bytes(large))
    before = usage.so_far()
    (tmp_path / "small").write_bytes(b"x" * 60)
    store.write(f"{base}/small", b"x" * 40)
    store.upload(tmp_path / "small", f"{base}/small-file")
    store.upload(tmp_path / "large", f"{base}/large")
    written = usage.so_far() - before
    assert (written.s3_written_bytes, written.s3_read_bytes, written.s3_retries) == (large + 100, 0, 0)
    before = usage.so_far()
    assert store.read(f"{base}/small") + store.read(f"{base}/small-file") == b"x" * 100
    store.download(f"{base}/large", tmp_path / "down")
    read = usage.so_far() - before
    assert (read.s3_read_bytes, read.s3_written_bytes) == (large + 100, 0)
    assert read.s3_requests >= 4

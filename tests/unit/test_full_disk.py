"""A full disk is told as what it is, wherever it was: nobody is sent to look for a bug of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from infra.errors import ServiceError, UserError, room_on_disk

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/x")


def as_a_worker_tells_it() -> None:
    raise RuntimeError(f"ray::Lane.run() (pid=7)\n  File cache.py, line 3\nOSError: {FULL}")


def as_a_cause() -> None:
    try:
        raise FULL
    except OSError as error:
        raise RuntimeError("The fit failed") from error


def here() -> None:
    raise FULL


def as_numpy_tells_it() -> None:
    """By `numpy.save`, where a part fitted."""
    raise OSError("400000 requested and 131056 written")


@pytest.mark.parametrize("fails", [as_a_worker_tells_it, as_a_cause, as_numpy_tells_it, here])
def test_a_full_disk_says_where_room_is_needed(fails: Callable[[], None]) -> None:
    with pytest.raises(ServiceError, match="A disk is full") as told:
        room_on_disk()(fails)()
    assert "UNFREEZE_CACHE_DIR" in told.value.way_out


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(UserError), room_on_disk():
        raise UserError("No space left on device, says the spec", "mend it")
    with pytest.raises(OSError, match="denied"), room_on_disk():
        raise OSError(errno.EACCES, "denied")

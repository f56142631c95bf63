"""Every error that a person may see: what happened, and what to do about it.

UnfreezeError
 ├─ UserError            the user's mistake: spec, data, arguments       exit code 2
 │   ├─ LedgerConflict   another promotion got there first: judge again
 │   └─ LedgerDamaged    an entry is altered, missing or out of order
 └─ ServiceError         a service could not be reached, or gave up      exit code 3

Anything else that escapes is our own bug (exit code 1).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

FULL = re.compile("|".join([os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), r"\d+ requested and \d+ written"]))
"""What is said of a full disk; the last by numpy, which leaves the errno out."""


class UnfreezeError(Exception):
    """What happened (with the value), and what to do about it."""

    exit_code = 1

    def __init__(self, what: str, way_out: str = "") -> None:
        super().__init__(what, way_out)  # all values, so that the error survives pickling between processes
        self.what = what
        self.way_out = way_out

    def __str__(self) -> str:
        return f"{self.what}\n{self.way_out}" if self.way_out else self.what


class UserError(UnfreezeError, ValueError):
    """The user's mistake: in the spec, the data or the arguments."""

    exit_code = 2


class LedgerConflict(UserError):  # noqa: N818 - its name is what happened
    """Another promotion got there first: whoever decided against an older champion judges again."""


class LedgerDamaged(UserError):  # noqa: N818 - its name is what happened
    """An entry of the ledger is altered, missing or out of order: nothing is decided by such a ledger."""


class ServiceError(UnfreezeError):
    """A service could not be reached, refused, or gave up after retries."""

    exit_code = 3


@contextmanager
def room_on_disk() -> Iterator[None]:
    """Turn the error of a full disk, here or told by a worker, into one that says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _is_full(error):
            raise
        raise ServiceError(
            f"A disk is full: {(str(error).splitlines() or [''])[-1]}",
            "Make room where UNFREEZE_CACHE_DIR, UNFREEZE_HOME and the folder for temporary files lie; the same command carries on.",
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """A worker's error arrives as text within another."""
    if error is None:
        return False
    return bool(FULL.search(str(error))) or _is_full(error.__cause__ or error.__context__)

"""Notice that Ray is gone: its client would say nothing for a minute, or for ever, and then end this process with exit code 1."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infra.errors import ServiceError, UnfreezeError

LOOK_EVERY_S = 2.0
GONE_AFTER_S = 10.0
LEAVE_S = 25.0
"""Until the client's own minute is over, nearly; what waits for Ray on the way out waits as long."""
TIMEOUT_S = 5.0


def refuses(address: str) -> bool:
    """Whether nobody listens at host:port any more. A silent network is no proof."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def is_gone(address: str) -> bool:
    """Whether nothing can be done on Ray any more from this process."""
    return refuses(address) or lost_its_machine()


def lost_its_machine() -> bool:
    """Whether the head counts the machine of this process as dead: an agent of Ray's takes its raylet along, and the head may stay."""
    import ray

    if not ray.is_initialized():
        return False
    own = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own and not node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]  # Ray leaves it untyped


def gone(address: str) -> ServiceError:
    return ServiceError(f"Ray at {address} is gone.", "The same command carries on where it was; an embedded Ray it starts anew.")


@contextmanager
def watched(address: str) -> Iterator[None]:
    """For the body, look whether Ray is there, and interrupt this process, as Ctrl-C does, where it is not for GONE_AFTER_S.

    Raises ServiceError then; where the way out takes longer than LEAVE_S, the process ends with that error's exit code.
    """
    watch = _Watch(address)
    watch.start()
    try:
        yield
    except Exception as error:
        if not isinstance(error, UnfreezeError) and is_gone(address):  # Ray's own errors come first where something waits for a result
            raise gone(address) from error
        raise
    except BaseException:
        if watch.found_gone:
            raise gone(address) from None
        raise
    finally:
        watch.over.set()


def _interrupt() -> None:
    """By TERM where Ctrl-C is ignored, as in what a script starts in the background; a command takes both for the same."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            os.kill(os.getpid(), number)
            break


class _Watch(threading.Thread):
    """The thread that looks."""

    def __init__(self, address: str) -> None:
        super().__init__(name="watch Ray's head", daemon=True)
        self.address, self.over, self.found_gone = address, threading.Event(), False

    def run(self) -> None:
        there = time.monotonic()
        while not self.over.wait(LOOK_EVERY_S):
            if not is_gone(self.address):
                there = time.monotonic()
            elif time.monotonic() - there >= GONE_AFTER_S:
                self.found_gone = True
                _interrupt()
                self._see_it_end()
                break

    def _see_it_end(self) -> None:
        if not self.over.wait(LEAVE_S):
            error = gone(self.address)
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os._exit(error.exit_code)

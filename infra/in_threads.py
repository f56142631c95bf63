"""The same work on many things in a few threads, such that an error ends all of it, and Ctrl-C at once.

An executor's threads are waited for when a process ends, however long a service makes them wait; these are not.
"""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from infra import patience

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_threads(work: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """What `work` makes of each item, in the order of the items. The first error is raised when all that is under way has ended."""
    todo = [(item, Future[Made]()) for item in items]
    numbers, taking, given_up = itertools.count(), threading.Lock(), threading.Event()

    def worker() -> None:
        with patience.until(given_up):
            while not given_up.is_set():
                with taking:
                    number = next(numbers)
                if number >= len(todo):
                    return
                item, future = todo[number]
                try:
                    future.set_result(work(item))
                except BaseException as error:
                    future.set_exception(error)
                    given_up.set()

    # each thread gets its own copy: the limits on waiting that hold for the caller hold for its threads
    running = [
        threading.Thread(target=contextvars.copy_context().run, args=(worker,), name="in_threads", daemon=True)
        for _ in range(min(threads, len(todo)))
    ]
    for thread in running:
        thread.start()
    try:
        for _, future in todo:
            yield future.result()
    except Exception as error:
        given_up.set()
        for thread in running:
            thread.join()
        if not isinstance(error, patience.Abandoned):
            raise
        raise next(_reasons(future for _, future in todo), error) from None  # another item's failure is why this one was abandoned
    finally:
        given_up.set()


def _reasons(futures: Iterable[Future[Made]]) -> Iterator[BaseException]:
    """What went wrong by itself."""
    errors = (future.exception() for future in futures if future.done())
    return (error for error in errors if error is not None and not isinstance(error, patience.Abandoned))

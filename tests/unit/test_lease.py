"""The lease: one at a time, a dead holder is not waited for, and a lost race costs work but no result."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from json import dumps, loads

import pytest

from infra import processes
from infra.errors import ServiceError
from infra.lease import Holder, Waiting, hold, this_machine
from tests.fakes import MemoryObjectStore

URI = "s3://bucket/leases/one"
QUICK = Waiting(renew_s=0.05, patience_s=0.4, poll_s=0.01, settle_s=0.02)


def nobody(holder: Holder) -> None:
    raise AssertionError(f"waited for {holder}")


def holder_of(pid: int, machine: str, create_time: float = 0.0) -> Holder:
    return Holder("another", machine, "far.example", pid, create_time)


def test_one_holds_it_while_the_other_waits_and_then_finds_it_free() -> None:
    store, order, told = MemoryObjectStore(), [], []
    started = threading.Event()

    def first() -> None:
        with hold(store, URI, nobody, QUICK):
            started.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    with hold(store, URI, told.append, QUICK):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert len(told) == 1
    assert not store.exists(URI)


def test_a_dead_process_of_this_machine_is_not_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    known = processes.record(child.pid, "child")
    child.kill()
    child.wait()
    store = MemoryObjectStore()
    store.write(URI, dumps(asdict(holder_of(child.pid, this_machine(), known.create_time))).encode())
    with hold(store, URI, nobody, replace(QUICK, patience_s=600)):
        pass


def test_a_holder_elsewhere_counts_as_dead_once_it_has_not_renewed_for_the_patience_on_our_own_clock() -> None:
    store, told = MemoryObjectStore(), []
    store.write(URI, dumps(asdict(holder_of(1, "another machine"))).encode())
    before = time.monotonic()
    with hold(store, URI, told.append, QUICK):
        assert time.monotonic() - before > 0.4
    assert [str(holder) for holder in told] == ["process 1 on far.example"]


def test_a_holder_elsewhere_that_renews_is_waited_for() -> None:
    store = MemoryObjectStore()
    far = holder_of(1, "another machine")
    store.write(URI, dumps(asdict(far)).encode())

    over = threading.Event()

    def renew() -> None:
        for beat in range(1, 16):
            time.sleep(0.1)
            store.write(URI, dumps(asdict(replace(far, beat=beat))).encode())
        over.set()
        store.delete([URI])

    thread = threading.Thread(target=renew)
    thread.start()
    with hold(store, URI, lambda holder: None, replace(QUICK, patience_s=1.0)):
        assert over.is_set()
    thread.join()


def test_it_is_renewed_while_held_and_a_lease_that_was_taken_over_is_left_to_its_new_holder() -> None:
    store = MemoryObjectStore()
    with hold(store, URI, nobody, QUICK):
        time.sleep(0.3)
        assert loads(store.read(URI))["beat"] >= 2
        taken = dumps(asdict(holder_of(1, "another machine"))).encode()
        store.write(URI, taken)
        time.sleep(0.2)
    assert store.read(URI) == taken


def test_two_who_start_at_once_have_it_one_after_the_other() -> None:
    store, inside, most = MemoryObjectStore(), [], []

    def work() -> None:
        with hold(store, URI, lambda holder: None, replace(QUICK, settle_s=0.5, patience_s=60.0)):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_lease_that_cannot_be_read_is_nobodys_and_a_store_that_fails_for_a_while_ends_no_work() -> None:
    store = MemoryObjectStore()
    store.write(URI, b"{half")
    with hold(store, URI, nobody, QUICK):

        def fail(uri: str) -> None:
            raise ServiceError("S3 is away")

        store.before_write = fail
        time.sleep(0.15)
        store.before_write = lambda uri: None
        time.sleep(0.15)
        assert loads(store.read(URI))["beat"] >= 2
    assert not store.exists(URI)


def test_an_error_in_the_work_frees_the_lease() -> None:
    store = MemoryObjectStore()
    with pytest.raises(KeyError), hold(store, URI, nobody, QUICK):
        raise KeyError
    assert not store.exists(URI)

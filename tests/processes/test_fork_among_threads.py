"""Forks among threads, at exits, and by other libraries."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import threading
import traceback
import warnings

import pytest

from children import in_own_process
from constants import COMMITTED, RESERVE, RW, SHAREABLE
from faces import Face, call
from forked import in_child
from inherited import outcome, region
from kernel_oracle import PAGE
from vmm_linux import VMM, PageKind, Retcode, VmmFlags


def hammer(vmm: VMM, seed: int, stop: threading.Event) -> None:
    """Hold this VMM's mutex, and the list of all mutexes, as often as can be."""
    choose = random.Random(seed)  # noqa: S311
    pages = 128
    va = vmm.allocate(0, pages * PAGE, RESERVE | RW | VmmFlags((0, SHAREABLE)[seed % 2]))
    while not stop.is_set():
        first = choose.randrange(pages)
        size = choose.randrange(1, pages - first + 1) * PAGE
        method = choose.choice(["commit", "commit", "decommit", "query", "short", "write", "view"])
        arguments: tuple[object, ...] = (va + first * PAGE, size)
        if method in {"query", "short"}:
            arguments = (va, method == "query")
            method = "query"
        if method == "write":
            arguments = (va, b"x" * size)
        call(vmm, Face.METHODS, method, *arguments)
        with VMM() as other:
            other.allocate(0, PAGE, COMMITTED)


def use(vmm: VMM, shared: int) -> None:
    """Everything a child might do with a VMM that threads of its parent were using."""
    vmm._check()
    assert vmm.query(shared).kind is PageKind.PRIVATE
    va = vmm.allocate(0, 100 * PAGE, COMMITTED)
    vmm.write(va, b"child!" * 1000)
    assert vmm.read(va, 6) == b"child!"
    vmm.decommit(va, PAGE)
    vmm.free(va, 100 * PAGE)
    assert outcome(vmm, "decommit", shared, PAGE) is Retcode.INVALID_OPERATION
    with VMM() as other:
        other.write(other.allocate(0, PAGE, COMMITTED), b"x")
    vmm._check()
    vmm.close()


def fork_among_threads(forks: int) -> None:
    """Fork while four threads are inside the VMM. A deadlock ends in SIGALRM, here and there."""
    signal.alarm(40)
    warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from Python 3.12 on
    sys.setswitchinterval(1e-5)
    stop = threading.Event()
    with VMM() as vmm:
        shared = region(vmm, SHAREABLE)
        threads = [threading.Thread(target=hammer, args=(vmm, seed, stop)) for seed in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(forks):
                child = os.fork()
                if child == 0:
                    status = 1
                    signal.alarm(20)
                    try:
                        use(vmm, shared)
                        status = 0
                    except BaseException:  # noqa: BLE001  a child must not go on as its parent
                        traceback.print_exc()
                    finally:
                        os._exit(status)
                assert os.waitpid(child, 0)[1] == 0, "a child failed, or hung until SIGALRM"
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert vmm.read(shared, 6) == b"parent"
        vmm._check()


def test_a_child_forked_while_threads_are_inside_the_vmm_can_use_it() -> None:
    in_own_process(fork_among_threads, 300)


def fork_from_every_thread(forks: int) -> None:
    """Four threads fork at once, each while the others are in a call or in a fork."""
    signal.alarm(40)
    warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from Python 3.12 on
    sys.setswitchinterval(1e-5)
    failures: list[int] = []
    with VMM() as vmm:
        va = region(vmm, 0)

        def work() -> None:
            for _ in range(forks):
                vmm.write(va, b"parent" * 2000)
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    status = 1
                    with contextlib.suppress(BaseException):
                        vmm.query(va)
                        vmm.decommit(va, PAGE)
                        vmm.close()
                        status = 0
                    os._exit(status)
                failures.append(os.waitpid(child, 0)[1])

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [0] * 4 * forks
        assert vmm.read(va, 6) == b"parent"


def test_threads_that_fork_at_the_same_time_get_children_that_work() -> None:
    in_own_process(fork_from_every_thread, 40)


def leave_open(how: str) -> None:
    """A child that ends with its parent's VMM open, and one of its own."""
    vmm = VMM()
    va = region(vmm, SHAREABLE)
    child = os.fork()
    if child == 0:
        if how == "_exit":
            os._exit(0)
        if how == "dropped":
            del vmm
            gc.collect()
        if how == "its own":
            VMM().__enter__()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert vmm.read(va, 6) == b"parent"
    vmm.close()


@pytest.mark.parametrize("how", ["_exit", "exit", "dropped"])
def test_a_child_does_not_warn_of_its_parents_open_vmm(how: str) -> None:
    assert "ResourceWarning" not in in_own_process(leave_open, how)


def test_a_child_warns_of_an_open_vmm_that_it_made_itself() -> None:
    assert "was never closed" in in_own_process(leave_open, "its own")


def use_multiprocessing() -> None:
    """A process of multiprocessing's fork context, and a pool of them."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    with VMM() as vmm:
        private, shared = region(vmm, 0), region(vmm, SHAREABLE)
        ours, theirs = context.Pipe()

        def work() -> None:
            vmm.write(private, b"child!")
            vmm.write(shared + PAGE, b"child!")
            theirs.send((vmm.read(shared, 6), outcome(vmm, "decommit", shared, PAGE)))

        process = context.Process(target=work)
        process.start()
        assert ours.recv() == (b"parent", Retcode.INVALID_OPERATION)
        process.join()
        assert process.exitcode == 0
        assert vmm.read(private, 6) == b"parent"
        assert vmm.read(shared + PAGE, 6) == b"child!"


def test_multiprocessing_with_fork_works() -> None:
    assert in_own_process(use_multiprocessing) == ""


def exec_after_fork() -> None:
    """Nothing of a VMM goes through exec."""
    import subprocess

    with VMM() as vmm:
        vmm.query(region(vmm, SHAREABLE))
        listing = (
            "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in range(3, 20)"
            " if os.path.exists(f'/proc/self/fd/{n}')])"
        )
        child = subprocess.run(
            [sys.executable, "-c", listing],
            check=True,
            capture_output=True,
            text=True,
            close_fds=False,
        )
        assert "memfd" not in child.stdout
        assert "/proc/" not in child.stdout


def test_no_descriptor_of_a_vmm_goes_through_exec() -> None:
    in_own_process(exec_after_fork)


def test_a_raw_pointer_in_a_child_sees_the_childs_page(vmm: VMM) -> None:
    va = region(vmm, 0)

    def child() -> str:
        ctypes.memmove(va, b"child!", 6)
        return vmm.read(va, 6).decode()

    assert in_child(child) == "child!"
    assert ctypes.string_at(va, 6) == b"parent"

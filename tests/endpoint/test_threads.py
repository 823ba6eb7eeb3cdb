"""Threads that share a VMM, or have one each.

What could end or hang the interpreter runs in a process of its own. The functions that are not
tests are what these children do.
"""

from __future__ import annotations

import _thread
import gc
import random
import sys
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from children import in_own_process
from constants import COMMITTED, FIXED, LOCKED, PERMISSIONS, RESERVE, RESERVE_COMMIT, RW, SHAREABLE
from faces import Face, call
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, PageKind, PageState, Retcode, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable


#: Calls over more than 256 KiB let go of the GIL: ranges of up to twice that.
PAGES = 128
ARENA_END = ARENA + PAGES * PAGE


def in_threads(*works: Callable[[], object]) -> None:
    """Run these at the same time; what one of them raises is raised here."""
    start = threading.Barrier(len(works))
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        start.wait()
        try:
            work()
        except BaseException as failure:  # noqa: BLE001  it is raised again below
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# --------------------------------------------------------------------------------- hammering


#: Seldom free, or there is nothing left to hammer.
METHODS = ["allocate"] * 4 + ["free"] + ["commit", "protect", "read", "write", "view"] * 6
METHODS += ["decommit", "query", "smaps"] * 3


def draw(choose: random.Random, number: int) -> tuple[str, tuple[Any, ...]]:
    """A call on some range of the arena, which may or may not be one region."""
    method = choose.choice(METHODS)
    first = choose.randrange(PAGES)
    pages = choose.choice([8, 32, PAGES] if method == "allocate" else [1, 1, 2, 3, 8, 80])
    pages = min(pages, PAGES - first)
    va, size = ARENA + first * PAGE, pages * PAGE
    if method == "allocate":
        flags = RESERVE | FIXED | VmmFlags(choose.choice([1, 3, 3, 3]))
        for extra in (VmmFlags.COMMIT, LOCKED, SHAREABLE, VmmFlags.LOW_GUARD, VmmFlags.HIGH_GUARD):
            flags |= extra if choose.random() < 0.3 else 0
        return method, (va, size, flags)
    if method == "protect":
        return method, (va, size, choose.choice([0, 1, 3, 3, 3, 5]))
    if method in {"query", "smaps"}:
        return "query", (va, method == "smaps")
    if method == "write":
        return method, (va, bytes([number]) * size)
    return method, (va, size)


def hammer(vmm: VMM, seed: int, number: int, calls: int, seen: Counter[Retcode]) -> None:
    """One thread's calls. A page is always written by one call as a whole: it reads so too."""
    choose = random.Random(100 * seed + number)  # noqa: S311
    views: list[memoryview] = []
    for _ in range(calls):
        method, arguments = draw(choose, number)
        face = Face.METHODS if method == "query" else choose.choice(list(Face))
        got = call(vmm, face, method, *arguments)
        seen[got.rc] += 1
        if got.rc is Retcode.OK and method == "read":
            for start in range(0, len(got.value), PAGE):
                page = got.value[start : start + PAGE]
                assert page == page[:1] * PAGE, "a torn page"
        if got.rc is Retcode.OK and method == "view":
            assert got.value[0] == got.value[PAGE - 1]
            views.append(got.value)
        if len(views) > 3 or choose.random() < 0.1:
            views.clear()
        del got
    # An error's traceback may keep this frame until the next collection of garbage.
    views.clear()


def hammer_one_vmm(seed: int, threads: int, calls: int) -> None:
    """All threads on one arena; afterwards ledger and kernel agree."""
    sys.setswitchinterval(1e-5)
    before = kernel.descriptors()
    seen = [Counter[Retcode]() for _ in range(threads)]
    with VMM() as vmm:
        in_threads(
            *(
                partial(hammer, vmm, seed, number + 1, calls, seen[number])
                for number in range(threads)
            )
        )
        vmm._check()
        permissions = kernel.page_permissions(ARENA, ARENA_END)
        for page, mode in enumerate(permissions):
            info = vmm.query(ARENA + page * PAGE, smaps=False)
            if info.kind is PageKind.FREE:
                assert mode is None
            else:
                access = info.protection if info.state is PageState.COMMITTED else 0
                assert mode is not None
                assert mode[:3] == PERMISSIONS[int(access)]
            if info.kind is PageKind.PRIVATE:
                assert (mode[3:] if mode else None) == ("s" if info.flags & SHAREABLE else "p")
    assert kernel.maps_between(ARENA, ARENA_END) == []
    assert kernel.descriptors() == before
    total = sum(seen, Counter[Retcode]())
    allowed = {Retcode.OK, Retcode.RESOURCE_NOT_FOUND, Retcode.INVALID_OPERATION}
    allowed |= {Retcode.BUSY, Retcode.ALREADY_EXISTS}
    assert set(total) == allowed, total
    assert total[Retcode.OK] > threads * calls // 10


@pytest.mark.parametrize(("seed", "threads"), [(1, 4), (2, 8), (3, 5)])
def test_threads_that_hammer_one_vmm_leave_ledger_and_kernel_in_step(
    seed: int, threads: int
) -> None:
    in_own_process(hammer_one_vmm, seed, threads, 12_000 // threads, timeout=120)


def close_under_calls(rounds: int) -> None:
    """Four threads call, a fifth closes."""
    sys.setswitchinterval(1e-5)
    # What is imported at the first refusal must not look like a leak.
    with VMM() as vmm:
        call(vmm, Face.METHODS, "free", ARENA, PAGE)
    before = kernel.descriptors()
    kept: list[VMM] = []
    for turn in range(rounds):
        vmm = VMM()
        kept.append(vmm)
        va = vmm.allocate(
            ARENA, PAGES * PAGE, RESERVE_COMMIT | FIXED | RW | VmmFlags((0, SHAREABLE)[turn % 2])
        )
        closing = threading.Event()

        def work(method: str, *arguments: object, vmm: VMM = vmm) -> None:
            rc = Retcode.OK
            count = 0
            while rc is Retcode.OK:
                count += 1
                if count == 5:
                    closing.set()  # noqa: B023  this round's event
                rc = call(vmm, Face.METHODS, method, *arguments).rc
            assert rc in {Retcode.INVALID_OPERATION, Retcode.BUSY}, rc

        def close(vmm: VMM = vmm) -> None:
            closing.wait()  # noqa: B023  this round's event
            vmm.close()
            vmm.close()

        in_threads(
            close,
            lambda: work("commit", va, PAGES * PAGE),  # noqa: B023
            lambda: work("write", va, b"x" * PAGES * PAGE),  # noqa: B023
            lambda: work("query", va),  # noqa: B023
            lambda: work("view", va, 3 * PAGE),  # noqa: B023
        )
        assert kernel.maps_between(ARENA, ARENA_END) == []
    assert all(vmm.closed for vmm in kept)
    kept.clear()
    gc.collect()
    assert kernel.descriptors() == before


def test_closing_while_others_call_ends_in_invalid_operation_and_leaves_nothing() -> None:
    in_own_process(close_under_calls, 40, timeout=120)


def close_under_queries(rounds: int) -> None:
    """Three threads query while a fourth closes: Query's descriptors must go as well."""
    sys.setswitchinterval(1e-5)
    before = kernel.descriptors()
    for _ in range(rounds):
        vmm = VMM()
        va = vmm.allocate(0, PAGE, COMMITTED)
        asked = threading.Event()

        def ask(vmm: VMM = vmm, va: int = va, asked: threading.Event = asked) -> None:
            while call(vmm, Face.METHODS, "query", va).rc is Retcode.OK:
                asked.set()

        def close(vmm: VMM = vmm, asked: threading.Event = asked) -> None:
            asked.wait()
            vmm.close()

        in_threads(close, ask, ask, ask)
        assert kernel.descriptors() == before, "a closed VMM has descriptors"


def test_a_query_that_meets_a_close_leaves_no_descriptor() -> None:
    in_own_process(close_under_queries, 60, timeout=120)


def drop_views_and_close(rounds: int) -> None:
    """Views die in some threads while another closes: the last one out unmaps."""
    sys.setswitchinterval(1e-5)
    for _ in range(rounds):
        vmm = VMM()
        va = vmm.allocate(ARENA, PAGES * PAGE, RESERVE_COMMIT | FIXED | RW)
        views = [[vmm.view(va + page * PAGE, PAGE * 9) for page in range(0, 100, 7)] for _ in "abc"]
        in_threads(vmm.close, *(own.clear for own in views))
        assert kernel.maps_between(ARENA, ARENA_END) == []


def test_the_last_view_out_unmaps_whichever_thread_drops_it() -> None:
    in_own_process(drop_views_and_close, 100, timeout=120)


def make_and_drop(rounds: int) -> None:
    """VMMs made and closed in four threads at once: their mutexes are in one list."""
    sys.setswitchinterval(1e-5)

    def work() -> None:
        for _ in range(rounds):
            with VMM() as vmm:
                va = vmm.allocate(0, 3 * PAGE, COMMITTED | VmmFlags.LOW_GUARD)
                assert vmm.write(va, b"mine") == 4
                assert vmm.query(va, smaps=False).kind is PageKind.PRIVATE

    in_threads(work, work, work, work)


def test_vmms_are_made_and_closed_in_many_threads() -> None:
    in_own_process(make_and_drop, 1000, timeout=120)


# ------------------------------------------------------------------------------ one sees another


def test_a_view_of_one_thread_makes_anothers_calls_busy() -> None:
    with VMM() as vmm:
        va = vmm.allocate(0, 4 * PAGE, COMMITTED)
        held, done = threading.Event(), threading.Event()
        answers: list[Retcode] = []

        def holder() -> None:
            view = vmm.view(va + PAGE, PAGE)
            held.set()
            done.wait()
            view.release()

        def caller() -> None:
            held.wait()
            for method, arguments in (
                ("free", (va, 4 * PAGE)),
                ("decommit", (va + PAGE, PAGE)),
                ("protect", (va, 2 * PAGE, 1)),
                ("free", (va + 3 * PAGE, PAGE)),
            ):
                answers.append(call(vmm, Face.ENDPOINT, method, *arguments).rc)
            done.set()

        in_threads(holder, caller)
        assert answers == [Retcode.BUSY, Retcode.BUSY, Retcode.BUSY, Retcode.OK]
        vmm.free(va, 3 * PAGE)


def test_what_one_thread_writes_another_reads() -> None:
    with VMM() as vmm:
        written = threading.Event()
        places: list[int] = []
        contents: list[bytes] = []

        def writer() -> None:
            places.append(vmm.allocate(0, 200 * PAGE, COMMITTED))
            vmm.write(places[0], b"from the other thread" * 1000)
            written.set()

        def reader() -> None:
            written.wait()
            contents.append(vmm.read(places[0], 21_000))

        in_threads(writer, reader)
        assert contents == [b"from the other thread" * 1000]


def test_vmms_of_two_threads_do_not_see_each_others_regions() -> None:
    places: dict[int, int] = {}
    both = threading.Barrier(2)
    outcomes: list[Counter[Retcode]] = []

    def work(number: int) -> None:
        seen: Counter[Retcode] = Counter()
        with VMM() as vmm:
            places[number] = own = vmm.allocate(0, 4 * PAGE, COMMITTED)
            vmm.write(own, bytes([number + 1]) * 4 * PAGE)
            both.wait()
            other = places[1 - number]
            for _ in range(200):
                info = vmm.query(other, smaps=False)
                assert (info.kind, info.state) == (PageKind.FOREIGN, PageState.COMMITTED)
                for method, arguments in (
                    ("commit", (other, PAGE)),
                    ("decommit", (other, PAGE)),
                    ("protect", (other, PAGE, 1)),
                    ("free", (other, PAGE)),
                    ("read", (other, PAGE)),
                    ("write", (other, b"x")),
                    ("view", (other, 1)),
                ):
                    seen[call(vmm, Face.METHODS, method, *arguments).rc] += 1
                assert vmm.read(own, 4 * PAGE) == bytes([number + 1]) * 4 * PAGE
            both.wait()
        outcomes.append(seen)

    in_threads(lambda: work(0), lambda: work(1))
    assert outcomes == [Counter({Retcode.RESOURCE_NOT_FOUND: 1400})] * 2


# ------------------------------------------------------------------------------------ the GIL

LONG = 16 << 20
ROUNDS = 100


class Case:
    """A call that can be long, and what makes it possible once more."""

    def __init__(self, method: str) -> None:
        self.vmm = VMM()
        self.data = bytes(LONG)
        self.locked = self.vmm.allocate(0, LONG, COMMITTED | LOCKED)
        self.prepare = getattr(self, f"prepare_{method}", lambda: None)
        self.call = getattr(self, f"call_{method}")

    def prepare_commit(self) -> None:
        """Reserve what the call commits."""
        self.vmm.decommit(self.locked, LONG)

    def call_commit(self) -> None:
        """Every page gets memory."""
        self.vmm.commit(self.locked, LONG)

    def prepare_decommit(self) -> None:
        """Commit what the call gives back."""
        self.vmm.commit(self.locked, LONG)

    def call_decommit(self) -> None:
        """Every page loses its memory."""
        self.vmm.decommit(self.locked, LONG)

    def call_allocate(self) -> None:
        """Every page gets memory; close gives it back."""
        self.vmm.allocate(0, LONG, COMMITTED | LOCKED)

    def prepare_free(self) -> None:
        """Make what the call frees."""
        self.locked = self.vmm.allocate(0, LONG, COMMITTED | LOCKED)

    def call_free(self) -> None:
        """Every page loses its memory."""
        self.vmm.free(self.locked, LONG)

    def call_read(self) -> None:
        """A long copy."""
        self.vmm.read(self.locked, LONG)

    def call_write(self) -> None:
        """A long copy."""
        self.vmm.write(self.locked, self.data)

    def call_query(self) -> None:
        """The kernel writes a record of every mapping below."""
        self.vmm.query(self.locked)

    def prepare_handle_close(self) -> None:
        """Make the buffer whose only handle the call closes."""
        self.handle = self.vmm.mdl_create(LONG, RW | LOCKED)

    def call_handle_close(self) -> None:
        """Every page loses its memory, of which the handle alone tells."""
        self.vmm.handle_close(self.handle)

    def prepare_close(self) -> None:
        """Make what the call closes."""
        self.vmm.close()
        self.vmm = VMM()
        self.vmm.allocate(0, LONG, COMMITTED | LOCKED)

    def call_close(self) -> None:
        """Every page loses its memory."""
        self.vmm.close()


def another_thread_runs_meanwhile(method: str) -> None:
    """No thread is ever made to give the GIL up: the other one runs when this one lets it.

    The other thread notes what this one is doing when it gets the GIL. A call is over before it
    does now and then, and is made again.
    """
    case = Case(method)
    sys.setswitchinterval(10_000)
    doing = "nothing"
    seen: list[str] = []
    go = _thread.allocate_lock()
    go.acquire()

    def other() -> None:
        while "end" not in seen:
            go.acquire()
            seen.append(doing)

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(ROUNDS):
        doing = "preparing"
        case.prepare()
        doing = "calculating"
        if go.locked():
            go.release()
        sum(range(20_000))
        doing = method
        case.call()
        if method in seen:
            break
    doing = "end"
    if go.locked():
        go.release()
    thread.join()
    case.vmm.close()
    assert "calculating" not in seen, "this proves nothing: the GIL changes hands by itself"
    assert method in seen, f"{method} keeps the GIL"


@pytest.mark.parametrize(
    "method",
    [
        "allocate",
        "commit",
        "decommit",
        "free",
        "read",
        "write",
        "query",
        "handle_close",
        "close",
    ],
)
def test_other_threads_run_during_a_call_that_can_be_long(method: str) -> None:
    in_own_process(another_thread_runs_meanwhile, method, timeout=120)

"""What happens where the system ends: map count, resource limits, memory; and what things cost.

Each case runs in a process of its own, which may fill its map count and lower its limits. The
functions that are not tests are what these children do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

import kernel_oracle as kernel
import leaks
from children import run_child
from faces import Face, call
from kernel_oracle import ARENA, PAGE, TESTS_IMPORTABLE
from vmm_linux import VMM, Limits, PageKind, PageState, Retcode, VmmFlags, _guards
from vmm_linux._ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

READ = VmmFlags.READ
RW = VmmFlags.READ | VmmFlags.WRITE
RESERVE = VmmFlags.RESERVE
COMMIT = VmmFlags.RESERVE | VmmFlags.COMMIT
GUARDS = VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD
FIXED = VmmFlags.FIXED
LOCKED = VmmFlags.LOCKED
SHAREABLE = VmmFlags.SHAREABLE

PAGES = 48
ARENA_END = ARENA + PAGES * PAGE
#: Where the mappings lie that bring the map count up to the wall: above the arena, so that
#: reading what lies there stops before them.
FILL = ARENA + (1 << 36)
SINGLES = ARENA + (1 << 40)

M_TRIM_THRESHOLD = -1


# ------------------------------------------------------------------------ what children share


#: Python's objects are in the C library's heap, which ``steady_heap`` gives room enough.
ONE_HEAP = {"PYTHONMALLOC": "malloc"}
#: The C library sets nothing aside for later, so that its figures are exact.
EXACT_HEAP = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
ORDINARY_HEAP: dict[str, str] = {}


def in_own_process(
    work: Callable[..., None],
    *arguments: object,
    nobody: bool = False,
    heap: Mapping[str, str] = ONE_HEAP,
) -> None:
    """Run a function of this module in a new process; its assertions are this test's."""
    child = run_child(
        f"from {__name__} import *\n{work.__name__}(*{arguments!r})\nprint('done')",
        nobody=nobody,
        environment={**TESTS_IMPORTABLE, **heap},
    )
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr


def steady_heap() -> None:
    """Give this process a heap that needs no new mapping for its next 64 MiB."""
    leaks.quieten_libc()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    assert libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    libc.free(libc.malloc(64 << 20))


def flags_between(low: int, high: int) -> list[tuple[bool, bool] | None]:
    """Whether each page of the range is charged for and whether it is locked; None is a hole."""
    pages: list[tuple[bool, bool] | None] = [None] * ((high - low) // PAGE)
    start = end = 0
    with open("/proc/self/smaps", encoding="utf-8") as lines:  # noqa: PTH123
        for line in lines:
            word, _, rest = line.partition(" ")
            if not word.endswith(":"):
                start, end = (int(number, 16) for number in word.split("-"))
                if start >= high:
                    break
            elif word == "VmFlags:":
                first, last = max(start, low), min(end, high)
                facts = "ac" in rest.split(), "lo" in rest.split()
                for page in range((first - low) // PAGE, (last - low) // PAGE):
                    pages[page] = facts
    return pages


class State(NamedTuple):
    """What a call that fails must leave as it was, page by page of the arena."""

    permissions: list[str | None]
    mappings: int
    contents: list[bytes | None]
    ledger: list[tuple[object, ...]]
    charged_and_locked: list[tuple[bool, bool] | None]
    descriptors: dict[int, str]

    @classmethod
    def of(cls, vmm: VMM) -> State:
        """Look now."""
        vmm._check()
        permissions = kernel.page_permissions(ARENA, ARENA_END)
        places = range(ARENA, ARENA_END, PAGE)
        infos = [vmm.query(va, smaps=False) for va in places]
        return cls(
            permissions,
            len(kernel.maps_between(ARENA, ARENA_END)),
            [
                ctypes.string_at(va, PAGE) if mode and mode[0] == "r" else None
                for va, mode in zip(places, permissions, strict=True)
            ],
            [
                (i.state, i.kind, i.protection, i.flags, i.base, i.size, i.run_start, i.run_end)
                for i in infos
            ],
            flags_between(ARENA, ARENA_END),
            {number: name for number, name in kernel.descriptors().items() if "/fd" not in name},
        )


def refusal(vmm: VMM, method: str, *arguments: object) -> tuple[Retcode, str]:
    """Return code and message of a call that must fail, and change nothing, through both faces."""
    before = State.of(vmm)
    by_code = call(vmm, Face.ENDPOINT, method, *arguments)
    got = call(vmm, Face.METHODS, method, *arguments)
    assert got.rc is by_code.rc
    assert got.rc is not Retcode.OK, f"{method} was to fail"
    assert State.of(vmm) == before, f"a {method} that failed changed something"
    return got.rc, str(got.error)


def limit(name: int, value: int) -> None:
    """Set a soft limit of this process."""
    resource.setrlimit(name, (value, resource.getrlimit(name)[1]))


# ---------------------------------------------------------------------------- the map-count wall

NEVER = 1 << 40


def fill_map_count(vmm: VMM) -> int:
    """Commit alternate pages until the kernel refuses: how many it let through.

    From now on this process commits as on a kernel without guards.
    """
    _guards.set_rule(NEVER, NEVER)
    pages = kernel.sysctl("vm.max_map_count") + 100
    vmm.allocate(FILL, pages * PAGE, RESERVE | FIXED | RW)
    for done in range(pages // 2):
        rc = vmm.endpoint.Commit(FILL + 2 * done * PAGE, PAGE, 0)
        if rc is not Retcode.OK:
            assert rc is Retcode.OUT_OF_MEMORY
            return done
    raise AssertionError("there is no wall")


def count_mappings() -> int:
    """How many mappings this process has, counted with little memory."""
    with open("/proc/self/maps", "rb") as lines:  # noqa: PTH123
        return sum(1 for _ in lines)


class Singles:
    """Single pages apart from each other, to set the map count with."""

    def __init__(self) -> None:
        self.made = 0

    def leave(self, room: int) -> None:
        """Leave room for so many mappings: none means that not even mmap(2) gets one more."""
        try:
            while True:
                kernel.map_at(SINGLES + 2 * PAGE * self.made, PAGE, kernel.PROT_READ)
                self.made += 1
        except OSError as full:
            assert full.errno == errno.ENOMEM  # noqa: PT017  there is nothing else to raise it
        for _ in range(room):
            self.made -= 1
            assert self.made >= 0
            kernel.unmap(SINGLES + 2 * PAGE * self.made, PAGE)


def fill_and_fail() -> None:
    """Every method at the wall."""
    steady_heap()
    with VMM() as vmm:
        vmm.allocate(ARENA, 16 * PAGE, COMMIT | FIXED | RW)
        vmm.write(ARENA, bytes(range(256)) * (16 * PAGE // 256))
        reserved = vmm.allocate(ARENA + 20 * PAGE, 16 * PAGE, RESERVE | FIXED | RW)
        before_filling = kernel.mapping_count()
        assert fill_map_count(vmm) > (kernel.sysctl("vm.max_map_count") - before_filling) // 2 - 3
        Singles().leave(0)
        mappings = count_mappings()
        calls: list[tuple[str, tuple[int, ...]]] = [
            ("commit", (reserved + 5 * PAGE, PAGE)),
            ("protect", (ARENA + 5 * PAGE, PAGE, READ)),
            ("decommit", (ARENA + 5 * PAGE, PAGE)),
            ("free", (ARENA + 5 * PAGE, PAGE)),
            ("free", (reserved + 5 * PAGE, PAGE)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, RESERVE | FIXED)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, COMMIT | RW | FIXED | GUARDS)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, COMMIT | RW | FIXED | SHAREABLE)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, COMMIT | RW | FIXED | LOCKED)),
        ]
        for method, arguments in calls:
            rc, message = refusal(vmm, method, *arguments)
            assert rc is Retcode.OUT_OF_MEMORY, message
            assert "vm.max_map_count" in message
        assert count_mappings() == mappings
        vmm.free(FILL, 40 * PAGE)
        for method, arguments in calls[:4]:
            getattr(vmm, method)(*arguments)
        State.of(vmm)


def test_a_call_that_fails_at_the_map_count_wall_changes_nothing_and_names_it() -> None:
    in_own_process(fill_and_fail)


def close_at_the_wall() -> None:
    """Regions whose neighbours belong to another VMM, closed with no room left."""
    steady_heap()
    with VMM() as other:
        vmm = VMM()
        for slot in range(0, 16, 2):
            vmm.allocate(ARENA + slot * PAGE, PAGE, RESERVE | FIXED)
            other.allocate(ARENA + (slot + 1) * PAGE, PAGE, RESERVE | FIXED)
        fill_map_count(vmm)
        Singles().leave(0)
        vmm.close()
        assert kernel.page_permissions(ARENA, ARENA + 16 * PAGE) == [None, "---p"] * 8
        assert kernel.maps_between(FILL, SINGLES) == []


def test_a_vmm_can_be_closed_at_the_map_count_wall() -> None:
    in_own_process(close_at_the_wall)


def many_runs_meet_the_wall() -> None:
    """A commit of forty runs of which some fit: told after all of them were undone."""
    steady_heap()
    with VMM() as vmm:
        vmm.allocate(ARENA, 40 * PAGE, RESERVE | FIXED | RW)
        for slot in range(0, 40, 2):
            vmm.protect(ARENA + slot * PAGE, PAGE, READ)
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        Singles().leave(12)
        rc, message = refusal(vmm, "commit", ARENA, 40 * PAGE)
        assert rc is Retcode.OUT_OF_MEMORY
        assert "vm.max_map_count" in message, message


def test_the_wall_is_named_for_a_call_that_came_half_way_too() -> None:
    in_own_process(many_runs_meet_the_wall)


def huge_pages_at_the_wall() -> None:
    """MADV_HUGEPAGE gives EAGAIN where other calls give ENOMEM."""
    steady_heap()
    with VMM() as vmm:
        vmm.allocate(ARENA, 16 * PAGE, RESERVE | FIXED | VmmFlags.HUGE)
        vmm.protect(ARENA + PAGE, PAGE, READ)
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        singles = Singles()
        for room in range(6):
            singles.leave(room)
            for pages in (1, 2):
                got = call(vmm, Face.METHODS, "commit", ARENA + 5 * PAGE, pages * PAGE)
                assert got.rc in {Retcode.OK, Retcode.OUT_OF_MEMORY}, got.error
                if got.rc is Retcode.OK:
                    vmm.decommit(ARENA + 5 * PAGE, pages * PAGE)


def test_huge_pages_at_the_wall_are_no_question_of_a_quota() -> None:
    in_own_process(huge_pages_at_the_wall)


def first_huge_region_at_the_wall() -> None:
    """Whether the kernel has huge pages is asked when somebody first wants to know."""
    steady_heap()
    with VMM() as vmm:
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        singles = Singles()
        for room in range(6):
            singles.leave(room)
            got = call(vmm, Face.METHODS, "allocate", 0, PAGE, COMMIT | RW | VmmFlags.HUGE)
            assert got.rc in {Retcode.OK, Retcode.OUT_OF_MEMORY}, got.error


def test_a_shortage_is_not_taken_for_a_kernel_without_huge_pages() -> None:
    in_own_process(first_huge_region_at_the_wall)


def no_memory_to_explain_with() -> None:
    """At the wall the heap cannot grow either, and the list of mappings is megabytes long."""
    with VMM() as vmm:
        vmm.allocate(ARENA, 16 * PAGE, RESERVE | FIXED | RW)
        fill_map_count(vmm)
        Singles().leave(0)
        for face in Face:
            assert call(vmm, face, "commit", ARENA + PAGE, PAGE).rc is Retcode.OUT_OF_MEMORY
            assert call(vmm, face, "free", ARENA + PAGE, PAGE).rc is Retcode.OUT_OF_MEMORY


def test_a_failure_is_told_even_when_the_heap_cannot_grow() -> None:
    in_own_process(no_memory_to_explain_with, heap=ORDINARY_HEAP)


def draw(choose: random.Random, state: State) -> tuple[str, tuple[object, ...]]:
    """A call on some pages of some region, or a new region."""
    regions = sorted({row[4:6] for row in state.ledger if row[1] is PageKind.PRIVATE}, key=str)
    methods = ["allocate", "commit", "decommit", "protect", "free", "write"]
    method = choose.choice(methods) if regions else "allocate"
    protection = choose.choice([0, 1, 3, 5, 7])
    if method == "allocate":
        first = choose.randrange(PAGES - 1)
        pages = choose.randrange(1, min(12, PAGES - first) + 1)
        flags = RESERVE | FIXED | VmmFlags(protection)
        for extra in (VmmFlags.COMMIT, LOCKED, *GUARDS, SHAREABLE):
            flags |= extra if choose.random() < 0.25 else 0
        return method, (ARENA + first * PAGE, pages * PAGE, int(flags))
    base, size = choose.choice(regions)
    assert isinstance(base, int)
    assert isinstance(size, int)
    first = choose.randrange(size // PAGE)
    pages = choose.randrange(1, size // PAGE - first + 1)
    va = base + first * PAGE
    if method == "write":
        return method, (va, bytes([choose.randrange(256)]) * pages * PAGE)
    return method, (va, pages * PAGE, protection)[: 3 if method == "protect" else 2]


def random_calls_at_the_wall(seed: int, calls: int) -> None:
    """Calls that have room for none to a few mappings more."""
    steady_heap()
    choose = random.Random(seed)  # noqa: S311
    singles = Singles()
    seen: Counter[tuple[str, Retcode]] = Counter()
    with VMM() as vmm:
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        state = State.of(vmm)
        for _ in range(calls):
            singles.leave(choose.choice([0, 0, 0, 1, 1, 2, 3, 40]))
            method, arguments = draw(choose, state)
            got = call(vmm, Face.METHODS, method, *arguments)
            seen[method, got.rc] += 1
            before, state = state, State.of(vmm)
            assert got.rc is Retcode.OK or state == before, (method, arguments, got.error)
            for mode, row in zip(state.permissions, state.ledger, strict=True):
                if row[0] is PageState.COMMITTED:
                    assert mode is not None
                    bits = sum(bit for bit, sign in ((1, "r"), (2, "w"), (4, "x")) if sign in mode)
                    assert bits == row[2]
                else:
                    assert mode in {None, "---p", "---s"}
    refused = {method for method, rc in seen if rc is Retcode.OUT_OF_MEMORY}
    assert len(refused) >= 4, "the wall was not met often enough to prove anything"
    assert not {Retcode.QUOTA_EXCEEDED, Retcode.FAIL} & {rc for _, rc in seen}, seen


@pytest.mark.parametrize("seed", [1, 4])
def test_random_calls_at_the_wall_succeed_or_change_nothing(seed: int) -> None:
    in_own_process(random_calls_at_the_wall, seed, 300)


# ------------------------------------------------------------------------------ resource limits

MEBI = 1 << 20


def small_arena(vmm: VMM) -> None:
    """A region with committed, written pages, so that State has something to compare."""
    vmm.allocate(ARENA, 16 * PAGE, COMMIT | FIXED | RW)
    vmm.write(ARENA, b"contents" * (16 * PAGE // 8))


def short_of_address_space() -> None:
    """RLIMIT_AS refuses reservations."""
    with VMM() as vmm:
        small_arena(vmm)
        limit(resource.RLIMIT_AS, kernel.status("VmSize") + 64 * MEBI)
        for flags in (RESERVE, COMMIT | RW, COMMIT | RW | SHAREABLE, RESERVE | GUARDS):
            rc, message = refusal(vmm, "allocate", 0, 128 * MEBI, flags)
            assert (rc, "RLIMIT_AS" in message) == (Retcode.QUOTA_EXCEEDED, True), message
        va = vmm.allocate(0, 16 * MEBI, COMMIT | RW)
        vmm.free(va, 16 * MEBI)


def guards_are_too_much() -> None:
    """A region that would fit, were it not for its guards."""
    steady_heap()
    with VMM() as vmm:
        small_arena(vmm)
        limit(resource.RLIMIT_AS, kernel.status("VmSize") + 64 * MEBI)
        vmm.query(ARENA)
        room = resource.getrlimit(resource.RLIMIT_AS)[0] - kernel.status("VmSize")
        got = call(vmm, Face.METHODS, "allocate", 0, room // PAGE * PAGE, RESERVE | GUARDS)
        assert got.rc is Retcode.QUOTA_EXCEEDED, got.error
        assert "RLIMIT_AS" in str(got.error)


def short_of_data() -> None:
    """RLIMIT_DATA refuses whatever makes private pages writable, and nothing else."""
    with VMM() as vmm:
        small_arena(vmm)
        big = ARENA + 32 * PAGE
        vmm.allocate(big, 128 * MEBI, RESERVE | FIXED | RW)
        readable = vmm.allocate(0, 128 * MEBI, COMMIT | READ)
        limit(resource.RLIMIT_DATA, kernel.status("VmData") + 64 * MEBI)
        calls: list[tuple[str, tuple[int, ...]]] = [
            ("commit", (big, 128 * MEBI)),
            ("protect", (readable, 128 * MEBI, RW)),
            ("allocate", (0, 128 * MEBI, COMMIT | RW)),
        ]
        for method, arguments in calls:
            rc, message = refusal(vmm, method, *arguments)
            assert (rc, "RLIMIT_DATA" in message) == (Retcode.QUOTA_EXCEEDED, True), message
        vmm.commit(big, 16 * MEBI)
        for flags in (RESERVE | RW, COMMIT | READ, COMMIT | RW | SHAREABLE):
            vmm.allocate(0, 128 * MEBI, flags)


def not_the_limits_fault() -> None:
    """Refusals that no limit had a say in, with limits set that the same size would pass."""
    huge = 1 << 40
    with VMM(limits=Limits.unlimited()) as vmm:
        va = vmm.allocate(0, huge, RESERVE | RW)
        limit(resource.RLIMIT_AS, kernel.status("VmSize") + huge // 2)
        rc, message = refusal(vmm, "commit", va, huge)
        assert (rc, "RLIMIT" in message) == (Retcode.OUT_OF_MEMORY, False), message
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        limit(resource.RLIMIT_DATA, kernel.status("VmData") + 64 * MEBI)
        flags = COMMIT | RW | SHAREABLE | LOCKED
        rc, message = refusal(vmm, "allocate", 0, huge, flags)
        assert (rc, "RLIMIT" in message) == (Retcode.OUT_OF_MEMORY, False), message


def limits_with_many_mappings() -> None:
    """The list of mappings is megabytes long, and the limit allows not one of them."""
    with VMM() as vmm:
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        limit(resource.RLIMIT_AS, PAGE)
        for face in Face:
            got = call(vmm, face, "allocate", 0, 128 * MEBI, RESERVE)
            assert got.rc is Retcode.QUOTA_EXCEEDED, got.error
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize(
    "work",
    [short_of_address_space, guards_are_too_much, short_of_data, not_the_limits_fault],
    ids=lambda work: work.__name__,
)
def test_a_limit_that_refuses_is_named_and_nothing_has_changed(
    work: Callable[[], None], nobody: bool
) -> None:
    in_own_process(work, nobody=nobody)


def test_a_limit_is_named_even_when_the_heap_cannot_grow() -> None:
    in_own_process(limits_with_many_mappings, heap=ORDINARY_HEAP)


def short_of_descriptors() -> None:
    """SHAREABLE takes one descriptor a region."""
    with VMM() as vmm:
        small_arena(vmm)
        vmm.query(ARENA)  # the descriptors that Query keeps are open from here on
        place = ARENA + 20 * PAGE
        before = kernel.descriptors()
        flags = COMMIT | RW | FIXED | SHAREABLE
        limit(resource.RLIMIT_NOFILE, 0)
        outcomes = [
            call(vmm, face, "allocate", place, PAGE, flags | extra)
            for face in Face
            for extra in (0, GUARDS, LOCKED)
        ]
        limit(resource.RLIMIT_NOFILE, 1000)
        assert {outcome.rc for outcome in outcomes} == {Retcode.QUOTA_EXCEEDED}
        assert "RLIMIT_NOFILE" in str(outcomes[0].error)
        assert kernel.hole_at(place)[0] == ARENA + 16 * PAGE
        assert kernel.descriptors() == before
        assert State.of(vmm).ledger[20][1] is PageKind.FREE
        vmm.allocate(place, PAGE, flags)


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_no_descriptor_left_for_a_shareable_region_is_a_quota(nobody: bool) -> None:
    in_own_process(short_of_descriptors, nobody=nobody)


def lock_within(pages_allowed: int, backing: int) -> None:
    """LOCKED regions under one limit."""
    # Root locks what it likes.
    pages = 64 if os.geteuid() == 0 else min(64, pages_allowed)
    limit(resource.RLIMIT_MEMLOCK, pages_allowed * PAGE)
    for protection in (RW, READ, READ | VmmFlags.EXECUTE):
        with VMM() as vmm:
            va = vmm.allocate(0, 64 * PAGE, COMMIT | LOCKED | protection | VmmFlags(backing))
            for smaps in (False, True):
                infos = [vmm.query(va + page * PAGE, smaps) for page in range(64)]
                assert [info.locked for info in infos] == [True] * pages + [False] * (64 - pages)
                assert all(info.resident for info in infos)
            told = [kernel.is_locked(va + page * PAGE) for page in range(64)]
            assert told == [True] * pages + [False] * (64 - pages)
            assert kernel.present_pages(va, 64) == [True] * 64
            assert kernel.status("VmLck") == pages * PAGE
            vmm.decommit(va, 64 * PAGE)
            assert kernel.status("VmLck") == 0
            vmm.commit(va, 64 * PAGE)
            assert kernel.status("VmLck") == pages * PAGE
        assert kernel.status("VmLck") == 0


def lock_under_several_limits(backing: int) -> None:
    """Regions of 64 pages under limits of none to more than that."""
    for pages_allowed in (100, 64, 21, 1, 0):
        lock_within(pages_allowed, backing)


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize("backing", [0, int(SHAREABLE)], ids=["private", "SHAREABLE"])
def test_locked_regions_are_resident_and_locked_as_far_as_the_limit_allows(
    backing: int, nobody: bool
) -> None:
    in_own_process(lock_under_several_limits, backing, nobody=nobody)


# ------------------------------------------------------------------------------- memory and charge


def meminfo(label: str) -> int:
    """A figure of ``/proc/meminfo`` in bytes."""
    with open("/proc/meminfo", encoding="utf-8") as lines:  # noqa: PTH123
        figures = dict(line.split(":") for line in lines)
    return int(figures[label].split()[0]) * 1024


def more_than_the_machine_has() -> None:
    """What can never be had is refused in the call that asks for it."""
    steady_heap()
    too_much = (meminfo("MemTotal") + meminfo("SwapTotal")) * 2 // PAGE * PAGE
    with VMM(limits=Limits.unlimited()) as vmm:
        small_arena(vmm)
        big = vmm.allocate(ARENA + 20 * PAGE, too_much, RESERVE | FIXED | RW)
        locked = vmm.allocate(0, too_much, RESERVE | RW | LOCKED)
        readable = vmm.allocate(0, too_much, COMMIT | READ)
        charge = kernel.charged_bytes()
        calls: list[tuple[str, tuple[int, ...]]] = [
            ("commit", (big, too_much)),
            ("commit", (locked, too_much)),
            ("protect", (readable, too_much, RW)),
            ("allocate", (0, too_much, COMMIT | RW)),
            ("allocate", (0, too_much, COMMIT | RW | LOCKED)),
            ("allocate", (0, too_much, COMMIT | READ | LOCKED)),
            ("allocate", (0, too_much, COMMIT | RW | LOCKED | SHAREABLE)),
        ]
        size = kernel.status("VmSize")
        for method, arguments in calls:
            rc, message = refusal(vmm, method, *arguments)
            assert (rc, "RLIMIT" in message) == (Retcode.OUT_OF_MEMORY, False), message
            assert "overcommit" in message
        assert kernel.charged_bytes() == charge
        assert kernel.status("VmSize") == size
        # A page of each still works.
        for va in (big, locked):
            vmm.commit(va, PAGE)
            vmm.write(va, b"x")


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_more_than_the_machine_has_is_refused_at_once(nobody: bool) -> None:
    in_own_process(more_than_the_machine_has, nobody=nobody)


def more_shared_memory_than_is_available() -> None:
    """Nothing charges for a memory file: the call must ask whether there is room."""
    available = meminfo("MemAvailable") + meminfo("SwapFree")
    with VMM(limits=Limits.unlimited()) as vmm:
        small_arena(vmm)
        size = (available + available // 8) // PAGE * PAGE
        rss = kernel.status("RssShmem")
        rc, message = refusal(vmm, "allocate", 0, size, COMMIT | RW | LOCKED | SHAREABLE)
        assert rc is Retcode.OUT_OF_MEMORY, message
        assert kernel.status("RssShmem") == rss


def test_locked_shared_memory_beyond_what_is_available_is_refused_at_once() -> None:
    in_own_process(more_shared_memory_than_is_available)


# --------------------------------------------------------------------------------- what it costs


def many_regions() -> None:
    """A hundred thousand at once, each known, each freed."""
    steady_heap()
    count = 100_000
    choose = random.Random(4)  # noqa: S311
    before = kernel.mapping_count()
    with VMM() as vmm:
        bases = [vmm.allocate(0, 2 * PAGE, RESERVE | RW) for _ in range(count)]
        assert len(set(bases)) == count
        assert kernel.mapping_count() - before < 10, "neighbours did not merge"
        for base in bases:
            info = vmm.query(base + PAGE, smaps=False)
            assert (info.state, info.base, info.size) == (PageState.RESERVED, base, 2 * PAGE)
        vmm._check()
        choose.shuffle(bases)
        for base in bases[: count // 2]:
            vmm.free(base, 2 * PAGE)
        for base in bases[: count // 2]:
            assert vmm.query(base, smaps=False).kind is PageKind.FREE
        vmm._check()
        for base in bases[count // 2 :]:
            vmm.commit(base, PAGE)
            vmm.write(base, b"x")
            vmm.free(base, 2 * PAGE)
        assert kernel.mapping_count() == before
        assert all(vmm.query(base, smaps=False).kind is PageKind.FREE for base in bases)


def test_a_hundred_thousand_reserved_regions_are_alive_at_once() -> None:
    in_own_process(many_regions)


def footprint() -> tuple[int, int]:
    """How many mappings there are, and the commit charge; both without the heap."""
    records = [record for record in kernel.smaps() if record.mapping.pathname != "[heap]"]
    charge = sum(record.figures["Size"] for record in records if "ac" in record.vm_flags)
    return len(records), charge


def cycles(seed: int, extra: int) -> None:
    """Ten thousand random commits, touches and decommits."""
    steady_heap()
    choose = random.Random(seed)  # noqa: S311
    pages = 256
    with VMM() as vmm:
        va = vmm.allocate(0, pages * PAGE, RESERVE | RW | VmmFlags(extra))
        before = footprint()
        for turn in range(10_000):
            first = choose.randrange(pages)
            count = choose.randrange(1, min(16, pages - first) + 1)
            vmm.commit(va + first * PAGE, count * PAGE)
            touched = va + (first + choose.randrange(count)) * PAGE
            ctypes.memset(touched, turn & 0xFF, PAGE)
            if turn % 3:
                vmm.decommit(va + first * PAGE, count * PAGE)
            if turn % 250 == 249:
                vmm.decommit(va, pages * PAGE)
                assert footprint() == before
                assert not any(kernel.present_pages(va, pages))
        assert footprint() == before
        vmm.commit(va, pages * PAGE)
        assert vmm.read(va, pages * PAGE) == bytes(pages * PAGE)


@pytest.mark.parametrize(
    "extra", [0, int(SHAREABLE), int(LOCKED), int(VmmFlags.HUGE)], ids=lambda f: str(VmmFlags(f))
)
def test_ten_thousand_cycles_leave_mappings_and_charge_where_they_were(extra: int) -> None:
    in_own_process(cycles, 7, extra)


class Mallinfo2(ctypes.Structure):
    """What ``mallinfo2(3)`` tells of the heap, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2


def heap_used() -> int:
    """Bytes of the C library's heap in use; Python's own small objects are elsewhere."""
    told = mallinfo2()
    return int(told.uordblks) + int(told.hblkhd)


def bytes_per_run() -> None:
    """A hundred thousand runs, in the ledger alone and behind a VMM."""
    runs = 100_000
    ledger = Ledger()
    assert ledger.add(ARENA, runs * PAGE)
    before = heap_used()
    for page in range(1, runs, 2):
        assert ledger.isolate(ARENA + page * PAGE, ARENA + (page + 1) * PAGE)
        ledger.set_state(ARENA + page * PAGE, ARENA + (page + 1) * PAGE, PageState.COMMITTED)
    used = heap_used() - before
    assert len(ledger.listing()) == runs
    ledger.check()
    assert 0 < used <= 100 * runs, used / runs
    ledger.set_state(ARENA, ARENA + runs * PAGE, PageState.RESERVED)
    assert heap_used() - before < 1000, "runs that merged were kept"


def bytes_per_run_of_a_vmm() -> None:
    """Reserved pages of alternate protections, which the kernel keeps in one mapping."""
    runs = 100_000
    with VMM() as vmm:
        va = vmm.allocate(0, runs * PAGE, RESERVE | RW)
        before = heap_used()
        for page in range(0, runs, 2):
            vmm.protect(va + page * PAGE, PAGE, READ)
        assert 0 < heap_used() - before <= 100 * runs
        info = vmm.query(va + 5 * PAGE, smaps=False)
        assert (info.run_start, info.run_end) == (va + 5 * PAGE, va + 6 * PAGE)
        vmm.protect(va, runs * PAGE, RW)
        assert heap_used() - before < 1000


@pytest.mark.parametrize("work", [bytes_per_run, bytes_per_run_of_a_vmm], ids=["ledger", "VMM"])
def test_a_run_costs_at_most_a_hundred_bytes(work: Callable[[], None]) -> None:
    in_own_process(work, heap=EXACT_HEAP)


def cost_of_region(vmm: VMM, size: int) -> tuple[int, int]:
    """Heap and page tables that a region takes of which pages were in use, in bytes."""
    page_tables = kernel.status("VmPTE")
    before = heap_used()
    va = vmm.allocate(0, size, RESERVE | RW)
    for offset in (0, size // 2 // PAGE * PAGE, size - PAGE):
        vmm.commit(va + offset, PAGE)
        vmm.decommit(va + offset, PAGE)
    vmm.protect(va, size, READ)
    info = vmm.query(va + size // 2, smaps=False)
    assert (info.run_start, info.run_end) == (va, va + size)
    used = heap_used() - before
    return used, kernel.status("VmPTE") - page_tables


#: malloc reuses a free chunk that is up to this many bytes larger than what is asked for.
CHUNK_MAY_BE_LARGER = 64


def the_largest_region() -> None:
    """Sixty-four tebibytes beside one page."""
    size = 64 << 40
    big, small = Ledger(), Ledger()
    before = heap_used()
    assert small.add(ARENA, PAGE)
    after_small = heap_used()
    assert big.add(ARENA, size)
    assert heap_used() - after_small <= after_small - before + CHUNK_MAY_BE_LARGER
    assert len(big.listing()) == len(small.listing()) == 1
    with VMM() as vmm:
        cost_of_region(vmm, PAGE)  # what is made once is made here
        of_page = cost_of_region(vmm, PAGE)
        of_tebibytes = cost_of_region(vmm, size)
        assert of_tebibytes[0] <= of_page[0] + CHUNK_MAY_BE_LARGER, "more for a larger region"
        assert of_tebibytes[1] < MEBI


def test_a_region_of_64_tebibytes_costs_as_little_as_one_of_a_page() -> None:
    in_own_process(the_largest_region, heap=EXACT_HEAP)


def take_memory_past_the_limit_for_files() -> None:
    """Take shared memory in every way, in a program that SIGXFSZ ends; runs in a child."""
    import os
    import resource
    import signal

    from vmm_linux import VMM, VmmFlags

    page = os.sysconf("SC_PAGE_SIZE")
    read_write = VmmFlags.READ | VmmFlags.WRITE
    committed = read_write | VmmFlags.RESERVE | VmmFlags.COMMIT
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with VMM() as vmm:
        private = vmm.allocate(0, 8 * page, committed)
        vmm.write(private, b"kept" * page)
        resource.setrlimit(resource.RLIMIT_FSIZE, (page, page))
        for rc in (
            vmm.endpoint.MdlCreate(8 * page, read_write)[1],
            vmm.endpoint.MdlCreateFromVm(private, 8 * page, read_write)[1],
            vmm.endpoint.Allocate(0, 8 * page, committed | VmmFlags.SHAREABLE)[1],
        ):
            print(rc.name)
        assert vmm.read(private, 4) == b"kept"
        vmm.mdl_create(page, read_write)
        vmm._check()
    assert signal.sigpending() == set()


def test_memory_past_the_limit_for_files_is_refused_whatever_sigxfsz_does() -> None:
    child = run_child(take_memory_past_the_limit_for_files)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.split() == ["FAIL"] * 3

"""Where the system ends: how a process gets there, and how it is seen that nothing changed.

Each case runs in a process of its own, which may fill its map count and lower its limits.
"""

from __future__ import annotations

import ctypes
import errno
import resource
from typing import TYPE_CHECKING, NamedTuple

import children
import kernel_oracle as kernel
import leaks
from constants import FIXED, RESERVE, RW
from faces import Face, call
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, Retcode
from vmm_linux._core import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


PAGES = 48
ARENA_END = ARENA + PAGES * PAGE
#: Where the mappings lie that bring the map count up to the wall: above the arena, so that
#: reading what lies there stops before them.
FILL = ARENA + (1 << 36)
SINGLES = ARENA + (1 << 40)

M_TRIM_THRESHOLD = -1

#: Python's objects are in the C library's heap, which ``steady_heap`` gives room enough.
ONE_HEAP = {"PYTHONMALLOC": "malloc"}
#: The C library sets nothing aside for later, so that its figures are exact.
EXACT_HEAP = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
ORDINARY_HEAP: dict[str, str] = {}


def in_own_process(
    work: Callable[..., object],
    *arguments: object,
    nobody: bool = False,
    heap: Mapping[str, str] = ONE_HEAP,
) -> None:
    """Run a function of a test module in a new process with such a heap."""
    children.in_own_process(work, *arguments, nobody=nobody, environment=heap)


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


NEVER = 1 << 40


def fill_map_count(vmm: VMM) -> int:
    """Commit alternate pages until the kernel refuses: how many it let through.

    From now on this process commits as on a kernel without guards.
    """
    memory.set_rule(NEVER, NEVER)
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


MEBI = 1 << 20


def meminfo(label: str) -> int:
    """A figure of ``/proc/meminfo`` in bytes."""
    with open("/proc/meminfo", encoding="utf-8") as lines:  # noqa: PTH123
        figures = dict(line.split(":") for line in lines)
    return int(figures[label].split()[0]) * 1024


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

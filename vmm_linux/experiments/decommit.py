"""Ways to give memory back, and how much each really gives back."""

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmm_linux import inspect
from vmm_linux.experiments import Run, at_least, at_most, equal, need, resident, timed, touch

ORDER = 20
TITLE = "Giving memory back"
QUESTION = "Who gets the memory back, and when: after Decommit, MADV_FREE, MADV_COLD, free()?"
PREDICTION = """
    Decommit gives everything back at once, and a later commit reads zeros. MADV_FREE and MADV_COLD
    give nothing back as long as nobody else needs memory: all stays resident. free() of a large
    block gives it back, for it was a mapping of its own; free() of many small blocks gives nothing
    back while a single later one lives: the allocator keeps them.
"""
EXPLANATION = """
    Decommit takes the pages out of the page table and to the system's free pages before it
    returns. MADV_FREE only marks them: the kernel may take them when memory is short, and until
    then the process still counts as large and finds its old contents. MADV_COLD makes them the
    first to be swapped out, no more. malloc takes small blocks from one heap that can shrink only
    at its end: one live block there holds all below it, until malloc_trim() walks through the heap
    and gives whole free pages back. So a process whose RSS stays high after free() need not leak.
"""

MIB = 1 << 20
MADV_COLD = 20
SMALL = 32 << 10
"""Below malloc's threshold for a mapping of its own."""


class Held(NamedTuple):
    """Memory that was touched."""

    resident: Callable[[], int]
    give_back: Callable[[], object]
    contents: Callable[[], str]


Way = Callable[[Run, int], contextlib.AbstractContextManager[Held]]


def measure(run: Run) -> None:
    """Touch the same amount of memory each way, give it back, and measure."""
    size = run.choose(quick=16 * MIB, full=128 * MIB)
    run.need_memory(size)
    columns = "way | resident before [B] | resident after [B] | time [µs] | contents after"
    table = run.table(f"{size // MIB} MiB touched and given back", columns)
    for name, (held, statement, expected) in run.steps(list(WAYS.items()), "giving back"):
        with run.part(name), held(run, size) as memory:
            before = memory.resident()
            seconds = timed(memory.give_back)
            after = memory.resident()
            table.add(name, before, after, seconds * 1e6, memory.contents())
            run.physical(statement, (before - after) / size, expected, "of it")
    found = dict(zip(table.column("way"), table.column("contents after"), strict=True))
    if "Decommit" in found:
        run.physical("Memory that is committed again reads", found["Decommit"], equal("zeros"))
    plot = run.plot("What stays resident", "way", "resident [B]")
    for when in ("before", "after"):
        plot.add(when, table.column("way"), table.column(f"resident {when}"))


def words(byte: int) -> str:
    """The contents afterwards, in words."""
    return "as before" if byte else "zeros"


@contextlib.contextmanager
def decommit(run: Run, size: int) -> Iterator[Held]:
    """Memory for the package's own call."""
    with run.vmm.region(size) as region:
        region.commit()
        touch(region)

        def contents() -> str:
            region.commit(0, run.page)
            return words(region.read(1)[0])

        yield Held(lambda: resident(region.base, size), region.decommit, contents)


def advised(advice: int) -> Way:
    """An ordinary mapping for an madvise(2) call."""

    @contextlib.contextmanager
    def held(run: Run, size: int) -> Iterator[Held]:
        del run
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
            first = ctypes.c_char.from_buffer(mapping)
            base = ctypes.addressof(first)
            del first
            touch(memoryview(mapping))

            def give_back() -> None:
                try:
                    mapping.madvise(advice)
                except OSError as refusal:
                    need(False, f"this kernel refuses it: {refusal.strerror}")

            yield Held(lambda: resident(base, size), give_back, lambda: words(mapping[0]))

    return held


def allocated(block: int, *, trim: bool = False) -> Way:
    """Blocks from malloc, all freed but for a small one at the end; 0 for one large block."""

    @contextlib.contextmanager
    def held(run: Run, size: int) -> Iterator[Held]:
        del run
        libc = ctypes.CDLL(None)
        need(hasattr(libc, "malloc_trim"), "this C library is not glibc, which this is about")
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        beginning, each = rss(), block or size
        blocks = [libc.malloc(each) for _ in range(size // each)]
        last = libc.malloc(SMALL)
        for address in blocks:
            ctypes.memset(address, 1, each)

        def give_back() -> None:
            while blocks:
                libc.free(blocks.pop())
            if trim:
                libc.malloc_trim(0)

        yield Held(lambda: rss() - beginning, give_back, lambda: "undefined")
        give_back()
        libc.free(last)
        libc.malloc_trim(0)  # kept memory must not serve the next way

    return held


def rss() -> int:
    """The resident bytes of the whole process: the place of malloc's memory is unknown."""
    return inspect.rollup().figures["rss"]


WAYS = {
    "Decommit": (decommit, "Decommit gives all of it back at once", equal(1)),
    "MADV_FREE": (advised(mmap.MADV_FREE), "MADV_FREE leaves it resident", at_most(0.1)),
    "MADV_COLD": (advised(MADV_COLD), "MADV_COLD leaves it resident", at_most(0.1)),
    "free(), large": (allocated(0), "free() of a large block gives it back", at_least(0.9)),
    "free(), small": (allocated(SMALL), "The allocator keeps small blocks", at_most(0.1)),
    "malloc_trim()": (
        allocated(SMALL, trim=True),
        "malloc_trim() makes it give them back",
        at_least(0.9),
    ),
}
"""The ways, and how much each should give back."""

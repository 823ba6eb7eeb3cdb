"""Guard pages: a stack that overflows into one, and their cost."""

import ctypes
from multiprocessing.connection import Connection
from typing import NamedTuple

from vmm_linux import Region, VmmFlags
from vmm_linux import experiments as lab

ORDER = 110
TITLE = "Guard pages"
QUESTION = "What becomes of a stack that overflows, and what does it cost to notice?"
PREDICTION = """
    Without a guard an overflow goes on into the memory below, changes what is there, and nobody
    notices. With one, the first byte too many ends the process by SIGSEGV, and the memory below
    stays as it was. A guard costs a page of addresses and an entry or two in the kernel's list of
    mappings; it takes no memory and no promise of any.
"""
EXPLANATION = """
    A stack grows towards lower addresses and is not told where it ends. What catches it is a page
    without any access at its low end: the processor faults at the first touch, before anything is
    changed. Nothing is ever in that page, so it takes no memory; but it separates mappings that the
    kernel would otherwise have joined into one, and their number is limited (vm.max_map_count). A
    guard of one page catches what goes step by step: a function with a larger array can step
    over it, which is why compilers touch every page of such an array in turn.
"""

COMMITTED = VmmFlags.READ | VmmFlags.WRITE | VmmFlags.COMMIT
LOW, HIGH = VmmFlags.LOW_GUARD, VmmFlags.HIGH_GUARD
STACK = 256 << 10
BEYOND = 1024
"""Words that a function pushes beyond the end of its stack."""
WORDS = STACK // 8 + BEYOND
"""Words that it pushes in all."""
PUSH = {
    "x86_64": "4889e0"  # mov rax, rsp
    "6aff"  # again: push -1
    "48ffcf 75f9"  # dec rdi; jnz again
    "4889c4 c3",  # mov rsp, rax; ret
    "aarch64": "e9030091 0a008092"  # mov x9, sp; mov x10, -1
    "ea2bbfa9"  # again: stp x10, x10, [sp, -16]!
    "000800f1 ccffff54"  # subs x0, x0, 2; b.gt again
    "3f010091 c0035fd6",  # mov sp, x9; ret
}
"""A function that pushes so many words of all ones, and returns."""


def measure(run: lab.Run) -> None:
    """Let stacks overflow, and measure the cost of guards."""
    with run.part("A stack that overflows"):
        overflows(run)
    with run.part("What guards cost"):
        costs(run)


class Overflow(NamedTuple):
    """The end of a process whose thread needed too much stack."""

    ended: str
    unused: int
    overwritten: int


def overflows(run: lab.Run) -> None:
    """Run the same thread on a stack without a guard, and on one with a guard."""
    code = lab.machine_code(run.vmm, PUSH)
    columns = "stack | process ended | stack left unused [B] | overwritten below [B]"
    table = run.table("A thread that needs more stack than it has", columns)
    without, guarded = overflow(run, code, VmmFlags(0)), overflow(run, code, LOW)
    table.add("without a guard", *without)
    table.add("with a guard", *guarded)
    run.physical("Without a guard nobody notices", without.ended, lab.equal("by itself"))
    beyond = BEYOND * 8
    run.physical("What is below is overwritten", without.overwritten, lab.at_least(beyond), "B")
    run.physical("With a guard the process ends", guarded.ended, lab.equal("by SIGSEGV"))
    run.physical("It has used its stack to the end", guarded.unused, lab.equal(0), "B")
    run.physical("What is below the guard is as it was", guarded.overwritten, lab.equal(0), "B")


def overflow(run: lab.Run, code: Region, guard: VmmFlags) -> Overflow:
    """Overflow a stack in a process of its own, with shared memory below it for a check."""
    gap = run.page if guard else 0
    with run.vmm.region(2 * STACK + gap) as room:
        base = room.base
    flags = COMMITTED | VmmFlags.SHAREABLE | VmmFlags.FIXED
    with (
        run.vmm.region(STACK, flags, base) as below,
        run.vmm.region(STACK, flags | guard, base + STACK + gap) as stack,
        run.child(run_on, stack, code) as child,
    ):
        ended = child.ended()
        unused = STACK - len(stack.read().lstrip(b"\0"))
        overwritten = len(below.read().lstrip(b"\0"))
    return Overflow(ended, unused, overwritten)


def run_on(connection: Connection, stack: Region, code: Region) -> None:
    """Run a function in a thread that has this stack."""
    del connection
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(256)
    thread = ctypes.c_ulong()
    size, start, words = (ctypes.c_size_t(n) for n in (STACK, code.base, WORDS))
    failures = [
        libc.pthread_attr_init(attributes),
        libc.pthread_attr_setstack(attributes, ctypes.c_size_t(stack.base), size),
        libc.pthread_create(ctypes.byref(thread), attributes, start, words),
    ]
    if any(failures):
        raise OSError(f"the thread could not be started: {failures}")
    libc.pthread_join(thread, None)


class Cost(NamedTuple):
    """The cost of committed and touched regions together: bytes, mappings, seconds."""

    addresses: int
    promised: int
    resident: int
    in_guards: int
    mappings: int
    seconds: float


def costs(run: lab.Run) -> None:
    """Make many small regions, without guards and with."""
    size = 4 * run.page
    count = min(run.choose(quick=200, full=4000), run.memory // size)
    cost_of(run, count, size, LOW)  # so that the interpreter itself does not grow later
    guards = {"none": VmmFlags(0), "below": LOW, "below and above": LOW | HIGH}
    table = run.table(
        f"{count} regions of {size >> 10} KiB, touched",
        "guards | addresses [B] | promised [B] | resident [B] | resident in guards [B] | mappings",
        "time for each [µs]",
    )
    found = {}
    for name, flags in run.steps(list(guards.items()), "regions"):
        found[name] = it = cost_of(run, count, size, flags)
        table.add(name, *it[:-1], it.seconds / count * 1e6)
    plot = run.plot(table.title, "guards", "addresses and memory [B]")
    plot.add_columns(table, "guards", "addresses", "promised", "resident")

    bare, both = found["none"], found["below and above"]
    pages = (both.addresses - bare.addresses) / run.page / count
    run.physical(
        "Two guards take the addresses of two pages", pages, lab.between(1.75, 2.25), "pages"
    )
    run.physical("Nothing is ever in them", both.in_guards, lab.equal(0), "B")
    run.physical("Touched, the regions are resident", both.resident, lab.equal(count * size), "B")
    more = abs(both.promised - bare.promised) / (count * size)
    run.physical("Guards are no promise of memory", more, lab.between(0, 0.1), "of the regions")
    entries = (both.mappings - bare.mappings) / count
    run.physical(
        "They take entries in the list of mappings", entries, lab.between(0.5, 3), "a region"
    )


def cost_of(run: lab.Run, count: int, size: int, flags: VmmFlags) -> Cost:
    """The cost of regions with these flags."""
    regions: list[Region] = []

    def make() -> None:
        regions.extend(run.vmm.region(size, COMMITTED | flags) for _ in range(count))

    addresses, promised, entries = lab.status("VmSize"), lab.status("VmData"), lab.mappings()
    seconds = lab.timed(make)
    for region in regions:
        lab.touch(region)
    cost = Cost(
        lab.status("VmSize") - addresses,
        lab.status("VmData") - promised,
        sum(lab.resident(region.base, size) for region in regions),
        sum(in_guards(run, region, flags) for region in regions),
        lab.mappings() - entries,
        seconds,
    )
    for region in regions:
        region.free()
    return cost


def in_guards(run: lab.Run, region: Region, flags: VmmFlags) -> int:
    """The bytes that are resident in the guards of a region."""
    below = lab.resident(region.base - run.page, run.page) if flags & LOW else 0
    above = lab.resident(region.base + region.size, run.page) if flags & HIGH else 0
    return below + above

"""A call that fails leaves everything as it was, at whichever call to the system it fails.

A scenario is one call of a method in a prepared state. In a child, each call that the package
makes to the system meanwhile is made to fail in turn, from a fresh state each time; all that the
kernel, the files and the package itself say is compared with what they said before, and the
same call is then made again and must do what it does when nothing fails.
"""

from __future__ import annotations

import errno
import gc
import re
import sys
import traceback
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

import faults
from faults import Faults, Mode, Picture, Window
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, Retcode, VmmError, VmmFlags, _features
from vmm_linux._features import Feature
from vmm_linux.errors import RETCODES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

NONE = VmmFlags(0)
R = VmmFlags.READ
RW = VmmFlags.READ | VmmFlags.WRITE
RX = VmmFlags.READ | VmmFlags.EXECUTE
RESERVE, COMMIT, LOCKED = VmmFlags.RESERVE, VmmFlags.COMMIT, VmmFlags.LOCKED
FIXED, HUGE, SHAREABLE = VmmFlags.FIXED, VmmFlags.HUGE, VmmFlags.SHAREABLE
GUARDS = VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD

PAGES = 16
SIZE = PAGES * PAGE
#: Where the regions of the scenarios lie, and where those that they allocate may.
BASE = ARENA + 4 * PAGE
ELSEWHERE = BASE + 64 * PAGE
HUGE_SIZE = _features.huge_page_size()
#: More than a scratch file takes at a time, twice.
LONG = 2 * (1 << 20) + 5 * PAGE + 3
#: What errors a full system gives.
FULL = {errno.ENOMEM, errno.EMFILE, errno.EAGAIN}
#: What can stop half way.
DIVISIBLE = {
    *("mprotect", "madvise", "mlock", "munlock"),
    *("read", "pread", "pwrite", "process_vm_readv", "process_vm_writev"),
}


# ---- what a scenario is


def everything(picture: Picture) -> object:
    """Its failure costs nothing."""
    return picture.essence


def all_but_locks(picture: Picture) -> object:
    """Its failure costs the pinning of pages, which is done as far as the limit allows."""
    pages = [page._replace(vm_flags=page.vm_flags - {"lo"}) for page in picture.pages]
    return {**picture.essence, "pages": pages}


def all_but_files(picture: Picture) -> object:
    """Its failure costs the memory of freed shared pages, until their region is gone."""
    return {**picture.essence, "files": None}


#: Closing gives the descriptor back whatever it says; without a figure of the free memory the
#: package looks for another.
HARMLESS: Mapping[str, Callable[[Picture], object]] = {"close": everything, "sysinfo": everything}
LOCKS = {**HARMLESS, "mlock": all_but_locks}
#: What closing a region's memory file frees anyhow need not be emptied first.
CLOSING = {**HARMLESS, "fallocate": everything}
#: Query leaves open whether the page is locked; half of a file can be enough.
UNTOLD = {**HARMLESS, "msync": everything, "pread": everything}


def nothing_to_take_back(_vmm: VMM, error: VmmError) -> None:
    """What all failed calls but write leave."""
    assert error.completed == 0, error.completed


@dataclass(frozen=True)
class Scenario:
    """One call in a prepared state.

    Attributes:
        name: what it is about.
        prepare: brings a fresh VMM into the state.
        call: makes the call; its result must be the same each time.
        calls: names, with spaces between, that must be among the calls that were made to fail.
        survives: those whose failure the call gets over, with what that costs.
        take_back: undoes what a failed call may leave by its promise, and checks it.
        size: of the window from BASE on that is looked at, in bytes.
        ask: whether Query is asked for every page of the window.
        without: the features that are switched off meanwhile.
        spare: calls to the system that cannot fail at that place.
    """

    name: str
    prepare: Callable[[VMM], object]
    call: Callable[[VMM], Any]
    calls: str
    survives: Mapping[str, Callable[[Picture], object]] = field(default_factory=lambda: HARMLESS)
    take_back: Callable[[VMM, VmmError], None] = nothing_to_take_back
    size: int = SIZE
    ask: bool = True
    without: tuple[Feature, ...] = ()
    spare: str = ""

    def picture(self, vmm: VMM, address: object = None) -> Picture:
        """Look at the window, or at the region that the call made at this address."""
        window = Window(BASE - 2 * PAGE, BASE + self.size + 2 * PAGE)
        if self in ALLOCATE and isinstance(address, int):
            flags = vmm.query(address, smaps=False).flags
            window = Window(
                address - PAGE * bool(flags & VmmFlags.LOW_GUARD),
                address + self.size + PAGE * bool(flags & VmmFlags.HIGH_GUARD),
            )
        return Picture(vmm, window, ask=self.ask)


# ---- the states


def region(flags: VmmFlags, size: int = SIZE) -> Callable[[VMM], int]:
    """A region at BASE."""
    return lambda vmm: vmm.allocate(BASE, size, RESERVE | FIXED | flags)


def filled(flags: VmmFlags, size: int = SIZE) -> Callable[[VMM], None]:
    """A committed region at BASE, something else in every page."""

    def prepare(vmm: VMM) -> None:
        vmm.allocate(BASE, size, RESERVE | FIXED | COMMIT | RW | flags)
        vmm.write(BASE, pattern(size))

    return prepare


def pattern(size: int, first: int = 1) -> bytes:
    """Bytes that tell one page from the next."""
    pages = -(-size // PAGE)
    return b"".join(bytes([(first + page) % 251 + 1]) * PAGE for page in range(pages))[:size]


def with_protections(
    prepare: Callable[[VMM], object], protections: Iterable[VmmFlags]
) -> Callable[[VMM], None]:
    """The same with another protection every two pages, from the second page on."""

    def prepare_runs(vmm: VMM) -> None:
        prepare(vmm)
        for index, protection in enumerate(protections):
            vmm.protect(BASE + (1 + 2 * index) * PAGE, 2 * PAGE, protection)

    return prepare_runs


def with_committed(
    prepare: Callable[[VMM], object], first: int, pages: int
) -> Callable[[VMM], None]:
    """The same with some of its pages committed and filled, where they are writable."""

    def prepare_pages(vmm: VMM) -> None:
        prepare(vmm)
        vmm.protect(BASE + first * PAGE, pages * PAGE, RW)
        vmm.commit(BASE + first * PAGE, pages * PAGE)
        vmm.write(BASE + first * PAGE, pattern(pages * PAGE, 100))

    return prepare_pages


def with_hole(prepare: Callable[[VMM], object], first: int, pages: int) -> Callable[[VMM], None]:
    """The same with some of its pages reserved again."""

    def prepare_hole(vmm: VMM) -> None:
        prepare(vmm)
        vmm.decommit(BASE + first * PAGE, pages * PAGE)

    return prepare_hole


MIXED = (R, NONE, RW, RX, R)


def guarded(flags: VmmFlags) -> Callable[[VMM], None]:
    """A filled region between guards."""
    return filled(GUARDS | flags)


def in_runs(flags: VmmFlags) -> Callable[[VMM], None]:
    """A filled region of pages with all protections, one of them reserved again."""
    return with_hole(with_protections(filled(flags), MIXED), 6, 1)


neighbour = with_committed(region(RW), 0, 2)


# ---- the calls


def allocate(flags: VmmFlags, address: int = 0, size: int = SIZE) -> Callable[[VMM], int]:
    """Allocate beside what is there."""
    return lambda vmm: vmm.allocate(address, size, RESERVE | flags)


def over(method: str, first: int, pages: int, *arguments: object) -> Callable[[VMM], object]:
    """Call a method over some of the region's pages."""
    return lambda vmm: getattr(vmm, method)(BASE + first * PAGE, pages * PAGE, *arguments)


def whole(method: str, *arguments: object, size: int = SIZE) -> Callable[[VMM], object]:
    """Call a method over the whole region."""
    return over(method, 0, size // PAGE, *arguments)


def look(first: int, size: int) -> Callable[[VMM], object]:
    """Make a view and look at it."""

    def call(vmm: VMM) -> object:
        view = vmm.view(BASE + first * PAGE + 7, size)
        return bytes(view), view.readonly

    return call


def ask(address: int, *, smaps: bool) -> Callable[[VMM], object]:
    """Query, told as text."""
    return lambda vmm: str(vmm.query(address, smaps=smaps))


def check_pins(vmm: VMM, _error: VmmError) -> None:
    """A failed view holds no page: all of them can be changed, and back."""
    vmm.protect(BASE, SIZE, R)
    vmm.protect(BASE, SIZE, RW)


OLD = pattern(LONG)
NEW = pattern(LONG, 77)


def take_back_write(vmm: VMM, error: VmmError) -> None:
    """A failed write tells how many bytes it wrote, and has written no more."""
    done = error.completed
    assert vmm.read(BASE, LONG) == NEW[:done] + OLD[done:], f"not just {done} bytes were written"
    if done:
        vmm.write(BASE, OLD[:done])


# ---- the scenarios

SHARED = GUARDS | SHAREABLE
ALLOCATE = [
    Scenario("plain", neighbour, allocate(RW), "malloc mmap"),
    Scenario("with guards", neighbour, allocate(RW | GUARDS), "malloc mmap"),
    Scenario("FIXED", neighbour, allocate(RW | FIXED | GUARDS, ELSEWHERE), "malloc mmap"),
    Scenario("at a preferred address", neighbour, allocate(RW, ELSEWHERE), "malloc mmap"),
    Scenario("where another is preferred", neighbour, allocate(RW, BASE), "malloc mmap"),
    Scenario("COMMIT", neighbour, allocate(RW | COMMIT | GUARDS), "malloc mmap mprotect"),
    Scenario("COMMIT without access", neighbour, allocate(COMMIT), "malloc mmap"),
    *(
        Scenario(
            f"{name} LOCKED COMMIT",
            neighbour,
            allocate(flags | COMMIT | LOCKED),
            f"malloc mmap mprotect madvise mlock {more}",
            survives=LOCKS,
        )
        for name, flags, more in (
            ("writable", RW, ""),
            ("read-only", R | GUARDS, ""),
            ("without access", GUARDS, ""),
            ("SHAREABLE", RW | SHAREABLE, "memfd_create ftruncate fcntl fallocate sysinfo"),
            ("SHAREABLE with guards", RW | SHARED, "memfd_create ftruncate fcntl fallocate"),
            ("SHAREABLE and read-only", R | SHARED, "memfd_create ftruncate fcntl fallocate"),
        )
    ),
    Scenario("SHAREABLE", neighbour, allocate(RW | SHAREABLE), "malloc memfd_create mmap"),
    Scenario("SHAREABLE with guards", neighbour, allocate(RX | SHARED), "memfd_create mmap"),
    Scenario("SHAREABLE COMMIT", neighbour, allocate(RW | SHARED | COMMIT), "mmap mprotect"),
    *(
        Scenario(
            f"HUGE {name}",
            neighbour,
            allocate(flags | RW | HUGE, address, HUGE_SIZE),
            f"malloc mmap {more}",
            size=HUGE_SIZE,
        )
        for name, flags, address, more in (
            ("plain", FIXED, ELSEWHERE, ""),
            ("COMMIT", FIXED | GUARDS | COMMIT, ELSEWHERE, "mprotect madvise"),
            ("SHAREABLE", FIXED | SHARED, ELSEWHERE, "memfd_create madvise"),
            ("SHAREABLE COMMIT", FIXED | SHARED | COMMIT, ELSEWHERE, "madvise mprotect"),
        )
    ),
    Scenario(
        "HUGE where the system chooses",
        neighbour,
        allocate(RW | HUGE, size=HUGE_SIZE),
        "malloc mmap",
        survives={**HARMLESS, "mmap": everything},
        size=HUGE_SIZE,
        # A mapping that was just made takes no more mappings to unmap than it took to make.
        spare="munmap",
    ),
]

COMMITS = [
    Scenario("middle", region(RW), over("commit", 4, 8), "malloc mprotect"),
    Scenario("edge", region(RW | GUARDS), over("commit", 0, 3), "malloc mprotect"),
    Scenario(
        "runs of other protections, some committed",
        with_committed(with_protections(region(RW), MIXED), 6, 2),
        whole("commit"),
        "malloc mprotect",
    ),
    *(
        Scenario(
            f"LOCKED, {name}",
            prepare,
            whole("commit"),
            "malloc mprotect madvise mlock",
            survives=LOCKS,
        )
        for name, prepare in (
            ("writable", region(RW | LOCKED)),
            ("read-only", region(R | LOCKED | GUARDS)),
            ("mixed", with_committed(with_protections(region(RW | LOCKED), MIXED), 6, 2)),
            ("SHAREABLE", region(RW | LOCKED | SHAREABLE)),
            ("SHAREABLE and read-only", region(R | LOCKED | SHARED)),
            (
                "SHAREABLE and mixed",
                with_committed(with_protections(region(RW | LOCKED | SHARED), MIXED), 6, 2),
            ),
            ("SHAREABLE and decommitted", with_hole(filled(LOCKED | SHAREABLE), 3, 9)),
        )
    ),
    Scenario(
        "SHAREABLE",
        with_committed(with_protections(region(RW | SHARED), MIXED), 6, 2),
        whole("commit"),
        "malloc mprotect",
    ),
    Scenario(
        "HUGE",
        region(RW | HUGE, HUGE_SIZE),
        whole("commit", size=HUGE_SIZE),
        "malloc mprotect madvise",
        size=HUGE_SIZE,
    ),
]

INTERRUPTED = [
    Scenario(
        name,
        region(RW | LOCKED | flags),
        whole("commit"),
        "malloc mprotect madvise fallocate",
        # An interrupted fallocate is tried again.
        survives={**LOCKS, "fallocate": everything},
    )
    for name, flags in (("SHAREABLE", SHAREABLE), ("with guards", SHARED))
]

DECOMMITS = [
    Scenario("middle", filled(NONE), over("decommit", 4, 8), "malloc mmap"),
    Scenario("runs", with_protections(filled(NONE), MIXED), over("decommit", 2, 12), "malloc mmap"),
    Scenario("all", with_hole(filled(GUARDS), 5, 2), whole("decommit"), "malloc mmap"),
    Scenario("locked", filled(LOCKED), over("decommit", 4, 8), "malloc mmap"),
    Scenario(
        "SHAREABLE runs",
        in_runs(SHARED),
        over("decommit", 2, 12),
        "malloc mprotect fallocate",
    ),
    Scenario(
        "SHAREABLE locked runs",
        in_runs(SHARED | LOCKED),
        over("decommit", 2, 12),
        "malloc mprotect munlock fallocate",
    ),
    Scenario(
        "HUGE",
        filled(HUGE, HUGE_SIZE),
        over("decommit", 3, HUGE_SIZE // PAGE - 5),
        "malloc mmap",
        size=HUGE_SIZE,
    ),
]

PROTECTS = [
    Scenario(f"{name}: {what}", prepare, call, "malloc mprotect")
    for what, flags in (
        ("private", NONE),
        ("locked", LOCKED),
        ("SHAREABLE", SHARED),
        ("SHAREABLE locked", SHARED | LOCKED),
    )
    for name, prepare, call in (
        ("middle", filled(flags), over("protect", 4, 8, R)),
        ("runs", with_protections(filled(flags), MIXED), over("protect", 2, 12, RX)),
        ("to none", with_protections(filled(flags), MIXED), whole("protect", NONE)),
        (
            "none to writable",
            with_protections(filled(flags), [NONE, NONE]),
            over("protect", 1, 3, RW),
        ),
        (
            "with reserved pages",
            with_hole(with_protections(filled(flags), MIXED), 4, 2),
            whole("protect", RW),
        ),
    )
]

FREES = [
    Scenario(f"{name}: {what}", prepare(flags), call, "munmap", survives=survives)
    for what, flags, survives in (
        ("private", NONE, HARMLESS),
        ("locked", LOCKED, HARMLESS),
        ("SHAREABLE", SHAREABLE, {**HARMLESS, "fallocate": all_but_files}),
    )
    for name, prepare, call in (
        ("whole", guarded, whole("free")),
        ("middle", guarded, over("free", 4, 8)),
        ("low edge", guarded, over("free", 0, 3)),
        ("high edge", guarded, over("free", 9, 7)),
        (
            "runs",
            in_runs,
            over("free", 2, 12),
        ),
    )
]

COPIES = [
    Scenario(
        f"{name}{', SHAREABLE' * bool(flags)}{', by a scratch file' * bool(without)}",
        filled(flags, LONG // PAGE * PAGE + PAGE),
        call,
        names,
        without=without,
        take_back=take_back,
        size=4 * PAGE,
    )
    for flags in (NONE, SHAREABLE)
    for without, reading, writing in (
        ((), "process_vm_readv", "process_vm_writev"),
        ((Feature.PROCESS_VM,), "memfd_create pwrite pread", "memfd_create pwrite pread"),
    )
    for name, call, names, take_back in (
        ("read", lambda vmm: vmm.read(BASE, LONG), reading, nothing_to_take_back),
        ("write", lambda vmm: vmm.write(BASE, NEW), writing, take_back_write),
    )
]

VIEWS = [
    Scenario("middle", filled(NONE), look(4, 3 * PAGE), "malloc", take_back=check_pins),
    Scenario("SHAREABLE", filled(SHARED), look(0, 1), "malloc", take_back=check_pins),
]

QUERIES = [
    Scenario(
        f"{name}{' with smaps' * smaps}{' without ' * bool(without)}"
        + " or ".join(feature.name for feature in without),
        filled(GUARDS),
        ask(address, smaps=smaps),
        "open " + calls,
        ask=False,
        without=without,
        survives=UNTOLD,
    )
    for name, address in (("a page", BASE + 3 * PAGE + 5), ("a hole", ELSEWHERE + 7))
    for smaps in (False, True)
    for without, calls in (
        ((), "ioctl"),
        ((Feature.PROCMAP_QUERY,), "pread realloc"),
        ((Feature.PAGEMAP_SCAN,), ""),
        ((Feature.PAGEMAP_SCAN, Feature.PAGEMAP), ""),
        ((Feature.PROCMAP_QUERY, Feature.PAGEMAP_SCAN, Feature.PAGEMAP), "pread realloc"),
    )
]

CLOSES = [
    Scenario("one region", filled(SHARED), VMM.close, "munmap", survives=CLOSING),
    Scenario(
        "regions",
        lambda vmm: [filled(GUARDS)(vmm), *(allocate(RW | COMMIT)(vmm) for _ in range(3))],
        VMM.close,
        "munmap",
        survives={**CLOSING, "munmap": everything},
    ),
]

SCENARIOS = {
    "allocate": ALLOCATE,
    "commit": COMMITS,
    "interrupted commit": INTERRUPTED,
    "decommit": DECOMMITS,
    "protect": PROTECTS,
    "free": FREES,
    "copy": COPIES,
    "view": VIEWS,
    "query": QUERIES,
    "close": CLOSES,
}


# ---- how they are tried, in the child


@dataclass
class Trial:
    """One scenario, in one way of failing.

    ``error`` is the errno of the calls that fail, 0 for the one that a full system gives.
    """

    scenario: Scenario
    library: Faults
    error: int = 0
    reference: Picture | None = None
    answer: object = None

    def succeed(self) -> None:
        """Remember what the call does when nothing fails."""
        with VMM() as vmm:
            self.scenario.prepare(vmm)
            self.answer = self.scenario.call(vmm)
            self.reference = self.scenario.picture(vmm, self.answer)

    def told(self, value: object, survived: str = "") -> object:
        """A result, without an address that only the system knows."""
        if survived == "msync":
            return re.sub("locked=(True|False)", "locked=None", str(value))
        return "an address" if self.scenario in ALLOCATE else value

    def fail(self, mode: Mode, n: int) -> None:
        """Let the n-th call to the system fail."""
        around = faults.surroundings()
        with VMM() as vmm:
            self.scenario.prepare(vmm)
            before = self.scenario.picture(vmm)
            raised, value = None, None
            try:
                with self.library.armed(mode, n, error=self.error, spare=self.scenario.spare):
                    value = self.scenario.call(vmm)
            except VmmError as error:
                raised = error
            if raised is not None:
                self.check_failure(vmm, before, raised)
                value = self.scenario.call(vmm)
            self.check_success(vmm, value, "" if raised else self.library.name)
        left = faults.surroundings()
        assert left == around, f"left behind: {faults.shortened((around, left))}"

    def check_failure(self, vmm: VMM, before: Picture, error: VmmError) -> None:
        """It told what was short, and nothing has changed."""
        if error.errno is None:
            assert error.rc is Retcode.OUT_OF_MEMORY, error
        else:
            own = self.library.name == "malloc" or not self.error
            assert error.errno in (FULL if own else {self.error}), error
            assert error.rc is RETCODES.get(error.errno, Retcode.FAIL), error
        self.scenario.take_back(vmm, error)
        changed = before.difference(self.scenario.picture(vmm))
        assert not changed, changed

    def check_success(self, vmm: VMM, value: object, survived: str) -> None:
        """It did all that it does, but for what the failure of ``survived`` costs."""
        assert self.reference is not None
        if survived:
            assert survived in self.scenario.survives, f"a failed {survived} was not told"
        assert self.told(value, survived) == self.told(self.answer, survived), value
        view = self.scenario.survives.get(survived, everything)
        now = self.scenario.picture(vmm, value)
        assert view(now) == view(self.reference), self.reference.difference(now)

    def told_failure(self, mode: Mode, n: int) -> str:
        """Let the n-th call fail and write what was wrong: the call's name, ``""`` if none is."""
        try:
            self.fail(mode, n)
        except Exception:  # noqa: BLE001  it is told, and the others are tried too
            print(f"--- {self.scenario.name}: call {n} ({self.library.name}) {mode.value}")
            traceback.print_exc(limit=-1, file=sys.stdout)
        return self.library.name

    def fail_each(self, modes: Iterable[Mode]) -> None:
        """Let every call fail in turn."""
        self.succeed()
        names: list[str] = []
        while name := self.told_failure(Mode.ALONE, len(names) + 1):
            names.append(name)
        if Mode.HALF in modes:
            for n, name in enumerate(names, 1):
                if name in DIVISIBLE:
                    self.told_failure(Mode.HALF, n)
        if Mode.MEMORY in modes:
            for n in count(1):
                if not self.told_failure(Mode.MEMORY, n):
                    break
        if not {*self.scenario.calls.split()} <= {*names}:
            print(f"--- {self.scenario.name}: only {sorted(names)} failed")


def try_all(scenarios: Iterable[Scenario], error: int = 0) -> None:
    """Try these in a process that is theirs."""
    library = Faults()
    gc.disable()
    for one in scenarios:
        with _features.without(*one.without):
            Trial(one, library, error).fail_each([] if error else Mode)


# ---- the tests


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail."""
    return faults.build(tmp_path_factory.mktemp("faults"))


def try_method(method: str, error: int) -> None:
    """Try all scenarios of a method; runs in a child."""
    import test_rollback

    test_rollback.try_all(test_rollback.SCENARIOS[method], error)


@pytest.mark.parametrize("method", SCENARIOS)
def test_a_failed_call_leaves_everything_as_it_was(library: Path, method: str) -> None:
    faults.run(library, try_method, method, 0)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("allocate", errno.EPERM),
        ("interrupted commit", errno.EINTR),
        ("commit", errno.EPERM),
        ("decommit", errno.EPERM),
        ("free", errno.EINVAL),
        ("copy", errno.EPERM),
    ],
)
def test_a_refusal_for_any_other_reason_leaves_everything_as_it_was_too(
    library: Path, method: str, error: int
) -> None:
    faults.run(library, try_method, method, error)


def try_making() -> None:
    """Make a VMM while there is no memory; runs in a child."""
    import pytest

    from faults import Faults, Mode, surroundings
    from vmm_linux import VMM

    library = Faults()
    VMM().close()
    before = surroundings()
    with pytest.raises(MemoryError), library.armed(Mode.MEMORY, 1):
        VMM()
    assert library.name == "malloc"
    with VMM() as vmm:
        assert not vmm.closed
    assert surroundings() == before


def test_a_vmm_that_cannot_be_made_leaves_nothing(library: Path) -> None:
    faults.run(library, try_making)


def try_filling_in_pieces() -> None:
    """Commit more shared memory than is filled at a time; runs in a child."""
    import os
    from itertools import count

    from faults import Faults, Mode
    from kernel_oracle import PAGE, descriptors
    from vmm_linux import VMM, VmmError, VmmFlags

    flags = VmmFlags.RESERVE | VmmFlags.LOCKED | VmmFlags.READ | VmmFlags.SHAREABLE
    size = (64 << 20) + PAGE
    library = Faults()
    names = []
    with VMM() as vmm:
        base = vmm.allocate(0, size, flags)
        (file,) = [fd for fd, name in descriptors().items() if name.startswith("/memfd:")]
        for n in count(1):
            try:
                with library.armed(Mode.ALONE, n, spare="malloc"):
                    vmm.commit(base, size)
            except VmmError:
                assert os.fstat(file).st_blocks == 0, library.name
            if not library.name:
                break
            names.append(library.name)
            vmm.decommit(base, size)
    assert names.count("fallocate") == 2, names


def test_shared_memory_that_was_filled_in_part_is_given_back(library: Path) -> None:
    faults.run(library, try_filling_in_pieces)


def try_dropping_the_last_view() -> None:
    """Let go of the last view of a closed VMM, whose region then cannot go; runs in a child."""
    from faults import Faults, Mode, surroundings
    from kernel_oracle import PAGE, mapping_at
    from vmm_linux import VMM, VmmFlags

    flags = VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.READ | VmmFlags.SHAREABLE
    library = Faults()
    before = surroundings()
    vmm = VMM()
    base = vmm.allocate(0, 4 * PAGE, flags)
    view = vmm.view(base, PAGE)
    vmm.close()
    with library.armed(Mode.ALONE, 1):
        del view
    assert library.name == "munmap"
    assert mapping_at(base)
    del vmm
    assert surroundings() == before


def test_a_region_that_could_not_go_with_its_last_view_goes_with_the_vmm(library: Path) -> None:
    faults.run(library, try_dropping_the_last_view)


def first_call(library: Faults, call: Callable[[VMM], object], n: int) -> str:
    """Make a process's first call with its n-th call to the system failing: that one's name."""
    around = faults.surroundings()
    with VMM() as vmm:
        before = Picture(vmm, Window(BASE, BASE + PAGE), ask=False)
        try:
            with library.armed(Mode.ALONE, n, spare="munmap"):
                call(vmm)
        except VmmError:
            changed = before.difference(Picture(vmm, Window(BASE, BASE + PAGE), ask=False))
            assert not changed, (n, library.name, changed)
    with VMM() as vmm:
        call(vmm)
    assert faults.surroundings() == around, (n, library.name)
    return library.name


def try_first_calls() -> None:
    """Ask what the kernel offers while something is short; runs in a child."""
    from functools import partial
    from itertools import count

    import test_rollback as here
    from faults import Faults
    from forked import in_child

    library = Faults()
    for call in here.FIRST_CALLS:
        for n in count(1):
            if not in_child(partial(here.first_call, library, call, n)):
                break
        assert n > 5, n


FIRST_CALLS = (
    allocate(RW | HUGE | COMMIT | FIXED | GUARDS, BASE, HUGE_SIZE),
    allocate(RW | SHAREABLE | COMMIT | LOCKED | FIXED, BASE),
    allocate(RW | HUGE),
    ask(BASE, smaps=True),
)


def test_a_shortage_while_the_kernel_is_asked_what_it_offers_does_no_harm(library: Path) -> None:
    faults.run(library, try_first_calls)

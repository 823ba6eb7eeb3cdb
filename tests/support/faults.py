"""Calls of the package to the system that fail at a chosen point.

The parent's side builds ``fault_injection.c`` and runs children with it; the child's side arms
it (:class:`Faults`) and takes a :class:`Picture` of all that a failed call must leave alone.

A :class:`Scenario` is one call of a method in a prepared state. A :class:`Trial` lets each call
that the package makes to the system meanwhile fail in turn, from a fresh state each time; all that
the kernel, the files and the package itself say is compared with what they said before, and the
same call is then made again and must do what it does when nothing fails.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import re
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from children import TESTS_IMPORTABLE, run_child
from constants import COMMIT, FIXED, GUARDS, RESERVE, RW, RX, SUBSETS_OF_RIGHTS
from forked import in_child
from kernel_oracle import ARENA, PAGE, descriptors, guarded_pages, present_pages
from vmm_linux import VMM, Handle, PageKind, Retcode, Rights, VmmError, VmmFlags
from vmm_linux._core import kernel, ledger
from vmm_linux.errors import RETCODES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from vmm_linux._core.kernel import Feature
    from vmm_linux.audit import Audit
    from vmm_linux.policy import Policy

SOURCE = Path(__file__).with_name("fault_injection.c")


# ---- the parent's side


def build(folder: Path) -> Path:
    """Compile the library into this folder with the C compiler (``CC``, else ``cc``)."""
    library = folder / "fault_injection.so"
    compiler = os.environ.get("CC", "cc").split()
    # A compiler that knows malloc may leave a call of it out, or make one of another call.
    options = ["-shared", "-fPIC", "-O1", "-fno-builtin", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *options, SOURCE, "-o", library], check=True)
    return library


def run(library: Path, function: Callable[..., None], *arguments: object) -> None:
    """Run a function in a child with the library loaded; what it writes is what went wrong.

    The child takes all of its own memory from the C library's one heap, so that every other
    mapping that comes or goes is the package's.
    """
    memory = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}
    environment = {"LD_PRELOAD": str(library), **memory, **TESTS_IMPORTABLE}
    child = run_child(function, *arguments, environment=environment, timeout=120)
    assert child.returncode == 0, child.stderr
    assert not child.stdout, child.stdout


# ---- the child's side


class Mode(Enum):
    """In which way the n-th call fails."""

    ALONE = "fails"
    HALF = "does half of its work and fails"
    MEMORY = "and all later ones find no memory"
    INTERPRETER = "of the interpreter's own finds no memory"


class Faults:
    """The library that this process was started with.

    What the ledger enters takes memory each time from then on, so that it can fail each time.
    """

    def __init__(self) -> None:
        ledger.set_leaf_limit(1)
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.fault_name.restype = ctypes.c_char_p

    @contextmanager
    def armed(self, mode: Mode, n: int, *, error: int = 0, spare: str = "") -> Iterator[None]:
        """Make the n-th call fail that the package makes in the ``with`` block; 0: none.

        ``error`` is its errno; 0 for the one that a full system gives. The memory that the
        package asks for itself counts as a call. Calls named ``spare`` neither count nor fail.
        """
        self._library.fault_spare(spare.encode())
        if mode is Mode.MEMORY:
            self._library.fault_arm_memory(ctypes.c_long(n))
        elif mode is Mode.INTERPRETER:
            self._library.fault_arm_interpreter(ctypes.c_long(n))
        elif mode is Mode.HALF:
            self._library.fault_arm_half(ctypes.c_long(n), error)
        else:
            self._library.fault_arm(ctypes.c_long(n), error)
        try:
            yield
        finally:
            self._library.fault_disarm()

    def answer_names(self, error: int) -> None:
        """Be the kernel to whoever names memory from now on; 0 for what names it, else an errno."""
        self._library.fault_answer_names(error)

    def named(self) -> list[tuple[int, int, str]]:
        """What was named since, in order: where, bytes, the name."""
        self._library.fault_named.restype = ctypes.c_char_p
        place = (ctypes.c_ulong * 2)()
        found: list[tuple[int, int, str]] = []
        while (name := self._library.fault_named(ctypes.c_size_t(len(found)), place)) is not None:
            found.append((place[0], place[1], name.decode()))
        return found

    @property
    def name(self) -> str:
        """The last call that was made to fail, ``""`` if there were fewer calls than that."""
        name: bytes = self._library.fault_name()
        return name.decode()


class Deliberate(socket.socket):
    """A socket through which nothing is sent but by its own method: as one that may have to wait.

    Where a plain socket takes a handle at once, whatever fails then is tried again this way.
    """


class Ground(VMM):
    """A VMM with what stands around a call: the handles of a scenario, and two sockets.

    Attributes:
        handles: those that the scenario made, in order.
        things: objects that it made, in order.
        descriptor: that it was given and is to close, or -1.
    """

    def __init__(self, policy: Policy | None = None, audit: Audit | None = None) -> None:
        super().__init__(policy=policy, audit=audit)
        self.handles: list[Handle] = []
        self.things: list[Any] = []
        self.descriptor = -1
        self._sockets: tuple[socket.socket, ...] = ()

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """Two ends of a stream, made when they are first asked for."""
        if not self._sockets:
            sender, receiver = socket.socketpair()
            self._sockets = Deliberate(fileno=sender.detach()), receiver
        return self._sockets

    def close(self) -> None:
        """Close all of it."""
        self.things.clear()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        super().close()
        for end in self._sockets:
            end.close()

    def waiting(self) -> bytes:
        """What was sent and not received, without its descriptors."""
        if not self._sockets:
            return b""
        try:
            return self._sockets[1].recv(PAGE, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def strangers(self, result: Handle | None = None) -> list[tuple[Rights, int]]:
        """Rights and size of each live handle that the scenario does not know of.

        Their numbers come after those of the scenario's; without any, after the result's.
        """
        newest = max(self.handles, key=serial, default=result)
        if newest is None:
            return []
        found = []
        for number in range(serial(newest), serial(newest) + NEAR):
            for rights in SUBSETS_OF_RIGHTS:
                handle = Handle(number & MASK | rights << 32 | number >> 32 << 48)
                if handle not in self.handles:
                    try:
                        found.append((rights, self.mdl_get_size(handle)))
                    except VmmError:
                        continue
        return found


MASK = (1 << 32) - 1
#: More than a call can use up of the numbers of handles.
NEAR = 3


def serial(handle: Handle) -> int:
    """The number of a handle among all that the process ever made."""
    return handle.number | handle.generation << 32


class Window(NamedTuple):
    """Addresses whose pages are looked at."""

    low: int
    high: int


class Page(NamedTuple):
    """All that can be told of one page without touching it."""

    permissions: str
    vm_flags: frozenset[str]
    present: bool
    guarded: bool
    contents: bytes
    answer: tuple[object, ...]

    @property
    def usable(self) -> Page:
        """What can be done with it, whichever way it was brought there; see ``memory.pyx``.

        A guard stands only where the mapping gives access: else it would outlive its purpose.
        """
        if self.guarded:
            assert self.permissions != "---p", "a guard in a mapping without access"
        permissions = "---p" if self.guarded else self.permissions
        return self._replace(permissions=permissions, vm_flags=frozenset(), guarded=False)


class File(NamedTuple):
    """A memory file: what it holds, how much memory it takes, and who may do what with it."""

    blocks: int
    contents: bytes
    permissions: int
    seals: int
    access: int


class Record(NamedTuple):
    """What a mapping's record in ``/proc/self/smaps`` says, the figures left out."""

    line: bytes
    low: int
    high: int
    permissions: str
    vm_flags: frozenset[str]


HOLE = Record(b"", 0, 0, "", frozenset())
#: These grow and shrink by themselves.
NOT_OURS = (b"[heap]", b"[stack]")
#: The kernel's own book-keeping: what was written to, and where guards may have been.
BOOK_KEEPING = frozenset({"sd", "gu"})


def read_records() -> list[Record]:
    """Every record of smaps but the heap's and the stack's.

    ``kernel_oracle.smaps`` reads all figures too, for which the number of pictures is too large.
    """
    # VmFlags is each record's last line.
    first, *others = Path("/proc/self/smaps").read_bytes().split(b"\nVmFlags: ")
    records = []
    line = first.partition(b"\n")[0]
    for other in others:
        words, next_line, *_ = other.split(b"\n", 2)
        if not line.endswith(NOT_OURS):
            records.append(_record(line, words))
        line = next_line
    return records


@lru_cache(maxsize=4096)
def _record(line: bytes, words: bytes) -> Record:
    low, high, permissions = re.split(rb"[- ]", line, maxsplit=2)
    vm_flags = frozenset(words.decode().split()) - BOOK_KEEPING
    return Record(line, int(low, 16), int(high, 16), permissions[:4].decode(), vm_flags)


def surroundings() -> tuple[dict[int, str], list[bytes]]:
    """The descriptors and the mappings of this process: what a closed VMM leaves as it was."""
    lines = Path("/proc/self/maps").read_bytes().splitlines()
    return descriptors(), [line for line in lines if not line.endswith(NOT_OURS)]


class Picture:
    """What there is at one moment. Taking it touches no page."""

    def __init__(
        self, vmm: Ground, window: Window, *, ask: bool = True, result: Handle | None = None
    ) -> None:
        """``ask`` the VMM about each page too, which opens its files of ``/proc``.

        Asked of a buffer, it remembers the security id. ``result`` is the handle that the call
        made.
        """
        self.window = window
        self.closed = vmm.closed
        vmm._check()
        self.usage = [] if vmm.closed else [use.used for use in vmm.usage()]
        self._vmm = vmm if ask and not vmm.closed else None
        self._sids: list[int | None] = [None]
        self._answers = [self._answer(va) for va in range(*window, PAGE)]
        self.handles = [self._told(vmm, handle) for handle in vmm.handles]
        self.strangers = vmm.strangers(result)
        self.waiting = vmm.waiting()
        records = read_records()
        self.mappings = [record.line for record in records]
        self.charged = sum(r.high - r.low for r in records if "ac" in r.vm_flags)
        self.descriptors = {
            number: target
            for number, target in descriptors().items()
            if ask or not target.startswith("/proc/")
        }
        memory = [n for n, name in sorted(self.descriptors.items()) if name.startswith("/memfd:")]
        self.files = [_file(number) for number in memory]
        self.identities = [os.fstat(number).st_ino for number in memory]
        self.pages = self._look_at_pages(records)

    def _answer(self, va: int) -> tuple[object, ...]:
        """What Query says of a page, addresses counted from the window's start."""
        if self._vmm is None:
            return ()
        info = self._vmm.query(va, smaps=False)
        facts: tuple[object, ...] = (info.state, info.kind, info.protection, info.flags)
        if info.kind in {PageKind.PRIVATE, PageKind.GUARD, PageKind.MDL}:
            low = self.window.low
            facts += (info.base - low, info.size, info.run_start - low, info.run_end - low)
            facts += (info.mdl_offset, self._known(info.sid))
        return facts

    def _known(self, sid: int | None) -> int:
        """The how manieth security id of this picture it is: which is the same each time."""
        if sid not in self._sids:
            self._sids.append(sid)
        return self._sids.index(sid)

    def _told(self, vmm: VMM, handle: Handle) -> tuple[object, ...]:
        """What the VMM says of a handle."""
        try:
            size = vmm.mdl_get_size(handle)
            if self._vmm is None:
                return (size,)
            info = vmm.handle_info(handle)
        except VmmError as refusal:
            return (refusal.rc,)
        sids = (info.sid, info.origin_sid) if Rights.GET_SID in info.rights else ()
        return (info.rights, size, info.seals, *(self._known(sid) for sid in sids))

    def _look_at_pages(self, records: list[Record]) -> list[Page]:
        found = []
        mapped: dict[int, Record] = {}
        for record in records:
            low, high = max(record.low, self.window.low), min(record.high, self.window.high)
            mapped.update(dict.fromkeys(range(low, high, PAGE), record))
        addresses = range(*self.window, PAGE)
        present = present_pages(self.window.low, len(addresses))
        guards = {*guarded_pages(self.window.low, len(addresses))}
        with Path("/proc/self/mem").open("rb", buffering=0) as memory:
            for index, va in enumerate(addresses):
                there, answer = present[index], self._answers[index]
                record = mapped.get(va, HOLE)
                contents = os.pread(memory.fileno(), PAGE, va) if there else b""
                found.append(
                    Page(
                        record.permissions,
                        record.vm_flags,
                        there,
                        index in guards,
                        contents,
                        answer,
                    )
                )
        return found

    def difference(self, other: Picture) -> str:
        """In what ``other`` differs from this picture of the same process, ``""``: in nothing."""
        parts = {
            "closed": (self.closed, other.closed),
            "usage": (self.usage, other.usage),
            "handles": (self.handles, other.handles),
            "new handles": (self.strangers, other.strangers),
            "messages": (self.waiting, other.waiting),
            "descriptors": (self.descriptors, other.descriptors),
            "mappings": (self.mappings, other.mappings),
            "charge": (self.charged, other.charged),
            "files": (self.files, other.files),
            "identities": (self.identities, other.identities),
            "pages": (self.pages, other.pages),
        }
        return "; ".join(
            f"{name}: {_first_difference(mine, theirs)}"
            for name, (mine, theirs) in parts.items()
            if mine != theirs
        )

    @property
    def essence(self) -> dict[str, object]:
        """What must be the same wherever the memory lies and whatever else there is."""
        return {
            "closed": self.closed,
            "pages": self.pages,
            "files": self.files,
            "handles": (self.handles, self.strangers),
            "messages": self.waiting,
            "names": sorted(
                name
                for name in self.descriptors.values()
                if not name.startswith(("/proc/", "socket:"))
            ),
        }


def _file(number: int) -> File:
    status = os.fstat(number)
    name = Path(f"/proc/self/fd/{number}").readlink().name
    return File(
        status.st_blocks,
        # An identity names files, which have other inode numbers each time.
        b"" if name.startswith("memfd:vmm_linux identity") else os.pread(number, status.st_size, 0),
        status.st_mode,
        fcntl.fcntl(number, fcntl.F_GET_SEALS),
        fcntl.fcntl(number, fcntl.F_GETFL),
    )


def _first_difference(mine: object, theirs: object) -> str:
    """A short text: long lists are told by the first place in which they differ."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        index = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if len({*pair}) > 1)
        return f"[{index}] {shortened(mine[index])} became {shortened(theirs[index])}"
    if isinstance(mine, list) and isinstance(theirs, list):
        gone = [item for item in mine if item not in theirs]
        new = [item for item in theirs if item not in mine]
        return f"{shortened(gone)} became {shortened(new)}"
    return f"{shortened(mine)} became {shortened(theirs)}"


def shortened(value: object) -> str:
    """Its text, or the beginning and the end of it."""
    text = repr(value)
    return text if len(text) < 700 else f"{text[:350]} ... {text[-350:]}"


# ---- what a scenario is

NONE = VmmFlags(0)
R = VmmFlags.READ
SHARED = GUARDS | VmmFlags.SHAREABLE

PAGES = 16
SIZE = PAGES * PAGE
#: Where the regions of the scenarios lie, and where those that they allocate may.
BASE = ARENA + 4 * PAGE
ELSEWHERE = BASE + 64 * PAGE
HUGE_SIZE = kernel.huge_page_size()
#: What errors a full system gives.
FULL = {errno.ENOMEM, errno.EMFILE, errno.EAGAIN}
#: What can stop half way.
DIVISIBLE = {
    *("mprotect", "madvise", "mlock", "munlock", "process_madvise"),
    *("read", "pread", "pwrite", "process_vm_readv", "process_vm_writev"),
}


def everything(picture: Picture) -> object:
    """Its failure costs nothing."""
    return picture.essence


def usable(picture: Picture) -> object:
    """Its failure costs a way of doing it; by the other one pages come out the same.

    What differs are mappings, guards and the charge.
    """
    return {**picture.essence, "pages": [page.usable for page in picture.pages]}


def all_but_locks(picture: Picture) -> object:
    """Its failure costs the pinning of pages, which is done as far as the limit allows."""
    pages = [page._replace(vm_flags=page.vm_flags - {"lo"}) for page in picture.pages]
    return {**picture.essence, "pages": pages}


def all_but_files(picture: Picture) -> object:
    """Its failure costs the memory of freed shared pages, until their region is gone."""
    return {**picture.essence, "files": None}


def all_but_permissions(picture: Picture) -> object:
    """Its failure costs that another user cannot open the memory for writing."""
    files = [file._replace(permissions=0) for file in picture.files]
    return {**picture.essence, "files": files}


#: Closing gives the descriptor back whatever it says; without a figure of the free memory, or of
#: the holes in a file, the package looks for another or takes the highest. Memory without a name is
#: as good.
HARMLESS: Mapping[str, Callable[[Picture], object]] = {
    **dict.fromkeys(("close", "sysinfo", "fstat", "prctl"), everything),
    "fchmod": all_but_permissions,
}
LOCKS = {**HARMLESS, "mlock": all_but_locks}
#: What closing a region's memory file frees anyhow need not be emptied first.
#: And what does not say whose it is, is taken for the package's, but where the kernel knows it not.
CLOSING = {**HARMLESS, "fallocate": everything, "fcntl": everything}
#: Query leaves open whether the page is locked; half of a file can be enough.
UNTOLD = {**HARMLESS, "msync": everything, "pread": everything}


def nothing_to_take_back(_vmm: Ground, error: VmmError) -> None:
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
        size: of the window that is looked at, in bytes.
        base: where this window begins.
        ask: whether Query is asked for every page of the window.
        without: the features that are switched off meanwhile.
        spare: calls to the system that cannot fail at that place.
        placed: whether the result is the address of a new region, which is looked at instead.
    """

    name: str
    prepare: Callable[[Ground], object]
    call: Callable[[Ground], Any]
    calls: str
    survives: Mapping[str, Callable[[Picture], object]] = field(default_factory=lambda: HARMLESS)
    take_back: Callable[[Ground, VmmError], None] = nothing_to_take_back
    size: int = SIZE
    base: int = BASE
    ask: bool = True
    without: tuple[Feature, ...] = ()
    spare: str = ""
    placed: bool = False

    def picture(self, vmm: Ground, result: object = None) -> Picture:
        """Look at the window, or at the region that the call made at this address."""
        window = Window(self.base - 2 * PAGE, self.base + self.size + 2 * PAGE)
        if self.placed and isinstance(result, int):
            flags = vmm.query(result, smaps=False).flags
            window = Window(
                result - PAGE * bool(flags & VmmFlags.LOW_GUARD),
                result + self.size + PAGE * bool(flags & VmmFlags.HIGH_GUARD),
            )
        return Picture(
            vmm, window, ask=self.ask, result=result if isinstance(result, Handle) else None
        )


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


def over(method: str, first: int, pages: int, *arguments: object) -> Callable[[VMM], object]:
    """Call a method over some of the region's pages."""
    return lambda vmm: getattr(vmm, method)(BASE + first * PAGE, pages * PAGE, *arguments)


def whole(method: str, *arguments: object, size: int = SIZE) -> Callable[[VMM], object]:
    """Call a method over the whole region."""
    return over(method, 0, size // PAGE, *arguments)


def ask(address: int, *, smaps: bool) -> Callable[[VMM], object]:
    """Query, told as text."""
    return lambda vmm: str(vmm.query(address, smaps=smaps))


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
        with Ground() as vmm:
            self.scenario.prepare(vmm)
            self.answer = self.scenario.call(vmm)
            self.reference = self.scenario.picture(vmm, self.answer)

    def told(self, value: object, survived: str = "") -> object:
        """A result, without addresses and numbers that only the system knows."""
        if survived == "msync":
            return re.sub("locked=(True|False)", "locked=None", str(value))
        if isinstance(value, Handle):
            return value.rights
        return "an address" if self.scenario.placed else value

    def fail(self, mode: Mode, n: int) -> None:
        """Let the n-th call to the system fail."""
        around = surroundings()
        with Ground() as vmm:
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
        left = surroundings()
        assert left == around, f"left behind: {shortened((around, left))}"

    def check_failure(self, vmm: Ground, before: Picture, error: VmmError) -> None:
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

    def check_success(self, vmm: Ground, value: object, survived: str) -> None:
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
        with kernel.without(*one.without):
            Trial(one, library, error).fail_each([] if error else Mode)


class FirstCall(NamedTuple):
    """A call of which a process asks for the first time what the kernel offers."""

    prepare: Callable[[Ground], object]
    call: Callable[[Ground], object]


def first_call(library: Faults, first: FirstCall, n: int) -> str:
    """Make a process's first call with its n-th call to the system failing: that one's name."""
    around = surroundings()
    window = Window(BASE, BASE + SIZE)
    with Ground() as vmm:
        first.prepare(vmm)
        before = Picture(vmm, window, ask=False)
        try:
            # A mapping just made takes no more mappings to unmap than it took to make.
            with library.armed(Mode.ALONE, n, spare="munmap"):
                first.call(vmm)
        except VmmError:
            changed = before.difference(Picture(vmm, window, ask=False))
            assert not changed, (n, library.name, changed)
    with Ground() as vmm:
        first.prepare(vmm)
        first.call(vmm)
    assert surroundings() == around, (n, library.name)
    return library.name


def try_first_calls(calls: Iterable[FirstCall], least: int) -> None:
    """Make each of these a process's first call, with each of its calls to the system failing.

    There are at least so many of these.
    """
    library = Faults()
    for first in calls:
        for n in count(1):
            if not in_child(partial(first_call, library, first, n)):
                break
        assert n > least, n


def nothing(_ground: Ground) -> None:
    """No state but a fresh VMM."""

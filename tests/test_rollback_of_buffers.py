"""A call that fails leaves MDL buffers, their handles and their mappings as they were.

At whichever call to the system it fails (:mod:`faults`), and where the system really ends: at the
map-count wall, under resource limits, without memory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import faults
from children import run_child
from faces import Face, call
from faults import (
    BASE,
    CLOSING,
    COMMIT,
    ELSEWHERE,
    FIXED,
    GUARDS,
    HARMLESS,
    HUGE,
    HUGE_SIZE,
    LOCKED,
    LOCKS,
    MIXED,
    NONE,
    OWN_FILES,
    PAGES,
    RESERVE,
    RW,
    RX,
    SHAREABLE,
    SHARED,
    SIZE,
    UNTOLD,
    Faults,
    FirstCall,
    Ground,
    Mode,
    Picture,
    R,
    Scenario,
    all_but_files,
    ask,
    everything,
    filled,
    nothing,
    nothing_to_take_back,
    over,
    pattern,
    with_protections,
)
from kernel_oracle import (
    ARENA,
    PAGE,
    TESTS_IMPORTABLE,
    descriptors,
    libc,
    maps,
    present_pages,
    status,
)
from test_limits_of_the_system import (
    FILL,
    ONE_HEAP,
    Singles,
    State,
    count_mappings,
    fill_map_count,
    limit,
    meminfo,
    refusal,
    steady_heap,
)
from vmm_linux import VMM, Handle, Limits, Retcode, Rights, Seal, VmmError, VmmFlags, _features
from vmm_linux._features import Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# ---- the states


def first(*steps: Callable[[Ground], object]) -> Callable[[Ground], None]:
    """One state after the other."""

    def prepare(ground: Ground) -> None:
        for step in steps:
            step(ground)

    return prepare


def buffer(prot: VmmFlags = RW) -> Callable[[Ground], None]:
    """A buffer with something else in every page."""
    return lambda ground: ground.handles.append(ground.mdl_create_from_buf(pattern(SIZE), prot))


def holes(ground: Ground) -> None:
    """A buffer that has no memory yet."""
    ground.handles.append(ground.mdl_create(SIZE, RW))


def window(ground: Ground) -> None:
    """A clone of the newest buffer, a page smaller on either side."""
    newest = ground.handles[-1]
    size = ground.mdl_get_size(newest)
    ground.handles.append(ground.mdl_clone(newest, PAGE, size - 2 * PAGE))


def copied(rights: Rights) -> Callable[[Ground], None]:
    """A copy of the newest handle."""
    return lambda ground: ground.handles.append(ground.handle_copy(ground.handles[-1], rights))


def mapped(flags: VmmFlags) -> Callable[[Ground], None]:
    """The newest buffer, mapped at BASE."""

    def prepare(ground: Ground) -> None:
        newest = ground.handles[-1]
        ground.mdl_map(newest, 0, ground.mdl_get_size(newest), BASE, FIXED | flags)

    return prepare


def converted(first_page: int, pages: int) -> Callable[[Ground], None]:
    """Some pages of the region made a buffer."""
    call = convert(first_page, pages)
    return lambda ground: ground.handles.append(call(ground))


def closed(ground: Ground) -> None:
    """The newest handle closed."""
    ground.handle_close(ground.handles.pop())


def revoked(ground: Ground) -> None:
    """What came from the oldest handle revoked."""
    ground.handle_revoke(ground.handles[0])


def half_touched(flags: VmmFlags) -> Callable[[Ground], None]:
    """A committed region in which every other page was touched."""

    def prepare(ground: Ground) -> None:
        ground.allocate(BASE, SIZE, RESERVE | FIXED | COMMIT | RW | flags)
        for page in range(0, PAGES, 2):
            ground.write(BASE + page * PAGE, pattern(PAGE, page))

    return prepare


def connected(ground: Ground) -> None:
    """Two sockets."""
    assert ground.sockets


# ---- the calls


def newest(method: str, *arguments: object) -> Callable[[Ground], object]:
    """Call a method with the newest handle."""
    return lambda ground: getattr(ground, method)(ground.handles[-1], *arguments)


def oldest(method: str, *arguments: object) -> Callable[[Ground], object]:
    """Call a method with the oldest handle."""
    return lambda ground: getattr(ground, method)(ground.handles[0], *arguments)


def convert(first_page: int, pages: int, flags: VmmFlags = RW) -> Callable[[Ground], Handle]:
    """Make a buffer of some of the region's pages."""
    return lambda ground: ground.mdl_create_from_vm(BASE + first_page * PAGE, pages * PAGE, flags)


def send(rights: Rights | None = None) -> Callable[[Ground], None]:
    """Send the newest handle."""
    return lambda ground: ground.send_handle(ground.sockets[0], ground.handles[-1], rights)


def receive(ground: Ground) -> Handle:
    """Receive a handle."""
    return ground.recv_handle(ground.sockets[1])


def send_again(rights: Rights | None = None) -> Callable[[Ground, VmmError], None]:
    """A message that was received is gone, whatever became of it: it must be sent again."""

    def take_back(ground: Ground, _error: VmmError) -> None:
        assert ground.waiting() == b""
        send(rights)(ground)

    return take_back


def info(ground: Ground) -> tuple[object, ...]:
    """What is known of the newest handle, without its security ids."""
    told = ground.handle_info(ground.handles[-1])
    return told.rights, told.size, told.seals, told.sid != 0, told.origin_sid is None


def ask_buffer(*, smaps: bool) -> Callable[[Ground], object]:
    """Query of a page of a buffer, told as text without its security id and inode."""
    question = ask(BASE + 3 * PAGE, smaps=smaps)
    return lambda ground: re.sub("(sid|inode)=[0-9]+", "", str(question(ground)))


def make_holes_again(ground: Ground, error: VmmError) -> None:
    """A failed LOCKED mapping may leave memory in the buffer, which nobody can tell from holes.

    It cannot be given back: somebody else who has the buffer may have written to it meanwhile.
    """
    nothing_to_take_back(ground, error)
    for number, target in descriptors().items():
        if target.startswith("/memfd:"):
            assert _file_contents(number) == bytes(SIZE)
            punch = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            assert libc.fallocate(number, punch, ctypes.c_long(0), ctypes.c_long(SIZE)) == 0


FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def _file_contents(number: int) -> bytes:
    return os.pread(number, SIZE, 0)


# ---- what a failure costs that a call gets over


def all_but_advice(picture: Picture) -> object:
    """Its failure costs the wish for huge pages."""
    pages = [page._replace(vm_flags=page.vm_flags - {"hg"}) for page in picture.pages]
    return {**picture.essence, "pages": pages}


#: Once the pages are in place, a refused change of protection is tried again.
CONVERTING = {
    **LOCKS,
    "mprotect": everything,
    "madvise": all_but_advice,
    "fallocate": all_but_files,
}


# ---- the scenarios

MAKING = "malloc memfd_create ftruncate fcntl"
CREATE = [
    Scenario("plain", holes, lambda g: g.mdl_create(SIZE, RW), MAKING),
    Scenario("the first handle", nothing, lambda g: g.mdl_create(SIZE, RW), MAKING),
    Scenario(
        "LOCKED", holes, lambda g: g.mdl_create(SIZE, RW | LOCKED), f"{MAKING} fallocate sysinfo"
    ),
    Scenario(
        "executable",
        holes,
        lambda g: g.mdl_create(SIZE, RX | LOCKED),
        f"{MAKING} fallocate sysinfo",
    ),
]

INTERRUPTED = [
    replace(scenario, survives={**HARMLESS, "fallocate": everything})
    for scenario in CREATE
    if scenario.name == "LOCKED"
]

FROM_BYTES = [
    Scenario(
        f"{prot!r}",
        holes,
        lambda g, prot=prot: g.mdl_create_from_buf(pattern(SIZE - 5), prot),  # type: ignore[misc]
        f"{MAKING} pwrite sysinfo",
    )
    for prot in (RW, R, RX)
]

COPYING = f"{MAKING} mmap mremap"
FROM_VM = [
    *(
        Scenario(name, prepare, call, f"{COPYING} {more}", CONVERTING, size=size)
        for name, prepare, call, size, more in (
            ("one run", filled(NONE), convert(0, PAGES), SIZE, "open pread pwrite"),
            ("some pages, RX", filled(GUARDS), convert(4, 8, RX), SIZE, "open pread pwrite"),
            ("untouched", half_touched(NONE), convert(1, 13), SIZE, "open pread pwrite"),
            (
                "runs",
                with_protections(filled(NONE), MIXED),
                convert(2, 11),
                SIZE,
                "open pread pwrite mprotect",
            ),
            (
                "no access",
                with_protections(filled(NONE), [NONE, R]),
                convert(0, 4),
                SIZE,
                "open pread pwrite mprotect",
            ),
            ("LOCKED", filled(LOCKED), convert(2, 12), SIZE, "pwrite fallocate mlock"),
            (
                "LOCKED runs",
                with_protections(filled(LOCKED | GUARDS), MIXED),
                convert(0, PAGES),
                SIZE,
                "pwrite fallocate mlock mprotect",
            ),
            (
                "HUGE",
                filled(HUGE, HUGE_SIZE),
                convert(3, HUGE_SIZE // PAGE - 5),
                HUGE_SIZE,
                "pwrite madvise",
            ),
            (
                "SHAREABLE part, untouched",
                half_touched(SHAREABLE | GUARDS),
                convert(1, 13),
                SIZE,
                "lseek pwrite",
            ),
            (
                "SHAREABLE runs",
                with_protections(filled(SHAREABLE), MIXED),
                convert(2, 11),
                SIZE,
                "lseek pwrite mprotect",
            ),
            (
                "SHAREABLE LOCKED runs",
                with_protections(filled(SHAREABLE | LOCKED), MIXED),
                convert(2, 11),
                SIZE,
                "lseek pwrite mprotect mlock",
            ),
        )
    ),
    *(
        Scenario(f"SHAREABLE whole{what}", prepare, convert(0, PAGES), "malloc")
        for what, prepare in (
            ("", filled(SHAREABLE)),
            (" LOCKED", filled(SHAREABLE | LOCKED)),
            (" in runs", with_protections(filled(SHARED), MIXED)),
        )
    ),
    Scenario(
        "beside a buffer", first(filled(NONE), converted(2, 4)), convert(6, 4), COPYING, CONVERTING
    ),
]
#: Access that is taken away can be short of mappings, but nobody refuses it.
REFUSED_FROM_VM = [
    replace(scenario, spare="mprotect", calls="mremap")
    for scenario in FROM_VM
    if COPYING in scenario.calls
]
FROM_VM_WITHOUT_PAGEMAP = [
    replace(scenario, without=(Feature.PAGEMAP,), calls=COPYING)
    for scenario in FROM_VM
    if scenario.name in {"runs", "LOCKED runs"}
]


def mapping(flags: VmmFlags, hint: int = 0, pages: int = PAGES) -> Callable[[Ground], object]:
    """Map the newest buffer from its start on."""
    return newest("mdl_map", 0, pages * PAGE, hint, flags)


MAP = [
    Scenario("writable", buffer(), mapping(RW), "malloc mmap"),
    Scenario("writable, guards", buffer(), mapping(RW | GUARDS), "malloc mmap"),
    Scenario("FIXED", buffer(), mapping(RW | FIXED | GUARDS, ELSEWHERE), "malloc mmap"),
    Scenario("at a preferred address", buffer(), mapping(RW, ELSEWHERE), "malloc mmap"),
    *(
        Scenario(name, buffer(), mapping(flags), "malloc mmap open")
        for name, flags in (
            ("read-only", R),
            ("read-only, guards", R | GUARDS),
            ("executable", R | GUARDS),
            ("without access", NONE),
        )
    ),
    Scenario("read-only again", first(buffer(), mapped(R)), mapping(R | GUARDS), "malloc mmap"),
    Scenario("read-only of a frozen one", buffer(R), mapping(R), "malloc mmap open"),
    Scenario(
        "a clone, read-only",
        first(buffer(), window),
        mapping(R, pages=PAGES - 2),
        "malloc mmap open",
        size=SIZE - 2 * PAGE,
    ),
    *(
        Scenario(
            f"LOCKED {name}",
            prepare,
            mapping(flags | LOCKED),
            f"malloc mmap madvise mlock sysinfo fstat {more}",
            LOCKS,
            take_back=take_back,
        )
        for prepare, take_back, what in (
            (buffer(), nothing_to_take_back, ""),
            (holes, make_holes_again, ", holes"),
        )
        for name, flags, more in (
            (f"writable{what}", RW, ""),
            (f"writable, guards{what}", RW | GUARDS, ""),
            (f"read-only{what}", R | GUARDS, "open"),
        )
    ),
]
MAP = [replace(scenario, placed=True) for scenario in MAP]

CLONE = [
    Scenario(
        "a buffer", buffer(), newest("mdl_clone", PAGE, 3 * PAGE), "malloc memfd_create fcntl"
    ),
    Scenario(
        "a clone",
        first(buffer(), window),
        newest("mdl_clone", PAGE, 3 * PAGE),
        "malloc memfd_create fcntl",
    ),
]

SEAL = [
    Scenario(f"{seal!r}{what}", prepare, newest("mdl_seal", seal), "fcntl")
    for what, prepare in (("", buffer()), (" of a clone", first(buffer(), window)))
    for seal in (Seal.PUBLISH, Seal.FREEZE, Seal.PUBLISH | Seal.FREEZE)
]

FAMILY = first(buffer(), window, copied(Rights.COPY | Rights.MAP_READ), window)
HANDLES = [
    Scenario("copy", buffer(), newest("handle_copy", Rights.COPY | Rights.MAP_READ), "malloc"),
    Scenario("close the last", first(holes, buffer()), newest("handle_close"), "close"),
    Scenario("close a parent", FAMILY, oldest("handle_close"), ""),
    Scenario("close a revoked one", first(FAMILY, revoked), newest("handle_close"), ""),
    Scenario("close of a mapped buffer", first(buffer(), mapped(R)), newest("handle_close"), ""),
    Scenario("revoke", FAMILY, oldest("handle_revoke"), "close"),
]

INFO = [
    Scenario(
        f"{name}{' without file handles' * bool(without)}",
        prepare,
        info,
        f"fcntl {identity}",
        ask=False,
        without=without,
    )
    for without, identity in (((), "name_to_handle_at"), ((Feature.FILE_HANDLES,), "fstat"))
    for name, prepare in (("a buffer", buffer()), ("a clone", first(buffer(), window, window)))
]

READ_ONLY = Rights.TRANSFER | Rights.COPY | Rights.MAP_READ
SENDINGS: tuple[tuple[str, Callable[[Ground], object], Rights | None], ...] = (
    ("a buffer", buffer(), None),
    ("a buffer, read-only", buffer(), READ_ONLY),
    ("a frozen buffer", buffer(R), None),
    ("a clone", first(buffer(), window), None),
    ("a clone, read-only", first(buffer(), window), READ_ONLY),
    ("a clone of a clone", first(buffer(), window, window), None),
)
SEND = [
    Scenario(
        name,
        first(prepare, connected),
        send(rights),
        "fcntl" if name in {"a buffer", "a clone", "a clone of a clone"} else "fcntl open",
    )
    for name, prepare, rights in SENDINGS
]
#: The receiver asks for seals by fcntl(2), which is never short of anything.
SEALS_ASKED = "fcntl"
RECEIVE = [
    Scenario(
        name,
        first(prepare, send(rights)),
        receive,
        "malloc",
        take_back=send_again(rights),
        spare=SEALS_ASKED,
    )
    for name, prepare, rights in SENDINGS
]

QUERY = [
    Scenario(
        f"{name}{' with smaps' * smaps}{' without file handles' * bool(without)}",
        prepare,
        ask_buffer(smaps=smaps),
        f"open {identity}",
        ask=False,
        without=without,
        survives=UNTOLD,
    )
    for name, prepare in (
        ("a mapping", first(buffer(), mapped(RW))),
        ("a mapping of a clone", first(buffer(), window, mapped(R))),
        ("pages of a region", first(filled(GUARDS), converted(2, 8))),
    )
    for smaps in (False, True)
    for without, identity in (((), "name_to_handle_at"), ((Feature.FILE_HANDLES,), "fstat"))
]

REGIONS: tuple[tuple[str, Callable[[Ground], object]], ...] = (
    ("a mapping", first(buffer(), mapped(RW | GUARDS))),
    ("the last mapping of a buffer", first(buffer(), mapped(R | GUARDS), closed)),
    ("a mapping of a clone", first(buffer(), window, mapped(RW | GUARDS))),
    ("a region made a buffer", first(filled(GUARDS), converted(0, PAGES))),
    ("a region with a buffer", first(filled(GUARDS), converted(3, 9), closed)),
    ("a SHAREABLE region made a buffer", first(filled(SHARED), converted(0, PAGES))),
    ("LOCKED", first(filled(GUARDS | LOCKED), converted(3, 9))),
)
FREES = [
    Scenario(f"{what}: {name}", prepare, call, "munmap", survives={**HARMLESS, "fallocate": freed})
    for what, prepare in REGIONS
    for name, call, freed in (
        ("middle", over("free", 4, 6), all_but_files),
        ("low edge", over("free", 0, 4), all_but_files),
        ("high edge", over("free", 10, 4), all_but_files),
    )
]
PROTECTS = [
    Scenario(f"{what}: {name}", prepare, over("protect", 2, 10, protection), "malloc mprotect")
    for what, prepare in REGIONS
    for name, protection in (("to R", R), ("to none", NONE))
    if (what, name) != ("the last mapping of a buffer", "to R")
]

CLOSES = [
    Scenario(
        name, prepare, VMM.close, "munmap close", survives={**CLOSING, **more}, spare=OWN_FILES
    )
    for name, prepare, more in (
        ("a mapping", first(buffer(), mapped(RW)), {}),
        ("a region with a buffer", first(filled(GUARDS), converted(3, 9)), {}),
        (
            "regions",
            first(filled(GUARDS), converted(3, 9), FAMILY, oldest("mdl_map", 0, PAGE, 0, R)),
            {"munmap": everything},
        ),
    )
]

SCENARIOS: Mapping[str, list[Scenario]] = {
    "mdl_create": CREATE,
    "mdl_create_from_buf": FROM_BYTES,
    "mdl_create_from_vm": FROM_VM,
    "mdl_create_from_vm without PAGEMAP": FROM_VM_WITHOUT_PAGEMAP,
    "mdl_map": MAP,
    "mdl_clone": CLONE,
    "mdl_seal": SEAL,
    "handles": HANDLES,
    "handle_info": INFO,
    "send_handle": SEND,
    "recv_handle": RECEIVE,
    "query": QUERY,
    "free": FREES,
    "protect": PROTECTS,
    "close": CLOSES,
}


REFUSED: Mapping[str, tuple[int, list[Scenario]]] = {
    "mdl_create": (errno.EPERM, CREATE),
    "interrupted mdl_create": (errno.EINTR, INTERRUPTED),
    "mdl_create_from_buf": (errno.EACCES, FROM_BYTES),
    "mdl_create_from_vm": (errno.EPERM, REFUSED_FROM_VM),
    "mdl_clone": (errno.EACCES, CLONE),
    "send_handle": (errno.EPERM, SEND),
    "free": (errno.EINVAL, FREES),
}

FIRST_CALLS = [
    FirstCall(nothing, lambda g: g.mdl_create(SIZE, RX | LOCKED)),
    FirstCall(buffer(), mapping(R)),
    FirstCall(half_touched(LOCKED), convert(2, 8)),
    FirstCall(first(buffer(), window), info),
    FirstCall(first(buffer(), mapped(RW)), ask_buffer(smaps=True)),
    FirstCall(first(buffer(), window, connected), send(READ_ONLY)),
]


# ---- every call to the system

library = pytest.fixture(faults.make_library, scope="session")


def try_method(method: str) -> None:
    """Try all scenarios of a method; runs in a child."""
    import faults
    import test_rollback_of_buffers

    faults.try_all(test_rollback_of_buffers.SCENARIOS[method])


@pytest.mark.parametrize("method", SCENARIOS)
def test_a_failed_call_leaves_buffers_and_handles_as_they_were(library: Path, method: str) -> None:
    faults.run(library, try_method, method)


def try_refusals(method: str) -> None:
    """Try all scenarios of a method that is refused for another reason; runs in a child."""
    import faults
    import test_rollback_of_buffers

    error, scenarios = test_rollback_of_buffers.REFUSED[method]
    faults.try_all(scenarios, error)


@pytest.mark.parametrize("method", REFUSED)
def test_a_refusal_for_any_other_reason_leaves_them_as_they_were_too(
    library: Path, method: str
) -> None:
    faults.run(library, try_refusals, method)


def try_first_calls() -> None:
    """Ask what the kernel offers while something is short; runs in a child."""
    import faults
    import test_rollback_of_buffers

    faults.try_first_calls(test_rollback_of_buffers.FIRST_CALLS, 4)


def test_a_shortage_while_the_kernel_is_asked_does_no_harm_to_buffers(library: Path) -> None:
    faults.run(library, try_first_calls)


def first_identity(library: Faults, n: int) -> tuple[str, bool]:
    """Ask for a process's first security id with the n-th call to the system failing.

    Returns:
        That call's name, and whether another holder of the buffer is told the same security id.
    """
    with Ground() as ground:
        buffer()(ground)
        mine = 0
        try:
            with library.armed(Mode.ALONE, n):
                mine = ground.handle_info(ground.handles[-1]).sid
        except VmmError:
            mine = ground.handle_info(ground.handles[-1]).sid
        send()(ground)
        return library.name, ground.handle_info(receive(ground)).sid == mine


def try_first_identity() -> None:
    """Let each call fail in a process that has asked nothing yet; runs in a child."""
    from functools import partial
    from itertools import count

    import test_rollback_of_buffers as here
    from faults import Faults
    from forked import in_child

    library = Faults()
    for n in count(1):
        name, same = in_child(partial(here.first_identity, library, n))
        assert same, (n, name)
        if not name:
            break
    assert n > 3, n


def test_a_shortage_does_not_change_a_security_id(library: Path) -> None:
    faults.run(library, try_first_identity)


# ---- where the system ends


def in_own_process(work: Callable[..., None], *arguments: object, nobody: bool = False) -> None:
    """Run a function of this module in a process whose limits it may lower."""
    child = run_child(
        f"from {__name__} import {work.__name__} as work\nwork(*{arguments!r})\nprint('done')",
        nobody=nobody,
        environment={**TESTS_IMPORTABLE, **ONE_HEAP},
    )
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr


def facts(ground: Ground) -> tuple[object, ...]:
    """What ``State`` does not see: handles that nobody was given, and the memory files."""
    files = [number for number, name in descriptors().items() if name.startswith("/memfd:")]
    status = {number: os.fstat(number) for number in sorted(files)}
    return (
        ground.strangers(),
        ground.waiting(),
        [(n, s.st_ino, s.st_blocks, s.st_mode) for n, s in status.items()],
    )


def refused(ground: Ground, method: str, *arguments: object) -> tuple[Retcode, str]:
    """Return code and message of a call that must fail, and change nothing, through both faces."""
    before = facts(ground)
    rc, message = refusal(ground, method, *arguments)
    assert facts(ground) == before, method
    return rc, message


#: Where, inside the arena of the limits' tests, buffers are mapped.
PLACE = ARENA + 20 * PAGE


def fail_at_the_wall() -> None:
    """Every method that needs a mapping, with no mapping left."""
    steady_heap()
    with Ground() as ground:
        buffer()(ground)
        (handle,) = ground.handles
        ground.mdl_map(handle, 0, 8 * PAGE, ARENA, RW | FIXED)
        ground.allocate(ARENA + 10 * PAGE, 8 * PAGE, RESERVE | COMMIT | RW | FIXED)
        ground.write(ARENA + 10 * PAGE, pattern(8 * PAGE))
        fill_map_count(ground)
        Singles().leave(0)
        mappings = count_mappings()
        calls: list[tuple[object, ...]] = [
            ("mdl_map", handle, 0, PAGE, PLACE, RW | FIXED),
            ("mdl_map", handle, 0, PAGE, PLACE, R | FIXED),
            ("mdl_map", handle, 0, PAGE, PLACE, R | FIXED | GUARDS | LOCKED),
            ("mdl_create_from_vm", ARENA + 10 * PAGE, 8 * PAGE, RW),
            ("mdl_create_from_vm", ARENA + 12 * PAGE, PAGE, R),
            ("free", ARENA + 3 * PAGE, PAGE),
            ("protect", ARENA + 3 * PAGE, PAGE, R),
        ]
        for method, *arguments in calls:
            rc, message = refused(ground, str(method), *arguments)
            assert rc is Retcode.OUT_OF_MEMORY, message
            assert "vm.max_map_count" in message, message
        assert count_mappings() == mappings
        ground.free(FILL, 40 * PAGE)
        for method, *arguments in (calls[2], calls[4], calls[5]):
            getattr(ground, str(method))(*arguments)
        assert ground.read(PLACE, PAGE) == pattern(PAGE)
        assert ground.read(ARENA + 10 * PAGE, 8 * PAGE) == pattern(8 * PAGE)


def test_a_call_that_fails_at_the_map_count_wall_names_it_and_leaves_buffers_alone() -> None:
    in_own_process(fail_at_the_wall)


def convert_near_the_wall(flags: int, first_page: int, pages: int) -> None:
    """A region of many protections is made a buffer as soon as there is room for the way there.

    A whole SHAREABLE region needs none.
    """
    steady_heap()
    with Ground() as ground:
        ground.allocate(ARENA, SIZE, RESERVE | COMMIT | RW | FIXED | VmmFlags(flags))
        ground.write(ARENA, pattern(SIZE))
        for index, protection in enumerate(MIXED):
            ground.protect(ARENA + (2 * index + 1) * PAGE, 2 * PAGE, protection)
        fill_map_count(ground)
        ground.free(FILL, 100 * PAGE)
        singles = Singles()
        permissions = State.of(ground).permissions
        for room in range(20):
            singles.leave(room)
            arguments = (ARENA + first_page * PAGE, pages * PAGE, int(R))
            before = State.of(ground), facts(ground)
            got = call(ground, Face.METHODS, "mdl_create_from_vm", *arguments)
            if got.rc is Retcode.OK:
                break
            assert "vm.max_map_count" in str(got.error)
            assert State.of(ground) == before[0]
            assert facts(ground) == before[1]
        whole = flags & SHAREABLE and pages == PAGES
        assert room == 0 if whole else 0 < room < 12
        now = State.of(ground).permissions
        assert [p and p[:3] for p in now] == [p and p[:3] for p in permissions]
        ground.free(FILL + 100 * PAGE, 100 * PAGE)
        ground.protect(ARENA, SIZE, R)
        assert ground.read(ARENA, SIZE) == pattern(SIZE)


@pytest.mark.parametrize("flags", [NONE, LOCKED, SHAREABLE, GUARDS], ids=repr)
@pytest.mark.parametrize(("first_page", "pages"), [(0, PAGES), (2, 8), (3, 2)])
def test_pages_become_a_buffer_near_the_map_count_wall_or_stay_as_they_were(
    flags: VmmFlags, first_page: int, pages: int
) -> None:
    in_own_process(convert_near_the_wall, int(flags), first_page, pages)


def short_of_descriptors() -> None:
    """With no descriptor left, what needs one is a quota."""
    with Ground() as ground:
        first(buffer(), window, connected, send())(ground)
        original, clone = ground.handles
        _, inbox = ground.sockets
        State.of(ground)  # the descriptors that Query keeps are open from here on
        before = State.of(ground), facts(ground)
        calls: list[tuple[object, ...]] = [
            ("mdl_create", SIZE, RW),
            ("mdl_create_from_buf", b"x", R),
            ("mdl_clone", original, 0, PAGE),
            ("mdl_map", original, 0, PAGE, 0, R),
            ("mdl_map", clone, 0, PAGE, 0, R | GUARDS | LOCKED),
            ("send_handle", ground.sockets[0], original),
            ("send_handle", ground.sockets[0], clone, READ_ONLY),
        ]
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limit(resource.RLIMIT_NOFILE, 1)
        outcomes = [
            call(ground, face, str(method), *arguments)
            for face in Face
            for method, *arguments in calls
        ]
        limit(resource.RLIMIT_NOFILE, most)
        assert (State.of(ground), facts(ground)) == before
        # Whoever receives a message with no room for its descriptors has lost them.
        limit(resource.RLIMIT_NOFILE, 1)
        outcomes.append(call(ground, Face.METHODS, "recv_handle", inbox))
        limit(resource.RLIMIT_NOFILE, most)
        assert [outcome.rc for outcome in outcomes] == [Retcode.QUOTA_EXCEEDED] * len(outcomes)
        assert all("RLIMIT_NOFILE" in str(outcome.error) for outcome in outcomes if outcome.error)
        assert State.of(ground) == before[0]
        for method, *arguments in calls:
            getattr(ground, str(method))(*arguments)
        ground.recv_handle(inbox)


def short_of_address_space() -> None:
    """RLIMIT_AS refuses mappings, and the mapping aside that pages become a buffer through."""
    size = 128 << 20
    with Ground() as ground:
        ground.handles.append(ground.mdl_create(size, RW))
        ground.allocate(PLACE, size, RESERVE | COMMIT | RW | FIXED)
        ground.write(PLACE, pattern(SIZE))
        limit(resource.RLIMIT_AS, status("VmSize") + (64 << 20))
        calls: list[tuple[object, ...]] = [
            ("mdl_map", ground.handles[0], 0, size, 0, RW),
            ("mdl_map", ground.handles[0], 0, size, 0, R | GUARDS),
            ("mdl_map", ground.handles[0], 0, size, 0, R | LOCKED),
            ("mdl_create_from_vm", PLACE, size, RW),
        ]
        for method, *arguments in calls:
            rc, message = refused(ground, str(method), *arguments)
            assert (rc, "RLIMIT_AS" in message) == (Retcode.QUOTA_EXCEEDED, True), message
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        ground.mdl_create_from_vm(PLACE, size, RW)
        assert ground.read(PLACE, SIZE) == pattern(SIZE)


def bytes_but_the_heap() -> int:
    """Bytes of all mappings but the heap, which grows by itself."""
    return sum(each.end - each.start for each in maps() if each.pathname != "[heap]")


def more_than_the_machine_has() -> None:
    """Memory that can never be had is refused in the call that asks for it."""
    too_much = (meminfo("MemTotal") + meminfo("SwapTotal")) * 2 // PAGE * PAGE
    with Ground() as ground:
        ground.limits = Limits.unlimited()
        ground.handles.append(ground.mdl_create(too_much, RW))
        ground.allocate(PLACE, too_much, RESERVE | COMMIT | R | FIXED)
        shared = ground.allocate(0, too_much, RESERVE | COMMIT | RW | SHAREABLE)
        before = bytes_but_the_heap(), status("RssShmem")
        calls: list[tuple[object, ...]] = [
            ("mdl_create", too_much, RW | LOCKED),
            ("mdl_map", ground.handles[0], 0, too_much, 0, RW | LOCKED),
            ("mdl_map", ground.handles[0], 0, too_much, 0, R | LOCKED | GUARDS),
        ]
        for method, *arguments in calls:
            rc, message = refused(ground, str(method), *arguments)
            assert (rc, "overcommit" in message) == (Retcode.OUT_OF_MEMORY, True), message
        # Where the kernel does not tell which pages were touched, all are copied.
        with _features.without(Feature.PAGEMAP):
            rc, message = refused(ground, "mdl_create_from_vm", PLACE, too_much, R)
        assert (rc, "overcommit" in message) == (Retcode.OUT_OF_MEMORY, True), message
        assert (bytes_but_the_heap(), status("RssShmem")) == before
        # Pages that were never touched take no room.
        ground.mdl_create_from_vm(PLACE, too_much, R)
        ground.mdl_create_from_vm(shared, too_much - PAGE, R)
        assert status("RssShmem") == before[1]


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize(
    "work",
    [short_of_descriptors, short_of_address_space, more_than_the_machine_has],
    ids=lambda work: work.__name__,
)
def test_a_limit_that_refuses_is_named_and_leaves_buffers_alone(
    work: Callable[[], None], nobody: bool
) -> None:
    in_own_process(work, nobody=nobody)


def locked_beyond_the_limit(backing: int) -> None:
    """Pages of a LOCKED region that become a buffer stay resident, locked or not."""
    limit(resource.RLIMIT_MEMLOCK, 0)
    for protection in (RW, R, NONE):
        with Ground() as ground:
            va = ground.allocate(
                0, SIZE, RESERVE | COMMIT | LOCKED | protection | VmmFlags(backing)
            )
            ground.mdl_create_from_vm(va, 4 * PAGE, RW)
            ground.mdl_create_from_vm(va + 4 * PAGE, 4 * PAGE, RW)
            assert present_pages(va, PAGES) == [True] * PAGES


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize("backing", [NONE, SHAREABLE], ids=["private", "SHAREABLE"])
def test_locked_pages_stay_resident_when_they_become_a_buffer(
    backing: VmmFlags, nobody: bool
) -> None:
    in_own_process(locked_beyond_the_limit, int(backing), nobody=nobody)

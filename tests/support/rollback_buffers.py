"""Calls that are made to fail: those that have to do with buffers, handles and mappings."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

from buffer_scenarios import (
    MAKING,
    READ_ONLY,
    ask_buffer,
    buffer,
    closed,
    connected,
    convert,
    converted,
    copied,
    first,
    half_touched,
    holes,
    info,
    make_holes_again,
    mapped,
    mapping,
    newest,
    oldest,
    receive,
    revoked,
    send,
    send_again,
    window,
)
from constants import FIXED, GUARDS, HUGE, LOCKED, RW, RX, SHAREABLE
from faults import (
    CLOSING,
    ELSEWHERE,
    HARMLESS,
    HUGE_SIZE,
    LOCKS,
    MIXED,
    NONE,
    PAGES,
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
    everything,
    filled,
    nothing,
    nothing_to_take_back,
    over,
    pattern,
    with_protections,
)
from kernel_oracle import PAGE
from vmm_linux import VMM, Rights, Seal, VmmError
from vmm_linux._core.kernel import Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


# ---- what a failure costs that a call gets over --------------------------------------------------


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
    "fstat": all_but_files,
}


# ---- the scenarios -------------------------------------------------------------------------------

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
        f"open {names}",
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
    for without, names in (((), "fstat name_to_handle_at"), ((Feature.FILE_HANDLES,), ""))
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
    Scenario(
        f"{what}: {name}",
        prepare,
        call,
        "munmap",
        survives={**HARMLESS, "fallocate": freed, "fstat": freed},
    )
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
    Scenario(name, prepare, VMM.close, "munmap close", survives={**CLOSING, **more})
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

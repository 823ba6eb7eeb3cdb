"""Calls that are made to fail: those on buffers in segments."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import faults
import kernel_oracle as kernel
from buffer_scenarios import (
    MAKING,
    ask_buffer,
    closed,
    connected,
    facts,
    first,
    info,
    mapped,
    mapping,
    newest,
    receive,
    send,
    send_again,
    window,
)
from constants import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FIXED,
    GUARDS,
    LOCKED,
    READ_ONLY,
    RESERVE,
    RW,
)
from faults import (
    BASE,
    LOCKS,
    SIZE,
    Faults,
    Ground,
    Mode,
    R,
    Scenario,
    nothing_to_take_back,
    over,
    pattern,
)
from kernel_oracle import PAGE
from segments import seals_of_files
from vmm_linux import Seal, VmmError, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Mapping


THIRD = 6 * PAGE


def segmented(ground: Ground) -> None:
    """A buffer in segments of six, six and four pages, something else in every page.

    Beside it a region, without which the ledger would have an empty leaf to enter the first in.
    """
    ground.allocate(0, PAGE, RESERVE)
    handle = ground.mdl_create(SIZE, RW, THIRD)
    va = ground.mdl_map(handle, 0, SIZE, 0, RW)
    ground.write(va, pattern(SIZE))
    ground.free(va, SIZE)
    ground.handles.append(handle)


def segmented_holes(ground: Ground) -> None:
    """One that has no memory yet."""
    ground.handles.append(ground.mdl_create(SIZE, RW, THIRD))


def empty_segments(ground: Ground, error: VmmError) -> None:
    """A failed LOCKED mapping may leave memory in the buffer: see ``make_holes_again``."""
    nothing_to_take_back(ground, error)
    for number, target in kernel.descriptors().items():
        if target == "/memfd:vmm_linux (deleted)":
            size = os.fstat(number).st_size
            assert os.pread(number, size, 0) == bytes(size)
            punch = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            assert kernel.libc.fallocate(number, punch, ctypes.c_long(0), ctypes.c_long(size)) == 0


SCENARIOS: Mapping[str, list[Scenario]] = {
    "mdl_create": [
        Scenario("plain", segmented_holes, lambda g: g.mdl_create(SIZE, RW, THIRD), MAKING),
        Scenario(
            "LOCKED",
            segmented_holes,
            lambda g: g.mdl_create(SIZE, RW | LOCKED, THIRD),
            f"{MAKING} fallocate sysinfo",
        ),
    ],
    "mdl_map": [
        *(
            Scenario(f"{flags!r}", segmented, mapping(flags), calls, placed=True)
            for flags, calls in (
                (RW, "malloc mmap"),
                (RW | GUARDS, "malloc mmap"),
                (R, "malloc mmap open"),
                (R | GUARDS, "malloc mmap open"),
                (VmmFlags(0), "malloc mmap open"),
            )
        ),
        Scenario(
            "read-only, one description there already",
            first(segmented, newest("mdl_map", THIRD, PAGE, BASE, R | FIXED)),
            mapping(R),
            "malloc mmap open",
            placed=True,
        ),
        Scenario(
            "a clone, read-only",
            first(segmented, window),
            newest("mdl_map", 0, SIZE - 2 * PAGE, 0, R),
            "malloc mmap open",
            size=SIZE - 2 * PAGE,
            placed=True,
        ),
        *(
            Scenario(
                f"LOCKED {flags!r}",
                segmented_holes,
                mapping(flags | LOCKED),
                "malloc mmap madvise mlock sysinfo fstat",
                LOCKS,
                take_back=empty_segments,
                placed=True,
            )
            for flags in (RW, R | GUARDS)
        ),
    ],
    "mdl_clone": [
        Scenario(
            name,
            prepare,
            newest("mdl_clone", PAGE, 8 * PAGE),
            "malloc memfd_create fcntl",
        )
        for name, prepare in (("whole", segmented), ("a clone", first(segmented, window)))
    ],
    "handles": [
        Scenario("close", segmented, newest("handle_close"), "close"),
        Scenario("info", segmented, info, "fcntl name_to_handle_at", ask=False),
        Scenario(
            "query",
            first(segmented, mapped(RW)),
            ask_buffer(smaps=False),
            "open",
            ask=False,
            survives={**faults.UNTOLD},
        ),
    ],
    "send_handle": [
        Scenario(name, first(prepare, connected), send(rights), calls)
        for name, prepare, rights, calls in (
            ("whole", segmented, None, "fcntl"),
            ("whole, read-only", segmented, READ_ONLY, "fcntl open"),
            ("a clone", first(segmented, window), None, "fcntl"),
            ("a clone, read-only", first(segmented, window), READ_ONLY, "fcntl open"),
            ("a clone of a clone", first(segmented, window, window), None, "fcntl"),
        )
    ],
    "recv_handle": [
        Scenario(
            name,
            first(prepare, send(rights)),
            receive,
            "malloc",
            take_back=send_again(rights),
            spare="fcntl",
        )
        for name, prepare, rights in (
            ("whole", segmented, None),
            ("whole, read-only", segmented, READ_ONLY),
            ("a clone", first(segmented, window), None),
            ("a clone of a clone", first(segmented, window, window), READ_ONLY),
        )
    ],
    "pages": [
        *(
            Scenario(f"free {name}", first(segmented, mapped(flags), closed), call, "munmap")
            for flags in (RW, R | GUARDS)
            for name, call in (
                ("middle", over("free", 4, 10)),
                ("one segment", over("free", 6, 6)),
                ("low edge", over("free", 0, 8)),
            )
        ),
        *(
            Scenario(
                f"protect {protection!r}",
                first(segmented, mapped(RW | GUARDS)),
                over("protect", 4, 10, protection),
                "malloc mprotect",
            )
            for protection in (R, VmmFlags(0))
        ),
    ],
}


def seal_with_failure(library: Faults, seal: Seal, n: int) -> None:
    """Seal with the n-th call failing, and hold ``completed`` against the kernel."""
    with Ground() as ground:
        segmented(ground)
        (handle,) = ground.handles
        clone = ground.mdl_clone(handle, 2 * PAGE, 14 * PAGE)
        before = facts(ground)
        completed = 14
        try:
            with library.armed(Mode.ALONE, n, error=errno.EBUSY, spare="fstat"):
                ground.mdl_seal(clone, seal)
        except VmmError as problem:
            completed = problem.completed // PAGE
        assert library.name == ("fcntl" if n < 4 else "")
        assert completed == (0, 4, 10, 14)[n - 1]
        assert sum(map(bool, seals_of_files())) == n - 1
        assert facts(ground) == before
        ground.mdl_seal(clone, seal)
        assert ground.handle_info(handle).seals == seal

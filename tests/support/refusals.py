"""Calls that are refused: what they are made on, and with which arguments.

After each of them everything must be as it was: see ``Ground.state``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import kernel_oracle as kernel
from constants import COMMITTED, FIXED, GUARDS, RESERVE, RESERVE_COMMIT, RW
from faces import Face, Outcome, call
from kernel_oracle import ARENA, PAGE, USER_SPACE_END
from model import LOWEST
from vmm_linux import VMM, Handle, Limits, Rights, Seal, VmmError, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


ARENA_PAGES = 96


class Ground(NamedTuple):
    """A VMM with one region and one handle of every kind, and strangers between them."""

    vmm: VMM
    committed: int
    neighbour: int
    hole: int
    guarded: int
    reserved: int
    read_only: int
    no_access: int
    mapped: int
    foreign: int
    #: A buffer of eight pages, mapped writable at ``mapped``; copies of its handle.
    handle: Handle
    reader: Handle
    closed: Handle
    revoked: Handle

    def state(self) -> list[object]:
        """All that a refused call must leave as it was."""
        answers = []
        for address in range(ARENA, ARENA + ARENA_PAGES * PAGE, PAGE):
            info = self.vmm.query(address, smaps=False)
            answers.append((info.state, info.kind, info.base, info.size, info.protection))
        filled = ((self.committed, 8), (self.read_only, 4), (self.mapped, 8))
        written = [self.vmm.read(va, pages * PAGE) for va, pages in filled]
        seals = [self.vmm.handle_info(handle).seals for handle in (self.handle, self.reader)]
        files = [mapping for mapping in kernel.maps() if "/memfd:" in mapping.pathname]
        inside = kernel.maps_between(ARENA, ARENA + ARENA_PAGES * PAGE)
        return [inside, files, answers, written, seals, kernel.descriptors()]


def make_ground() -> Iterator[Ground]:
    """Regions at known places, of eight pages and four, filled where they can be."""
    places = {
        "committed": (16, 8, COMMITTED),
        "neighbour": (24, 4, COMMITTED),
        "guarded": (33, 4, COMMITTED | GUARDS),
        "reserved": (40, 4, RESERVE | RW),
        "read_only": (48, 4, RESERVE_COMMIT | VmmFlags.READ),
        "no_access": (56, 4, RESERVE_COMMIT),
    }
    hole, foreign = ARENA + 28 * PAGE, ARENA + 64 * PAGE
    kernel.map_at(foreign, PAGE, kernel.PROT_READ | kernel.PROT_WRITE)
    at: dict[str, Any] = {name: ARENA + slot * PAGE for name, (slot, _, _) in places.items()}
    try:
        with VMM(limits=Limits.unlimited()) as vmm:
            for name, (_, pages, flags) in places.items():
                assert vmm.allocate(at[name], pages * PAGE, flags | FIXED) == at[name]
            vmm.write(at["committed"], b"committed" * 900)
            yield Ground(vmm, **at, hole=hole, foreign=foreign, **handles(vmm))
    finally:
        kernel.unmap(foreign, PAGE)


def handles(vmm: VMM) -> dict[str, Any]:
    """A mapped buffer and handles of it, good ones and bad ones."""
    handle = vmm.mdl_create(8 * PAGE, RW)
    mapped = vmm.mdl_map(handle, 0, 8 * PAGE, ARENA + 72 * PAGE, RW | FIXED)
    vmm.write(mapped, b"mapped" * 900)
    closed = vmm.handle_copy(handle, handle.rights)
    revoker = vmm.handle_copy(handle, handle.rights)
    revoked = vmm.handle_copy(revoker, handle.rights)
    vmm.handle_close(closed)
    vmm.handle_revoke(revoker)
    reader = vmm.handle_copy(handle, Rights.MAP_READ)
    return {
        "handle": handle,
        "mapped": mapped,
        "closed": closed,
        "revoked": revoked,
        "reader": reader,
    }


faces = pytest.mark.parametrize("face", list(Face), ids=lambda face: face.value)

#: Parameters of each method, with values that a call on ``Ground.committed`` succeeds with.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "allocate": ("addr", "size", "flags"),
    "commit": ("va", "size"),
    "decommit": ("va", "size"),
    "protect": ("va", "size", "flags"),
    "free": ("va", "size"),
    "query": ("va",),
    "read": ("va", "size"),
    "view": ("va", "size"),
    "write": ("va", "data"),
    "mdl_create": ("size", "prot"),
    "mdl_create_from_vm": ("va", "size", "flags"),
    "mdl_create_from_buf": ("data", "prot"),
    "mdl_get_size": ("handle",),
    "mdl_map": ("handle", "offset", "length", "hint", "prot"),
    "mdl_clone": ("originHandle", "offset", "length"),
    "mdl_seal": ("handle", "seals"),
    "handle_copy": ("handle", "rights"),
    "handle_close": ("handle",),
    "handle_revoke": ("handle",),
    "handle_info": ("handle",),
}
RANGE_METHODS = (
    "commit",
    "decommit",
    "protect",
    "free",
    "read",
    "view",
    "write",
    "mdl_create_from_vm",
)
PAGE_METHODS = ("commit", "decommit", "protect", "free", "mdl_create_from_vm")
WINDOW_METHODS = ("mdl_map", "mdl_clone")
HANDLE_METHODS = tuple(
    method for method, names in PARAMETERS.items() if {"handle", "originHandle"} & set(names)
)
NUMBERS = [
    (method, parameter)
    for method, parameters in PARAMETERS.items()
    for parameter in parameters
    if parameter != "data"
]
numbers = pytest.mark.parametrize(("method", "parameter"), NUMBERS)


def good_arguments(ground: Ground, method: str) -> dict[str, Any]:
    """Arguments that the method accepts, by name."""
    values = {
        "addr": 0,
        "va": ground.committed,
        "size": PAGE,
        "flags": int(COMMITTED) if method == "allocate" else 1,
        "data": b"x",
        "handle": ground.handle,
        "originHandle": ground.handle,
        "offset": PAGE,
        "length": PAGE,
        "hint": 0,
        "prot": 1,
        "rights": int(Rights.MAP_READ),
        "seals": int(Seal.PUBLISH),
    }
    return {name: values[name] for name in PARAMETERS[method]}


def call_with(ground: Ground, face: Face, method: str, **changed: object) -> Outcome:
    """Call ``method`` with good arguments but for those given."""
    arguments = good_arguments(ground, method) | changed
    return call(ground.vmm, face, method, *arguments.values())


def range_arguments(method: str, va: int, size: int) -> tuple[Any, ...]:
    """Arguments with which ``method`` means ``[va, va + size)``."""
    if method == "write":
        return va, bytes(size)
    return (va, size, 1) if method in {"protect", "mdl_create_from_vm"} else (va, size)


def handle_parameter(method: str) -> str:
    """What the method calls the handle that it takes."""
    return "originHandle" if method == "mdl_clone" else "handle"


def names_value(error: VmmError, value: object) -> bool:
    """Whether the message has the value in it, in any usual notation."""
    ways = [repr(value), str(value), type(value).__name__]
    if type(value) is int:
        ways = [str(value), hex(value), f"{value:,}", f"{value:_}"]
        if value.bit_length() > 64:
            ways = [f"number of {value.bit_length()} bits"]
    return any(way in str(error) for way in ways)


#: Where something is that FIXED must not replace: an address, a size, and flags besides.
TAKEN: dict[str, Callable[[Ground], tuple[int, int, int]]] = {
    "a region": lambda on: (on.committed, PAGE, 0),
    "the end of a region": lambda on: (on.neighbour + 3 * PAGE, 2 * PAGE, 0),
    "a low guard": lambda on: (on.guarded - PAGE, PAGE, 0),
    "a high guard": lambda on: (on.guarded + 4 * PAGE, PAGE, 0),
    "reserved pages": lambda on: (on.reserved, PAGE, 0),
    "a stranger": lambda on: (on.foreign, PAGE, 0),
    "a stranger in the middle": lambda on: (on.foreign - PAGE, 3 * PAGE, 0),
    "a stranger where the low guard goes": lambda on: (
        on.foreign + PAGE,
        PAGE,
        VmmFlags.LOW_GUARD,
    ),
    "a region where the high guard goes": lambda on: (
        on.committed - PAGE,
        PAGE,
        VmmFlags.HIGH_GUARD,
    ),
}


#: What no process may have: an address, a size, and flags besides.
UNREACHABLE = {
    "null": (0, PAGE, 0),
    "below the lowest address": (LOWEST - PAGE, PAGE, 0),
    "with a guard below the lowest address": (LOWEST, PAGE, VmmFlags.LOW_GUARD),
    "across the end": (USER_SPACE_END - PAGE, 2 * PAGE, 0),
    "with a guard across the end": (USER_SPACE_END - PAGE, PAGE, VmmFlags.HIGH_GUARD),
    "at the end": (USER_SPACE_END, PAGE, 0),
    "in the kernel": (1 << 63, PAGE, 0),
    "the last page of all": ((1 << 64) - PAGE, PAGE, 0),
}

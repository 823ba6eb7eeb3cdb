"""Flags and protections that there are not, through both faces."""

from __future__ import annotations

import pytest

from constants import COMMITTED, FIXED, GUARDS, RESERVE, RESERVE_COMMIT, RW
from faces import Face, call
from kernel_oracle import PAGE
from model import KNOWN_FLAGS
from refusals import Ground, call_with, faces, names_value
from vmm_linux import Retcode, Rights, Seal, VmmFlags

#: What each method about buffers calls the protection that it takes.
BUFFER_PROTECTIONS = {
    "mdl_create": "prot",
    "mdl_create_from_vm": "flags",
    "mdl_create_from_buf": "prot",
    "mdl_map": "prot",
}


@faces
@pytest.mark.parametrize("protection", [2, 4, 6], ids=["W", "X", "WX"])
def test_illegal_protections_are_invalid_arguments(
    ground: Ground, face: Face, protection: int
) -> None:
    before = ground.state()
    for method, flags in (("protect", protection), ("allocate", int(RESERVE) | protection)):
        got = call_with(ground, face, method, flags=flags)
        assert got.rc is Retcode.INVALID_ARGUMENT
    for method, name in BUFFER_PROTECTIONS.items():
        got = call_with(ground, face, method, **{name: protection})
        assert got.rc is Retcode.INVALID_ARGUMENT, method
        assert got.error is None or names_value(got.error, protection), str(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("protection", [0, 1, 3, 5, 7], ids=["none", "R", "RW", "RX", "RWX"])
def test_legal_protections_are_accepted(ground: Ground, face: Face, protection: int) -> None:
    for method, flags in (("protect", protection), ("allocate", int(RESERVE_COMMIT) | protection)):
        assert call_with(ground, face, method, flags=flags).rc is Retcode.OK
    for method, name in BUFFER_PROTECTIONS.items():
        changed: dict[str, object] = {name: protection}
        if method == "mdl_create_from_vm":
            changed["va"] = ground.neighbour
        if method == "mdl_map":
            changed["handle"] = ground.vmm.mdl_create(2 * PAGE, VmmFlags.RWX_MASK)
        got = call_with(ground, face, method, **changed)
        some_access = protection != 0 or method == "mdl_map"
        assert got.rc is (Retcode.OK if some_access else Retcode.INVALID_ARGUMENT), method


@faces
@pytest.mark.parametrize(
    ("method", "name", "known"),
    [
        ("mdl_create", "prot", VmmFlags.RWX_MASK | VmmFlags.LOCKED),
        ("mdl_create_from_vm", "flags", VmmFlags.RWX_MASK),
        ("mdl_create_from_buf", "prot", VmmFlags.RWX_MASK),
        ("mdl_map", "prot", VmmFlags.RWX_MASK | VmmFlags.LOCKED | GUARDS | FIXED),
        ("mdl_seal", "seals", Seal.PUBLISH | Seal.FREEZE),
        ("handle_copy", "rights", Rights(0x3F)),
    ],
    ids=lambda value: value if isinstance(value, str) else hex(value),
)
def test_a_buffers_methods_take_no_flags_but_their_own(
    ground: Ground, face: Face, method: str, name: str, known: int
) -> None:
    """Cache modes neither: those are for Allocate."""
    before = ground.state()
    for bit in range(64):
        if known >> bit & 1:
            continue
        got = call_with(ground, face, method, **{name: 1 | 1 << bit})
        assert got.rc is Retcode.INVALID_ARGUMENT, bit
        if got.error is not None:
            assert names_value(got.error, 1 << bit) or names_value(got.error, 1 | 1 << bit)
    assert ground.state() == before


@faces
def test_sealing_with_nothing_is_an_invalid_argument(ground: Ground, face: Face) -> None:
    before = ground.state()
    assert call_with(ground, face, "mdl_seal", seals=0).rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
def test_an_unknown_flag_is_an_invalid_argument(ground: Ground, face: Face) -> None:
    before = ground.state()
    for bit in range(64):
        if KNOWN_FLAGS >> bit & 1:
            continue
        flags = int(COMMITTED) | 1 << bit
        got = call_with(ground, face, "allocate", flags=flags)
        assert got.rc is Retcode.INVALID_ARGUMENT, bit
        if got.error is not None:
            assert names_value(got.error, 1 << bit) or names_value(got.error, flags), got.error
    assert ground.state() == before


@faces
def test_protect_takes_nothing_but_protections(ground: Ground, face: Face) -> None:
    before = ground.state()
    for bit in range(3, 64):
        got = call_with(ground, face, "protect", flags=1 | 1 << bit)
        assert got.rc is Retcode.INVALID_ARGUMENT, bit
    assert ground.state() == before


@faces
@pytest.mark.parametrize(
    "flags",
    [0, 3, VmmFlags.COMMIT | RW, VmmFlags.LOCKED | RW, FIXED | RW, GUARDS, VmmFlags.SHAREABLE],
    ids=hex,
)
def test_allocate_without_reserve_is_an_invalid_argument(
    ground: Ground, face: Face, flags: int
) -> None:
    before = ground.state()
    got = call_with(ground, face, "allocate", flags=int(flags))
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert got.error is None or "RESERVE" in str(got.error)
    assert ground.state() == before


CACHE_MODES = ["WRITE_THROUGH", "WRITE_COMBINE", "CACHE_DISABLE"]


@faces
@pytest.mark.parametrize("mode", CACHE_MODES)
def test_cache_modes_that_linux_has_not_are_unimplemented(
    ground: Ground, face: Face, mode: str
) -> None:
    before = ground.state()
    flags = int(COMMITTED | VmmFlags[mode])
    got = call_with(ground, face, "allocate", flags=flags)
    assert got.rc is Retcode.UNIMPLEMENTED
    assert got.error is None or names_value(got.error, flags), str(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("mode", CACHE_MODES)
def test_bad_arguments_come_before_cache_modes_and_these_before_the_range(
    ground: Ground, face: Face, mode: str
) -> None:
    flags = COMMITTED | VmmFlags[mode]
    bad = ground.hole, PAGE + 1, flags
    assert call(ground.vmm, face, "allocate", *bad).rc is Retcode.INVALID_ARGUMENT
    unknown = ground.hole, PAGE, int(flags) | 1 << 40
    assert call(ground.vmm, face, "allocate", *unknown).rc is Retcode.INVALID_ARGUMENT
    taken = ground.committed, PAGE, flags | FIXED
    assert call(ground.vmm, face, "allocate", *taken).rc is Retcode.UNIMPLEMENTED


@faces
def test_write_back_is_what_every_mapping_has(ground: Ground, face: Face) -> None:
    got = call_with(ground, face, "allocate", flags=COMMITTED | VmmFlags.WRITE_BACK)
    assert got.rc is Retcode.OK
    assert ground.vmm.query(got.value).flags == COMMITTED | VmmFlags.WRITE_BACK

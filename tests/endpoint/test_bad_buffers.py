"""Buffers, windows and handles that are refused, through both faces."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import TYPE_CHECKING

import pytest

from constants import FIXED, RW
from faces import Face, call
from kernel_oracle import PAGE, USER_SPACE_END
from refusals import (
    HANDLE_METHODS,
    TAKEN,
    UNREACHABLE,
    WINDOW_METHODS,
    Ground,
    call_with,
    faces,
    handle_parameter,
    names_value,
    range_arguments,
)
from vmm_linux import INVALID_HANDLE, VMM, Retcode, Rights, Seal, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Iterator


@faces
@pytest.mark.parametrize("method", WINDOW_METHODS)
@pytest.mark.parametrize("skew", [1, 512, PAGE // 2, PAGE - 1])
def test_windows_want_whole_pages(ground: Ground, face: Face, method: str, skew: int) -> None:
    before = ground.state()
    for changed in (
        {"offset": skew},
        {"length": PAGE - skew},
        {"length": PAGE + skew},
        {"offset": PAGE - skew, "length": skew},
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.INVALID_ARGUMENT, changed
    assert ground.state() == before


@faces
@pytest.mark.parametrize("skew", [1, PAGE // 2, PAGE - 1])
def test_buffers_and_hints_want_whole_pages(ground: Ground, face: Face, skew: int) -> None:
    before = ground.state()
    for method, changed in (
        ("mdl_create", {"size": skew}),
        ("mdl_create", {"size": PAGE + skew}),
        ("mdl_map", {"hint": ground.hole + skew}),
        ("mdl_map", {"hint": ground.hole + skew, "prot": int(FIXED) | 1}),
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.INVALID_ARGUMENT, (method, changed)
        assert got.error is None or any(names_value(got.error, each) for each in changed.values())
    assert ground.state() == before


@faces
@pytest.mark.parametrize("method", WINDOW_METHODS)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 9 * PAGE),
        (8 * PAGE, PAGE),
        (7 * PAGE, 2 * PAGE),
        (1 << 40, PAGE),
        (0, 1 << 62),
        (1 << 63, 1 << 63),
        ((1 << 64) - PAGE, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
        (PAGE, (1 << 64) - PAGE),
    ],
    ids=lambda number: f"{number:#x}",
)
def test_a_window_beyond_the_buffer_is_an_invalid_argument(
    ground: Ground, face: Face, method: str, offset: int, length: int
) -> None:
    before = ground.state()
    got = call_with(ground, face, method, offset=offset, length=length)
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert got.error is None or names_value(got.error, offset) or names_value(got.error, length)
    assert ground.state() == before


@faces
def test_a_hint_beyond_64_bits_with_its_length_is_an_invalid_argument(
    ground: Ground, face: Face
) -> None:
    before = ground.state()
    for extra in (0, FIXED):
        got = call_with(
            ground, face, "mdl_map", hint=(1 << 64) - PAGE, length=2 * PAGE, prot=1 | int(extra)
        )
        assert got.rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
@pytest.mark.parametrize("method", HANDLE_METHODS)
@pytest.mark.parametrize(
    ("which", "rc"),
    [
        ("closed", Retcode.RESOURCE_NOT_FOUND),
        ("revoked", Retcode.HANDLE_REVOKED),
        ("another VMM's", Retcode.INVALID_ARGUMENT),
        ("INVALID_HANDLE", Retcode.INVALID_ARGUMENT),
        ("nothing", Retcode.INVALID_ARGUMENT),
        ("forged", Retcode.INVALID_ARGUMENT),
        ("an address", Retcode.INVALID_ARGUMENT),
    ],
)
def test_bad_handles_are_refused_by_every_method(
    ground: Ground, face: Face, method: str, which: str, rc: Retcode
) -> None:
    with VMM() as other:
        handle = {
            "closed": ground.closed,
            "revoked": ground.revoked,
            "another VMM's": other.mdl_create(8 * PAGE, RW),
            "INVALID_HANDLE": INVALID_HANDLE,
            "nothing": 0,
            "forged": ground.reader | int(Rights.MAP_WRITE) << 32,
            "an address": ground.mapped,
        }[which]
        before = ground.state()
        if which == "revoked" and method == "handle_close":
            rc = Retcode.OK
        got = call_with(ground, face, method, **{handle_parameter(method): handle})
        assert got.rc is rc
        assert got.error is None or names_value(got.error, int(handle)), str(got.error)
        assert ground.state() == before


@faces
def test_what_a_handle_does_not_allow_is_no_capability(ground: Ground, face: Face) -> None:
    before = ground.state()
    mute = ground.vmm.handle_copy(ground.handle, 0)
    for method, changed, right in (
        ("mdl_map", {"handle": ground.reader, "prot": 3}, "MAP_WRITE"),
        ("mdl_map", {"handle": ground.reader, "prot": 5}, "MAP_EXECUTE"),
        ("mdl_map", {"handle": ground.handle, "prot": 7}, "MAP_EXECUTE"),
        ("mdl_map", {"handle": mute, "prot": 1}, "MAP_READ"),
        ("mdl_clone", {"originHandle": ground.reader}, "COPY"),
        ("mdl_seal", {"handle": ground.reader}, "MAP_WRITE"),
        ("handle_copy", {"handle": ground.reader}, "COPY"),
        ("handle_copy", {"rights": int(Rights.MAP_EXECUTE)}, "MAP_EXECUTE"),
        ("handle_copy", {"rights": 0x3F}, "MAP_EXECUTE"),
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.NO_CAPABILITY, (method, changed)
        assert got.error is None or right in str(got.error)
    assert ground.state() == before


@faces
def test_protect_above_what_was_mapped_is_no_capability(ground: Ground, face: Face) -> None:
    va = ground.vmm.mdl_map(ground.reader, 0, 4 * PAGE, 0, VmmFlags.READ)
    before = ground.state()
    for protection in (3, 5, 7):
        got = call(ground.vmm, face, "protect", va, PAGE, protection)
        assert got.rc is Retcode.NO_CAPABILITY
        assert got.error is None or names_value(got.error, va)
    got = call(ground.vmm, face, "protect", ground.mapped, PAGE, 7)
    assert got.rc is Retcode.NO_CAPABILITY
    assert ground.state() == before


@faces
@pytest.mark.parametrize("seal", [Seal.PUBLISH, Seal.FREEZE])
def test_writing_to_a_sealed_buffer_is_no_capability(
    ground: Ground, face: Face, seal: Seal
) -> None:
    handle = ground.vmm.mdl_create(8 * PAGE, RW)
    ground.vmm.mdl_seal(handle, seal)
    before = ground.state()
    got = call_with(ground, face, "mdl_map", handle=handle, prot=3)
    assert got.rc is Retcode.NO_CAPABILITY
    assert got.error is None or "sealed" in str(got.error)
    assert ground.state() == before


@faces
def test_freezing_what_somebody_can_write_is_busy(ground: Ground, face: Face) -> None:
    before = ground.state()
    got = call_with(ground, face, "mdl_seal", seals=int(Seal.FREEZE))
    assert got.rc is Retcode.BUSY
    assert ground.state() == before


@faces
def test_the_right_pages_in_the_wrong_state_are_an_invalid_operation(
    ground: Ground, face: Face
) -> None:
    ground.vmm.decommit(ground.neighbour + PAGE, PAGE)
    before = ground.state()
    for method, va, pages in (
        ("mdl_create_from_vm", ground.reserved, 1),
        ("mdl_create_from_vm", ground.neighbour, 4),
        ("mdl_create_from_vm", ground.mapped, 8),
        ("mdl_create_from_vm", ground.mapped + PAGE, 1),
        ("decommit", ground.mapped, 8),
        ("decommit", ground.mapped + 7 * PAGE, 1),
    ):
        got = call(ground.vmm, face, method, *range_arguments(method, va, pages * PAGE))
        assert got.rc is Retcode.INVALID_OPERATION, (method, va)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("where", [*TAKEN, "a mapping of the buffer itself"])
def test_mapping_fixed_on_something_already_exists(ground: Ground, face: Face, where: str) -> None:
    before = ground.state()
    if where in TAKEN:
        hint, size, guards = TAKEN[where](ground)
    else:
        hint, size, guards = ground.mapped, PAGE, 0
    prot = RW | FIXED | guards
    got = call(ground.vmm, face, "mdl_map", ground.handle, 0, size, hint, prot)
    assert got.rc is Retcode.ALREADY_EXISTS
    assert ground.state() == before


@faces
@pytest.mark.parametrize("where", UNREACHABLE)
def test_mapping_fixed_outside_what_a_process_may_have_is_an_invalid_argument(
    ground: Ground, face: Face, where: str
) -> None:
    before = ground.state()
    hint, size, guards = UNREACHABLE[where]
    got = call(ground.vmm, face, "mdl_map", ground.handle, 0, size, hint, RW | FIXED | guards)
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
def test_buffers_that_no_memory_can_hold_are_out_of_memory(ground: Ground, face: Face) -> None:
    half = USER_SPACE_END // 2 // PAGE * PAGE
    big = ground.vmm.mdl_create(half, RW)
    call(ground.vmm, face, "mdl_map", big, 0, half, 0, RW)  # where it fits, no second one does
    before = ground.state()
    for method, changed in (
        ("mdl_create", {"size": half, "prot": int(RW | VmmFlags.LOCKED)}),
        ("mdl_create", {"size": USER_SPACE_END + PAGE}),
        ("mdl_create", {"size": 1 << 63}),
        ("mdl_create", {"size": (1 << 64) - PAGE}),
        ("mdl_map", {"handle": big, "offset": 0, "length": half, "prot": 3}),
        ("mdl_map", {"handle": big, "length": 1 << 42, "prot": 3 | int(VmmFlags.LOCKED)}),
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.OUT_OF_MEMORY, (method, changed)
    assert ground.state() == before


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Let this process open nothing more."""
    spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(spare)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


@faces
def test_without_a_descriptor_the_quota_is_exceeded(ground: Ground, face: Face) -> None:
    before = ground.state()
    with no_descriptor_left():
        for method in ("mdl_create", "mdl_create_from_vm", "mdl_create_from_buf", *WINDOW_METHODS):
            got = call_with(ground, face, method)
            assert got.rc is Retcode.QUOTA_EXCEEDED, method
            assert got.error is None or "RLIMIT_NOFILE" in str(got.error), str(got.error)
        for method in ("handle_copy", "handle_info"):
            assert call_with(ground, face, method).rc is Retcode.OK, "a handle takes none"
        writer = call_with(ground, face, "mdl_map", prot=3)
        assert writer.rc is Retcode.OK, "a writable mapping takes none"
        ground.vmm.free(writer.value, PAGE)
    assert ground.state() == before

"""Handles of one process: what their values are, what they allow, how they end."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import (
    ALL_RIGHTS,
    COMMITTED,
    FIRST_RIGHTS,
    READ,
    RW,
    SUBSETS_OF_RIGHTS,
)
from faces import REFERENCE_METHODS, Face, call
from kernel_oracle import PAGE
from refusals import faces
from vmm_linux import INVALID_HANDLE, VMM, Handle, Retcode, Rights, Seal, VmmError, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable


#: Every method that takes a handle, with the rest of its arguments.
TAKING_HANDLES: dict[str, tuple[int, ...]] = {
    "mdl_get_size": (),
    "mdl_map": (0, PAGE, 0, 1),
    "mdl_clone": (0, PAGE),
    "mdl_seal": (1,),
    "handle_copy": (0,),
    "handle_close": (),
    "handle_revoke": (),
    "handle_info": (),
    "handle_fileno": (),
}


def mapped_files() -> list[kernel.Mapping]:
    """The mappings of memory files."""
    return [mapping for mapping in kernel.maps() if "/memfd:" in mapping.pathname]


def refusal(operation: Callable[..., object], *arguments: object) -> Retcode:
    """The return code with which a call fails."""
    with pytest.raises(VmmError) as caught:
        operation(*arguments)
    return caught.value.rc


def answers(vmm: VMM, face: Face, handle: int) -> set[Retcode]:
    """What the methods that take a handle say of one that they all must refuse, and name."""
    before = kernel.descriptors(), mapped_files()
    codes = set()
    for method, rest in TAKING_HANDLES.items():
        got = call(vmm, face, method, handle, *rest)
        assert got.error is None or f"{handle:x}" in str(got.error)
        codes.add(got.rc)
    assert (kernel.descriptors(), mapped_files()) == before
    return codes


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", FIRST_RIGHTS, ids=["R", "RW", "RX", "RWX"])
def test_a_new_handle_has_what_its_protection_gives(vmm: VMM, prot: int) -> None:
    va = vmm.allocate(0, PAGE, COMMITTED)
    origin = vmm.mdl_create(2 * PAGE, prot)
    for handle in (
        origin,
        vmm.mdl_create_from_vm(va, PAGE, prot),
        vmm.mdl_create_from_buf(b"x", prot),
        vmm.mdl_clone(origin, 0, PAGE),
    ):
        assert handle.rights == vmm.handle_info(handle).rights == FIRST_RIGHTS[prot]


def test_a_handle_is_an_integer_whose_bits_are_documented(vmm: VMM) -> None:
    origin = vmm.mdl_create(PAGE, VmmFlags.RWX_MASK)
    for rights in SUBSETS_OF_RIGHTS:
        handle = vmm.handle_copy(origin, rights)
        assert isinstance(handle, Handle)
        assert isinstance(handle, int)
        assert handle & 0xFFFFFFFF == handle.number
        assert handle >> 32 & 0xFFFF == int(rights) == int(handle.rights)
        assert handle >> 48 & 0x7FFF == handle.generation
        assert handle >> 63 == 0
        assert handle == handle.number | int(rights) << 32 | handle.generation << 48
        assert vmm.mdl_get_size(int(handle)) == PAGE, "a plain int of the same value will do"
        assert f"{handle:x}" in repr(handle)


def test_both_faces_hand_out_the_same_kind_of_handle(vmm: VMM) -> None:
    handle, rc = vmm.endpoint.MdlCreate(PAGE, RW)
    assert rc is Retcode.OK
    assert isinstance(handle, Handle)
    assert vmm.endpoint.MdlGetSize(handle) == (PAGE, Retcode.OK)


def test_the_invalid_handle_equals_none_and_is_none(vmm: VMM) -> None:
    handles = [vmm.mdl_create(PAGE, RW) for _ in range(5)]
    assert INVALID_HANDLE not in handles
    assert isinstance(INVALID_HANDLE, int)
    assert INVALID_HANDLE >> 63 == 1, "no handle has its top bit"
    for face in Face:
        assert answers(vmm, face, INVALID_HANDLE) == {Retcode.INVALID_ARGUMENT}


def test_no_handle_is_ever_handed_out_twice_by_any_vmm() -> None:
    seen: set[int] = set()
    numbers: set[tuple[int, int]] = set()
    count = 0
    for _ in range(3):
        with VMM() as first, VMM() as second:
            origins = [each.mdl_create(PAGE, RW) for each in (first, second)]
            for turn in range(5000):
                for each, origin in zip((first, second), origins, strict=True):
                    copied = each.handle_copy(origin, turn % 4)
                    each.handle_close(copied)
                    seen.add(int(copied))
                    numbers.add((copied.generation, copied.number))
                    count += 1
            seen.update(map(int, origins))
            count += 2
    assert len(seen) == count
    assert len(numbers) == count - 6, "not even with other rights"


# ---- rights --------------------------------------------------------------------------------------


def test_a_copy_has_the_rights_asked_for_and_no_others(vmm: VMM) -> None:
    origin = vmm.mdl_create(PAGE, VmmFlags.RWX_MASK)
    for rights in SUBSETS_OF_RIGHTS:
        copied = vmm.handle_copy(origin, rights)
        assert vmm.handle_info(copied).rights == rights
        assert vmm.mdl_get_size(copied) == PAGE, "the size needs no right"


def test_a_copy_never_has_more_rights_than_its_origin(vmm: VMM) -> None:
    origin = vmm.mdl_create(PAGE, VmmFlags.RWX_MASK)
    for had in SUBSETS_OF_RIGHTS:
        copied = vmm.handle_copy(origin, had)
        for wanted in (had, Rights(0), *(Rights(1 << bit) for bit in range(6)), ALL_RIGHTS):
            got = call(vmm, Face.METHODS, "handle_copy", copied, had | wanted)
            allowed = Rights.COPY in had and not wanted & ~had
            assert got.rc is (Retcode.OK if allowed else Retcode.NO_CAPABILITY), (had, wanted)
            if not allowed:
                missing = (wanted | Rights.COPY) & ~had
                assert all(str(right.name) in str(got.error) for right in missing)


@faces
def test_mapping_needs_the_rights_that_its_protection_names(vmm: VMM, face: Face) -> None:
    origin = vmm.mdl_create(PAGE, VmmFlags.RWX_MASK)
    needed = {1: Rights.MAP_READ, 2: Rights.MAP_WRITE, 4: Rights.MAP_EXECUTE}
    for had in SUBSETS_OF_RIGHTS[::8]:
        copied = vmm.handle_copy(origin, had)
        for prot in (0, 1, 3, 5, 7):
            allowed = all(right in had for bit, right in needed.items() if prot & bit)
            got = call(vmm, face, "mdl_map", copied, 0, PAGE, 0, prot)
            assert got.rc is (Retcode.OK if allowed else Retcode.NO_CAPABILITY), (had, prot)
            if allowed:
                vmm.free(got.value, PAGE)


@faces
def test_cloning_needs_the_right_to_copy(vmm: VMM, face: Face) -> None:
    origin = vmm.mdl_create(PAGE, VmmFlags.RWX_MASK)
    for had in SUBSETS_OF_RIGHTS:
        got = call(vmm, face, "mdl_clone", vmm.handle_copy(origin, had), 0, PAGE)
        allowed = Rights.COPY in had
        assert got.rc is (Retcode.OK if allowed else Retcode.NO_CAPABILITY)
        if allowed:
            assert vmm.handle_info(got.value).rights == had
            vmm.handle_close(got.value)


def test_the_security_ids_need_their_right_and_the_rest_does_not(vmm: VMM) -> None:
    origin = vmm.mdl_clone(vmm.mdl_create(3 * PAGE, VmmFlags.RWX_MASK), 0, 2 * PAGE)
    whole = vmm.handle_info(origin)
    assert whole.origin_sid is not None
    for rights in SUBSETS_OF_RIGHTS:
        info = vmm.handle_info(vmm.handle_copy(origin, rights))
        assert (info.rights, info.size, info.seals) == (rights, 2 * PAGE, Seal(0))
        if Rights.GET_SID in rights:
            assert (info.sid, info.origin_sid) == (whole.sid, whole.origin_sid)
        else:
            assert refusal(lambda info=info: info.sid) is Retcode.NO_CAPABILITY
            assert refusal(lambda info=info: info.origin_sid) is Retcode.NO_CAPABILITY
        assert str(2 * PAGE) in repr(info)


@pytest.mark.parametrize("bit", [6, 7, 15, 16, 31, 32, 63])
def test_unknown_rights_are_invalid_arguments(vmm: VMM, bit: int) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    for rights in (1 << bit, 1 << bit | int(Rights.MAP_READ)):
        assert refusal(vmm.handle_copy, handle, rights) is Retcode.INVALID_ARGUMENT


# ---- sids ----------------------------------------------------------------------------------------


def test_the_security_id_is_the_buffers_not_the_handles(vmm: VMM) -> None:
    handle = vmm.mdl_create(2 * PAGE, RW)
    sid = vmm.handle_info(handle).sid
    copies = [vmm.handle_copy(handle, handle.rights) for _ in range(3)]
    copies.append(vmm.handle_copy(copies[0], Rights.GET_SID))
    assert {vmm.handle_info(copied).sid for copied in copies} == {sid}
    vmm.handle_close(handle)
    assert vmm.handle_info(copies[2]).sid == sid
    mapped = vmm.mdl_map(copies[1], 0, PAGE, 0, READ)
    assert vmm.query(mapped).sid == sid


def test_security_ids_tell_buffers_apart_after_they_are_gone_too() -> None:
    seen = set()
    for _ in range(50):
        with VMM() as vmm:
            for _ in range(20):
                handle = vmm.mdl_create(PAGE, RW)
                seen.add(vmm.handle_info(handle).sid)
                vmm.handle_close(handle)
    assert len(seen) == 1000


def test_what_an_information_tells_cannot_be_changed(vmm: VMM) -> None:
    info = vmm.handle_info(vmm.mdl_create(PAGE, RW))
    for name in ("rights", "size", "sid", "origin_sid", "seals", "anything"):
        with pytest.raises(AttributeError):
            setattr(info, name, 0)


# ---- closed, stale, forged -----------------------------------------------------------------------


@faces
def test_a_closed_handle_is_not_found(vmm: VMM, face: Face) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    vmm.handle_close(handle)
    assert answers(vmm, face, handle) == {Retcode.RESOURCE_NOT_FOUND}
    newer = [vmm.mdl_create(PAGE, RW) for _ in range(100)]
    assert answers(vmm, face, handle) == {Retcode.RESOURCE_NOT_FOUND}, "no newer one takes over"
    for each in newer:
        assert vmm.mdl_get_size(each) == PAGE


@faces
def test_every_flipped_bit_of_a_live_handle_is_refused(vmm: VMM, face: Face) -> None:
    """This is the VMM's one handle, so every other value was never handed out."""
    handle = vmm.mdl_create(PAGE, RW)
    for bit in range(64):
        assert answers(vmm, face, handle ^ 1 << bit) == {Retcode.INVALID_ARGUMENT}, bit
    for bit in range(64):
        for other in range(bit):
            got = call(vmm, face, "mdl_get_size", handle ^ 1 << bit ^ 1 << other)
            assert got.rc is Retcode.INVALID_ARGUMENT
    assert vmm.mdl_get_size(handle) == PAGE


@faces
def test_rights_in_a_forged_handle_give_nothing(vmm: VMM, face: Face) -> None:
    weak = vmm.handle_copy(vmm.mdl_create(PAGE, RW), Rights.MAP_READ)
    for rights in SUBSETS_OF_RIGHTS + [Rights(1 << bit) for bit in range(6, 16)]:
        forged = weak & ~(0xFFFF << 32) | int(rights) << 32
        got = call(vmm, face, "mdl_map", forged, 0, PAGE, 0, RW)
        genuine = rights == Rights.MAP_READ
        assert got.rc is (Retcode.NO_CAPABILITY if genuine else Retcode.INVALID_ARGUMENT)


@faces
@pytest.mark.parametrize("value", [0, 1, 2, 0x3F << 32, (1 << 48) - 1, 1 << 62, (1 << 63) - 1])
def test_a_value_that_was_never_handed_out_is_an_invalid_argument(
    vmm: VMM, face: Face, value: int
) -> None:
    vmm.mdl_create(PAGE, RW)
    assert answers(vmm, face, value) == {Retcode.INVALID_ARGUMENT}


@faces
def test_the_next_handles_cannot_be_used_before_they_are_handed_out(vmm: VMM, face: Face) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    for ahead in (1, 2, 3, 1000, 4096, 100_000):
        assert answers(vmm, face, handle + ahead) == {Retcode.INVALID_ARGUMENT}
    assert vmm.mdl_create(PAGE, RW) != handle


@faces
@pytest.mark.parametrize("fate", ["live", "closed", "revoked", "VMM closed"])
def test_another_vmms_handle_is_an_invalid_argument(vmm: VMM, face: Face, fate: str) -> None:
    own = vmm.mdl_create(PAGE, RW)
    with VMM() as other:
        origin = other.mdl_create(PAGE, RW)
        theirs = other.handle_copy(origin, origin.rights)
        if fate == "closed":
            other.handle_close(theirs)
        elif fate == "revoked":
            other.handle_revoke(origin)
        elif fate == "VMM closed":
            other.close()
        assert answers(vmm, face, theirs) == {Retcode.INVALID_ARGUMENT}
        if not other.closed:
            assert answers(other, face, own) == {Retcode.INVALID_ARGUMENT}


# ---- close and revoke ----------------------------------------------------------------------------


@faces
def test_a_revoked_handle_says_so_until_it_is_closed(vmm: VMM, face: Face) -> None:
    origin = vmm.mdl_create(PAGE, RW)
    copied = vmm.handle_copy(origin, origin.rights)
    vmm.handle_revoke(origin)
    for method, rest in TAKING_HANDLES.items():
        if method != "handle_close":
            assert call(vmm, face, method, copied, *rest).rc is Retcode.HANDLE_REVOKED
    vmm.handle_close(copied)
    assert answers(vmm, face, copied) == {Retcode.RESOURCE_NOT_FOUND}
    assert vmm.mdl_get_size(origin) == PAGE


def family(vmm: VMM) -> dict[str, Handle]:
    """A handle, what came from it, and what came from that, by how it came to be."""
    made = {"root": vmm.mdl_create(8 * PAGE, RW)}
    for name, parent, how in (
        ("copy", "root", "copy"),
        ("clone", "root", "clone"),
        ("copy of copy", "copy", "copy"),
        ("clone of copy", "copy", "clone"),
        ("copy of clone", "clone", "copy"),
        ("clone of clone", "clone", "clone"),
        ("copy of clone of copy", "clone of copy", "copy"),
    ):
        origin = made[parent]
        made[name] = (
            vmm.handle_copy(origin, origin.rights)
            if how == "copy"
            else vmm.mdl_clone(origin, 0, vmm.mdl_get_size(origin) - PAGE)
        )
    return made


def revoked(vmm: VMM, handles: dict[str, Handle]) -> set[str]:
    """Which of these are revoked; the others that are not closed must work."""
    found = set()
    for name, handle in handles.items():
        rc = call(vmm, Face.METHODS, "mdl_get_size", handle).rc
        assert rc in {Retcode.OK, Retcode.HANDLE_REVOKED, Retcode.RESOURCE_NOT_FOUND}
        if rc is Retcode.HANDLE_REVOKED:
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("which", "gone"),
    [
        ("root", "all"),
        ("copy", "copy of copy, clone of copy, copy of clone of copy"),
        ("clone", "copy of clone, clone of clone"),
        ("clone of copy", "copy of clone of copy"),
        ("copy of copy", ""),
    ],
)
def test_revoking_ends_the_descendants_and_nobody_else(vmm: VMM, which: str, gone: str) -> None:
    handles = family(vmm)
    vmm.handle_revoke(handles[which])
    descendants = set(handles) - {"root"} if gone == "all" else set(gone.split(", ")) - {""}
    assert revoked(vmm, handles) == descendants
    vmm.handle_revoke(handles[which])
    fresh = vmm.handle_copy(handles[which], 0)
    assert vmm.mdl_get_size(fresh) == vmm.mdl_get_size(handles[which]), "newer ones may follow"


@pytest.mark.parametrize("order", ["upwards", "downwards"])
def test_revoking_reaches_past_handles_that_were_closed_in_between(vmm: VMM, order: str) -> None:
    handles = family(vmm)
    between = ["copy", "clone", "clone of copy"]
    for name in between if order == "downwards" else between[::-1]:
        vmm.handle_close(handles[name])
    assert revoked(vmm, handles) == set()
    vmm.handle_revoke(handles["root"])
    assert revoked(vmm, handles) == set(handles) - {"root", *between}


def test_closing_a_handle_leaves_what_came_from_it(vmm: VMM) -> None:
    handles = family(vmm)
    vmm.handle_close(handles["root"])
    assert revoked(vmm, handles) == set()
    for name in ("copy", "clone of copy"):
        vmm.handle_close(handles[name])
    vmm.handle_revoke(handles["clone"])
    assert revoked(vmm, handles) == {"copy of clone", "clone of clone"}
    for name in ("copy of copy", "copy of clone of copy"):
        assert vmm.handle_info(handles[name]).rights == handles[name].rights


def test_mappings_stay_when_their_handles_are_revoked(vmm: VMM) -> None:
    handles = family(vmm)
    mapped = vmm.mdl_map(handles["copy of clone of copy"], 0, PAGE, 0, RW)
    sid = vmm.query(mapped).sid
    vmm.write(mapped, b"stays")
    vmm.handle_revoke(handles["root"])
    assert vmm.read(mapped, 5) == b"stays"
    vmm.protect(mapped, PAGE, READ)
    assert vmm.query(mapped).sid == sid
    assert vmm.read(vmm.mdl_map(handles["root"], 0, PAGE, 0, READ), 5) == b"stays"


def test_revoked_handles_keep_no_memory(vmm: VMM) -> None:
    root = vmm.mdl_create(PAGE, RW)
    before = kernel.descriptors()
    clones = [vmm.mdl_clone(root, 0, PAGE) for _ in range(10)]
    clones += [vmm.mdl_clone(clone, 0, PAGE) for clone in clones]
    assert len(kernel.descriptors()) == len(before) + 20
    vmm.handle_revoke(root)
    assert kernel.descriptors() == before
    for clone in clones:
        vmm.handle_close(clone)


def test_a_failed_call_takes_no_handle_and_ends_none(vmm: VMM) -> None:
    handles = family(vmm)
    vmm.handle_revoke(handles["clone"])
    before = revoked(vmm, handles), kernel.descriptors()
    for face in Face:
        call(vmm, face, "mdl_create", 0, RW)
        call(vmm, face, "mdl_create", 1 << 45, RW | VmmFlags.LOCKED)
        call(vmm, face, "mdl_clone", handles["root"], 8 * PAGE, PAGE)
        call(vmm, face, "mdl_create_from_vm", PAGE, PAGE, RW)
        call(vmm, face, "handle_copy", handles["root"], ALL_RIGHTS)
        call(vmm, face, "handle_revoke", handles["copy of clone"])
        call(vmm, face, "handle_close", handles["root"] ^ 1 << 40)
        call(vmm, face, "mdl_seal", handles["root"], 4)
    assert (revoked(vmm, handles), kernel.descriptors()) == before


def test_a_closed_vmm_has_no_handles() -> None:
    vmm = VMM()
    handle = vmm.mdl_create(PAGE, RW)
    vmm.close()
    for face in Face:
        for method, rest in TAKING_HANDLES.items():
            assert call(vmm, face, method, handle, *rest).rc is Retcode.INVALID_OPERATION


def test_every_method_of_the_reference_that_takes_a_handle_is_tried_here() -> None:
    handles = {"mdl_get_size", "mdl_map", "mdl_clone"}
    assert handles == set(REFERENCE_METHODS) & set(TAKING_HANDLES)


# ---- numbers -------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of private memory that this process has."""
    gc.collect()
    return kernel.status("RssAnon")


def test_hundreds_of_thousands_of_handles_come_and_go_without_growth(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    rights = handle.rights

    def come_and_go(count: int) -> None:
        for _ in range(count):
            vmm.handle_close(vmm.handle_copy(handle, rights))

    come_and_go(20_000)
    before = resident()
    come_and_go(300_000)
    assert resident() - before < 256 << 10


def test_buffers_and_clones_come_and_go_without_growth(vmm: VMM) -> None:
    descriptors = kernel.descriptors()

    def come_and_go(count: int) -> None:
        for _ in range(count):
            handle = vmm.mdl_create(PAGE, RW)
            clone = vmm.mdl_clone(handle, 0, PAGE)
            vmm.handle_close(handle)
            vmm.free(vmm.mdl_map(clone, 0, PAGE, 0, READ), PAGE)
            vmm.handle_close(clone)

    come_and_go(500)
    before = resident()
    come_and_go(5_000)
    assert resident() - before < 256 << 10
    assert kernel.descriptors() == descriptors


@pytest.mark.parametrize("shape", ["chain", "star", "chain of stars"])
def test_a_hundred_thousand_handles_end_at_once(vmm: VMM, shape: str) -> None:
    """Neither revoking nor closing needs a stack as deep as the chain is long."""
    root = vmm.mdl_create(PAGE, RW)
    rights, last, made = root.rights, root, []
    for turn in range(100_000):
        made.append(vmm.handle_copy(last, rights))
        if shape == "chain" or (shape == "chain of stars" and turn % 100 == 0):
            last = made[-1]
    vmm.handle_revoke(root)
    for handle in (made[0], made[50_000], made[-1]):
        assert refusal(vmm.mdl_get_size, handle) is Retcode.HANDLE_REVOKED
    order = made[::-1] if shape == "chain" else made
    for handle in order:
        vmm.handle_close(handle)
    assert vmm.mdl_get_size(root) == PAGE


def test_a_vmm_closes_with_a_hundred_thousand_handles() -> None:
    before = kernel.descriptors()
    with VMM() as vmm:
        last = vmm.mdl_create(PAGE, RW)
        for _ in range(100_000):
            last = vmm.handle_copy(last, last.rights)
        for _ in range(500):
            last = vmm.mdl_clone(last, 0, PAGE)
        assert vmm.mdl_get_size(last) == PAGE
    assert kernel.descriptors() == before

"""What looks at an ``Mdl``: what rights and seals allow it, what it shares, how long it lasts."""

from __future__ import annotations

import copy
import gc
import io
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from buffers import mapped_files
from children import in_own_process
from kernel_oracle import PAGE
from vmm_linux import VMM, Mdl, Retcode, Rights, Seal, VmmError
from vmm_linux.errors import (
    Busy,
    InvalidOperation,
    NoCapability,
    ResourceNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# ---- rights and seals ----------------------------------------------------------------------------


def refusals_to_write(mdl: Mdl) -> set[str]:
    """The words for every way of writing; it is read-only for all that look at it."""
    writes: list[Callable[[], object]] = [
        lambda: mdl.write(b"x"),
        lambda: mdl.__setitem__(0, 1),
        lambda: mdl.__setitem__(slice(0, 3, 2), b"xy"),
    ]
    words = set()
    for write in writes:
        with pytest.raises(InvalidOperation) as caught:
            write()
        words.add(caught.value.message)
    assert memoryview(mdl).readonly
    assert not np.asarray(mdl).flags.writeable
    whole: Any = mdl
    assert not np.ndarray(3, "u1", whole).flags.writeable
    with pytest.raises((BufferError, TypeError, ValueError)):
        io.BytesIO(b"abc").readinto(mdl)
    with pytest.raises(TypeError):
        mdl.buf[0] = 1
    return words


def test_a_read_only_handle_says_that_it_lacks_map_write(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    words = refusals_to_write(mdl.read_only())
    assert words == {"the buffer is read-only here: its handle lacks MAP_WRITE"}
    mdl[0] = 1


def test_a_sealed_buffer_says_by_what(vmm: VMM) -> None:
    frozen = refusals_to_write(sealed(vmm, Seal.FREEZE))
    assert frozen == {"the buffer is read-only here: it is sealed with FREEZE"}
    published = refusals_to_write(sealed(vmm, Seal.PUBLISH))
    assert published == {"the buffer is read-only here: it is sealed with PUBLISH"}


def sealed(vmm: VMM, seal: Seal) -> Mdl:
    """A buffer sealed before its first use."""
    mdl = Mdl(10, vmm=vmm)
    vmm.mdl_seal(mdl, seal)
    return mdl


def test_where_some_segments_are_sealed_all_is_read_only_and_says_so(vmm: VMM) -> None:
    mdl = Mdl(2 * PAGE, segment_size=PAGE, vmm=vmm)
    mdl.clone(PAGE, PAGE).freeze()
    words = refusals_to_write(mdl)
    assert words == {"the buffer is read-only here: some of its segments are sealed"}
    assert bytes(mdl) == bytes(2 * PAGE)


def test_it_can_be_frozen_after_its_own_use(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    mdl[:3] = b"abc"
    assert mdl.read(3) == b"abc"
    mdl.freeze()
    assert (mdl.seals, mdl[:3]) == (Seal.FREEZE, b"abc")
    assert refusals_to_write(mdl)


def test_a_view_keeps_it_from_being_frozen_and_it_still_writes(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    for name in ("memoryview", "asarray", "array"):
        looking = LOOKS[name](mdl)
        with pytest.raises(Busy, match="can still write"):
            mdl.freeze()
        mdl[0] = 7
        del looking
    mdl.freeze()
    assert mdl[0] == 7


def test_an_array_that_does_not_say_when_it_is_gone_is_named(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    other = copy.copy(mdl)
    looking = LOOKS["ndarray"](mdl)
    looking[0] = 3
    with pytest.raises(Busy, match=r"numpy\.ndarray\(buffer=.*copy\.copy\(mdl\)"):
        mdl.freeze()
    del looking
    with pytest.raises(Busy, match=r"numpy\.ndarray\(buffer="):
        mdl.freeze()
    del mdl
    other.freeze()
    assert other[0] == 3


def test_publishing_lets_what_writes_go_on_and_nothing_new(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    view = mdl.buf
    mdl.publish()
    view[0] = 7
    mdl.write(b"x", 1)
    assert mdl[:2] == b"\x07x"
    assert Mdl.from_fd(mdl.fileno(), vmm=vmm).buf.readonly
    with pytest.raises(NoCapability):
        mdl.array(1, "u1", writable=True)


# ---- one mapping for all -------------------------------------------------------------------------


def test_objects_of_one_buffer_share_a_mapping(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    others = [copy.copy(mdl) for _ in range(50)]
    views = [each.buf for each in (mdl, *others)]
    assert len(mapped_files()) == 1
    readers = [mdl.read_only().buf for _ in range(50)]
    assert len(mapped_files()) == 2
    views[0][0] = 9
    assert {view[0] for view in views + readers} == {9}
    del views, readers, others
    gc.collect()
    mdl.close()
    assert mapped_files() == []


def test_objects_without_get_sid_share_none(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    rights = mdl.rights & ~Rights.GET_SID
    others = [Mdl.from_handle(vmm, vmm.handle_copy(mdl, rights)) for _ in range(3)]
    views = [each.buf for each in (mdl, *others)]
    assert len(mapped_files()) == 4
    views[1][0] = 9
    assert {view[0] for view in views} == {9}


def test_objects_of_two_vmms_share_none(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    with VMM() as other, Mdl.from_fd(mdl.fileno(), vmm=other) as second:
        views = mdl.buf, second.buf
        assert (len(mapped_files()), second.sid) == (2, mdl.sid)
        views[0][0] = 1
        assert views[1][0] == 1
        del views


def test_no_handle_gets_a_mapping_of_another_one_s_that_it_could_not_make(vmm: VMM) -> None:
    mdl = Mdl(PAGE, vmm=vmm)
    looking = mdl.array(PAGE, "u1"), mdl.read_only().array(PAGE, "u1"), mdl.buf
    reader = mdl.read_only()
    with pytest.raises(NoCapability, match="MAP_WRITE"):
        reader.array(PAGE, "u1", writable=True)
    rights = Rights.GET_SID | Rights.COPY | Rights.TRANSFER
    blind = Mdl.from_handle(vmm, vmm.handle_copy(mdl, rights))
    calls: list[Callable[[], object]] = [
        lambda: blind.array(PAGE, "u1", writable=False),
        lambda: blind.buf,
        lambda: blind.read(1),
        lambda: blind[0],
        lambda: np.asarray(blind),
    ]
    for call in calls:
        with pytest.raises(NoCapability, match="MAP_READ"):
            call()
    mdl.publish()
    with pytest.raises(NoCapability, match="sealed"):
        mdl.array(PAGE, "u1", writable=True)
    assert not mdl.array(PAGE, "u1").flags.writeable
    assert looking[0].flags.writeable


# ---- lifetimes -----------------------------------------------------------------------------------

LOOKS: dict[str, Callable[[Any], Any]] = {
    "memoryview": memoryview,
    "part of a view": lambda mdl: mdl.buf[5:],
    "asarray": np.asarray,
    "frombuffer": lambda mdl: np.frombuffer(mdl, "u1"),
    "ndarray": lambda mdl: np.ndarray(10, "u1", mdl),
    "array": lambda mdl: mdl.array(10, "u1"),
    "slice of an array": lambda mdl: np.ndarray(10, "u1", mdl)[2:],
}


@pytest.mark.parametrize("name", LOOKS)
def test_the_memory_stays_as_long_as_anything_looks_at_it(name: str) -> None:
    vmm = VMM()
    mdl = Mdl(10, vmm=vmm)
    mdl[:] = b"\5" * 10
    looking = LOOKS[name](mdl)
    mdl.close()
    vmm.close()
    del mdl, vmm
    gc.collect()
    assert set(bytes(looking)) == {5}
    looking[0] = 6
    assert len(mapped_files()) == 1
    del looking
    gc.collect()
    assert mapped_files() == []


def touch_after_everything_is_closed() -> None:
    """Touch every page of arrays over buffers of which all was closed, and new memory came."""
    from vmm_linux._default_vmm import default_vmm

    size = 64 * PAGE
    arrays: list[Any] = []
    for number in range(8):
        vmm = VMM() if number % 2 else default_vmm()
        mdl = Mdl(size - number, vmm=vmm)
        arrays.append(np.ndarray((size - number,), "u1", buffer=mdl))  # type: ignore[arg-type]
        arrays.append(np.ndarray((size - number,), "u1", buffer=mdl.map()))  # type: ignore[arg-type]
        mdl.close()
        if number % 4 != 2:
            vmm.close()
        del mdl, vmm
        gc.collect()
    fresh = [np.zeros(size, "u1") for _ in range(8)]
    for number, array in enumerate(arrays):
        array[:] = number + 1
    assert [int(array.max()) for array in arrays[1::2]] == [
        number + 1 for number in range(1, 16, 2)
    ]
    assert [int(array.min()) for array in arrays[::2]] == [number + 2 for number in range(0, 16, 2)]
    assert not any(array.any() for array in fresh)


def test_numpy_s_own_way_survives_the_end_of_everything() -> None:
    in_own_process(touch_after_everything_is_closed)


def test_an_open_end_is_closed_when_it_is_dropped(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    view = mdl.buf
    del mdl
    gc.collect()
    assert (view[0], len(mapped_files())) == (0, 1)
    del view
    gc.collect()
    assert vmm.usage().handles.used == vmm.usage().mdl_mappings.used == 0


def send_it(mdl: Mdl) -> None:
    """Send it to nobody."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mdl.send(ours)


CLOSED: dict[str, Callable[[Any], object]] = {
    "len": len,
    "nbytes": lambda mdl: mdl.nbytes,
    "buf": lambda mdl: mdl.buf,
    "bytes": bytes,
    "iteration": list,
    "item": lambda mdl: mdl[0],
    "slice": lambda mdl: mdl[:0],
    "item set": lambda mdl: mdl.__setitem__(0, 0),
    "read": lambda mdl: mdl.read(1),
    "write": lambda mdl: mdl.write(b"x"),
    "readinto": lambda mdl: mdl.readinto(bytearray(1)),
    "memoryview": memoryview,
    "frombuffer": np.frombuffer,
    "asarray": np.asarray,
    "ndarray": lambda mdl: np.ndarray(1, "u1", mdl),
    "array": lambda mdl: mdl.array(1, "u1"),
    "send": send_it,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_one_says_so_whatever_it_is_asked(name: str, used: bool, vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    if used:
        mdl[0] = 1
    mdl.close()
    with pytest.raises(ResourceNotFound, match="closed"):
        CLOSED[name](mdl)
    assert repr(mdl) == "<Mdl, closed>"
    assert vmm.usage().mdls.used == 0


def test_a_deep_copy_is_another_buffer_of_the_same_length(vmm: VMM) -> None:
    mdl = Mdl.from_bytes(b"hello", vmm=vmm)
    other, same = copy.deepcopy(mdl), copy.copy(mdl)
    other[0] = 72
    assert (bytes(mdl), bytes(other), bytes(same)) == (b"hello", b"Hello", b"hello")
    assert (other.sid != mdl.sid, same.sid == mdl.sid, len(other)) == (True, True, 5)


def test_a_clone_ends_where_its_buffer_does(vmm: VMM) -> None:
    mdl = Mdl(PAGE + 10, vmm=vmm)
    mdl[PAGE:] = b"0123456789"
    assert (len(mdl.clone(0, PAGE)), len(mdl.clone(0)), len(mdl.clone(PAGE))) == (
        PAGE,
        PAGE + 10,
        10,
    )
    assert bytes(mdl.clone(PAGE)) == b"0123456789"
    assert rc_of(lambda: mdl.clone(0, 10)) is Retcode.INVALID_ARGUMENT
    assert bytes(mdl.clone().clone(PAGE, PAGE).clone()) == b"0123456789"


def rc_of(call: Callable[[], object]) -> Retcode:
    """The return code of a refused call."""
    with pytest.raises(VmmError) as caught:
        call()
    return caught.value.rc

"""An ``Mdl`` is a buffer of just its bytes, which lives as long as anything looks at it."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import socket
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kernel_oracle as kernel
from buffers import mapped_files
from children import in_own_process
from constants import LOCKED, READ, RW, RX
from kernel_oracle import PAGE
from vmm_linux import VMM, Handle, Mdl, Retcode, Rights, Seal, VmmError, VmmFlags
from vmm_linux.errors import (
    Busy,
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    OutOfMemory,
    OutOfRange,
    ResourceNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = [1, 5, 1000, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 7]
sizes = pytest.mark.parametrize("size", SIZES)


def behind(mdl: Mdl) -> bytes:
    """What the kernel has in the pages of a buffer: a mapping of its own, beyond the last byte."""
    found = kernel.libc.mmap(None, mdl.size, 3, kernel.MAP_SHARED, mdl.fileno(), 0)
    try:
        return ctypes.string_at(found, mdl.size)
    finally:
        kernel.unmap(found, mdl.size)


def put_behind(mdl: Mdl, offset: int, data: bytes) -> None:
    """Write into the pages of a buffer, beyond the last byte too, as a hostile owner does."""
    with mdl.map() as region:
        region.write(data, offset)


# ---- making one ----------------------------------------------------------------------------------


@sizes
def test_its_length_is_the_file_s_to_the_byte_and_memory_is_mapped_in_whole_pages(
    size: int, vmm: VMM
) -> None:
    mdl = Mdl(size, vmm=vmm)
    pages = -(-size // PAGE) * PAGE
    assert (len(mdl), mdl.nbytes, mdl.size) == (size, size, pages)
    assert os.fstat(mdl.fileno()).st_size == size
    assert vmm.usage().mdl_bytes.used == pages
    view = mdl.buf
    assert (view.nbytes, view.readonly, view.format, view.ndim) == (size, False, "B", 1)
    (mapping,) = mapped_files()
    assert mapping.end - mapping.start == pages
    assert mdl.map().size == pages


def test_protections_flags_and_segments_are_mdl_create_s(vmm: VMM) -> None:
    assert Mdl(10, READ, vmm=vmm).rights & Rights.MAP_WRITE == Rights(0)
    assert Rights.MAP_EXECUTE in Mdl(10, RX, vmm=vmm).rights
    locked = Mdl(PAGE + 1, RW | LOCKED, vmm=vmm)
    assert os.fstat(locked.fileno()).st_blocks * 512 == 2 * PAGE
    assert vmm.usage().locked.used == 2 * PAGE
    many = Mdl(2 * PAGE + 3, segment_size=PAGE, vmm=vmm)
    assert (len(many), vmm.handle_info(many.handle).segments) == (2 * PAGE + 3, 3)
    assert Mdl(np.int64(7), vmm=vmm).nbytes == 7


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[VmmError], str]] = {
    "0": ((0,), {}, InvalidArgument, "size 0: at least one byte is needed"),
    "-1": ((-1,), {}, InvalidArgument, "size -1: at least one byte"),
    "text": (("1",), {}, InvalidArgument, "size is '1' of type str, not an integer"),
    "float": ((1.5,), {}, InvalidArgument, "size is 1.5 of type float"),
    "bool": ((True,), {}, InvalidArgument, "size is True"),
    "None": ((None,), {}, InvalidArgument, "size is None"),
    "65 bits": ((2**64,), {}, InvalidArgument, "65 bits"),
    "rounded to 65 bits": ((2**64 - 1,), {}, InvalidArgument, "65 bits"),
    "beyond addresses": ((2**63,), {}, OutOfMemory, "more than the address space"),
    "no protection": ((1, 0), {}, InvalidArgument, "READ at least"),
    "WRITE alone": ((1, VmmFlags.WRITE), {}, InvalidArgument, "protection 0x2"),
    "segments": ((1,), {"segment_size": 100}, InvalidArgument, "segment_size 0x64"),
    "VMM": ((1,), {"vmm": 3}, InvalidArgument, "vmm is 3 of type int, not a VMM"),
    "buffer": ((b"abc",), {}, InvalidArgument, "size is b'abc'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_buffer_is_refused_in_words(name: str, vmm: VMM) -> None:
    arguments, keywords, kind, why = WRONG[name]
    before = vmm.usage(), kernel.descriptors()
    with pytest.raises(kind, match=why):
        Mdl(*arguments, **{"vmm": vmm, **keywords})
    assert (vmm.usage(), kernel.descriptors()) == before


def test_the_old_call_warns_and_works(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    with pytest.warns(DeprecationWarning, match=r"Mdl\.from_handle\(vmm, handle\)") as caught:
        mdl = Mdl(vmm, handle)  # type: ignore[arg-type]
    assert caught[0].filename == __file__
    mdl[:2] = b"ab"
    assert (mdl.handle, mdl.vmm, mdl[:3]) == (handle, vmm, b"ab\0")
    mdl.close()
    with pytest.raises(ResourceNotFound):
        vmm.mdl_get_size(handle)


def test_a_vmm_alone_is_no_size(vmm: VMM) -> None:
    with (
        pytest.warns(DeprecationWarning, match="from_handle"),
        pytest.raises(InvalidArgument, match=r"no size: Mdl\(size, vmm=vmm\)"),
    ):
        Mdl(vmm)  # type: ignore[arg-type]


def test_a_handle_becomes_one_and_is_closed_with_it(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW, 0, 10)
    with Mdl.from_handle(vmm, handle) as mdl:
        assert (mdl.handle, len(mdl)) == (handle, 10)
    with pytest.raises(ResourceNotFound):
        Mdl.from_handle(vmm, handle)


def test_what_is_no_handle_becomes_none(vmm: VMM) -> None:
    mdl, wrong = Mdl(5, vmm=vmm), Handle(5)
    with pytest.raises(InvalidArgument, match="not a handle of this VMM"):
        Mdl.from_handle(vmm, wrong)
    with pytest.raises(InvalidArgument, match="vmm is 3 of type int, not a VMM"):
        Mdl.from_handle(3, wrong)  # type: ignore[arg-type]
    own: Any = mdl
    with pytest.raises(InvalidArgument, match=r"closes its own; copy\.copy\(mdl\) makes another"):
        Mdl.from_handle(vmm, own)
    first: Any = vmm
    with pytest.warns(DeprecationWarning, match="from_handle") as caught:
        assert rc_of(lambda: Mdl(first, own)) == Retcode.INVALID_ARGUMENT
    assert len(caught) == 1
    assert mdl.nbytes == 5


def test_bytes_make_a_frozen_buffer_of_just_their_length(vmm: VMM) -> None:
    mdl = Mdl.from_bytes(b"hello", vmm=vmm)
    assert (len(mdl), bytes(mdl), mdl.seals) == (5, b"hello", Seal.FREEZE)
    assert behind_read_only(mdl) == b"hello" + bytes(PAGE - 5)
    assert bytes(Mdl.from_bytes(memoryview(bytes(range(6))).cast("H"), vmm=vmm)) == bytes(range(6))
    assert bytes(Mdl.from_bytes(mdl, vmm=vmm)) == b"hello"
    writable = Mdl.from_bytes(b"hello", RW, vmm=vmm)
    writable[0] = 72
    assert bytes(writable) == b"Hello"


def behind_read_only(mdl: Mdl) -> bytes:
    """All that is in its pages."""
    return mdl.map(READ).read()


WRONG_BYTES: list[tuple[Any, str]] = [
    (b"", "size 0"),
    ("abc", "'abc' of type str, not a contiguous buffer"),
    (np.arange(6)[::2], "a ndarray, not a contiguous buffer"),
    (5, "not a contiguous buffer"),
]


@pytest.mark.parametrize(("data", "why"), WRONG_BYTES, ids=repr)
def test_what_is_no_bytes_makes_none(data: Any, why: str, vmm: VMM) -> None:  # noqa: ANN401
    with pytest.raises(InvalidArgument, match=why):
        Mdl.from_bytes(data, vmm=vmm)
    assert vmm.usage().mdls.used == 0


def test_an_array_makes_one_of_its_elements(vmm: VMM) -> None:
    mdl = Mdl.from_array([[1, 2], [3, 4]], vmm=vmm)
    assert (mdl.vmm, len(mdl), mdl.array((2, 2), "i8").tolist()) == (vmm, 32, [[1, 2], [3, 4]])
    mdl.close()


def test_a_descriptor_makes_one_of_just_its_length(vmm: VMM) -> None:
    first = Mdl(1000, vmm=vmm)
    first[:5] = b"hello"
    second = Mdl.from_fd(first.fileno(), vmm=vmm)
    assert (len(second), second[:5], second.sid) == (1000, b"hello", first.sid)
    with open(first.fileno(), "rb", closefd=False) as file:
        assert file.read() == bytes(first)


def test_send_and_recv_carry_it(vmm: VMM) -> None:
    mdl = Mdl.from_bytes(b"hello", vmm=vmm)
    ours, theirs = socket.socketpair()
    with ours, theirs, VMM() as other:
        mdl.send(ours)
        received = Mdl.recv(theirs, Seal.FREEZE, 5, os.geteuid(), vmm=other)
        assert (bytes(received), received.rights, received.vmm) == (b"hello", mdl.rights, other)
        mdl.send(ours, Rights.MAP_READ)
        few = Mdl.recv(theirs, vmm=other)
        assert (few.rights, few[1:4]) == (Rights.MAP_READ, b"ell")
        mdl.send(ours)
        with pytest.raises(PermissionError, match="5 bytes; max_size is 4"):
            Mdl.recv(theirs, max_size=4, vmm=other)
        with pytest.raises(NoCapability):
            mdl.send(ours, Rights.MAP_WRITE)
        with pytest.raises(InvalidArgument):
            mdl.send(few)  # type: ignore[arg-type]


# ---- its bytes -----------------------------------------------------------------------------------


@sizes
def test_it_is_a_sequence_of_its_bytes(size: int, vmm: VMM) -> None:
    mdl = Mdl(size, vmm=vmm)
    data = bytes(number % 251 + 1 for number in range(size))
    put_behind(mdl, 0, b"\xff" * mdl.size)
    mdl[:] = data
    assert bytes(mdl) == bytes(bytearray(mdl)) == bytes(memoryview(mdl)) == data
    assert mdl.read() == mdl[:] == mdl[-size:] == data
    assert mdl[::-1] == data[::-1]
    assert mdl[::3] == data[::3]
    assert (mdl[0], mdl[-1]) == (data[0], data[-1])
    whole: Any = mdl
    if size <= 1000:
        assert list(whole) == list(data)
    assert bytes(np.frombuffer(whole, "u1")) == bytes(np.asarray(mdl)) == data
    assert io.BytesIO(mdl).read() == data
    assert behind(mdl)[size:] == b"\xff" * (mdl.size - size), "what lies behind is not written"


@sizes
def test_what_lies_behind_the_last_byte_is_neither_read_nor_written(size: int, vmm: VMM) -> None:
    mdl = Mdl(size, vmm=vmm)
    put_behind(mdl, 0, b"\xee" * mdl.size)
    calls: list[Callable[[], object]] = [
        lambda: mdl.read(size + 1),
        lambda: mdl.read(1, size),
        lambda: mdl.read(2, size - 1),
        lambda: mdl.write(b"x" * (size + 1)),
        lambda: mdl.write(b"x", size),
        lambda: mdl.write(b"xy", size - 1),
        lambda: mdl[size],
        lambda: mdl[-size - 1],
        lambda: mdl.__setitem__(size, 1),
        lambda: mdl.__setitem__(slice(size - 1, size + 1), b"xy"),
        lambda: mdl.readinto(bytearray(1), size),
        lambda: mdl.array(size + 1, "u1"),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument):
            call()
    assert mdl[size - 1 : size + 5] == b"\xee"
    assert mdl[size:] == b""
    room = bytearray(b"\x11" * (mdl.size + 9))
    assert mdl.readinto(room) == size
    assert room == b"\xee" * size + b"\x11" * (mdl.size + 9 - size)
    assert mdl.readinto(room, size - 1) == 1
    with pytest.raises(IndexError):
        mdl.buf[size]
    assert behind(mdl) == b"\xee" * mdl.size


def test_bytes_that_are_none_are_refused_in_words(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    calls: dict[str, Callable[[], object]] = {
        "size 0 is less than 1 byte: read": lambda: mdl.read(0),
        "size -1 at offset 0": lambda: mdl.read(-1),
        "offset -1 is not inside the buffer of 10 bytes": lambda: mdl.read(1, -1),
        "3 bytes at offset 8: 2 bytes are there": lambda: mdl.write(b"abc", 8),
        "data is 'abc' of type str": lambda: mdl.write("abc"),  # type: ignore[arg-type]
        "size 0: at least one byte": lambda: mdl.write(b""),
        "3 bytes for a slice of 2": lambda: mdl.__setitem__(slice(0, 2), b"abc"),
        "value 256 is no byte": lambda: mdl.__setitem__(0, 256),
        "not an integer or a slice": lambda: mdl["a"],  # type: ignore[call-overload]
        "a slice's step cannot be 0": lambda: mdl[::0],
        "buffer is b'abc' of type bytes, not writable": lambda: mdl.readinto(b"abc"),
    }
    for why, call in calls.items():
        with pytest.raises(InvalidArgument, match=why):
            call()
    with pytest.raises(OutOfRange, match="index 10 is outside, there are 10 bytes"):
        mdl[10]
    assert bytes(mdl) == bytes(10)


def test_an_mdl_is_true_and_itself(vmm: VMM) -> None:
    mdl = Mdl(1, vmm=vmm)
    assert mdl
    assert mdl == mdl  # noqa: PLR0124
    assert mdl != Mdl(1, vmm=vmm)
    assert len({mdl, mdl}) == 1
    assert 0 in mdl  # type: ignore[operator]


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


def test_no_warning_of_its_own_is_left(vmm: VMM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mdl.from_handle(vmm, vmm.mdl_create(PAGE, RW)).close()
        copy.copy(Mdl(5, vmm=vmm)).close()

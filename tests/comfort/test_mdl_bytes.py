"""An ``Mdl`` is a buffer of just its bytes: to the byte, here and at every receiver."""

from __future__ import annotations

import copy
import ctypes
import io
import os
import socket
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kernel_oracle as kernel
from buffers import mapped_files
from constants import LOCKED, READ, RW, RX
from kernel_oracle import PAGE
from vmm_linux import VMM, Handle, Mdl, Retcode, Rights, Seal, VmmError, VmmFlags
from vmm_linux.errors import (
    InvalidArgument,
    NoCapability,
    OutOfMemory,
    OutOfRange,
    ResourceNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = [1, 5, 1000, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 7]
sizes = pytest.mark.parametrize("size", SIZES)


def rc_of(call: Callable[[], object]) -> Retcode:
    """The return code of a refused call."""
    with pytest.raises(VmmError) as caught:
        call()
    return caught.value.rc


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
    "text": (("1",), {}, InvalidArgument, "size is '1' of type str, not a number of bytes"),
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
            mdl.send(few)


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


def test_no_warning_of_its_own_is_left(vmm: VMM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mdl.from_handle(vmm, vmm.mdl_create(PAGE, RW)).close()
        copy.copy(Mdl(5, vmm=vmm)).close()


def test_bytes_move_within_a_buffer_as_within_a_bytearray(vmm: VMM) -> None:
    mdl = vmm.mdl(3 * PAGE)
    mdl[:] = bytes(number % 251 for number in range(3 * PAGE))
    for start, stop, to in ((0, 90, 7), (7, 90, 0), (0, 2 * PAGE, PAGE // 2), (PAGE, 3 * PAGE, 5)):
        expected = bytearray(mdl)
        expected[to : to + stop - start] = bytes(expected[start:stop])
        mdl[to : to + stop - start] = mdl.buf[start:stop]
        assert bytes(mdl) == expected, (start, stop, to)


def test_what_is_no_size_is_refused_with_the_calls_that_copy_data() -> None:
    for data in (b"abc", bytearray(3), memoryview(b"abc"), [1, 2], "abc", 1.5):
        with pytest.raises(InvalidArgument, match=r"Mdl\.from_bytes.* Mdl\.from_array"):
            Mdl(data)  # type: ignore[arg-type]

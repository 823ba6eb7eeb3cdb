"""What read, write and view refuse."""

from __future__ import annotations

import array
import ctypes
from typing import Any

import pytest

from constants import RESERVE_COMMIT
from faces import Face, call
from kernel_oracle import PAGE
from refusals import Ground, range_arguments
from vmm_linux import Retcode, VmmFlags


def test_reads_writes_and_views_want_committed_pages_that_allow_them(ground: Ground) -> None:
    vmm, before = ground.vmm, ground.state()
    ground_and = {
        "reserved": (ground.reserved, {"read", "write", "view"}),
        "read-only": (ground.read_only, {"write"}),
        "no access": (ground.no_access, {"read", "write", "view"}),
    }
    for name, (va, refused) in ground_and.items():
        for method in ("read", "write", "view"):
            got = call(vmm, Face.METHODS, method, *range_arguments(method, va, 2 * PAGE))
            expected = Retcode.INVALID_OPERATION if method in refused else Retcode.OK
            assert got.rc is expected, (name, method)
    got = call(vmm, Face.METHODS, "view", ground.read_only, PAGE, True)
    assert got.rc is Retcode.INVALID_OPERATION
    assert ground.state() == before


def test_one_page_in_the_wrong_state_is_enough(ground: Ground) -> None:
    vmm = ground.vmm
    vmm.decommit(ground.committed + 3 * PAGE, PAGE)
    for method in ("read", "write", "view"):
        arguments = range_arguments(method, ground.committed, 8 * PAGE)
        assert call(vmm, Face.METHODS, method, *arguments).rc is Retcode.INVALID_OPERATION
    assert vmm.read(ground.committed, 9) == b"committed"


# ---- what is copied ------------------------------------------------------------------------------


def test_write_takes_every_contiguous_buffer(ground: Ground) -> None:
    numpy = pytest.importorskip("numpy", reason="arrays of NumPy need NumPy")
    data = bytes(range(64))
    buffers: list[Any] = [
        data,
        bytearray(data),
        memoryview(data),
        memoryview(data).cast("I"),
        memoryview(data).cast("B", (8, 8)),
        array.array("Q", data),
        (ctypes.c_uint16 * 32).from_buffer_copy(data),
        numpy.frombuffer(data, dtype=numpy.uint32),
        numpy.frombuffer(data, dtype=numpy.uint8).reshape(4, 16),
    ]
    for buffer in buffers:
        ground.vmm.write(ground.committed, bytes(64))
        assert ground.vmm.write(ground.committed, buffer) == 64
        assert ground.vmm.read(ground.committed, 64) == data, type(buffer)


def test_write_refuses_what_is_no_contiguous_buffer(ground: Ground) -> None:
    numpy = pytest.importorskip("numpy", reason="arrays of NumPy need NumPy")
    square = numpy.zeros((4, 16), dtype=numpy.uint8)
    released = memoryview(b"gone")
    released.release()
    before = ground.state()
    for wrong in (
        None,
        "text",
        5,
        1.5,
        [1, 2],
        object(),
        memoryview(bytes(64))[::2],
        memoryview(bytes(64))[::-1],
        square.T,
        square[:, ::2],
        released,
        memoryview(b""),
    ):
        got = call(ground.vmm, Face.METHODS, "write", ground.committed, wrong)
        assert got.rc is Retcode.INVALID_ARGUMENT, repr(wrong)
    assert ground.state() == before


def test_write_from_memory_that_faults_is_an_error_and_no_signal(ground: Ground) -> None:
    before = ground.state()
    for bad in (ground.reserved, ground.no_access, ground.hole, ground.guarded - PAGE):
        buffer = (ctypes.c_char * PAGE).from_address(bad)
        got = call(ground.vmm, Face.METHODS, "write", ground.committed, buffer)
        assert got.rc is not Retcode.OK
        assert got.error is not None
        assert got.error.completed == 0
    assert ground.state() == before


def test_write_that_stops_half_way_says_how_far_it_came(ground: Ground) -> None:
    edge = ground.neighbour + 4 * PAGE - 100
    ground.vmm.write(edge, b"y" * 100)
    buffer = (ctypes.c_char * PAGE).from_address(edge)
    got = call(ground.vmm, Face.METHODS, "write", ground.committed, buffer)
    assert got.error is not None
    done = got.error.completed
    assert 0 <= done <= 100
    assert ground.vmm.read(ground.committed, done) == b"y" * done
    assert ground.vmm.read(ground.committed + 100, 9) == (b"committed" * 20)[100:109]


def test_write_may_come_from_the_same_pages(ground: Ground) -> None:
    view = ground.vmm.view(ground.committed, 4 * PAGE)
    assert ground.vmm.write(ground.committed + PAGE, view[:PAGE]) == PAGE
    assert bytes(view[PAGE : PAGE + 9]) == b"committed"
    view.release()


def test_a_read_that_no_memory_can_hold_is_out_of_memory(ground: Ground) -> None:
    size = 1 << 45
    va = ground.vmm.allocate(0, size, RESERVE_COMMIT | VmmFlags.READ)
    got = call(ground.vmm, Face.METHODS, "read", va, size)
    assert got.rc is Retcode.OUT_OF_MEMORY
    assert ground.vmm.read(va + size - 5, 5) == bytes(5)
    ground.vmm.free(va, size)


def test_a_read_only_view_refuses_stores(ground: Ground) -> None:
    for view in (
        ground.vmm.view(ground.read_only, PAGE),
        ground.vmm.view(ground.committed, PAGE, False),
        ground.vmm.view(ground.committed, PAGE, writable=False),
    ):
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 1
        view.release()

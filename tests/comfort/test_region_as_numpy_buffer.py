"""``numpy.ndarray(buffer=region)``, which keeps the region and not its buffer.

What would touch memory that is gone does so in a process of its own, so that a signal is a failure.
"""

from __future__ import annotations

import builtins
import ctypes
import gc
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from children import in_own_process
from constants import READ, RW
from forked import in_child
from kernel_oracle import PAGE
from leaks import read_mappings
from vmm_linux import VMM, Mdl, Region, VmmFlags
from vmm_linux.errors import Busy, InvalidOperation, ResourceNotFound, SecurityDisallow
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

COMMITTED = RW | VmmFlags.COMMIT
SIZE = 4 * PAGE
ANY_CONTIGUOUS, WRITABLE, FORMAT = 0x98, 0x1, 0x4
ADVICE = (
    r"numpy\.ndarray\(buffer=\.\.\.\) holds this region.*drop the region object.*numpy\.asarray"
)


def array_over(region: Region, offset: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The idiom of the documentation of ``multiprocessing.shared_memory``."""
    buffer: Any = region
    return np.ndarray((len(region) - offset,), "u1", buffer=buffer, offset=offset)


def is_mapped(va: int) -> bool:
    """Whether the kernel has anything at an address."""
    return any(start <= va < end for (start, end), _, _ in read_mappings())


def takers(region: Region) -> list[Callable[[], object]]:
    """All that would take memory from under an array."""
    return [
        region.free,
        lambda: region.free(PAGE),
        region.decommit,
        lambda: region.decommit(PAGE, PAGE),
        lambda: region.protect(READ),
        lambda: region.protect(0, 2 * PAGE),
        lambda: region.__exit__(None, None, None),
    ]


def check_is_busy(region: Region) -> None:
    """Assert that nothing can be taken away, and that the error says what to do."""
    for take in takers(region):
        with pytest.raises(Busy, match=ADVICE):
            take()
    assert len(region) == SIZE


# ---- as long as there is an array --------------------------------------------------------------


def touch_after_attempts_to_free() -> None:
    """Touch an array's memory after each attempt to take it away."""
    with VMM() as vmm:
        region = vmm.region(SIZE, COMMITTED)
        array, other = array_over(region), array_over(region, PAGE)
        for take in takers(region):
            with pytest.raises(Busy, match=ADVICE):
                take()
            array[:] = 5
            other += 1
            assert (array[:PAGE].sum(), array[PAGE:].sum()) == (5 * PAGE, 6 * 3 * PAGE)
        check_is_busy(region)
        base, part = region.base, array[PAGE:][::2]
        del region, take, array, other
        vmm._check()
        assert part.sum() == 6 * part.size
        del part
        assert not is_mapped(base)
        vmm._check()


def touch_after_leaving_its_with() -> None:
    """Touch an array after its region's ``with`` was left."""
    with VMM() as vmm:
        with pytest.raises(Busy, match=ADVICE), vmm.region(SIZE, COMMITTED) as region:
            array = array_over(region)
        array[:] = 7
        assert region.read() == b"\7" * SIZE
        base = region.base
        del region
        assert array.sum() == 7 * SIZE
        del array
        assert not is_mapped(base)


def touch_after_the_vmm() -> None:
    """Touch an array after its VMM was closed."""
    for keep_region in (True, False):
        with VMM() as vmm:
            region = vmm.region(SIZE, COMMITTED)
            array = array_over(region)
            base = region.base
            kept = [region] if keep_region else []
            del region
        array[:] = 9
        assert array.sum() == 9 * SIZE
        for region in kept:
            assert region.freed
            with pytest.raises(ResourceNotFound, match="this region was freed"):
                array_over(region)
            del region
        kept.clear()
        assert array.sum() == 9 * SIZE
        del array
        assert not is_mapped(base)


def touch_a_buffer_after_all_else() -> None:
    """Touch an array over a mapped buffer after everything was closed."""
    with VMM() as vmm:
        mdl = vmm.mdl(SIZE)
        region = mdl.map()
        array, base = array_over(region), region.base
        mdl.close()
    array[:] = 3
    del region, mdl
    assert array.sum() == 3 * SIZE
    del array
    assert not is_mapped(base)


def touch_read_only_pages() -> None:
    """Touch arrays whose memory cannot be written."""
    with VMM() as vmm:
        region = vmm.region(SIZE, READ | VmmFlags.COMMIT)
        array = array_over(region)
        assert not array.flags.writeable
        check_is_busy(region)
        base = region.base
        del region
        assert array.sum() == 0
        del array
        assert not is_mapped(base)


def touch_after_its_finalizer() -> None:
    """Touch an array after a program called what only Python should call."""
    with VMM() as vmm:
        region = vmm.region(SIZE, COMMITTED)
        array, base = array_over(region), region.base
        for _ in range(3):
            region.__del__()
        assert region.freed
        array[:] = 1
        del region
        assert array.sum() == SIZE
        del array
        assert not is_mapped(base)
        vmm._check()


def touch_what_threads_made_at_once() -> None:
    """Touch arrays that many threads make of one region, whose views are copies each."""
    copies = []

    class Copying(VMM):
        """One whose views are copies, so that what is not kept is gone."""

        __slots__ = ()

        def view(self, *arguments: Any) -> Any:  # noqa: ANN401
            copy = bytearray(super().view(*arguments))
            copies.append(id(copy))
            start.wait()
            return copy

    number = 8
    start = threading.Barrier(number)
    made: list[Any] = []
    with Copying() as vmm, vmm.region(SIZE, COMMITTED) as region:
        threads = [
            threading.Thread(target=lambda: made.append(array_over(region))) for _ in range(number)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(copies), len(made)) == (number, number)
        made[0][::2] = 7
        assert {bytes(array) for array in made} == {bytes(made[0])}
        assert {array.ctypes.data for array in made} == {made[0].ctypes.data}


@pytest.mark.parametrize(
    "touch",
    [
        touch_after_attempts_to_free,
        touch_after_leaving_its_with,
        touch_after_the_vmm,
        touch_a_buffer_after_all_else,
        touch_read_only_pages,
        touch_after_its_finalizer,
        touch_what_threads_made_at_once,
    ],
    ids=lambda touch: touch.__name__,
)
def test_an_array_s_memory_stays_whatever_ends_first(touch: Callable[[], None]) -> None:
    assert in_own_process(touch) == ""


def exit_with_arrays() -> None:
    """End the interpreter while arrays over regions are everywhere."""
    kept: Any = builtins, sys, np
    with VMM() as vmm:
        region = vmm.region(SIZE, COMMITTED)
        kept[0].kept = [region, array_over(region)]
        kept[1].kept = array_over(vmm.mdl(SIZE).map())
        cycle: list[Any] = [vmm.region(SIZE, COMMITTED)]
        cycle += [cycle, array_over(cycle[0])]
    kept[2].kept = array_over(Mdl.from_bytes(bytes(SIZE)).map())
    for array in (kept[0].kept[1], kept[1].kept, kept[2].kept, cycle[2]):
        assert array.sum() == 0


def test_nothing_is_said_at_exit() -> None:
    assert in_own_process(exit_with_arrays) == ""


# ---- its end -----------------------------------------------------------------------------------


def test_the_pin_lasts_as_long_as_the_region_object(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    base = region.base
    array_over(region)
    gc.collect()
    check_is_busy(region)
    region.write(b"still there")
    assert region[:11] == b"still there"
    del region
    assert not is_mapped(base)
    vmm._check()


def test_views_beside_an_array_end_with_their_consumers(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    array, view, buffer = array_over(region), region.view(), memoryview(region)
    buffer[5] = 5
    assert (array[5], view[5]) == (5, 5)
    base = region.base
    del region, array, view
    assert is_mapped(base)
    del buffer
    assert not is_mapped(base)


def test_what_is_left_of_a_region_can_be_an_array(vmm: VMM) -> None:
    region = vmm.region(2 * SIZE, COMMITTED)
    region.free(SIZE)
    array = array_over(region)
    assert array.size == SIZE
    check_is_busy(region)
    base = region.base
    del region, array
    assert not is_mapped(base)


def test_garbage_with_arrays_gives_its_memory_back(vmm: VMM) -> None:
    class Node:
        """A part of a cycle."""

        def __init__(self) -> None:
            self.region = vmm.region(SIZE, COMMITTED)
            self.arrays = [array_over(self.region)]
            self.itself = self
            self.view = memoryview(self.region)

        def __del__(self) -> None:
            """Look once more."""
            sums.append(int(self.arrays[0].sum()))

    sums: list[int] = []
    node = Node()
    base = node.region.base
    node.arrays[0][:] = 1
    del node
    gc.collect()
    assert sums == [SIZE]
    assert not is_mapped(base)
    vmm._check()


def test_arrays_come_and_go_without_leaving_anything(vmm: VMM) -> None:
    for _ in range(1000):
        array_over(vmm.region(SIZE, COMMITTED))[0] = 1
    assert vmm.usage().regions.used == 0
    vmm._check()


def test_a_forked_child_has_arrays_of_its_own(vmm: VMM) -> None:
    regions = [vmm.region(SIZE, COMMITTED)]
    arrays = [array_over(regions[0])]
    base = regions[0].base
    arrays[0][:] = 1

    def child_drops_them() -> list[object]:
        check_is_busy(regions[0])
        arrays[0][:] = 2
        arrays.append(array_over(regions[0]))
        regions.clear()
        seen = [int(array.sum()) for array in arrays]
        arrays.clear()
        return [seen, is_mapped(base)]

    assert in_child(child_drops_them) == [[2 * SIZE, 2 * SIZE], False]
    check_is_busy(regions[0])
    assert arrays[0].sum() == SIZE
    regions.clear()
    arrays.clear()
    assert not is_mapped(base)


# ---- who is not NumPy, and what is no array ----------------------------------------------------


def ask(region: Region, flags: int) -> None:
    """Ask for a buffer as C code does, and release it."""
    room = ctypes.create_string_buffer(256)
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(region), room, flags)
    ctypes.pythonapi.PyBuffer_Release(room)


@pytest.mark.parametrize(
    "flags",
    [0, WRITABLE, FORMAT, 0x18, 0x11D, ANY_CONTIGUOUS, ANY_CONTIGUOUS | WRITABLE | FORMAT],
    ids=hex,
)
def test_who_keeps_a_buffer_leaves_no_pin(flags: int, vmm: VMM) -> None:
    """``ANY_CONTIGUOUS`` alone is how PyArrow asks."""
    region = vmm.region(SIZE, COMMITTED)
    ask(region, flags)
    region.free()


def test_what_numpy_asks_for_is_what_is_kept(vmm: VMM) -> None:
    for flags in (RW, READ):
        region = vmm.region(SIZE, flags | VmmFlags.COMMIT)
        if flags is RW:
            ask(region, ANY_CONTIGUOUS | WRITABLE)
        else:
            with pytest.raises(BufferError, match="read-only"):
                ask(region, ANY_CONTIGUOUS | WRITABLE)
        check_is_busy(region)


def test_other_consumers_of_numpy_leave_no_pin(vmm: VMM) -> None:
    region: Any = vmm.region(SIZE, COMMITTED)
    np.asarray(region)
    np.array(region)
    np.frombuffer(region, "u8")
    np.ndarray(3, "u1", memoryview(region))
    np.ndarray(3, "u1", region.view())
    bytes(region)
    region.free()


def test_pages_that_cannot_be_seen_make_no_array_and_no_pin(vmm: VMM) -> None:
    region = vmm.region(SIZE)
    region.commit(0, PAGE)
    with pytest.raises(InvalidOperation, match="not committed"):
        array_over(region)
    region.free()


def test_a_policy_is_asked_about_each_array() -> None:
    denied: list[str] = []
    with VMM(policy=Policy(ask=lambda question: question.method not in denied)) as vmm:
        region = vmm.region(SIZE, COMMITTED)
        denied.append("view")
        with pytest.raises(SecurityDisallow):
            array_over(region)
        denied.clear()
        array = array_over(region)
        denied.append("view")
        with pytest.raises(SecurityDisallow):
            array_over(region)
        denied.append("free")
        base = region.base
        del region, array
        assert is_mapped(base), "as that of any region that a policy keeps from being freed"
    assert not is_mapped(base)

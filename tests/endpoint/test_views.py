"""Views: what holds pages, for how long, and what that keeps from happening."""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from constants import RW
from vmm_linux import VMM, PageState, Retcode, VmmError, VmmFlags

PAGE = 4096
COMMITTED = VmmFlags.RESERVE | VmmFlags.COMMIT


def refusal(call: Callable[..., object], *arguments: object) -> Retcode:
    """The return code with which a call fails."""
    with pytest.raises(VmmError) as caught:
        call(*arguments)
    return caught.value.rc


def test_a_view_is_the_memory_itself(vmm: VMM) -> None:
    """What is written through it is read back by the kernel, and the other way round."""
    base = vmm.allocate(0, 4 * PAGE, COMMITTED | RW)
    view = vmm.view(base + 10, 2 * PAGE)
    view[:5] = b"hello"
    assert vmm.read(base + 10, 5) == b"hello"
    vmm.write(base + 12, b"LL")
    assert bytes(view[:5]) == b"heLLo"
    assert (view.format, view.itemsize, view.nbytes) == ("B", 1, 2 * PAGE)


@pytest.mark.parametrize("held", [0, 1, 3])
def test_pages_that_a_view_holds_are_busy(vmm: VMM, held: int) -> None:
    """Free, Decommit and Protect are refused over any range that touches a held page."""
    base = vmm.allocate(0, 4 * PAGE, COMMITTED | RW)
    view = vmm.view(base + held * PAGE + 5, 1)
    for start, size in ((0, 4), (held, 1)):
        va, length = base + start * PAGE, size * PAGE
        assert refusal(vmm.free, va, length) is Retcode.BUSY
        assert refusal(vmm.decommit, va, length) is Retcode.BUSY
        assert refusal(vmm.protect, va, length, VmmFlags.READ) is Retcode.BUSY
        vmm.commit(va, length)
    view[0] = 7
    others = [page for page in range(4) if page != held]
    vmm.decommit(base + others[0] * PAGE, PAGE)
    vmm.free(base + others[-1] * PAGE, PAGE)
    assert vmm.read(base + held * PAGE + 5, 1) == b"\x07"
    del view
    vmm.decommit(base + held * PAGE, PAGE)


def test_overlapping_views_hold_their_pages_each(vmm: VMM) -> None:
    """A page is free again with the last of its views, in whatever order they go."""
    base = vmm.allocate(0, 4 * PAGE, COMMITTED | RW)
    first = vmm.view(base, 3 * PAGE)
    second = vmm.view(base + PAGE, 3 * PAGE)
    third = vmm.view(base + 2 * PAGE, 1)
    del second
    assert refusal(vmm.decommit, base + 2 * PAGE, PAGE) is Retcode.BUSY
    vmm.decommit(base + 3 * PAGE, PAGE)
    del first
    assert refusal(vmm.decommit, base + 2 * PAGE, PAGE) is Retcode.BUSY
    vmm.decommit(base, 2 * PAGE)
    del third
    vmm.decommit(base, 4 * PAGE)
    vmm._check()
    assert vmm.query(base, smaps=False).run_end == base + 4 * PAGE


def test_the_pin_lasts_as_long_as_the_object_behind_the_view(vmm: VMM) -> None:
    """Consumers that release the buffer and keep the object, as torch does, are safe."""
    base = vmm.allocate(0, PAGE, COMMITTED | RW)
    view = vmm.view(base, PAGE)
    pin = view.obj
    view.release()
    del view
    assert refusal(vmm.free, base, PAGE) is Retcode.BUSY
    assert memoryview(pin)[0] == 0
    del pin
    vmm.free(base, PAGE)


def test_a_numpy_array_holds_the_pages_however_it_is_sliced(vmm: VMM) -> None:
    """``frombuffer`` keeps the exporter, and a slice keeps the array."""
    base = vmm.allocate(0, PAGE, COMMITTED | RW)
    array = np.frombuffer(vmm.view(base, PAGE), dtype=np.uint32)[5:100:3]
    array[0] = 77
    assert vmm.read(base + 20, 1) == b"M"
    assert refusal(vmm.decommit, base, PAGE) is Retcode.BUSY
    del array
    vmm.decommit(base, PAGE)


def test_a_view_in_a_cycle_lets_go_when_the_cycle_is_collected(vmm: VMM) -> None:
    """Garbage collection runs the same way out."""
    base = vmm.allocate(0, PAGE, COMMITTED | RW)
    cycle: list[Any] = [vmm.view(base, PAGE)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    vmm.free(base, PAGE)


@pytest.mark.parametrize(
    ("protection", "writable", "read_only"),
    [
        (RW, None, False),
        (RW, True, False),
        (RW, False, True),
        (VmmFlags.READ, None, True),
        (VmmFlags.READ, False, True),
    ],
)
def test_a_view_is_writable_where_every_page_is_unless_told_otherwise(
    vmm: VMM, protection: VmmFlags, writable: bool | None, read_only: bool
) -> None:
    """``writable`` None asks the pages."""
    base = vmm.allocate(0, 2 * PAGE, COMMITTED | protection)
    assert vmm.view(base, 2 * PAGE, writable).readonly is read_only


def test_one_read_only_page_makes_a_view_read_only(vmm: VMM) -> None:
    """And a writable one is refused."""
    base = vmm.allocate(0, 2 * PAGE, COMMITTED | RW)
    vmm.protect(base + PAGE, PAGE, VmmFlags.READ)
    assert vmm.view(base, 2 * PAGE).readonly
    assert not vmm.view(base, PAGE).readonly
    assert refusal(vmm.view, base, 2 * PAGE, True) is Retcode.INVALID_OPERATION


def test_a_view_needs_committed_readable_pages_of_one_region(vmm: VMM) -> None:
    """Everything else is refused, and says why."""
    base = vmm.allocate(0, 4 * PAGE, VmmFlags.RESERVE | RW)
    vmm.commit(base, 2 * PAGE)
    assert refusal(vmm.view, base + PAGE, PAGE + 1) is Retcode.INVALID_OPERATION
    assert refusal(vmm.view, base + 3 * PAGE, 2 * PAGE) is Retcode.RESOURCE_NOT_FOUND
    assert refusal(vmm.view, base, 0) is Retcode.INVALID_ARGUMENT
    assert refusal(vmm.view, base, PAGE, 1) is Retcode.INVALID_ARGUMENT
    vmm.protect(base, PAGE, VmmFlags(0))
    assert refusal(vmm.view, base, 1) is Retcode.INVALID_OPERATION
    assert vmm.query(base).state is PageState.COMMITTED


def test_closing_with_views_alive_leaves_their_regions_until_the_last_is_gone() -> None:
    """Regions without a view go at once."""
    vmm = VMM()
    kept = vmm.allocate(0, 2 * PAGE, COMMITTED | RW)
    gone = vmm.allocate(0, 2 * PAGE, COMMITTED | RW)
    first, second = vmm.view(kept, PAGE), vmm.view(kept + PAGE, 1)
    vmm.close()
    with VMM() as observer:
        assert observer.query(gone).state is PageState.FREE
        first[0] = 1
        second[0] = 2
        del first
        assert second[0] == 2
        del second
        assert observer.query(kept).state is PageState.FREE


def test_a_vmm_and_its_view_may_go_in_any_order() -> None:
    """The view keeps what it needs."""
    vmm = VMM()
    view = vmm.view(vmm.allocate(0, PAGE, COMMITTED | RW), PAGE)
    vmm.close()
    del vmm
    view[3] = 9
    assert view[3] == 9


def test_a_ctypes_array_over_a_view_holds_the_pages(vmm: VMM) -> None:
    """Any consumer of the buffer protocol does."""
    base = vmm.allocate(0, PAGE, COMMITTED | RW)
    array = (ctypes.c_ubyte * PAGE).from_buffer(vmm.view(base, PAGE))
    array[1] = 3
    assert refusal(vmm.free, base, PAGE) is Retcode.BUSY
    assert vmm.read(base, 2) == b"\x00\x03"
    del array
    gc.collect()
    vmm.free(base, PAGE)

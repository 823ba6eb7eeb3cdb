"""A Region is a region with a length and an end; nothing more."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from children import run_child
from constants import READ, RW
from forked import in_child
from kernel_oracle import PAGE
from leaks import read_mappings
from vmm_linux import VMM, PageState, Region, VmmFlags
from vmm_linux.errors import Busy, InvalidArgument, InvalidOperation, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable


COMMITTED = RW | VmmFlags.COMMIT
SIZE = 4 * PAGE


# As the stubs of NumPy would have them: they know of no class with a buffer but Python's own.
asarray: Callable[..., np.ndarray[Any, Any]] = np.asarray


def is_mapped(va: int) -> bool:
    """Whether the kernel has anything at an address."""
    return any(start <= va < end for (start, end), _, _ in read_mappings())


# ---- what it is ----------------------------------------------------------------------------------


def test_a_region_is_reserved_with_the_protection_asked_for(vmm: VMM) -> None:
    region = vmm.region(SIZE)
    info = region.query()
    assert (region.vmm, region.base, region.size, len(region)) == (vmm, info.base, info.size, SIZE)
    assert (info.state, info.protection) == (PageState.RESERVED, RW)
    assert vmm.region(SIZE, READ | VmmFlags.COMMIT).query().state is PageState.COMMITTED


def test_an_address_is_a_preference(vmm: VMM) -> None:
    free = vmm.allocate(0, SIZE, VmmFlags.RESERVE)
    vmm.free(free, SIZE)
    assert vmm.region(SIZE, addr=free).base == free


def test_its_text_tells_size_state_and_protection(vmm: VMM) -> None:
    region = vmm.region(SIZE)
    where = f"<Region at 0x{region.base:x}, "
    assert repr(region) == f"{where}{SIZE} bytes: RESERVED, READ|WRITE>"
    region.commit(0, PAGE)
    assert repr(region) == f"{where}{SIZE} bytes: COMMITTED, READ|WRITE at first>"
    region.commit()
    region.protect(0)
    assert repr(region) == f"{where}{SIZE} bytes: COMMITTED, no access>"
    region.free()
    assert repr(region) == f"{where}freed>"


def test_offsets_count_from_its_base_and_default_to_all_of_it(vmm: VMM) -> None:
    region = vmm.region(SIZE)
    region.commit(PAGE)
    assert region.query().state is PageState.RESERVED
    assert [region.query(n * PAGE + 5).state for n in (1, 3)] == [PageState.COMMITTED] * 2
    assert region.write(b"bytes", PAGE + 10) == 5
    assert region.read(5, PAGE + 10) == b"bytes"
    assert bytes(region.view(PAGE + 10, 5)) == b"bytes"
    assert len(region.read(None, PAGE)) == len(region.read(offset=PAGE)) == SIZE - PAGE
    region.protect(READ, PAGE, PAGE)
    assert [region.query(n * PAGE).protection for n in (1, 2)] == [READ, RW]
    region.decommit(PAGE, PAGE)
    assert [region.query(n * PAGE).state for n in (1, 2)] == [
        PageState.RESERVED,
        PageState.COMMITTED,
    ]
    assert region.query(smaps=False).smaps is None


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (-PAGE, PAGE),
        (-1, None),
        (SIZE, PAGE),
        (SIZE, None),
        (2**64 - PAGE, 2 * PAGE),
        (2**70, PAGE),
        (0, SIZE + PAGE),
        (PAGE, SIZE),
        (PAGE, 2**64),
        (0, 0),
        (0, -PAGE),
        (True, PAGE),
        (0, True),
        (0.0, PAGE),
        ("0", PAGE),
        (0, PAGE * 1.0),
    ],
)
def test_what_is_not_inside_the_region_is_refused_before_a_neighbour_is_met(
    offset: Any,  # noqa: ANN401
    size: Any,  # noqa: ANN401
    vmm: VMM,
) -> None:
    below = vmm.region(3 * SIZE, COMMITTED)
    base = below.base + SIZE
    below.free(SIZE)
    region = vmm.region(SIZE, COMMITTED | VmmFlags.FIXED, base)
    above = vmm.region(SIZE, COMMITTED | VmmFlags.FIXED, base + SIZE)
    region.write(b"x" * SIZE)
    for method in (
        region.commit,
        region.decommit,
        region.view,
        lambda offset, size: region.read(size, offset),
        lambda offset, size: region.protect(READ, offset, size),
    ):
        with pytest.raises(InvalidArgument, match=r"offset|size"):
            method(offset, size)
    assert region.read() == b"x" * SIZE
    assert [part.query().protection for part in (below, region, above)] == [RW] * 3


def test_data_that_goes_beyond_the_region_is_not_written(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    with pytest.raises(ResourceNotFound):
        region.write(bytes(PAGE + 1), SIZE - PAGE)
    with pytest.raises(InvalidArgument, match="offset"):
        region.write(b"x", SIZE)
    with pytest.raises(InvalidArgument, match="contiguous buffer"):
        region.write("text")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [(0,), (1,), (PAGE, "RW"), (PAGE, True), (True,), (PAGE, RW, 5), (PAGE, 1 << 40), (PAGE, 2)],
)
def test_arguments_that_allocate_refuses_make_no_region(arguments: Any, vmm: VMM) -> None:  # noqa: ANN401
    with pytest.raises(InvalidArgument, match="allocate"):
        vmm.region(*arguments)


# ---- its end -------------------------------------------------------------------------------------


def test_leaving_it_frees_it(vmm: VMM) -> None:
    with vmm.region(SIZE) as region:
        assert (is_mapped(region.base), region.freed) == (True, False)
    assert region.freed
    assert (region.size, len(region)) == (0, 0)
    assert not is_mapped(region.base)
    with pytest.raises(ResourceNotFound, match="freed"):
        region.__enter__()


def test_it_may_be_freed_before_it_is_left(vmm: VMM) -> None:
    with vmm.region(SIZE) as region:
        region.free()
    with vmm.region(SIZE):
        vmm.close()


def test_leaving_it_while_it_is_looked_at_is_busy_and_its_end_comes_later(vmm: VMM) -> None:
    with pytest.raises(Busy), vmm.region(SIZE, COMMITTED) as region:
        view = memoryview(region)
    base = region.base
    del region
    assert is_mapped(base)
    del view
    assert not is_mapped(base)


def test_dropping_it_frees_it(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    base = region.base
    del region
    assert not is_mapped(base)


def test_a_cycle_of_garbage_frees_it(vmm: VMM) -> None:
    node: list[object] = [vmm.region(SIZE, COMMITTED)]
    region = node[0]
    assert isinstance(region, Region)
    base = region.base
    node += [node, memoryview(region), region.view()]
    del node, region
    gc.collect()
    assert not is_mapped(base)


def test_every_method_of_a_freed_region_says_so(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    region.free()
    calls: list[Callable[[], object]] = [
        region.commit,
        region.decommit,
        region.query,
        region.view,
        region.read,
        region.free,
        lambda: region.protect(READ),
        lambda: region.write(b"x"),
        lambda: memoryview(region),
        lambda: asarray(region),
    ]
    for call in calls:
        with pytest.raises(ResourceNotFound, match="this region was freed"):
            call()


def test_it_is_freed_with_its_vmm() -> None:
    with VMM() as vmm:
        region = vmm.region(SIZE, COMMITTED)
    assert region.freed
    assert "freed" in repr(region)
    with pytest.raises(ResourceNotFound):
        region.read()


def test_its_end_can_be_freed_and_the_rest_is_the_region(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    region.free(2 * PAGE)
    assert len(region) == region.query().size == 2 * PAGE
    assert not is_mapped(region.base + 2 * PAGE)
    with pytest.raises(InvalidArgument, match="offset"):
        region.read(1, 2 * PAGE)
    for offset in (1, -PAGE, 2 * PAGE, True):
        with pytest.raises(InvalidArgument):
            region.free(offset)
    assert len(region) == 2 * PAGE
    region.free()
    assert not is_mapped(region.base)


def test_a_region_in_view_is_not_freed_and_stays_as_it_was(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    view = region.view(PAGE, 1)
    calls: list[Callable[[], object]] = [
        region.free,
        region.decommit,
        lambda: region.protect(READ),
        lambda: region.free(PAGE),
    ]
    for call in calls:
        with pytest.raises(Busy):
            call()
    assert len(region) == SIZE
    region.free(2 * PAGE)
    del view
    region.free()


def test_a_forked_child_that_drops_it_frees_its_own_copy(vmm: VMM) -> None:
    regions = [vmm.region(SIZE, COMMITTED)]
    base = regions[0].base
    regions[0].write(b"the parent's")

    def child_drops_it() -> bool:
        regions.clear()
        return is_mapped(base)

    assert in_child(child_drops_it) is False
    assert regions[0].read(12) == b"the parent's"


def test_it_does_not_pickle_and_says_what_does(vmm: VMM) -> None:
    region = vmm.region(SIZE)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InvalidOperation, match="send the Mdl"):
            attempt(region)


def exit_with_open_regions() -> None:
    """End the interpreter while regions, and arrays of them, are alive everywhere."""
    import builtins
    import sys

    import numpy as np

    from vmm_linux import VMM, Mdl, VmmFlags

    with VMM() as vmm:
        region = vmm.region(1 << 16, VmmFlags.READ | VmmFlags.WRITE | VmmFlags.COMMIT)
        arrays = [np.asarray(region), memoryview(region)]
        builtins.kept = [region, arrays]  # type: ignore[attr-defined]
        sys.kept = vmm.mdl(1 << 16).map()  # type: ignore[attr-defined]
    buffer = Mdl.from_bytes(b"of the package's own")
    np.kept = [buffer, buffer.map(), buffer.array(4, "u1")]  # type: ignore[attr-defined]


def test_nothing_is_said_at_exit() -> None:
    child = run_child(exit_with_open_regions)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")

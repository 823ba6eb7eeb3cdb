"""The buffer of a Region, and what holds it."""

from __future__ import annotations

import ctypes
import importlib.util
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import pytest

from children import run_child
from constants import READ, RW
from kernel_oracle import PAGE
from leaks import read_mappings
from vmm_linux import VMM, VmmError, VmmFlags
from vmm_linux.errors import Busy, InvalidArgument, InvalidOperation, NoCapability, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable


COMMITTED = RW | VmmFlags.COMMIT
SIZE = 4 * PAGE
PYBUF_WRITABLE, PYBUF_STRIDES, PYBUF_FULL = 0x1, 0x18, 0x11D


# As the stubs of NumPy would have them: they know of no class with a buffer but Python's own.
asarray: Callable[..., np.ndarray[Any, Any]] = np.asarray
frombuffer: Callable[..., np.ndarray[Any, Any]] = np.frombuffer


def is_mapped(va: int) -> bool:
    """Whether the kernel has anything at an address."""
    return any(start <= va < end for (start, end), _, _ in read_mappings())


CONSUMERS: dict[str, Callable[[Any], Any]] = {
    "memoryview": memoryview,
    "view": lambda region: region.view(),
    "slice": lambda region: memoryview(region)[5:7],
    "cast": lambda region: memoryview(region).cast("Q"),
    "numpy.asarray": asarray,
    "numpy.array": lambda region: np.array(region, copy=False),
    "numpy slice": lambda region: asarray(region)[3:5],
    "numpy.frombuffer": lambda region: frombuffer(region, "u8"),
    "numpy.ndarray": lambda region: np.ndarray(3, "u1", memoryview(region)),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_consumer_holds_the_pages_until_it_is_gone(name: str, vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    consumer = CONSUMERS[name](region)
    calls: list[Callable[[], object]] = [
        region.free,
        region.decommit,
        lambda: region.protect(READ),
    ]
    for call in calls:
        with pytest.raises(Busy):
            call()
    del consumer
    region.protect(READ)
    region.decommit()
    region.free()


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_consumer_keeps_a_dropped_region_and_frees_it_with_its_own_end(
    name: str, vmm: VMM
) -> None:
    region = vmm.region(SIZE, COMMITTED)
    base = region.base
    consumers = [CONSUMERS[name](region), CONSUMERS[name](region)]
    del region
    vmm._check()
    consumers.pop()
    assert is_mapped(base)
    consumers.pop()
    assert not is_mapped(base)


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_consumer_outlives_region_and_vmm(name: str) -> None:
    with VMM() as vmm:
        region = vmm.region(SIZE, COMMITTED)
        region.write(bytes(range(16)))
        base = region.base
        consumer = CONSUMERS[name](region)
    assert is_mapped(base)
    # The first byte differs, as some show a part.
    assert bytes(np.asarray(consumer).reshape(-1)[:1])[:1] in (b"\x00", b"\x03", b"\x05")
    del region, consumer
    assert not is_mapped(base)


def hold_by_a_library(consumer: str) -> None:
    """Have PyArrow or PyTorch hold a region, then drop it, then outlive its VMM.

    In a process of its own: these libraries start threads, and take memory that they keep.
    """
    import importlib
    from pathlib import Path

    from vmm_linux import VMM, VmmFlags
    from vmm_linux.errors import Busy

    module, name = consumer.split(".")
    library = importlib.import_module(module)
    arguments = {"dtype": library.uint8} if module == "torch" else {}
    size, flags = 1 << 16, VmmFlags.READ | VmmFlags.WRITE | VmmFlags.COMMIT

    def is_mapped(va: int) -> bool:
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in lines]
        return any(int(start, 16) <= va < int(end, 16) for start, end in spans)

    with VMM() as vmm:
        region = vmm.region(size, flags)
        held = getattr(library, name)(region, **arguments)
        for call in (region.free, region.decommit):
            try:
                call()
            except Busy as problem:
                print(problem.method)
        region.write(b"\x05")
        print(held[0] == 5)
        base = region.base
        del region
        print(is_mapped(base))
        del held, call
        print(is_mapped(base))
        region = vmm.region(size, flags)
        held = getattr(library, name)(region, **arguments)
        del held
        region.free()
        print(region.freed)
        region = vmm.region(size, flags)
        base = region.base
        held = getattr(library, name)(region, **arguments)
    print(is_mapped(base), int(held[0]))
    del region, held
    print(is_mapped(base))


@pytest.mark.parametrize("consumer", ["pyarrow.py_buffer", "torch.frombuffer"])
def test_libraries_hold_the_memory_until_they_let_go(consumer: str) -> None:
    module = consumer.partition(".")[0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    child = run_child(hold_by_a_library, consumer)
    assert (child.returncode, child.stderr) == (0, "")
    answers = ["free", "decommit", "True", "True", "False", "True", "True", "0", "False"]
    assert child.stdout.replace("tensor(True)", "True").split() == answers


def test_what_is_written_through_the_buffer_is_in_the_region(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    array = asarray(region)
    assert (array.dtype.name, *array.shape) == ("uint8", SIZE)
    array[PAGE:] = 7
    assert region.read(2, PAGE - 1) == b"\x00\x07"
    assert bytearray(region) == region.read()


@pytest.mark.parametrize("protection", [READ, RW], ids=["all", "one page"])
def test_read_only_pages_make_a_read_only_buffer(protection: VmmFlags, vmm: VMM) -> None:
    region = vmm.region(SIZE, protection | VmmFlags.COMMIT)
    region.protect(READ, PAGE, PAGE)
    assert memoryview(region).readonly
    assert not asarray(region).flags.writeable
    assert not frombuffer(region, "u1").flags.writeable
    with pytest.raises(BufferError, match="read-only"):
        get_buffer(region, PYBUF_WRITABLE)


def get_buffer(exporter: object, flags: int) -> None:
    """Ask for a buffer as C code does."""
    room = ctypes.create_string_buffer(256)
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(exporter), room, flags)
    ctypes.pythonapi.PyBuffer_Release(room)


def test_whatever_form_of_buffer_is_asked_for_is_given_and_released(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    for flags in (PYBUF_WRITABLE, PYBUF_STRIDES, PYBUF_FULL):
        get_buffer(region, flags)
    region.free()


def test_mappings_of_read_only_handles_make_read_only_buffers(vmm: VMM) -> None:
    region = vmm.mdl(SIZE).read_only().map()
    assert memoryview(region).readonly
    with pytest.raises(NoCapability):
        region.protect(RW)


def test_pages_that_cannot_be_seen_are_an_error_everywhere_and_never_an_object_array(
    vmm: VMM,
) -> None:
    region = vmm.region(SIZE)
    region.commit(0, PAGE)
    for consume in (memoryview, asarray, np.array, frombuffer, bytes):
        with pytest.raises(InvalidOperation, match="not committed"):
            consume(region)
    with pytest.raises(InvalidOperation, match="not committed"):
        asarray(region, "f8")
    with pytest.raises(InvalidOperation, match="not committed"):
        np.asarray([region])
    region.commit()
    region.protect(0)
    with pytest.raises(InvalidOperation, match="protection"):
        asarray(region)


def test_a_released_view_lets_go_at_once(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    with memoryview(region) as view:
        assert view.nbytes == SIZE
        assert view.obj is not region
    region.free()


def test_views_come_and_go_without_leaving_anything(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    for _ in range(1000):
        memoryview(region)
        with pytest.raises(VmmError):
            region.view(SIZE)
    vmm._check()
    region.free()


def hold_what_is_no_view() -> None:
    """Have the holder that every consumer of a region has hold other things."""
    from vmm_linux import VMM, VmmFlags

    class Copying(VMM):
        """One whose views are copies."""

        def view(self, *arguments: object) -> object:  # type: ignore[override]
            return bytes(super().view(*arguments))  # type: ignore[arg-type]

    flags = VmmFlags.READ | VmmFlags.WRITE | VmmFlags.COMMIT
    with Copying() as copying, copying.region(1 << 16, flags) as region:
        print(len(memoryview(region)), len(region.view(0, 5)))
    with VMM() as vmm, vmm.region(1 << 16, flags) as region:
        view = memoryview(region)
        holder: Any = type(view.obj)
        for wrong in (view[::-1], view[::2], 5, None):
            try:
                holder(region, wrong)
            except (BufferError, TypeError) as problem:
                print(type(problem).__name__)
        held = holder(region, view)
        try:
            view.release()
        except BufferError as problem:
            print(problem)
        print(memoryview(held)[-1])
        del held
        view.release()


def test_whatever_a_view_is_its_bytes_are_there_as_long_as_somebody_looks() -> None:
    child = run_child(hold_what_is_no_view)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.splitlines() == [
        "65536 5",
        *("BufferError", "BufferError", "TypeError", "TypeError"),
        "memoryview has 1 exported buffer",
        "0",
    ]


def test_negative_flags_are_no_flags(vmm: VMM) -> None:
    everything = 1 << max(VmmFlags).bit_length()
    for flags in (-1, -everything + RW, -(2**100)):
        with pytest.raises(
            InvalidArgument, match=r"^allocate: flags (-0x|is a negative number of 101 bits)"
        ):
            vmm.region(SIZE, flags)


@pytest.mark.parametrize("number", [10**5000, -(10**5000)], ids=["huge", "negative"])
def test_numbers_too_long_for_a_message_are_refused(number: int, vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    calls: list[Callable[[], object]] = [
        lambda: vmm.region(number),
        lambda: vmm.region(SIZE, number),
        lambda: region.read(number),
        lambda: region.read(1, number),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match=r"number of \d+ bits"):
            call()


def test_a_region_that_is_being_freed_is_not_freed_once_more() -> None:
    """Otherwise the second of two threads could free what somebody else has there by then."""

    class Meanwhile(VMM):
        """Somebody frees the region in the middle of its being freed."""

        def free(self, va: SupportsIndex, size: SupportsIndex) -> None:
            with pytest.raises(ResourceNotFound, match="was freed"):
                region.free()
            super().free(va, size)

    with Meanwhile() as vmm:
        region = vmm.region(SIZE)
        base = region.base
        region.free(2 * PAGE)
        assert region.size == 2 * PAGE
        assert (is_mapped(base), is_mapped(base + 2 * PAGE)) == (True, False)
        region.free()
        assert not is_mapped(base)


def test_a_region_whose_freeing_is_refused_can_be_freed_later(vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    view = region.view()
    for offset in (0, PAGE):
        with pytest.raises(Busy):
            region.free(offset)
        with pytest.raises(InvalidArgument):
            region.free(SIZE)
        assert region.size == SIZE
    del view
    region.free()
    assert region.freed

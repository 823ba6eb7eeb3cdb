"""Bytes of a Region by index and slice, as of a bytearray, and into a buffer."""

from __future__ import annotations

import array
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from constants import READ, RW
from kernel_oracle import PAGE
from vmm_linux import VMM, Region, Retcode, VmmFlags
from vmm_linux.audit import Audit
from vmm_linux.errors import InvalidArgument, InvalidOperation, OutOfRange, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Buffer

COMMITTED = RW | VmmFlags.COMMIT
SIZE = 4 * PAGE
PIECE = 1 << 20
LARGE = 3 * PIECE
#: As no byte of one page is alike to that of its neighbours.
CONTENTS = bytes((place * 7 + place // PAGE) % 251 for place in range(SIZE))


@pytest.fixture
def region(vmm: VMM) -> Region:
    """A region that has contents."""
    made = vmm.region(SIZE, COMMITTED)
    made.write(CONTENTS)
    return made


@contextmanager
def filled_region() -> Iterator[Region]:
    """A region of one example of many."""
    with VMM() as vmm, vmm.region(SIZE, COMMITTED) as made:
        made.write(CONTENTS)
        yield made


# ---- the order of read and write ---------------------------------------------------------------


def test_read_and_write_take_offsets_last(region: Region) -> None:
    assert region.write(b"twelve bytes", 100) == 12
    assert region.read(12, 100) == region.read(offset=100, size=12) == b"twelve bytes"
    assert region.read(5) == CONTENTS[:5]
    assert region.read(None, SIZE - 3) == CONTENTS[-3:]


@pytest.mark.parametrize("second", [0, 1, 8, PAGE, SIZE, 2**70])
def test_a_call_in_the_order_of_old_names_the_new_one(region: Region, second: int) -> None:
    with pytest.raises(InvalidArgument, match=r"size 0 .*read\(size, offset\), the size comes fi"):
        region.read(0, second)


# ---- reading -----------------------------------------------------------------------------------


def test_an_index_is_a_byte_as_of_bytes(region: Region) -> None:
    for place in (0, 1, PAGE, SIZE - 1, -1, -PAGE, -SIZE, np.int64(5), np.uint8(200)):
        assert region[place] == CONTENTS[place]
        assert type(region[place]) is int


@pytest.mark.parametrize("place", [SIZE, -SIZE - 1, 2**63, -(2**63), 2**64 - 1])
def test_an_index_outside_is_an_index_error_and_an_invalid_argument(
    region: Region, place: int
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: region[place],
        lambda: region.__setitem__(place, 1),
    ]
    for call in calls:
        with pytest.raises(IndexError, match="is outside, there are") as caught:
            call()
        assert type(caught.value) is OutOfRange
        assert isinstance(caught.value, InvalidArgument)
        assert caught.value.rc is Retcode.INVALID_ARGUMENT


BOUNDS = st.none() | st.integers(-SIZE - 9, SIZE + 9)
STEPS = st.none() | st.integers(-SIZE - 9, SIZE + 9).filter(bool) | st.integers(1, 9)


@given(BOUNDS, BOUNDS, STEPS)
def test_a_slice_is_what_it_is_of_bytes(
    start: int | None, stop: int | None, step: int | None
) -> None:
    with filled_region() as region:
        got = region[start:stop:step]
    assert type(got) is bytes
    assert got == CONTENTS[start:stop:step]


@given(BOUNDS, BOUNDS, STEPS)
def test_a_written_slice_is_what_it_is_of_a_bytearray(
    start: int | None, stop: int | None, step: int | None
) -> None:
    expected = bytearray(CONTENTS)
    # A step of one byte is a single write; others are one each.
    least = 1 if step in (None, 1, -1) else SIZE // 64
    key = slice(start, stop, step if step is None or abs(step) >= least else least)
    data = os.urandom(len(expected[key]))
    with filled_region() as region:
        region[key] = expected[key] = data
        assert region.read() == expected


def test_long_slices_with_a_step_are_right_across_pieces(vmm: VMM) -> None:
    contents = os.urandom(LARGE)
    region = vmm.region(LARGE, COMMITTED)
    region.write(contents)
    for step in (1, 2, 3, PAGE - 1, PAGE, PAGE + 1, PIECE - 1, PIECE, PIECE + 1, LARGE):
        for key in (slice(None, None, step), slice(5, -5, step), slice(None, None, -step)):
            assert region[key] == contents[key], key


@pytest.mark.parametrize(("step", "calls"), [(1, 1), (-1, 1), (2, 3), (PAGE, 3)])
def test_long_slices_take_few_copies(step: int, calls: int) -> None:
    with VMM(audit=Audit()) as vmm:
        region = vmm.region(LARGE, COMMITTED)
        region[::step]
        assert [record.method for record in vmm.history()].count("read") == calls


def test_a_slice_needs_only_the_pages_that_it_touches(vmm: VMM) -> None:
    region = vmm.region(16 * PAGE)
    for page in range(0, 16, 2):
        region.commit(page * PAGE, PAGE)
        region[page * PAGE + 5] = page
    assert region[5 :: 2 * PAGE] == bytes(range(0, 16, 2))
    region[5 :: 2 * PAGE] = bytes(range(8))
    assert region[5 :: 2 * PAGE] == bytes(range(8))
    for key in (slice(None, None, PAGE), slice(None, None, -1), slice(PAGE, None, 2 * PAGE)):
        with pytest.raises(InvalidOperation, match="not committed"):
            region[key]


def iterated(region: Any) -> Iterable[int]:  # noqa: ANN401
    """A region, of which type checkers do not know that it can be iterated over."""
    iterable: Iterable[int] = region
    return iterable


def test_iterating_ends_as_of_bytes(vmm: VMM) -> None:
    region = vmm.region(PAGE, COMMITTED)
    region.write(CONTENTS[:PAGE])
    assert list(iterated(region)) == list(CONTENTS[:PAGE])
    assert [*reversed(region)] == [*reversed(CONTENTS[:PAGE])]
    assert 250 in iterated(region)
    assert 255 not in iterated(region)
    ended = iter(iterated(region))
    assert len([*ended]) == PAGE
    assert next(ended, None) is None


def test_iterating_over_a_region_that_is_freed_says_so(region: Region) -> None:
    bytes_of_it = iter(iterated(region))
    next(bytes_of_it)
    region.free()
    with pytest.raises(ResourceNotFound, match="this region was freed"):
        next(bytes_of_it)


# ---- writing -----------------------------------------------------------------------------------


def test_an_index_is_written_as_a_byte(region: Region) -> None:
    region[3], region[-1], region[np.int16(5)] = 7, np.uint8(255), True + 0
    assert (region[3], region[SIZE - 1], region[5]) == (7, 255, 1)
    expected = bytearray(CONTENTS)
    expected[3], expected[-1], expected[5] = 7, 255, 1
    assert region.read() == expected


@pytest.mark.parametrize(
    "data",
    [
        b"12345678",
        bytearray(b"12345678"),
        memoryview(b"1234567890")[:8],
        array.array("H", b"12345678"),
        np.frombuffer(b"12345678", ">i4"),
        np.frombuffer(b"12345678", "i2,f2").reshape(2, 1),
        np.frombuffer(b"12345678", "u1").reshape(2, 4),
    ],
    ids=["bytes", "bytearray", "memoryview", "array", "big-endian", "structs", "rows"],
)
def test_any_contiguous_buffer_can_be_written(region: Region, data: Any) -> None:  # noqa: ANN401
    expected = bytearray(CONTENTS)
    for key in (slice(5, 13), slice(13, 5, -1), slice(PAGE - 7, PAGE + 9, 2)):
        region[key] = data
        expected[key] = b"12345678"
        assert region.read() == expected


@pytest.mark.parametrize(
    ("key", "size", "words"),
    [
        (slice(0, 4), 3, "3 bytes for a slice of 4"),
        (slice(0, 4), 5, "5 bytes for a slice of 4"),
        (slice(0, 4), 0, "0 bytes for a slice of 4"),
        (slice(4, 4), 1, "1 bytes for a slice of 0"),
        (slice(0, 8, 2), 8, "8 bytes for a slice of 4"),
        (slice(None), SIZE + 1, f"bytes for a slice of {SIZE}"),
    ],
)
def test_a_slice_keeps_its_length(region: Region, key: slice, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}.*the length does not change") as caught:
        region[key] = bytes(size)
    assert isinstance(caught.value, InvalidArgument)
    assert region.read() == CONTENTS


def test_empty_slices_read_nothing_and_write_nothing(vmm: VMM) -> None:
    region = vmm.region(SIZE)
    for key in (slice(5, 5), slice(9, 2), slice(SIZE, None), slice(2, 9, -1), slice(99 * SIZE, 5)):
        assert region[key] == b""
        region[key] = b""
    region.free()
    for call in (lambda: region[5:5], lambda: region.__setitem__(slice(5, 5), b"")):
        with pytest.raises(ResourceNotFound, match="this region was freed"):
            call()


class Counting(VMM):
    """One that writes down what it writes."""

    __slots__ = ("written",)

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, bytes]] = []

    def write(self, va: SupportsIndex, data: Buffer) -> int:
        """Write it down, and write it."""
        self.written.append((int(va), bytes(data)))
        return super().write(va, data)


def test_bytes_between_those_of_a_slice_are_not_written() -> None:
    """Another process may write them meanwhile."""
    with Counting() as vmm:
        region = vmm.region(SIZE, COMMITTED)
        region[4:9:2] = b"abc"
        region[9:4:-2] = b"cba"
        region[3:0:-1] = b"zyx"
        places = [(va - region.base, data) for va, data in vmm.written]
        assert places == [
            *zip((4, 6, 8), (b"a", b"b", b"c"), strict=True),
            *zip((5, 7, 9), (b"a", b"b", b"c"), strict=True),
            (1, b"xyz"),
        ]


def test_a_written_slice_says_how_far_it_came(region: Region) -> None:
    region.protect(READ, 2 * PAGE, PAGE)
    region[PAGE : 4 * PAGE : 2 * PAGE] = b"ab"
    for key, done in ((slice(0, None, PAGE), 2), (slice(PAGE, None, 2), PAGE // 2)):
        with pytest.raises(InvalidOperation, match="write: the protection") as caught:
            region[key] = b"x" * len(region[key])
        assert caught.value.completed == done
    with pytest.raises(InvalidOperation):
        region[2 * PAGE] = 1
    with pytest.raises(InvalidOperation):
        region[PAGE : 3 * PAGE] = bytes(2 * PAGE)
    assert region.read(PAGE, 2 * PAGE) == CONTENTS[2 * PAGE : 3 * PAGE]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (0, 256, "value 256 is no byte"),
        (0, -1, "value -1 is no byte"),
        (0, True, "value is True, not an integer"),
        (0, 1.0, "value is 1.0 of type float"),
        (0, b"x", "value is b'x' of type bytes, not an integer"),
        (slice(0, 3), "abc", "value is 'abc' of type str, not a contiguous buffer"),
        (slice(0, 3), 5, "value is 5 of type int, not a contiguous buffer"),
        (slice(0, 3), [1, 2, 3], "value is a list, not a contiguous buffer"),
        (slice(0, 3), memoryview(b"123456")[::2], "not a contiguous buffer"),
        (slice(0, 4), np.zeros((2, 2), "u1", order="F"), "not a contiguous buffer"),
        (slice(0, 8, 0), b"x", "step cannot be 0"),
        ("0", 1, "index is '0' of type str, not an integer or a slice"),
        (None, 1, "index is None of type NoneType, not an integer or a slice"),
        ((0, 1), b"x", "index is a tuple, not an integer or a slice"),
        (True, 1, "index is True, not an integer or a slice"),
        (slice("0", 4), b"x", "start is '0' of type str, not an integer"),
        (slice(0, 1.5), b"x", "stop is 1.5 of type float, not an integer"),
        (slice(0, 4, False), b"x", "step is False, not an integer"),
        (slice(0, 2**65), b"x", "stop is a number of 66 bits"),
    ],
)
def test_what_is_no_index_or_no_byte_is_refused_in_words(
    region: Region,
    key: Any,  # noqa: ANN401
    value: Any,  # noqa: ANN401
    words: str,
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        region[key] = value
    assert words in str(caught.value)
    if words.startswith(("index", "start", "stop", "step")):
        with pytest.raises(InvalidArgument) as caught:
            region[key]
        assert words in str(caught.value)
    assert region.read() == CONTENTS


# ---- readinto ----------------------------------------------------------------------------------


def test_a_buffer_is_filled_from_an_offset_on(region: Region) -> None:
    room = bytearray(12)
    assert region.readinto(room) == 12
    assert room == CONTENTS[:12]
    assert region.readinto(room, PAGE - 5) == 12
    assert room == CONTENTS[PAGE - 5 : PAGE + 7]
    assert region.readinto(bytearray()) == 0
    numbers: Any = np.zeros((2, 3), ">u4")
    assert region.readinto(numbers, offset=8) == numbers.nbytes
    assert numbers.tobytes() == CONTENTS[8:32]


def test_a_longer_buffer_is_filled_as_far_as_there_are_bytes(region: Region) -> None:
    room = bytearray(b"x" * 20)
    assert region.readinto(room, SIZE - 7) == 7
    assert room == CONTENTS[-7:] + b"x" * 13


@pytest.mark.parametrize(("size", "calls"), [(PIECE, 1), (PIECE + 1, 2), (LARGE, 3)])
def test_a_buffer_is_filled_by_copies_of_a_mebibyte(size: int, calls: int) -> None:
    contents = os.urandom(size)
    with VMM(audit=Audit()) as vmm:
        region = vmm.region(-(-size // PAGE) * PAGE, COMMITTED)
        region.write(contents)
        room = bytearray(size)
        assert region.readinto(room) == size
        reads = [record for record in vmm.history() if record.method == "read"]
        assert len(reads) == calls
        assert max(record.as_dict()["arguments"]["size"] for record in reads) <= PIECE
    assert room == contents


def test_what_was_copied_before_a_failure_is_told(vmm: VMM) -> None:
    region = vmm.region(LARGE)
    region.commit(0, PIECE)
    region[PIECE - 1] = 5
    room = bytearray(b"x" * LARGE)
    with pytest.raises(InvalidOperation, match="not committed") as caught:
        region.readinto(room)
    assert caught.value.completed == PIECE
    assert room[PIECE - 1 :] == b"\x05" + b"x" * (LARGE - PIECE)


@pytest.mark.parametrize(
    ("buffer", "offset", "words"),
    [
        (b"bytes", 0, "not writable"),
        (memoryview(bytearray(9))[::2], 0, "not a contiguous buffer"),
        ("text", 0, "not a contiguous buffer"),
        (5, 0, "not a contiguous buffer"),
        (bytearray(5), SIZE, f"offset {SIZE} is not inside"),
        (bytearray(5), -1, "offset -1 is not inside"),
        (bytearray(5), "0", "offset is '0' of type str"),
    ],
)
def test_what_cannot_be_filled_is_refused(
    region: Region,
    buffer: Any,  # noqa: ANN401
    offset: Any,  # noqa: ANN401
    words: str,
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        region.readinto(buffer, offset)


def test_a_region_can_be_filled_from_another_and_neither_stays_held(vmm: VMM) -> None:
    first, second = vmm.region(SIZE, COMMITTED), vmm.region(SIZE, COMMITTED)
    first[:] = CONTENTS
    assert first.readinto(second) == SIZE
    first[: 2 * PAGE] = second.view(PAGE, 2 * PAGE)
    assert first.read() == CONTENTS[PAGE : 3 * PAGE] + CONTENTS[2 * PAGE :]
    for region in (first, second):
        region.free()


# ---- its end -----------------------------------------------------------------------------------


def test_bytes_of_a_freed_region_are_not_found(region: Region) -> None:
    region.free()
    calls: list[Callable[[], object]] = [
        lambda: region[0],
        lambda: region[:],
        lambda: region.__setitem__(0, 1),
        lambda: region.__setitem__(slice(None), b""),
        lambda: region.readinto(bytearray(5)),
        lambda: list(iterated(region)),
    ]
    for call in calls:
        with pytest.raises(ResourceNotFound, match="this region was freed"):
            call()


class Freeing:
    """A number that frees a region when it is asked for."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __index__(self) -> int:
        self.region.free()
        return 1


USES: dict[str, Callable[[Region, Freeing], object]] = {
    "index": lambda region, number: region[number],
    "slice": lambda region, number: region[:number],
    "step": lambda region, number: region[::number],
    "written index": lambda region, number: region.__setitem__(number, 1),
    "written slice": lambda region, number: region.__setitem__(slice(number), b"x"),
    "value": lambda region, number: region.__setitem__(0, number),
    "readinto": lambda region, number: region.readinto(bytearray(5), number),
}


@pytest.mark.parametrize("name", USES)
def test_a_number_that_frees_the_region_meets_no_other_memory(name: str, vmm: VMM) -> None:
    region = vmm.region(SIZE, COMMITTED)
    with pytest.raises(ResourceNotFound, match="this region was freed"):
        USES[name](region, Freeing(region))

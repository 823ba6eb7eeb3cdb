"""The parser of smaps and maps: texts of many kernels, cut, damaged and generated ones."""

from __future__ import annotations

import copy
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_oracle import PAGE
from vmm_linux._smaps_parser import parse_maps, parse_smaps
from vmm_linux._smaps_record import NAMES, SmapsRecord

if TYPE_CHECKING:
    from collections.abc import Callable

# ---- the parser: kernels

FIRST = b"55d0c8a00000-55d0c8a21000 rw-p 0001f000 08:0a 131097                     /usr/bin/cat\n"
SECOND = b"7f2b8c000000-7f2b8c003000 ---s 00000000 00:1d 7 \n"
THIRD = b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"

# Labels as each kernel writes them, with a number of its own for each figure.
LINUX_5_10 = b"""\
Size:                101 kB
KernelPageSize:        4 kB
MMUPageSize:          64 kB
Rss:                 102 kB
Pss:                 103 kB
Shared_Clean:        104 kB
Shared_Dirty:        105 kB
Private_Clean:       106 kB
Private_Dirty:       107 kB
Referenced:          108 kB
Anonymous:           109 kB
LazyFree:            110 kB
AnonHugePages:       111 kB
ShmemPmdMapped:      112 kB
FilePmdMapped:       113 kB
Shared_Hugetlb:      114 kB
Private_Hugetlb:     115 kB
Swap:                116 kB
SwapPss:             117 kB
Locked:              118 kB
THPeligible:    1
VmFlags: rd wr mr mw me ac sd
"""
FIGURES_5_10 = {
    "size": 101 << 10,
    "kernel_page_size": 4 << 10,
    "mmu_page_size": 64 << 10,
    "rss": 102 << 10,
    "pss": 103 << 10,
    "shared_clean": 104 << 10,
    "shared_dirty": 105 << 10,
    "private_clean": 106 << 10,
    "private_dirty": 107 << 10,
    "referenced": 108 << 10,
    "anonymous": 109 << 10,
    "lazy_free": 110 << 10,
    "anon_huge_pages": 111 << 10,
    "shmem_pmd_mapped": 112 << 10,
    "file_pmd_mapped": 113 << 10,
    "shared_hugetlb": 114 << 10,
    "private_hugetlb": 115 << 10,
    "swap": 116 << 10,
    "swap_pss": 117 << 10,
    "locked": 118 << 10,
    "thp_eligible": 1,
}
LINUX_6_1 = b"""\
Size:                201 kB
KernelPageSize:        4 kB
MMUPageSize:          64 kB
Rss:                 202 kB
Pss:                 203 kB
Pss_Dirty:           219 kB
Shared_Clean:        204 kB
Shared_Dirty:        205 kB
Private_Clean:       206 kB
Private_Dirty:       207 kB
Referenced:          208 kB
Anonymous:           209 kB
LazyFree:            210 kB
AnonHugePages:       211 kB
ShmemPmdMapped:      212 kB
FilePmdMapped:       213 kB
Shared_Hugetlb:      214 kB
Private_Hugetlb:     215 kB
Swap:                216 kB
SwapPss:             217 kB
Locked:              218 kB
THPeligible:           0
ProtectionKey:        15
VmFlags: rd ex mr mw me
"""
FIGURES_6_1 = {
    "size": 201 << 10,
    "kernel_page_size": 4 << 10,
    "mmu_page_size": 64 << 10,
    "rss": 202 << 10,
    "pss": 203 << 10,
    "pss_dirty": 219 << 10,
    "shared_clean": 204 << 10,
    "shared_dirty": 205 << 10,
    "private_clean": 206 << 10,
    "private_dirty": 207 << 10,
    "referenced": 208 << 10,
    "anonymous": 209 << 10,
    "lazy_free": 210 << 10,
    "anon_huge_pages": 211 << 10,
    "shmem_pmd_mapped": 212 << 10,
    "file_pmd_mapped": 213 << 10,
    "shared_hugetlb": 214 << 10,
    "private_hugetlb": 215 << 10,
    "swap": 216 << 10,
    "swap_pss": 217 << 10,
    "locked": 218 << 10,
    "thp_eligible": 0,
    "protection_key": 15,
}
LINUX_6_18 = b"""\
Size:                301 kB
KernelPageSize:        4 kB
MMUPageSize:          64 kB
Rss:                 302 kB
Pss:                 303 kB
Pss_Dirty:           319 kB
Shared_Clean:        304 kB
Shared_Dirty:        305 kB
Private_Clean:       306 kB
Private_Dirty:       307 kB
Referenced:          308 kB
Anonymous:           309 kB
KSM:                 320 kB
LazyFree:            310 kB
AnonHugePages:       311 kB
ShmemPmdMapped:      312 kB
FilePmdMapped:       313 kB
Shared_Hugetlb:      314 kB
Private_Hugetlb:     315 kB
Swap:                316 kB
SwapPss:             317 kB
Locked:              318 kB
THPeligible:           1
ProtectionKey:         3
VmFlags: rd wr mr mw me lo ac gu sd 
"""  # noqa: W291  the kernel leaves the blank at the end
FIGURES_6_18 = {
    "size": 301 << 10,
    "kernel_page_size": 4 << 10,
    "mmu_page_size": 64 << 10,
    "rss": 302 << 10,
    "pss": 303 << 10,
    "pss_dirty": 319 << 10,
    "shared_clean": 304 << 10,
    "shared_dirty": 305 << 10,
    "private_clean": 306 << 10,
    "private_dirty": 307 << 10,
    "referenced": 308 << 10,
    "anonymous": 309 << 10,
    "ksm": 320 << 10,
    "lazy_free": 310 << 10,
    "anon_huge_pages": 311 << 10,
    "shmem_pmd_mapped": 312 << 10,
    "file_pmd_mapped": 313 << 10,
    "shared_hugetlb": 314 << 10,
    "private_hugetlb": 315 << 10,
    "swap": 316 << 10,
    "swap_pss": 317 << 10,
    "locked": 318 << 10,
    "thp_eligible": 1,
    "protection_key": 3,
}


def numbered(first: int, labels: str, flags: str) -> tuple[bytes, dict[str, int]]:
    """A record whose figures are numbered from ``first`` on, and what it says.

    A label with an ``=`` has no unit.
    """
    lines, figures = [], {}
    for number, label in enumerate(labels.split(), first):
        name = SNAKE.sub("_", label.strip("=")).lower()
        plain = label.endswith("=")
        lines.append(f"{label.strip('=') + ':':16}{number:8}{'' if plain else ' kB'}\n")
        figures[name] = number if plain else number << 10
    return "".join([*lines, f"VmFlags: {flags} \n"]).encode(), figures


SNAKE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=MMU)(?=P)|(?<=THP)(?=e)")
# 5.15 is 5.10 with protection keys built in; 6.6 writes THPeligible in another column than 6.1.
LINUX_5_15, FIGURES_5_15 = numbered(
    501,
    "Size KernelPageSize MMUPageSize Rss Pss Shared_Clean Shared_Dirty Private_Clean "
    "Private_Dirty Referenced Anonymous LazyFree AnonHugePages ShmemPmdMapped FilePmdMapped "
    "Shared_Hugetlb Private_Hugetlb Swap SwapPss Locked THPeligible= ProtectionKey=",
    "rd wr",
)
LINUX_6_6, FIGURES_6_6 = numbered(
    601,
    "Size KernelPageSize MMUPageSize Rss Pss Pss_Dirty Shared_Clean Shared_Dirty Private_Clean "
    "Private_Dirty Referenced Anonymous LazyFree AnonHugePages ShmemPmdMapped FilePmdMapped "
    "Shared_Hugetlb Private_Hugetlb Swap SwapPss Locked THPeligible= ProtectionKey=",
    "rd sh",
)
# KSM came with 6.8.
LINUX_6_12, FIGURES_6_12 = numbered(
    701,
    "Size KernelPageSize MMUPageSize Rss Pss Pss_Dirty Shared_Clean Shared_Dirty Private_Clean "
    "Private_Dirty Referenced Anonymous KSM LazyFree AnonHugePages ShmemPmdMapped FilePmdMapped "
    "Shared_Hugetlb Private_Hugetlb Swap SwapPss Locked THPeligible= ProtectionKey=",
    "rd sl",
)
# A kernel to come: one figure more in the middle, one at the end, one line less.
FUTURE = LINUX_6_18.replace(b"LazyFree:            310 kB\n", b"LazyFreeHUGEPages:   330 kB\n")
FUTURE = FUTURE.replace(b"VmFlags", b"ColdScore:            99\nVmFlags")
FIGURES_FUTURE = {name: value for name, value in FIGURES_6_18.items() if name != "lazy_free"}
FIGURES_FUTURE |= {"lazy_free_huge_pages": 330 << 10, "cold_score": 99}
# The first Windows Subsystem for Linux.
WSL = b"Pss:                   5 kB\n"
# What smaps_rollup has beside smaps.
ROLLUP_LINE = b"55d0c8a00000-7ffd1c9f1000 ---p 00000000 00:00 0                          [rollup]\n"
ROLLUP = b"""\
Rss:                 401 kB
Pss:                 402 kB
Pss_Dirty:           403 kB
Pss_Anon:            404 kB
Pss_File:            405 kB
Pss_Shmem:           406 kB
Locked:              407 kB
"""
FIGURES_ROLLUP = {
    "rss": 401 << 10,
    "pss": 402 << 10,
    "pss_dirty": 403 << 10,
    "pss_anon": 404 << 10,
    "pss_file": 405 << 10,
    "pss_shmem": 406 << 10,
    "locked": 407 << 10,
}


class Form(NamedTuple):
    """The lines of one record as some kernel writes them, and what they say."""

    text: bytes
    figures: dict[str, int]
    vm_flags: frozenset[str] | None


def flags(names: str) -> frozenset[str]:
    return frozenset(names.split())


FORMS = {
    "5.10": Form(LINUX_5_10, FIGURES_5_10, flags("rd wr mr mw me ac sd")),
    "5.15": Form(LINUX_5_15, FIGURES_5_15, flags("rd wr")),
    "6.6": Form(LINUX_6_6, FIGURES_6_6, flags("rd sh")),
    "6.12": Form(LINUX_6_12, FIGURES_6_12, flags("rd sl")),
    "6.1": Form(LINUX_6_1, FIGURES_6_1, flags("rd ex mr mw me")),
    "6.18": Form(LINUX_6_18, FIGURES_6_18, flags("rd wr mr mw me lo ac gu sd")),
    "future": Form(FUTURE, FIGURES_FUTURE, flags("rd wr mr mw me lo ac gu sd")),
    "WSL": Form(WSL, {"pss": 5 << 10}, None),
    "rollup": Form(ROLLUP, FIGURES_ROLLUP, None),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def described(record: SmapsRecord) -> tuple[object, ...]:
    return (
        record.start,
        record.end,
        record.permissions,
        record.offset,
        record.device,
        record.inode,
        record.pathname,
    )


HEADS: list[tuple[bytes, tuple[object, ...]]] = [
    (
        FIRST,
        (0x55D0C8A00000, 0x55D0C8A21000, "rw-p", 0x1F000, "08:0a", 131097, "/usr/bin/cat"),
    ),
    (SECOND, (0x7F2B8C000000, 0x7F2B8C003000, "---s", 0, "00:1d", 7, None)),
    (
        THIRD,
        (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "--xp", 0, "00:00", 0, "[vsyscall]"),
    ),
]


@every_form
def test_smaps_of_every_kernel_is_read_figure_by_figure(form: Form) -> None:
    records = parse_smaps(b"".join(head + form.text for head, _ in HEADS))
    assert [described(record) for record in records] == [expected for _, expected in HEADS]
    for record in records:
        assert record.figures == form.figures
        assert record.vm_flags == form.vm_flags
        for name, value in form.figures.items():
            assert getattr(record, name) == value, name
        for name in set(NAMES) - set(form.figures):
            assert getattr(record, name) is None, name


def test_records_of_one_text_may_have_different_figures() -> None:
    texts = [FORMS[name] for name in ("6.18", "WSL", "5.10", "future", "6.1", "rollup", "6.18")]
    records = parse_smaps(b"".join(FIRST + form.text for form in texts))
    assert [record.figures for record in records] == [form.figures for form in texts]
    assert [record.vm_flags for record in records] == [form.vm_flags for form in texts]


def test_the_rollup_of_all_mappings_is_one_record() -> None:
    (record,) = parse_smaps(ROLLUP_LINE + ROLLUP)
    assert (record.pathname, record.permissions) == ("[rollup]", "---p")
    assert record.figures == FIGURES_ROLLUP


def test_the_smaps_and_the_rollup_of_this_process_can_be_read() -> None:
    with Path("/proc/self/smaps").open("rb", buffering=1 << 22) as file:
        records = parse_smaps(file.read())
    assert sum(record.size or 0 for record in records) == sum(r.end - r.start for r in records)
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.exists():
        (total,) = parse_smaps(rollup.read_bytes())
        assert total.pss is not None


def test_lines_of_maps_are_records_without_figures() -> None:
    records = parse_maps(b"".join(head for head, _ in HEADS))
    assert [described(record) for record in records] == [expected for _, expected in HEADS]
    for record in records:
        assert record.figures == {}
        assert record.vm_flags is None
        assert record.rss is None


@pytest.mark.parametrize("parse", [parse_maps, parse_smaps])
def test_no_text_has_no_records(parse: Callable[[bytes], list[SmapsRecord]]) -> None:
    assert parse(b"") == []


# ---- the parser: damaged text


@every_form
def test_a_text_cut_anywhere_is_read_as_whole_records_or_refused(form: Form) -> None:
    text = b"".join(head + form.text for head, _ in HEADS)
    whole = parse_smaps(text)
    ends = {0: 0} | {
        sum(len(head + form.text) for head, _ in HEADS[:count]): count for count in (1, 2, 3)
    }
    for length in range(len(text) + 1):
        if length in ends:
            assert parse_smaps(text[:length]) == whole[: ends[length]]
        elif form.vm_flags is None and text[:length].endswith(b" kB\n"):
            # Short forms have no line that is always the last: figures may be missing.
            assert parse_smaps(text[:length])[:-1] == whole[: len(parse_smaps(text[:length])) - 1]
        else:
            with pytest.raises(ValueError, match=r": b'"):
                parse_smaps(text[:length])


def test_lines_of_maps_cut_anywhere_are_read_whole_or_refused() -> None:
    text = b"".join(head for head, _ in HEADS)
    whole = parse_maps(text)
    for length in range(len(text) + 1):
        lines = text[:length].count(b"\n")
        if length == sum(len(head) for head, _ in HEADS[:lines]):
            assert parse_maps(text[:length]) == whole[:lines]
        else:
            with pytest.raises(ValueError, match=r": b'"):
                parse_maps(text[:length])


UNREADABLE_HEADS = [
    b"",
    b" ",
    b"nonsense",
    b"55d0c8a00000 rw-p 00000000 08:0a 13 /x",
    b"55d0c8a00000-55d0c8a21000",
    b"55d0c8a00000-55d0c8a21000 rw-",
    b"55d0c8a00000-55d0c8a21000 rw-p",
    b"55d0c8a00000-55d0c8a21000 rw-p 00000000",
    b"55d0c8a00000-55d0c8a21000 rw-p 00000000 08:0a",
    b"55d0c8a00000-55d0c8a21000 rw-p 00000000 08:0a ",
    b"55d0c8a00000-55d0c8a21000 rw-p 00000000 080a 13",
    b"55d0c8a00000-55d0c8a21000 rw-q 00000000 08:0a 13",
    b"55d0c8a00000-55d0c8a21000 wr-p 00000000 08:0a 13",
    b"55d0c8a00000-55d0c8a21000 rw-pp 00000000 08:0a 13",
    b"55d0c8a00000-55d0c8a21000 rw-p 0000000g 08:0a 13",
    b"55d0c8a00000-55d0c8a21000 rw-p 00000000 08:0a 13x",
    b"55d0c8a00000-55d0c8a21000 rw-p 00000000 08:0a 18446744073709551616 /x",
    b"55d0c8a21000-55d0c8a00000 rw-p 00000000 08:0a 13 /x",
    b"55D0C8A00000-55D0C8A21000 rw-p 00000000 08:0a 13 /x",
    b"10000000000000000-10000000000001000 rw-p 00000000 08:0a 13 /x",
    b"-55d0c8a21000 rw-p 00000000 08:0a 13 /x",
]


@pytest.mark.parametrize("line", UNREADABLE_HEADS)
def test_a_line_of_maps_that_cannot_be_read_is_quoted(line: bytes) -> None:
    for parse, after in ((parse_maps, FIRST), (parse_smaps, FIRST + LINUX_6_18)):
        with pytest.raises(ValueError, match=re.escape(repr(line))):
            parse(after + line + b"\n" + after)


@pytest.mark.parametrize(
    "line",
    [
        b"Rss",
        b"Rss:",
        b"Rss: kB",
        b"Rss: -1 kB",
        b"Rss: 1",
        b"Rss: 1 MB",
        b"Rss: 1 kB x",
        b"Rss: 0x10 kB",
        b"Rss: 18014398509481984 kB",
        b"Rss: 18446744073709551617 kB",
        b"THPeligible: 1 kB",
        b"Novelty: many",
        b"RSS: 1 kB",
        b"rss: 1 kB",
    ],
)
def test_a_figure_that_cannot_be_read_is_quoted(line: bytes) -> None:
    text = FIRST + LINUX_6_18.replace(b"Rss:                 302 kB", line)
    with pytest.raises(ValueError, match=re.escape(repr(line)[:-1])):
        parse_smaps(text)


@pytest.mark.parametrize("line", [b"Rss: 1 kB\n", b"VmFlags: rd\n", b"ColdScore: 2\n"])
def test_a_figure_given_twice_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=line[:4].decode()):
        parse_smaps(FIRST + FUTURE + line)


def test_figures_before_any_mapping_are_refused() -> None:
    with pytest.raises(ValueError, match="Size"):
        parse_smaps(LINUX_6_18)
    with pytest.raises(ValueError, match="Size"):
        parse_maps(FIRST + LINUX_6_18)


@pytest.mark.parametrize("text", [None, "text", bytearray(b""), 5])
def test_only_bytes_are_parsed(text: object) -> None:
    for parse in (parse_maps, parse_smaps):
        with pytest.raises(TypeError):
            parse(text)  # type: ignore[arg-type]


@given(
    st.binary(max_size=300),
    st.integers(0, len(FIRST + LINUX_6_18)),
    st.integers(0, 40),
)
def test_damaged_text_is_read_or_refused(damage: bytes, at: int, length: int) -> None:
    text = FIRST + LINUX_6_18
    text = text[:at] + damage + text[at + length :]
    with suppress(ValueError):
        for record in parse_smaps(text):
            assert record.start <= record.end
    with suppress(ValueError):
        parse_maps(text)


# ---- the parser: generated maps

PATHS = st.one_of(
    st.just(b""),
    st.sampled_from([b"[heap]", b"[stack]", b"[anon:a name]", b"/memfd:x (deleted)", b"/a  b "]),
    st.binary(max_size=80).map(lambda name: b"/" + name.replace(b"\0", b"")),
)


class Line(NamedTuple):
    """What one line of maps says; the path is as the file system has it."""

    start: int
    end: int
    permissions: str
    offset: int
    major: int
    minor: int
    inode: int
    path: bytes


@st.composite
def generated_line(draw: st.DrawFn) -> Line:
    start = draw(st.integers(0, (1 << 52) - 2))
    end = draw(st.integers(start + 1, (1 << 52) - 1))
    permissions = "".join(draw(st.sampled_from(pair)) for pair in ("r-", "w-", "x-", "ps"))
    offset, major, minor, inode = (
        draw(st.integers(0, (1 << bits) - 1)) for bits in (64, 12, 20, 64)
    )
    # The kernel's text is ambiguous for these four characters.
    path = draw(PATHS).replace(b"\\012", b"")
    return Line(start * PAGE, end * PAGE, permissions, offset, major, minor, inode, path)


def kernels_line(line: Line) -> bytes:
    """The line as ``show_map_vma`` in the kernel's fs/proc/task_mmu.c writes it."""
    head = (
        f"{line.start:08x}-{line.end:08x} {line.permissions} {line.offset:08x} "
        f"{line.major:02x}:{line.minor:02x} {line.inode} "
    ).encode()
    if not line.path:
        return head + b"\n"
    return head.ljust(73) + line.path.replace(b"\n", b"\\012") + b"\n"


LINE = re.compile(rb"(\w+)-(\w+) (\S{4}) (\w+) (\w+:\w+) (\d+) *(.*)")


@settings(deadline=None)
@given(st.lists(generated_line(), max_size=20))
def test_generated_maps_are_read_as_plain_python_reads_them(lines: list[Line]) -> None:
    text = b"".join(map(kernels_line, lines))
    records = parse_maps(text)
    assert len(records) == len(lines)
    plain = [LINE.fullmatch(line) for line in text.split(b"\n")[:-1]]
    for record, match, line in zip(records, plain, lines, strict=True):
        assert match is not None
        start, end, permissions, offset, device, inode, path = match.groups()
        name = os.fsdecode(path.replace(b"\\012", b"\n")) or None
        assert described(record) == (
            int(start, 16),
            int(end, 16),
            permissions.decode(),
            int(offset, 16),
            device.decode(),
            int(inode),
            name,
        )
        assert os.fsencode(record.pathname or "") == line.path


# ---- records


def one_record(text: bytes = FUTURE) -> SmapsRecord:
    (record,) = parse_smaps(FIRST + text)
    return record


def test_figures_of_a_newer_kernel_are_attributes_under_their_snake_case_names() -> None:
    record = one_record()
    assert record.lazy_free_huge_pages == 330 << 10
    assert record.cold_score == 99
    assert {"cold_score", "rss"} <= set(dir(record))
    with pytest.raises(AttributeError, match="hot_score"):
        _ = record.hot_score


def test_a_figure_called_like_another_attribute_is_kept_among_the_figures() -> None:
    record = one_record(FUTURE.replace(b"ColdScore", b"Start"))
    assert record.figures["start"] == 99
    assert record.start == 0x55D0C8A00000


def test_a_record_cannot_be_changed_or_made() -> None:
    record: Any = one_record()
    for name in ("start", "pathname", "rss", "cold_score", "vm_flags", "new"):
        with pytest.raises(AttributeError):
            setattr(record, name, 1)
    with pytest.raises(TypeError):
        record.figures["rss"] = 1
    with pytest.raises(TypeError, match="parse_smaps"):
        type(record)()


def test_records_are_equal_when_all_they_say_is() -> None:
    assert one_record() == one_record()
    assert hash(one_record()) == hash(one_record())
    assert len({one_record(), one_record()}) == 1
    assert one_record() != object()
    for change in (
        (b"302 kB", b"303 kB"),
        (b"ColdScore:            99", b"ColdScore:            98"),
        (b"VmFlags: rd", b"VmFlags: ex"),
        (b"Rss:                 302 kB\n", b""),
    ):
        assert one_record() != one_record(FUTURE.replace(*change))
    heads = [
        FIRST,
        FIRST.replace(b"55d0c8a00000", b"55d0c8a01000"),
        FIRST.replace(b"55d0c8a21000", b"55d0c8a22000"),
        FIRST.replace(b"rw-p", b"rw-s"),
        FIRST.replace(b"0001f000", b"00020000"),
        FIRST.replace(b"08:0a", b"08:0b"),
        FIRST.replace(b"08:0a", b"09:0a"),
        FIRST.replace(b"131097", b"131098"),
        FIRST.replace(b"cat", b"dog"),
    ]
    assert len(set(parse_maps(b"".join(heads)))) == len(heads)


def pickled(record: SmapsRecord) -> SmapsRecord:
    return cast(SmapsRecord, pickle.loads(pickle.dumps(record)))  # noqa: S301  our own


@every_form
def test_records_are_pickled_and_copied_whole(form: Form) -> None:
    record = one_record(form.text)
    for other in (pickled(record), copy.copy(record), copy.deepcopy(record)):
        assert other == record
        assert described(other) == described(record)
        assert other.figures == form.figures
    (line,) = parse_maps(SECOND)
    assert pickled(line) == line


def test_the_representation_tells_the_range_the_path_and_the_figures() -> None:
    text = repr(one_record())
    for part in ("55d0c8a00000-55d0c8a21000", "rw-p", "'/usr/bin/cat'", f"rss={302 << 10}"):
        assert part in text


def test_figures_are_listed_in_the_kernels_order() -> None:
    assert tuple(one_record(LINUX_6_18).figures) == NAMES

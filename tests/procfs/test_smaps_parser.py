"""The parser of smaps and maps: texts of many kernels, cut, damaged and generated ones."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_oracle import PAGE
from smaps_texts import (
    FIGURES_ROLLUP,
    FIRST,
    FORMS,
    FUTURE,
    HEADS,
    LINUX_6_18,
    ROLLUP,
    ROLLUP_LINE,
    Form,
    described,
    every_form,
)
from vmm_linux._core.procfs import NAMES, SmapsRecord, parse_maps, parse_smaps

if TYPE_CHECKING:
    from collections.abc import Callable


# ---- the parser: kernels -------------------------------------------------------------------------


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


# ---- the parser: damaged text --------------------------------------------------------------------


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


# ---- the parser: generated maps ------------------------------------------------------------------

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

"""What /proc/self tells of pages, and of one mapping in smaps; the kernel is the oracle."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from kernel_oracle import ARENA, PAGE, USER_SPACE_END
from own_memory import READ, WRITE, islands, mapped, memory_file, own, page_way
from vmm_linux import VMM
from vmm_linux._core.kernel import Feature, available, without

if TYPE_CHECKING:
    from vmm_linux._core.procfs import OwnProcess


__all__ = ["own", "page_way"]  # the fixtures

MADV_HUGEPAGE, MADV_GUARD_INSTALL = 14, 102


TOLD = {
    "scan": {"present", "swapped", "huge", "guard", "locked", "file_or_shared"},
    "scan and pagemap": {"present", "swapped", "huge", "locked", "file_or_shared"},
    "pagemap": {"present", "swapped", "guard", "locked", "file_or_shared"},
    "mincore": {"present", "locked"},
}


# ---- one page ------------------------------------------------------------------------------------


def check_page(own: OwnProcess, address: int, way: str, **expected: bool | None) -> None:
    """Compare the facts that this way tells; what it does not tell must be None."""
    if not available(Feature.PAGEMAP_SCAN) and "huge" in expected:
        del expected["huge"]
    nothing = dict.fromkeys(
        ("present", "swapped", "huge", "guard", "locked", "file_or_shared"), False
    )
    for name, fact in own.page(address).items():
        if name not in TOLD[way]:
            assert fact is None, name
        else:
            assert fact is {**nothing, **expected}[name], name


knows_all_facts = pytest.mark.skipif(
    not all(map(available, (Feature.PAGEMAP_SCAN, Feature.PAGEMAP_GUARD))),
    reason="this kernel does not tell all facts",
)


@knows_all_facts
def test_memory_never_touched_is_not_present(own: OwnProcess, page_way: str) -> None:
    with mapped(ARENA, PAGE):
        check_page(own, ARENA, page_way)


@knows_all_facts
def test_memory_written_to_is_present(own: OwnProcess, page_way: str) -> None:
    with mapped(ARENA, 2 * PAGE):
        ctypes.memset(ARENA + PAGE, 1, 1)
        check_page(own, ARENA, page_way)
        check_page(own, ARENA + PAGE, page_way, present=True)
        check_page(own, ARENA + 2 * PAGE - 1, page_way, present=True)


@knows_all_facts
def test_the_zero_page_is_present(own: OwnProcess, page_way: str) -> None:
    with mapped(ARENA, PAGE):
        ctypes.string_at(ARENA, 1)
        check_page(own, ARENA, page_way, present=True)


@knows_all_facts
def test_a_page_without_access_is_still_present(own: OwnProcess, page_way: str) -> None:
    with mapped(ARENA, PAGE):
        ctypes.memset(ARENA, 1, 1)
        kernel.protect(ARENA, PAGE, 0)
        check_page(own, ARENA, page_way, present=True)


@knows_all_facts
def test_a_guard_is_no_swapped_page(own: OwnProcess, page_way: str) -> None:
    with mapped(ARENA, PAGE):
        assert kernel.libc.madvise(ARENA, PAGE, MADV_GUARD_INSTALL) == 0
        if page_way == "scan and pagemap":
            # Guards exist, this kernel does not show them: it may be either.
            assert own.page(ARENA)["swapped"] is None
        else:
            check_page(own, ARENA, page_way, guard=True)


@knows_all_facts
def test_shared_memory_is_of_a_file(own: OwnProcess, page_way: str) -> None:
    with memory_file(PAGE) as fd, mapped(ARENA, PAGE, fd=fd):
        ctypes.memset(ARENA, 1, 1)
        check_page(own, ARENA, page_way, present=True, file_or_shared=True)


@knows_all_facts
def test_looking_at_a_hole_in_shared_memory_does_not_fill_it(
    own: OwnProcess, page_way: str
) -> None:
    with memory_file(PAGE) as fd, mapped(ARENA, PAGE, fd=fd):
        check_page(own, ARENA, page_way)
        own.span(ARENA)
        own.record(ARENA)
        assert os.fstat(fd).st_blocks == 0
        assert kernel.present_pages(ARENA, 1) == [False]


@pytest.mark.parametrize("protection", [READ | WRITE, READ, 0])
@knows_all_facts
def test_a_locked_mapping_is_locked_whatever_its_access(
    own: OwnProcess, page_way: str, protection: int
) -> None:
    with mapped(ARENA, 2 * PAGE):
        ctypes.memset(ARENA, 7, 2 * PAGE)
        assert kernel.libc.mlock(ARENA, PAGE) == 0
        kernel.protect(ARENA, 2 * PAGE, protection)
        check_page(own, ARENA, page_way, present=True, locked=True)
        check_page(own, ARENA + PAGE, page_way, present=True)
        kernel.protect(ARENA, 2 * PAGE, READ)
        assert ctypes.string_at(ARENA, 2 * PAGE) == b"\7" * 2 * PAGE


@knows_all_facts
def test_locked_shared_memory_is_locked(own: OwnProcess, page_way: str) -> None:
    with memory_file(2 * PAGE) as fd, mapped(ARENA, 2 * PAGE, fd=fd):
        assert kernel.libc.mlock(ARENA, PAGE) == 0
        check_page(own, ARENA, page_way, present=True, locked=True, file_or_shared=True)
        check_page(own, ARENA + PAGE, page_way)


@knows_all_facts
def test_where_nothing_is_mapped_nothing_is_known_of_locks(own: OwnProcess, page_way: str) -> None:
    check_page(own, ARENA, page_way, locked=None)


@knows_all_facts
def test_a_page_of_a_huge_page_is_huge(own: OwnProcess, page_way: str) -> None:
    figure = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    if not figure.exists():
        pytest.skip("this kernel has no huge pages")
    size = int(figure.read_text())
    start = ARENA // size * size
    with mapped(start, size):
        kernel.libc.madvise(start, size, MADV_HUGEPAGE)
        ctypes.memset(start, 1, 1)
        (record,) = (r for r in kernel.smaps() if r.mapping.start == start)
        huge = record.figures["AnonHugePages"] > 0
        check_page(own, start + size - PAGE, page_way, present=huge, huge=huge)


def test_a_process_with_no_right_to_its_pagemap_still_learns_what_is_present() -> None:
    def child() -> None:
        import ctypes

        from vmm_linux._core.kernel import Feature, available
        from vmm_linux._core.procfs import OwnProcess

        for feature in Feature:
            available(feature)
        # An ordinary user's process that may not be dumped has no right to its own pagemap.
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
        facts = OwnProcess().page(id(None))
        print(facts["present"], facts["swapped"], facts["locked"])

    done = run_child(child, nobody=True)
    assert (done.stdout.split(), done.stderr) == (["True", "None", "False"], "")


# ---- one record of smaps -------------------------------------------------------------------------


def test_the_record_at_an_address_is_that_mappings(own: OwnProcess) -> None:
    before = kernel.maps()
    records = [own.record(mapping.end - 1) for mapping in before if mapping.end <= USER_SPACE_END]
    unchanged = set(before) & set(kernel.maps())
    compared = 0
    for mapping, record in zip(before, records, strict=False):
        if mapping in unchanged:
            assert record is not None
            assert tuple(mapping) == (
                record.start,
                record.end,
                record.permissions,
                record.offset,
                record.device,
                record.inode,
                record.pathname or "",
            )
            compared += 1
    assert compared > len(before) * 0.9


def test_the_record_among_many_mappings_has_its_own_figures(own: OwnProcess) -> None:
    with islands(1000):
        for island in range(0, 1000, 37):
            address = ARENA + 2 * island * PAGE
            assert own.record(address + PAGE) is None
            record = own.record(address)
            assert record is not None
            assert (record.start, record.size, record.rss) == (address, PAGE, 0)


def test_figures_of_the_record_are_the_kernels(own: OwnProcess) -> None:
    with mapped(ARENA, 8 * PAGE):
        ctypes.memset(ARENA, 1, 3 * PAGE)
        assert kernel.libc.mlock(ARENA, 8 * PAGE) == 0
        record = own.record(ARENA + PAGE)
        (expected,) = (r for r in kernel.smaps() if r.mapping.start == ARENA)
        assert record is not None
        assert list(record.figures.values()) == list(expected.figures.values())
        assert record.rss == record.locked == 8 * PAGE
        assert record.vm_flags == expected.vm_flags
        assert "lo" in record.vm_flags


# ---- paths of real files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"plain",
        b"with a space",
        b"  spaces  around  ",
        b"new\nline",
        b"two\n\nlines\n",
        b"tab\tand\rreturn",
        b"back\\slash",
        b"back\\040slash",
        b"x (deleted)",
        b"x (deleted) (deleted)",
        b"not utf-8 \xff\xfe",
        "Ünïcödé \N{SNOWMAN}".encode(),
        b"Rss:  1 kB",
        b"a" * 255,
    ],
)
def test_the_path_of_a_mapped_file_is_the_files(
    own: OwnProcess, tmp_path: Path, name: bytes
) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(fd, PAGE)
    with mapped(ARENA, PAGE, READ, fd):
        status = os.fstat(fd)
        os.close(fd)
        record = own.record(ARENA)
        assert record is not None
        assert record.pathname == os.fsdecode(path)
        assert Path(record.pathname).stat().st_ino == record.inode == status.st_ino
        assert not record.deleted
        assert own.span(ARENA)[5] == record.inode
        with without(Feature.PROCMAP_QUERY):
            assert own.span(ARENA)[5] == record.inode
        Path(record.pathname).unlink()
        record = own.record(ARENA)
        assert record is not None
        assert record.pathname == os.fsdecode(path) + " (deleted)"
        assert record.deleted


@pytest.mark.parametrize("name", ["a\\012b", "a\nb", "a\\012b\n\\012", "\\012 (deleted)"])
def test_a_backslash_and_012_in_a_name_is_told_from_a_newline_where_the_kernel_can(
    own: OwnProcess, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, mapped(ARENA, PAGE, READ, file.fileno()):

        def names() -> list[str | None]:
            with VMM() as vmm:
                records = [own.record(ARENA), own.record(ARENA + PAGE - 1), vmm.query(ARENA).smaps]
            return [record.pathname for record in records if record is not None]

        told = str(path) if available(Feature.PROCMAP_QUERY) else str(path).replace("\\012", "\n")
        assert names() == [told] * 3
        with without(Feature.PROCMAP_QUERY):
            assert names() == [str(path).replace("\\012", "\n")] * 3
        path.unlink()
        assert names() == [f"{told} (deleted)"] * 3


def test_another_file_under_the_name_of_a_deleted_one_is_not_taken_for_it(
    own: OwnProcess, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, mapped(ARENA, PAGE, READ, file.fileno()):
        path.unlink()
        (tmp_path / "file (deleted)").write_bytes(bytes(PAGE))
        record = own.record(ARENA)
        assert record is not None
        assert record.deleted


def test_a_memory_file_is_deleted_and_private_memory_is_not(own: OwnProcess) -> None:
    with memory_file(PAGE) as fd, mapped(ARENA, PAGE, READ, fd):
        record = own.record(ARENA)
        assert record is not None
        assert record.pathname == "/memfd:test (deleted)"
        assert record.deleted
    with mapped(ARENA, PAGE):
        record = own.record(ARENA)
        assert record is not None
        assert record.pathname is None
        assert not record.deleted

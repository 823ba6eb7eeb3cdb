"""What /proc tells: the mapping, the page and the record of smaps at an address, and the parser.

The kernel is the oracle: answers are compared with a plain reading of /proc (kernel_oracle), with
every interface switched off in turn, so that each way around a missing one is taken too.
"""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import random
import re
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_oracle as kernel
from children import run_child
from forked import in_child
from kernel_oracle import ARENA, MAP_FIXED_NOREPLACE, MAP_SHARED, PAGE, USER_SPACE_END
from vmm_linux._features import Feature, available, without
from vmm_linux._procfs import NAMES, OwnProcess, SmapsRecord, parse_maps, parse_smaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ, WRITE, EXECUTE, SHARED = 1, 2, 4, 8
MADV_HUGEPAGE, MADV_GUARD_INSTALL = 14, 102

kernel.libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kernel.libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@pytest.fixture
def own() -> Iterator[OwnProcess]:
    process = OwnProcess()
    yield process
    process.close()


@pytest.fixture(params=["query", "text"])
def ways_to_span(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to find a mapping: by asking for it, and by reading them all."""
    with without(*([Feature.PROCMAP_QUERY] if request.param == "text" else [])):
        yield request.param


PAGE_WAYS = {
    "scan": [],
    "scan and pagemap": [Feature.PAGEMAP_GUARD],
    "pagemap": [Feature.PAGEMAP_SCAN],
    "mincore": [Feature.PAGEMAP_SCAN, Feature.PAGEMAP],
}


@pytest.fixture(params=PAGE_WAYS)
def page_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to look at a page."""
    with without(*PAGE_WAYS[request.param]):
        yield request.param


@contextmanager
def mapped(
    address: int, size: int, protection: int = READ | WRITE, fd: int = -1, offset: int = 0
) -> Iterator[int]:
    """A mapping at this address: private and anonymous, or of a file and shared."""
    flags = MAP_FIXED_NOREPLACE | (
        kernel.MAP_PRIVATE | kernel.MAP_ANONYMOUS if fd < 0 else MAP_SHARED
    )
    got = kernel.libc.mmap(address, size, protection, flags, fd, offset)
    assert got == address
    try:
        yield address
    finally:
        kernel.unmap(address, size)


@contextmanager
def memory_file(size: int) -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def islands(count: int) -> Iterator[int]:
    """``count`` mapped pages with a hole of one page after each."""
    size = 2 * count * PAGE
    kernel.map_at(ARENA, size, READ)
    try:
        for island in range(count):
            kernel.unmap(ARENA + (2 * island + 1) * PAGE, PAGE)
        yield ARENA
    finally:
        kernel.unmap(ARENA, size)


Answer = tuple[int, int, bool, int, int, int, str]


def expected_span(mappings: list[kernel.Mapping], address: int) -> Answer:
    """The answer of ``OwnProcess.span``, from a plain reading of maps."""
    low, high = 0, USER_SPACE_END
    for mapping in mappings:
        if mapping.start <= address < mapping.end:
            bits = sum(
                bit
                for bit, letter in ((READ, "r"), (WRITE, "w"), (EXECUTE, "x"), (SHARED, "s"))
                if letter in mapping.permissions
            )
            place = (mapping.offset, mapping.inode, mapping.device)
            return (mapping.start, mapping.end, True, bits, *place)
        if mapping.end <= address:
            low = mapping.end
        else:
            high = min(high, mapping.start)
            break
    return (low, high, False, 0, 0, 0, "00:00")


def check_spans(own: OwnProcess, addresses: list[int]) -> None:
    """Compare all answers with maps. What Python maps meanwhile for itself is left out."""
    before = kernel.maps()
    answers = [own.span(address) for address in addresses]
    after = kernel.maps()
    compared = 0
    for address, answer in zip(addresses, answers, strict=True):
        expected = expected_span(before, address)
        if expected == expected_span(after, address):
            assert answer == expected, hex(address)
            compared += 1
    assert compared > len(addresses) * 0.9


def borders() -> list[int]:
    """First, middle and last address of every mapping and every hole."""
    found = {0, USER_SPACE_END // 2, USER_SPACE_END - 1}
    mappings = [mapping for mapping in kernel.maps() if mapping.end <= USER_SPACE_END]
    for mapping in mappings:
        found |= {mapping.start, mapping.end - 1, (mapping.start + mapping.end) // 2}
        found |= {mapping.start - 1, mapping.end}
    for below, above in pairwise(mappings):
        found.add((below.end + above.start) // 2)
    return sorted(address for address in found if 0 <= address < USER_SPACE_END)


# ---- one mapping


@pytest.mark.usefixtures("ways_to_span")
def test_every_mapping_and_every_hole_is_found_from_each_of_its_ends(own: OwnProcess) -> None:
    check_spans(own, borders())


@pytest.mark.usefixtures("ways_to_span")
def test_random_addresses_lie_where_maps_says(own: OwnProcess) -> None:
    rng = random.Random(2)  # noqa: S311  the same addresses in every run
    low, high = ARENA, ARENA + 400 * PAGE
    with islands(200):
        for island in range(0, 200, 3):
            with suppress(OSError):
                kernel.protect(low + 2 * island * PAGE, PAGE, rng.choice([0, READ | WRITE]))
        anywhere = [rng.randrange(USER_SPACE_END) for _ in range(100)]
        scales = [rng.randrange(1 << rng.randrange(12, 47)) for _ in range(100)]
        near = [low - PAGE + rng.randrange(high - low + 2 * PAGE) for _ in range(300)]
        check_spans(own, [*near, *scales, *anywhere])


@pytest.mark.usefixtures("ways_to_span")
def test_holes_of_every_size_are_found_below_many_mappings(own: OwnProcess) -> None:
    top = ARENA + 8000 * PAGE
    with islands(2000):
        for bits in range(30):
            with mapped(top + (1 << bits) * PAGE, PAGE):
                hole = (ARENA + 3999 * PAGE, top + (1 << bits) * PAGE)
                for address in (hole[0], hole[1] - 1, sum(hole) // 2):
                    assert own.span(address)[:3] == (*hole, False)


@pytest.mark.usefixtures("ways_to_span")
def test_a_shared_file_mapping_tells_offset_inode_and_device(own: OwnProcess) -> None:
    with memory_file(8 * PAGE) as fd, mapped(ARENA, PAGE, READ, fd, 3 * PAGE):
        inode = os.fstat(fd).st_ino
        device = os.fstat(fd).st_dev
        assert own.span(ARENA + 17) == (
            ARENA,
            ARENA + PAGE,
            True,
            READ | SHARED,
            3 * PAGE,
            inode,
            f"{os.major(device):02x}:{os.minor(device):02x}",
        )


@pytest.mark.usefixtures("ways_to_span")
def test_an_answer_is_about_now(own: OwnProcess) -> None:
    hole = own.span(ARENA)
    assert not hole[2]
    with mapped(ARENA, 3 * PAGE):
        assert own.span(ARENA)[:4] == (ARENA, ARENA + 3 * PAGE, True, READ | WRITE)
        kernel.protect(ARENA + PAGE, PAGE, 0)
        assert own.span(ARENA)[:4] == (ARENA, ARENA + PAGE, True, READ | WRITE)
        assert own.span(ARENA + PAGE)[:4] == (ARENA + PAGE, ARENA + 2 * PAGE, True, 0)
    assert own.span(ARENA) == hole


@pytest.mark.usefixtures("ways_to_span")
def test_beyond_user_space_is_no_place_to_ask_about(own: OwnProcess) -> None:
    for address in (USER_SPACE_END, USER_SPACE_END + PAGE, (1 << 64) - 1):
        for question in (own.span, own.page, own.record):
            with pytest.raises(OSError, match="Invalid argument"):
                question(address)


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_what_is_no_address_is_refused(own: OwnProcess, address: int) -> None:
    for question in (own.span, own.page, own.record):
        with pytest.raises(OverflowError):
            question(address)


# ---- descriptors


def proc_files() -> dict[int, str]:
    """The descriptors of this process that lead to files of /proc, but for a listing's own."""
    return {
        fd: target
        for fd, target in kernel.descriptors().items()
        if re.fullmatch(r"/proc/\d+/(maps|smaps|pagemap)", target)
    }


def test_files_are_opened_when_needed_kept_and_closed() -> None:
    process = OwnProcess()
    assert proc_files() == {}
    for _ in range(3):
        process.span(ARENA)
    assert list(proc_files().values()) == [f"/proc/{os.getpid()}/maps"]
    for _ in range(3):
        process.page(ARENA)
        process.record(ARENA)
    assert sorted(proc_files().values()) == [
        f"/proc/{os.getpid()}/{name}" for name in ("maps", "pagemap", "smaps")
    ]
    assert not any(os.get_inheritable(fd) for fd in proc_files())
    process.close()
    process.close()
    assert proc_files() == {}
    assert not process.span(ARENA)[2]
    del process
    assert proc_files() == {}


def test_without_a_descriptor_to_spare_the_answer_is_emfile_and_later_the_truth() -> None:
    def child() -> None:
        import os
        import resource

        from vmm_linux._features import Feature, available
        from vmm_linux._procfs import OwnProcess

        list(map(available, Feature))
        own = OwnProcess()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        for question in (own.span, own.page, own.record):
            try:
                question(id(own))
            except OSError as error:
                print(error.strerror)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        print(own.span(id(own))[2], own.page(id(own))["present"], own.record(id(own)) is not None)

    done = run_child(child)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["Too many open files"] * 3 + ["True True True"]


@pytest.mark.usefixtures("ways_to_span")
@pytest.mark.parametrize("way", ["closed", "another file's"])
def test_a_descriptor_closed_behind_its_back_is_opened_again(way: str, page_way: str) -> None:
    process = OwnProcess()
    with mapped(ARENA, PAGE) as address:
        ctypes.memset(address, 1, 1)

        def ask() -> list[object]:
            return [process.span(address), process.page(address), process.record(address)]

        before = ask()
        numbers = list(proc_files())
        assert len(numbers) == (2 if page_way == "mincore" else 3)
        other = os.open("/dev/zero", os.O_RDONLY)
        for number in numbers:
            os.close(number)
            if way != "closed":
                os.dup2(other, number)
        assert ask() == before
        process.close()
        if way != "closed":
            # Another's file is not ours to close.
            for number in numbers:
                assert kernel.descriptors()[number] == "/dev/zero"
                os.close(number)
        os.close(other)


# ---- fork


@pytest.mark.usefixtures("ways_to_span", "page_way")
def test_a_forked_childs_answers_are_about_the_child(own: OwnProcess) -> None:
    with mapped(ARENA, 3 * PAGE) as address:
        ctypes.memset(address, 1, PAGE)

        def ask() -> list[object]:
            spans = [own.span(address + page * PAGE)[2:4] for page in range(3)]
            pages = [own.page(address + page * PAGE)["present"] for page in range(3)]
            records = [own.record(address + page * PAGE) for page in range(3)]
            sizes = [record and record.size for record in records]
            return [[list(span) for span in spans], pages, sizes]

        def child() -> list[Any]:
            kernel.unmap(address, PAGE)
            kernel.protect(address + 2 * PAGE, PAGE, READ)
            ctypes.memset(address + PAGE, 1, 1)
            return [ask(), ask(), list(proc_files().values()), os.getpid()]

        parents = [[[True, 3]] * 3, [True, False, False], [3 * PAGE] * 3]
        assert ask() == parents
        held = proc_files()
        first, second, files, pid = in_child(child)
        assert (
            first
            == second
            == [
                [[False, 0], [True, 3], [True, 1]],
                [False, True, False],
                [None, PAGE, PAGE],
            ]
        )
        assert len(files) == len(held)
        assert all(name.startswith(f"/proc/{pid}/") for name in files)
        assert ask() == parents
        assert proc_files() == held


def test_a_childs_close_leaves_its_other_files_alone(own: OwnProcess) -> None:
    own.span(ARENA)
    (number,) = proc_files()

    def child() -> list[object]:
        os.close(number)
        other = os.open("/dev/zero", os.O_RDONLY)
        os.dup2(other, number)
        mapping = own.span(ARENA)[2]
        own.close()
        return [mapping, kernel.descriptors()[number]]

    assert in_child(child) == [False, "/dev/zero"]


def test_a_grandchild_asks_about_itself(own: OwnProcess) -> None:
    own.span(ARENA)

    def child() -> bool:
        own.span(ARENA)
        with mapped(ARENA, PAGE):
            return in_child(lambda: own.span(ARENA)[2])

    assert in_child(child) is True
    assert not own.span(ARENA)[2]


# ---- one page

TOLD = {
    "scan": {"present", "swapped", "huge", "guard", "locked", "file_or_shared"},
    "scan and pagemap": {"present", "swapped", "huge", "locked", "file_or_shared"},
    "pagemap": {"present", "swapped", "guard", "locked", "file_or_shared"},
    "mincore": {"present", "locked"},
}


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

        from vmm_linux._features import Feature, available
        from vmm_linux._procfs import OwnProcess

        for feature in Feature:
            available(feature)
        # An ordinary user's process that may not be dumped has no right to its own pagemap.
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
        facts = OwnProcess().page(id(None))
        print(facts["present"], facts["swapped"], facts["locked"])

    done = run_child(child, nobody=True)
    assert (done.stdout.split(), done.stderr) == (["True", "None", "False"], "")


# ---- one record of smaps


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


# ---- paths of real files


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


def test_a_backslash_and_012_in_a_name_cannot_be_told_from_a_newline(
    own: OwnProcess, tmp_path: Path
) -> None:
    path = tmp_path / "a\\012b"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, mapped(ARENA, PAGE, READ, file.fileno()):
        record = own.record(ARENA)
        assert record is not None
        assert record.pathname == str(tmp_path / "a\nb")


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

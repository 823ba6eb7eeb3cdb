"""What /proc/self tells: the mapping, the page and the record of smaps at an address.

The kernel is the oracle: answers are compared with a plain reading of /proc (kernel_oracle), with
every interface switched off in turn, so that each way around a missing one is taken too.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import threading
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from children import run_child
from forked import in_child
from kernel_oracle import ARENA, MAP_FIXED_NOREPLACE, MAP_SHARED, PAGE, USER_SPACE_END
from vmm_linux import VMM
from vmm_linux._features import Feature, available, without
from vmm_linux._own_process import OwnProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

READ, WRITE, EXECUTE, SHARED = 1, 2, 4, 8
MADV_HUGEPAGE, MADV_GUARD_INSTALL = 14, 102


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
        if re.fullmatch(r"/proc/\d+/task/\d+/(maps|smaps|pagemap)", target)
    }


def test_files_are_opened_when_needed_kept_and_closed() -> None:
    process = OwnProcess()
    assert proc_files() == {}
    for _ in range(3):
        process.span(ARENA)
    folder = f"/proc/{os.getpid()}/task/{threading.get_native_id()}"
    assert list(proc_files().values()) == [f"{folder}/maps"]
    for _ in range(3):
        process.page(ARENA)
        process.record(ARENA)
    assert sorted(proc_files().values()) == [
        f"{folder}/{name}" for name in ("maps", "pagemap", "smaps")
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
        from vmm_linux._own_process import OwnProcess

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
        from vmm_linux._own_process import OwnProcess

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

"""Looking at memory of this process and of others; the kernel's own files are the oracle."""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from forked import in_child
from kernel_oracle import PAGE, USER_SPACE_END
from test_smaps import FORMS, HEADS
from vmm_linux import VMM, PageKind, PageState, Retcode, VmmError, VmmFlags, inspect
from vmm_linux._features import Feature, available, huge_page_size, without
from vmm_linux._inspect import read_mappings, read_pages
from vmm_linux.inspect import Mapping, PageFlags, PageRun, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
RESERVE = VmmFlags.RESERVE | READ_WRITE
COMMIT = RESERVE | VmmFlags.COMMIT
PR_SET_PDEATHSIG = 1
MADV_HUGEPAGE, MADV_GUARD_INSTALL = 14, 102
MAP_FIXED = 0x10

kernel.libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture
def vmm() -> Iterator[VMM]:
    with VMM() as made:
        yield made


@contextmanager
def stopped_child() -> Iterator[int]:
    """A forked child that does not run."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            kernel.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            while os.getppid() == parent:
                signal.pause()
        finally:
            os._exit(1)
    try:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        yield child
    finally:
        end(child)


@contextmanager
def stopped_program() -> Iterator[int]:
    """A program that does not run, and shares no page that anybody writes to."""
    child = os.fork()
    if child == 0:
        try:
            kernel.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            stop = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
            os.execv(sys.executable, [sys.executable, "-c", stop])  # noqa: S606  its own program
        finally:
            os._exit(1)
    try:
        os.waitpid(child, os.WUNTRACED)
        yield child
    finally:
        end(child)


def end(child: int) -> None:
    with suppress(ChildProcessError, ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture(params=["query", "text"])
def ways_to_one(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to find one mapping."""
    with without(*([Feature.PROCMAP_QUERY] if request.param == "text" else [])):
        yield request.param


PAGE_WAYS = {
    "scan": [],
    "scan without guards": [Feature.PAGEMAP_GUARD],
    "pagemap": [Feature.PAGEMAP_SCAN],
    "pagemap without guards": [Feature.PAGEMAP_SCAN, Feature.PAGEMAP_GUARD],
}


@pytest.fixture(params=PAGE_WAYS)
def ways_to_pages(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to find out about pages."""
    with without(*PAGE_WAYS[request.param]):
        yield request.param


def plain(mapping: Mapping) -> kernel.Mapping:
    """The mapping as the oracle tells one."""
    return kernel.Mapping(
        mapping.start,
        mapping.end,
        mapping.permissions,
        mapping.offset,
        mapping.device,
        mapping.inode,
        mapping.pathname or "",
    )


def lasting(mappings: list[kernel.Mapping]) -> list[kernel.Mapping]:
    """Without what grows while one looks: the heap and the stack."""
    return [mapping for mapping in mappings if mapping.pathname not in {"[heap]", "[stack]"}]


# ---- all mappings


def test_a_snapshot_has_every_mapping_of_this_process_with_every_figure(vmm: VMM) -> None:
    vmm.allocate(0, 4 * PAGE, COMMIT)
    before = lasting(kernel.maps())
    for snapshot in (inspect.snapshot(), inspect.maps()):
        assert snapshot.pid == os.getpid()
        found = lasting([plain(whole) for whole in snapshot.wholes()])
        assert set(before) & set(lasting(kernel.maps())) <= set(found)
        assert [mapping.start for mapping in snapshot] == sorted(m.start for m in snapshot)
    (record,) = [r for r in kernel.smaps() if r.mapping.pathname == "[vdso]"]
    (mapping,) = [m for m in inspect.snapshot() if m.pathname == "[vdso]"]
    assert mapping.size == record.figures["Size"]
    assert mapping.vm_flags == record.vm_flags


def test_the_figures_of_a_process_add_up_to_the_kernels_own_sum() -> None:
    with stopped_program() as child:
        # Others map the same libraries and unmap them: look until nobody did meanwhile.
        total = snapshot = None
        for _ in range(100):
            total, snapshot = inspect.rollup(child), inspect.snapshot(child)
            if total == inspect.rollup(child):
                break
        assert total is not None
        assert snapshot is not None
        assert snapshot.pid == child
        figures = dict(total.figures)
        # By kind they are told in the sum alone.
        kinds = [figures.pop(name, 0) for name in ("pss_anon", "pss_file", "pss_shmem")]
        assert abs(sum(kinds) - figures["pss"]) <= 3 * 1024
        for name, sum_of_all in figures.items():
            # Each record leaves out its fraction of a KiB where figures are divided.
            divided = name.startswith("pss") or name in {"swap_pss", "locked"}
            spare = 1024 * len(snapshot) if divided else 0
            assert 0 <= sum_of_all - snapshot.total(name) <= spare, name
        assert total.pathname == "[rollup]"
        assert (total.start, total.end) == (snapshot[0].start, total.end)


def test_a_snapshot_without_figures_has_the_same_mappings() -> None:
    with stopped_child() as child:
        full, lean = inspect.snapshot(child), inspect.maps(child)
        assert list(map(plain, full)) == list(map(plain, lean))
        assert all(mapping.rss is None and mapping.vm_flags is None for mapping in lean)
        assert all(mapping.rss is not None and mapping.vm_flags for mapping in full)


def test_a_snapshot_is_a_sequence() -> None:
    with stopped_child() as child:
        snapshot = inspect.maps(child)
    assert snapshot[0] == next(iter(snapshot))
    assert snapshot[-1] == snapshot[len(snapshot) - 1] == list(snapshot)[-1]
    assert list(snapshot[1:3]) == [snapshot[1], snapshot[2]]
    assert snapshot[1] in snapshot
    assert snapshot.index(snapshot[2]) == 2
    with pytest.raises(IndexError):
        snapshot[len(snapshot)]
    with pytest.raises(IndexError):
        snapshot[-len(snapshot) - 1]
    assert str(len(snapshot)) in repr(snapshot)


def test_a_snapshot_finds_the_mapping_at_an_address() -> None:
    snapshot = inspect.maps()
    for mapping in snapshot:
        assert snapshot.at(mapping.start) == snapshot.at(mapping.end - 1) == mapping
    assert snapshot.at(0) is None
    assert snapshot.at(1 << 64) is None


def test_text_that_comes_in_pieces_of_any_size_is_read_whole() -> None:
    form = FORMS["future"]
    text = b"".join(head + form.text for head, _ in HEADS)
    for cut in range(1, len(text)):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            theirs.send(text[:cut])
            theirs.send(text[cut:])
            theirs.close()
            found = read_mappings(ours.fileno(), figures=True, ours=False)
        assert [mapping.figures for mapping in found] == [form.figures] * len(HEADS)
        assert [plain(mapping)[:6] for mapping in found] == [told[:6] for _, told in HEADS]


def test_text_that_ends_early_or_has_an_unreadable_line_is_refused_with_the_line() -> None:
    text = b"".join(head + FORMS["6.18"].text for head, _ in HEADS)
    for damaged, line in (
        (text[:-3], "VmFlags: rd wr mr"),
        (text + b"nonsense\n", "nonsense"),
        (text[: text.rindex(b"VmFlags")], "[vsyscall]"),
    ):
        fd = os.memfd_create("text")
        try:
            os.pwrite(fd, damaged, 0)
            with pytest.raises(ValueError, match=line.replace("[", r"\[")):
                read_mappings(fd, figures=True, ours=False)
        finally:
            os.close(fd)


@pytest.mark.parametrize("name", ["snapshot", "maps"])
def test_many_mappings_are_read(name: str) -> None:
    base = kernel.libc.mmap(None, 6000 * PAGE, 0, 0x22, -1, 0)
    try:
        for page in range(0, 6000, 2):
            assert kernel.libc.mprotect(base + page * PAGE, PAGE, 1) == 0
        ours = [
            mapping
            for mapping in getattr(inspect, name)()
            if base <= mapping.start and mapping.end <= base + 6000 * PAGE
        ]
        assert [m.permissions[0] for m in ours if m.end - m.start == PAGE][:4] == list("r-r-")
        assert len(ours) >= 5999
    finally:
        kernel.libc.munmap(base, 6000 * PAGE)


# ---- names


NAMES = [
    b"plain",
    b"with two  blanks ",
    b"line\nbreak",
    b"real (deleted)",
    b"not\xff\xfeUTF-8",
    "ünïcode".encode(),
    b"back\\slash\\t",
]


@pytest.mark.usefixtures("ways_to_one")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deleted", [False, True])
def test_names_are_what_they_are(tmp_path: Path, name: bytes, *, deleted: bool) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, 3 * PAGE)
        base = kernel.libc.mmap(None, PAGE, 1, 1, fd, 2 * PAGE)
    finally:
        os.close(fd)
    try:
        if deleted:
            Path(os.fsdecode(path)).unlink()
        expected = os.fsdecode(path) + " (deleted)" * deleted
        found = [inspect.at(base), inspect.snapshot().at(base), inspect.maps().at(base)]
        for mapping in found:
            assert mapping is not None
            assert mapping.pathname == expected
            assert mapping.deleted is deleted
            assert mapping.offset == 2 * PAGE
    finally:
        kernel.libc.munmap(base, PAGE)


# ---- one mapping


@pytest.mark.usefixtures("ways_to_one")
def test_the_mapping_at_an_address_is_the_one_that_maps_tells() -> None:
    for mapping in lasting(kernel.maps()):
        if mapping.start >= USER_SPACE_END:
            continue
        for va in (mapping.start, mapping.end - 1):
            found = inspect.at(va)
            if found is not None and mapping in kernel.maps():
                assert plain(found.whole) == mapping


@pytest.mark.usefixtures("ways_to_one")
def test_the_mapping_at_an_address_of_another_process_is_the_one_that_maps_tells() -> None:
    with stopped_child() as child:
        snapshot = [m for m in inspect.maps(child) if m.start < USER_SPACE_END]
        for mapping in snapshot:
            assert inspect.at(mapping.start, child) == mapping
            assert inspect.at(mapping.end - 1, child) == mapping
        for below, above in pairwise(snapshot):
            if below.end < above.start:
                assert inspect.at(below.end, child) is None


@pytest.mark.usefixtures("ways_to_one")
def test_where_nothing_is_mapped_is_nothing() -> None:
    base = kernel.libc.mmap(None, 3 * PAGE, 1, 0x22, -1, 0)
    kernel.libc.munmap(base + PAGE, PAGE)
    try:
        assert inspect.at(base + PAGE) is None
        assert inspect.at(base + 2 * PAGE - 1) is None
        assert inspect.at(0) is None
    finally:
        kernel.libc.munmap(base, 3 * PAGE)


def test_a_forked_child_asks_about_itself() -> None:
    with mmap.mmap(-1, PAGE) as memory:
        va = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert inspect.at(va) is not None

        def unmapped() -> list[bool]:
            kernel.libc.munmap(va, PAGE)
            return [inspect.at(va) is None, inspect.snapshot().at(va) is None]

        assert in_child(unmapped) == [True, True]
        assert inspect.at(va) is not None


# ---- our own regions


def pages_told(vmm: VMM, snapshot: Snapshot, low: int, high: int) -> None:
    """Every page of a range is told by the snapshot, by ``at`` and by ``query`` alike."""
    for va in range(low, high, PAGE):
        info = vmm.query(va, smaps=False)
        for mapping in (snapshot.at(va), inspect.at(va + 1)):
            if info.kind in (PageKind.FREE, PageKind.FOREIGN):
                assert mapping is None or mapping.region is None
                continue
            assert mapping is not None
            region = mapping.region
            assert region is not None
            assert (region.state, region.kind, region.flags, region.sid) == (
                info.state,
                info.kind,
                info.flags,
                info.sid,
            )
            assert (region.base, region.size) == (info.base, info.size)
            if info.state is PageState.RESERVED:
                assert region.protection == info.protection
        inside, alone = snapshot.at(va), inspect.at(va)
        assert (inside and (inside.start, inside.end)) == (alone and (alone.start, alone.end))


@pytest.mark.usefixtures("ways_to_one")
def test_mappings_are_cut_at_the_borders_of_regions_and_tell_whose_they_are(vmm: VMM) -> None:
    guards = VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD
    first = vmm.allocate(0, 16 * PAGE, RESERVE | guards)
    vmm.commit(first + 4 * PAGE, 4 * PAGE)
    vmm.protect(first + 6 * PAGE, PAGE, VmmFlags.READ)
    vmm.protect(first + 12 * PAGE, PAGE, VmmFlags.READ)
    pages_told(vmm, inspect.snapshot(), first - 3 * PAGE, first + 19 * PAGE)
    handle = vmm.mdl_create(4 * PAGE, READ_WRITE)
    for _ in range(2):
        address = vmm.mdl_map(handle, 0, 4 * PAGE, 0, READ_WRITE)
        pages_told(vmm, inspect.snapshot(), address - PAGE, address + 5 * PAGE)
    vmm.mdl_create_from_vm(first + 5 * PAGE, PAGE, READ_WRITE)
    vmm.free(first + 8 * PAGE, PAGE)
    pages_told(vmm, inspect.maps(), first - 3 * PAGE, first + 19 * PAGE)


@pytest.mark.usefixtures("ways_to_one")
def test_regions_that_lie_side_by_side_are_told_apart(vmm: VMM) -> None:
    base = vmm.allocate(0, 12 * PAGE, COMMIT)
    vmm.free(base, 12 * PAGE)
    with VMM() as other:
        vmm.allocate(base, 4 * PAGE, COMMIT | VmmFlags.FIXED)
        other.allocate(base + 4 * PAGE, 4 * PAGE, COMMIT | VmmFlags.FIXED)
        vmm.allocate(base + 8 * PAGE, 4 * PAGE, COMMIT | VmmFlags.FIXED)
        parts = [m for m in inspect.snapshot() if base <= m.start < base + 12 * PAGE]
        assert [(m.start, m.end, m.region and m.region.base) for m in parts] == [
            (start, start + 4 * PAGE, start) for start in range(base, base + 12 * PAGE, 4 * PAGE)
        ]
        for part in parts:
            assert inspect.at(part.start) is not None
            assert part.whole.start <= base
            assert part.whole.region is None
    # Its pages are gone, those beside them are not.
    assert inspect.at(base + 4 * PAGE) is None
    assert inspect.at(base) is not None


def neighbours(vmm: VMM) -> tuple[int, int]:
    """Two regions of eight reserved pages, of which the kernel makes one mapping."""
    base = vmm.allocate(0, 16 * PAGE, RESERVE)
    vmm.free(base, 16 * PAGE)
    first, second = (
        vmm.allocate(va, 8 * PAGE, RESERVE | VmmFlags.FIXED) for va in (base, base + 8 * PAGE)
    )
    return first, second


def test_a_part_has_only_the_figures_that_hold_for_it(vmm: VMM) -> None:
    base, _ = neighbours(vmm)
    snapshot = inspect.snapshot()
    part = snapshot.at(base)
    assert part is not None
    assert part.whole is not part
    assert set(part.figures) <= {"size", "kernel_page_size", "mmu_page_size", "protection_key"}
    assert part.size == part.end - part.start
    assert part.rss is None
    assert part.whole.rss is not None
    assert part.whole.size == part.whole.end - part.whole.start
    assert part.vm_flags == part.whole.vm_flags
    wholes = list(snapshot.wholes())
    assert len({whole.start for whole in wholes}) == len(wholes)
    assert snapshot.total("size") == sum(whole.end - whole.start for whole in wholes)


def test_a_closed_vmm_has_no_regions_and_a_part_of_a_file_has_its_own_offset(vmm: VMM) -> None:
    handle = vmm.mdl_create(8 * PAGE, READ_WRITE)
    address = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ_WRITE)
    # The kernel makes one mapping of pages of one buffer that lie side by side.
    with VMM() as other:
        gone = other.allocate(0, PAGE, COMMIT)
    below, above = inspect.snapshot().at(address), inspect.at(address + 7 * PAGE)
    assert below is not None
    assert above is not None
    assert above.offset - below.offset == above.start - below.start
    assert gone not in {mapping.region.base for mapping in inspect.maps() if mapping.region}


# ---- pages


def page_by_page(runs: list[PageRun]) -> list[PageFlags]:
    return [run.flags for run in runs for _ in range(run.start, run.end, PAGE)]


def entries(va: int, count: int, pid: int | None = None) -> list[int]:
    with Path(f"/proc/{pid or 'self'}/pagemap").open("rb", buffering=0) as file:
        text = os.pread(file.fileno(), 8 * count, va // PAGE * 8)
    return list(struct.unpack(f"{count}Q", text))


def expected_of(entry: int) -> PageFlags:
    if entry >> 58 & 1 and available(Feature.PAGEMAP_GUARD):
        return PageFlags.GUARD
    flags = PageFlags(0)
    for bit, flag in (
        (63, PageFlags.PRESENT),
        (62, PageFlags.SWAPPED),
        (61, PageFlags.SHARED),
        (57, PageFlags.WRITE_PROTECTED),
        (56, PageFlags.EXCLUSIVE),
    ):
        if entry >> bit & 1:
            flags |= flag
    return flags


@contextmanager
def varied_pages() -> Iterator[tuple[int, int]]:
    """Pages of every kind there is here: address and number."""
    libc = kernel.libc
    base = libc.mmap(None, 64 * PAGE, 3, 0x22, -1, 0)
    fd = os.memfd_create("pages")
    try:
        libc.munmap(base + 40 * PAGE, 4 * PAGE)
        os.ftruncate(fd, 8 * PAGE)
        os.pwrite(fd, b"x" * 2 * PAGE, PAGE)
        assert libc.mmap(base + 48 * PAGE, 8 * PAGE, 3, 0x11, fd, 0) == base + 48 * PAGE
        for page in (0, 1, 3, 5, 6, 7, 49, 63):
            ctypes.memset(base + page * PAGE, 1, 1)
        for page in (10, 11, 50):
            ctypes.string_at(base + page * PAGE, 1)
        if available(Feature.GUARD_REGIONS):
            assert libc.madvise(base + 20 * PAGE, 3 * PAGE, MADV_GUARD_INSTALL) == 0
        yield base, 64
    finally:
        os.close(fd)
        libc.munmap(base, 64 * PAGE)


@pytest.mark.usefixtures("ways_to_pages")
def test_pages_are_what_pagemap_tells() -> None:
    told = inspect.page_flags_told(exclusive=True)
    compared = told & ~(PageFlags.HUGE | PageFlags.ZERO)
    with varied_pages() as (base, count), stopped_child() as child:
        for pid in (None, child):
            runs = inspect.pages(base, count * PAGE, pid, exclusive=True)
            assert (runs[0].start, runs[-1].end) == (base, base + count * PAGE)
            assert all(a.end == b.start and a.flags != b.flags for a, b in pairwise(runs))
            found = [flags & compared for flags in page_by_page(runs)]
            assert found == [expected_of(e) & compared for e in entries(base, count, pid)]
            assert all(run.flags & ~told == 0 for run in runs)
            without_it = page_by_page(inspect.pages(base, count * PAGE, pid))
            assert without_it == [f & ~PageFlags.EXCLUSIVE for f in page_by_page(runs)]


def test_pages_of_zeros_are_told_and_present_is_what_mincore_says() -> None:
    with varied_pages() as (base, count):
        found = page_by_page(inspect.pages(base, count * PAGE, exclusive=True))
        if PageFlags.ZERO in inspect.page_flags_told():
            assert PageFlags.ZERO in found[10]
            assert PageFlags.ZERO not in found[0]
        assert PageFlags.EXCLUSIVE in found[0]
        vector = ctypes.create_string_buffer(40)
        assert kernel.libc.mincore(base, 40 * PAGE, vector) == 0
        told = [bool(flags & (PageFlags.PRESENT)) for flags in found[:40]]
        # A guard is no hole for mincore.
        assert [t for i, t in enumerate(told) if not 20 <= i < 23] == [
            bool(byte[0] & 1) for i, byte in enumerate(vector) if not 20 <= i < 23
        ]
        with stopped_child():
            shared = page_by_page(inspect.pages(base, PAGE, exclusive=True))
            assert PageFlags.EXCLUSIVE not in shared[0]


def test_huge_pages_are_as_many_as_smaps_tells() -> None:
    size = 4 * huge_page_size()
    if not available(Feature.TRANSPARENT_HUGE_PAGES) or not size:
        pytest.skip("no transparent huge pages here")
    base = kernel.libc.mmap(None, size, 3, 0x22, -1, 0)
    try:
        kernel.libc.madvise(base, size, MADV_HUGEPAGE)
        ctypes.memset(base, 1, size)
        runs = inspect.pages(base, size)
        mapping = inspect.snapshot().at(base)
        assert mapping is not None
        huge = sum(run.end - run.start for run in runs if PageFlags.HUGE in run.flags)
        if PageFlags.HUGE in inspect.page_flags_told():
            assert huge == mapping.anon_huge_pages
    finally:
        kernel.libc.munmap(base, size)


USERFAULTFD = {"x86_64": 323, "aarch64": 282}
UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP = 1, 2, 1
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06


def userfaultfd() -> int:
    """A descriptor with which pages can be write-protected."""
    number = USERFAULTFD.get(os.uname().machine, -1)
    fd: int = kernel.libc.syscall(number, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    if fd < 0:
        pytest.skip("no userfaultfd here")
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("3Q", 0xAA, 0, 0)))
    return fd


@pytest.mark.usefixtures("ways_to_pages")
def test_pages_that_are_write_protected_are_told() -> None:
    fd = userfaultfd()
    base = kernel.libc.mmap(None, 8 * PAGE, 3, 0x22, -1, 0)
    try:
        ctypes.memset(base, 1, 6 * PAGE)
        wanted = struct.pack("4Q", base, 8 * PAGE, UFFDIO_REGISTER_MODE_WP, 0)
        fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(wanted))
        protect = struct.pack("3Q", base + PAGE, 2 * PAGE, UFFDIO_WRITEPROTECT_MODE_WP)
        fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, bytearray(protect))
        found = page_by_page(inspect.pages(base, 8 * PAGE))
        assert [PageFlags.WRITE_PROTECTED in flags for flags in found] == [
            page in (1, 2) for page in range(8)
        ]
        assert all(PageFlags.PRESENT in flags for flags in found[:6])
    finally:
        os.close(fd)
        kernel.libc.munmap(base, 8 * PAGE)


@pytest.mark.usefixtures("ways_to_pages")
def test_looking_at_pages_takes_no_memory(vmm: VMM) -> None:
    handle = vmm.mdl_create(64 * PAGE, READ_WRITE)
    address = vmm.mdl_map(handle, 0, 64 * PAGE, 0, READ_WRITE)
    assert inspect.pages(address, 64 * PAGE) == [
        PageRun(address, address + 64 * PAGE, PageFlags(0))
    ]
    mapping = inspect.snapshot().at(address)
    assert mapping is not None
    assert mapping.rss == 0


def test_all_of_user_space_can_be_asked_about() -> None:
    runs = inspect.pages(0, USER_SPACE_END)
    assert (runs[0].start, runs[-1].end) == (0, USER_SPACE_END)
    resident = sum(run.end - run.start for run in runs if PageFlags.PRESENT in run.flags)
    rss = inspect.rollup().rss
    assert rss is not None
    assert abs(resident - rss) < 64 << 20


def test_all_of_user_space_can_be_asked_about_without_scan() -> None:
    with stopped_child() as child:
        scanned = inspect.pages(0, USER_SPACE_END, child)
        with without(Feature.PAGEMAP_SCAN):
            read = inspect.pages(0, USER_SPACE_END, child)
    lost = PageFlags.HUGE | PageFlags.ZERO
    assert sum(r.end - r.start for r in read if r.flags) == sum(
        r.end - r.start for r in scanned if r.flags & ~lost
    )


# ---- differences


def test_what_appears_goes_grows_and_shrinks_is_told() -> None:
    libc = kernel.libc
    base = libc.mmap(None, 32 * PAGE, 0, 0x22, -1, 0)
    try:
        libc.mprotect(base, PAGE, 1)
        libc.mprotect(base + 8 * PAGE, 4 * PAGE, 3)
        ctypes.memset(base + 8 * PAGE, 1, 1)
        libc.mprotect(base + 16 * PAGE, 4 * PAGE, 5)
        fd = os.memfd_create("goes")
        os.ftruncate(fd, PAGE)
        libc.mmap(base + 24 * PAGE, PAGE, 1, 0x11, fd, 0)
        os.close(fd)
        before = within(inspect.snapshot(), base)
        assert not inspect.diff(before, before)
        libc.mprotect(base + 12 * PAGE, 2 * PAGE, 3)  # grows upwards
        ctypes.memset(base + 9 * PAGE, 1, 1)
        libc.mprotect(base + 14 * PAGE, 2 * PAGE, 5)  # grows downwards
        libc.munmap(base + 24 * PAGE, PAGE)
        libc.mprotect(base + 28 * PAGE, PAGE, 1)  # appears
        after = within(inspect.snapshot(), base)
        difference = inspect.diff(before, after)
        assert difference
        grown = {change.after.start: change.grown for change in difference.changed}
        assert grown[base + 8 * PAGE] == 2 * PAGE
        assert grown[base + 14 * PAGE] == 2 * PAGE
        (written,) = [c for c in difference.changed if c.after.start == base + 8 * PAGE]
        assert written.figures["rss"] == PAGE
        assert [m.pathname for m in difference.went if m.pathname] == ["/memfd:goes (deleted)"]
        assert base + 28 * PAGE in [m.start for m in difference.appeared]
        back = inspect.diff(after, before)
        assert {m.start for m in back.went} == {m.start for m in difference.appeared}
        assert sum(c.grown for c in back.changed) == -sum(c.grown for c in difference.changed)
    finally:
        libc.munmap(base, 32 * PAGE)


def within(snapshot: Snapshot, base: int) -> list[Mapping]:
    return [m for m in snapshot if base <= m.start and m.end <= base + 32 * PAGE]


# ---- as data


def test_mappings_are_pickled_and_go_through_json_whole(vmm: VMM) -> None:
    base, _ = neighbours(vmm)
    vmm.commit(base + PAGE, PAGE)
    handle = vmm.mdl_create(PAGE, READ_WRITE)
    vmm.mdl_map(handle, 0, PAGE, 0, READ_WRITE)
    snapshot = list(inspect.snapshot())
    assert any(mapping.whole is not mapping for mapping in snapshot)
    for mapping in snapshot:
        carried = Mapping.from_dict(json.loads(json.dumps(mapping.as_dict())))
        for other in (pickle.loads(pickle.dumps(mapping)), carried):  # noqa: S301  our own
            assert other == mapping
            assert other.region == mapping.region
            assert other.whole == mapping.whole
            assert hash(other) == hash(mapping)
    assert not inspect.diff(snapshot, [Mapping.from_dict(m.as_dict()) for m in snapshot])
    rebuilt = Snapshot(1, snapshot)
    assert rebuilt.total("rss") == Snapshot(2, rebuilt).total("rss") > 0


NO_REGION = {
    **dict.fromkeys(("base", "size", "flags", "protection"), 0),
    "state": 1,
    "kind": 1,
    "sid": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"start": -1},
        {"start": 1 << 64},
        {"start": 2 * PAGE, "end": PAGE},
        {"permissions": "rwx"},
        {"permissions": "srwx"},
        {"device": "none"},
        {"figures": {"rss": -1}},
        {"figures": {"rss": "much"}},
        {"region": {}},
        {"vm_flags": 5},
        {"vm_flags": [5]},
        {"offset": None},
        {"inode": True},
        {"pathname": b"/a"},
        {"device": 5},
        {"permissions": None},
        {"figures": None},
        {"figures": {5: 5}},
        {"whole": []},
        {"whole": {}},
        {"region": {**NO_REGION, "state": 77}},
        {"region": {**NO_REGION, "kind": True}},
        {"region": {**NO_REGION, "flags": "READ"}},
        {"region": {**NO_REGION, "flags": 1 << 63}},
        {"region": {**NO_REGION, "sid": -1}},
    ],
)
def test_a_dict_that_tells_no_mapping_is_refused(change: dict[str, object]) -> None:
    values = inspect.snapshot()[0].as_dict()
    (name,) = {*change} - {"end"}
    with pytest.raises(VmmError, match=rf"Mapping.from_dict: .*\b{name}") as caught:
        Mapping.from_dict(values | change)
    assert caught.value.rc is Retcode.INVALID_ARGUMENT
    assert isinstance(caught.value, ValueError)


def test_a_dict_without_a_part_and_what_is_no_dict_are_refused() -> None:
    values = inspect.snapshot()[0].as_dict()
    for name in values:
        with pytest.raises(VmmError, match=rf"\b{name} is missing"):
            Mapping.from_dict({key: value for key, value in values.items() if key != name})
    for other in (None, 5, "text", [values], [*values.items()]):
        with pytest.raises(VmmError, match=f"type {type(other).__name__}; expected a dict"):
            Mapping.from_dict(other)  # type: ignore[arg-type]
    with pytest.raises(VmmError, match=r"whole\.whole"):
        Mapping.from_dict(values | {"whole": values | {"whole": values}})


def test_a_snapshot_and_a_difference_refuse_what_they_do_not_know() -> None:
    found = inspect.snapshot()
    for address in ("x", None, 1.5, True):
        with pytest.raises(VmmError, match=r"Snapshot\.at: va is ") as caught:
            found.at(address)  # type: ignore[arg-type]
        assert caught.value.rc is Retcode.INVALID_ARGUMENT
    assert found.at(-1) is None
    assert found.at(1 << 70) is None
    for before, after, name in ((None, found, "before"), (found, 5, "after"), ("x", found, "str")):
        with pytest.raises(VmmError, match=rf"diff: .*\b{name}") as caught:
            inspect.diff(before, after)  # type: ignore[arg-type]
        assert caught.value.rc is Retcode.INVALID_ARGUMENT
    assert not inspect.diff([], ())


def test_a_figure_that_nobody_knows_is_no_zero() -> None:
    found = inspect.snapshot()
    for name, hint in (("rsss", "'rss'"), ("privat_dirty", "'private_dirty'"), ("%", "swap_pss")):
        with pytest.raises(VmmError, match=hint) as caught:
            found.total(name)
        assert caught.value.rc is Retcode.INVALID_ARGUMENT
    for other in (None, 5, ["rss"]):
        with pytest.raises(VmmError, match="expected a name"):
            found.total(other)  # type: ignore[arg-type]
    # What this kernel does not tell is a figure all the same.
    assert found.total("ksm") >= 0
    assert inspect.maps().total("rss") == 0


# ---- what goes wrong

Question = "Callable[[int], object]"
QUESTIONS: dict[str, Callable[[int], object]] = {
    "snapshot": inspect.snapshot,
    "maps": inspect.maps,
    "rollup": inspect.rollup,
    "at": lambda pid: inspect.at(0x10000, pid),
    "pages": lambda pid: inspect.pages(0x10000, PAGE, pid),
}
every_question = pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())


@every_question
def test_a_process_that_is_not_there(question: Callable[[int], object]) -> None:
    with stopped_child() as child:
        pass
    with pytest.raises(inspect.NoSuchProcess, match=str(child)) as caught:
        question(child)
    assert isinstance(caught.value, ProcessLookupError)
    assert caught.value.rc is Retcode.RESOURCE_NOT_FOUND
    assert not isinstance(caught.value, inspect.ProcessExited)


@every_question
def test_a_zombie(question: Callable[[int], object]) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(inspect.ZombieProcess, match="waits for its parent"):
            question(child)
    finally:
        os.waitpid(child, 0)


@every_question
def test_a_thread_of_the_kernel(question: Callable[[int], object]) -> None:
    try:
        fields = Path("/proc/2/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        pytest.skip("this container does not show the kernel's threads")
    if not int(fields[6]) & 0x00200000:
        pytest.skip("process 2 is no thread of the kernel here")
    with pytest.raises(inspect.KernelThread, match="thread of the kernel"):
        question(2)


def look_at_another_users(pid: int) -> None:
    from vmm_linux import inspect

    for question in (
        inspect.snapshot,
        inspect.maps,
        inspect.rollup,
        lambda pid: inspect.at(0x10000, pid),
        lambda pid: inspect.pages(0x10000, 4096, pid),
    ):
        try:
            question(pid)
        except inspect.AccessDenied as reason:
            print(type(reason).__name__, isinstance(reason, PermissionError))
    va = inspect.snapshot()[0].start
    print(len(inspect.maps()) > 10, inspect.at(va) is not None, inspect.rollup().start == va)
    print(inspect.pages(va, 4096, exclusive=True)[0].start == va)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's process to show")
def test_another_users_process() -> None:
    child = run_child(look_at_another_users, os.getpid(), nobody=True)
    assert child.returncode == 0, child.stderr
    *refused, own, pages = child.stdout.splitlines()
    assert refused == ["AccessDenied True"] * 5
    assert own == "True True True"
    assert pages == "True"


@pytest.mark.parametrize("name", ["snapshot", "maps"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_process_that_ends_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    def read(fd: int, figures: bool, ours: bool) -> object:
        if moment == "before":
            end(child)
        found = read_mappings(fd, figures, ours)
        end(child)
        return found

    monkeypatch.setattr(inspect, "read_mappings", read)
    with stopped_child() as child, pytest.raises(inspect.ProcessExited, match="while it was read"):
        getattr(inspect, name)(child)


def test_a_process_that_ends_while_its_pages_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> object:
        end(child)
        return read_pages(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(inspect, "read_pages", read)
    with stopped_child() as child, pytest.raises(inspect.ProcessExited):
        inspect.pages(0x10000, PAGE, child)


def test_a_process_that_starts_another_program_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go, gone = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kernel.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.close(gone)
            os.read(go, 1)
            os.execv("/bin/sleep", ["sleep", "60"])  # noqa: S606  its own program
        finally:
            os._exit(1)
    os.close(go)
    try:

        def read(fd: int, figures: bool, ours: bool) -> object:
            found = read_mappings(fd, figures, ours)
            os.close(gone)
            while os.pread(fd, 1, 0):
                select.select([], [], [], 0.001)
            return found

        monkeypatch.setattr(inspect, "read_mappings", read)
        with pytest.raises(inspect.ProcessExited, match="another program"):
            inspect.maps(child)
    finally:
        end(child)


def test_an_unreadable_line_of_the_kernels_is_an_exception_with_that_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object) -> object:
        raise ValueError("not a line of /proc/PID/maps: b'nonsense'")

    monkeypatch.setattr(inspect, "read_mappings", read)
    with pytest.raises(inspect.UnreadableText, match="nonsense") as caught:
        inspect.maps()
    assert isinstance(caught.value, ValueError)
    assert caught.value.rc is Retcode.FAIL


@every_question
@pytest.mark.parametrize("pid", [0, -1, True, "one", 1.0, b"1", 1 << 31, 1 << 100, [], object()])
def test_what_is_no_process_id(question: Callable[[int], object], pid: int) -> None:
    with pytest.raises(VmmError, match="pid") as caught:
        question(pid)
    assert caught.value.rc is Retcode.INVALID_ARGUMENT


@pytest.mark.parametrize("va", [-1, True, "1", None, 1.5, USER_SPACE_END, 1 << 64, 1 << 5000])
def test_what_is_no_address(va: int) -> None:
    for question in (inspect.at, lambda va: inspect.pages(va, PAGE)):
        with pytest.raises(VmmError, match=r"va|user space") as caught:
            question(va)
        assert caught.value.rc is Retcode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("va", "size"),
    [(1, PAGE), (PAGE, 1), (PAGE, 0), (PAGE, -PAGE), (0, USER_SPACE_END + PAGE), (PAGE, "one")],
)
def test_what_is_no_range_of_pages(va: int, size: int) -> None:
    with pytest.raises(VmmError) as caught:
        inspect.pages(va, size)
    assert caught.value.rc is Retcode.INVALID_ARGUMENT


def test_every_exception_is_pickled_whole() -> None:
    for name in inspect.__all__:
        kind = getattr(inspect, name)
        if isinstance(kind, type) and issubclass(kind, VmmError):
            other = pickle.loads(pickle.dumps(kind("at", "why", 3)))  # noqa: S301  our own
            assert type(other) is kind
            assert (other.method, other.errno, str(other)) == ("at", 3, "at: why [ESRCH]")


def test_mappings_are_not_made_by_hand_and_not_changed() -> None:
    with pytest.raises(TypeError, match="snapshot"):
        Mapping()
    mapping = inspect.snapshot()[0]
    for name in ("start", "region", "whole", "rss", "new"):
        with pytest.raises(AttributeError):
            setattr(mapping, name, 1)


def test_snapshots_are_taken_while_other_threads_allocate_and_close() -> None:
    done = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not done.is_set():
                with VMM() as vmm:
                    base = vmm.allocate(0, 8 * PAGE, RESERVE | VmmFlags.LOW_GUARD)
                    vmm.commit(base + PAGE, 2 * PAGE)
                    vmm.decommit(base + PAGE, PAGE)
                    vmm.free(base + 4 * PAGE, PAGE)
        except BaseException as failure:  # noqa: BLE001  told below
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            snapshot = inspect.maps()
            # A mapping that grows while the kernel tells of it can be told twice.
            told_twice = [a for a, b in pairwise(snapshot) if a.end > b.start]
            assert len(told_twice) <= len(threads)
            for mapping in snapshot:
                inspect.at(min(mapping.start, USER_SPACE_END - 1))
                assert mapping.whole.start <= mapping.start < mapping.end <= mapping.whole.end
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_snapshot_can_be_pickled_with_the_parts_of_regions(vmm: VMM) -> None:
    va = vmm.allocate(0, 4 * PAGE, RESERVE)
    vmm.commit(va, PAGE)
    before = inspect.snapshot()
    after = pickle.loads(pickle.dumps(before))  # noqa: S301 (of our own)
    assert list(after) == list(before)
    assert [each.whole for each in after] == [each.whole for each in before]
    assert after.pid == before.pid


def test_mappings_that_nobody_read_are_none() -> None:
    done = run_child(look_at_no_mappings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 []\n", "")


def look_at_no_mappings() -> None:
    """Make the container by hand, which has read nothing."""
    import sys
    from pathlib import Path

    from vmm_linux._inspect import read_mappings

    with Path("/proc/self/maps").open("rb") as file:
        kind = type(read_mappings(file.fileno(), False, False))
    empty = kind.__new__(kind)
    sys.stdout.write(f"{len(empty)} {list(empty)}\n")
    try:
        empty[0]
    except IndexError:
        return
    sys.exit(1)


def test_a_process_whose_first_thread_has_ended_sees_itself() -> None:
    done = run_child(look_without_first_thread)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True True True\n", "")


def look_without_first_thread() -> None:
    """End the first thread alone, and look from another one."""
    import ctypes
    import os
    import platform
    import sys
    import threading
    from pathlib import Path

    from vmm_linux import inspect

    def look() -> None:
        while "Z" not in Path("/proc/self/stat").read_text("ascii").rpartition(")")[2]:
            pass
        found = inspect.snapshot()
        first = found[0]
        here = inspect.pages(first.start, first.end - first.start)
        fd = os.memfd_create("seen")
        names = [each.name for each in inspect.sharing(all=True).channels]
        told = (len(found) > 10, bool(inspect.rollup().rss), bool(here), "seen" in names)
        sys.stdout.write(f"{' '.join(map(str, told))}\n")
        sys.stdout.flush()
        os.close(fd)
        os._exit(0)

    threading.Thread(target=look).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)


@pytest.mark.parametrize("without", ["", "PROCMAP_QUERY", "PROCMAP_QUERY,PAGEMAP_SCAN"])
def test_a_process_whose_first_thread_has_ended_is_asked_about_addresses(without: str) -> None:
    done = run_child(ask_without_first_thread, environment={"VMM_LINUX_WITHOUT": without})
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")


def ask_without_first_thread() -> None:
    """End the first thread alone; others ask, and end too."""
    import ctypes
    import os
    import platform
    import sys
    import threading
    from pathlib import Path

    from vmm_linux import VMM, PageKind, PageState, VmmFlags, _features, inspect

    read_write = VmmFlags.READ | VmmFlags.WRITE
    page = os.sysconf("SC_PAGE_SIZE")

    def ask(vmm: VMM, va: int) -> None:
        found = vmm.query(va)
        assert (found.kind, found.state) == (PageKind.PRIVATE, PageState.COMMITTED)
        assert found.resident is True
        assert found.smaps is not None
        assert vmm.query(0).state is PageState.FREE
        mapping = inspect.at(va)
        assert mapping is not None
        assert mapping.region is not None
        assert inspect.at(0) is None

    def look() -> None:
        while "Z" not in Path("/proc/self/stat").read_text("ascii").rpartition(")")[2]:
            pass
        with VMM() as vmm:
            va = vmm.allocate(0, 4 * page, VmmFlags.RESERVE | VmmFlags.COMMIT | read_write)
            vmm.write(va, b"x")
            # Each is the one that opens for the next, which finds that it has ended.
            for _ in range(3):
                thread = threading.Thread(target=ask, args=(vmm, va))
                thread.start()
                thread.join()
            ask(vmm, va)
            handle = vmm.mdl_create_from_vm(va, page, read_write)
            vmm.mdl_map(handle, 0, page, 0, VmmFlags.READ)
            assert vmm.read(va, 1) == b"x"
        assert _features.available(_features.Feature.PAGEMAP)
        sys.stdout.write("asked\n")
        sys.stdout.flush()
        inspect.close_files()
        os._exit(0)

    def look_or_tell() -> None:
        try:
            look()
        finally:
            sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
            os._exit(1)

    threading.Thread(target=look_or_tell).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)


def test_names_with_a_newline_and_names_with_its_escape_are_told_apart(tmp_path: Path) -> None:
    names = ["a\\012b", "a\nb", "a\\012b", "a\\b", "\\012\n\xff", "a\nb"]
    size = (len(names) + 1) * PAGE
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        buffer = (ctypes.c_char * size).from_buffer(room)
        start = ctypes.addressof(buffer)
        for at, name in enumerate(names):
            path = tmp_path / name
            path.write_bytes(bytes(PAGE))
            fd = os.open(path, os.O_RDONLY)
            shown = kernel.libc.mmap(
                start + at * PAGE, PAGE, kernel.PROT_READ, MAP_FIXED | kernel.MAP_PRIVATE, fd, 0
            )
            os.close(fd)
            assert shown == start + at * PAGE
        escaped = [str(tmp_path / name).replace("\\012", "\n") for name in names]
        plain = [str(tmp_path / name) for name in names]

        def told(look: Callable[[int | None], Snapshot], pid: int | None) -> list[str | None]:
            return [look(pid)[i].pathname for i in indices(look(pid))]

        def indices(found: Snapshot) -> list[int]:
            return [i for i, each in enumerate(found) if start <= each.start < start + size - PAGE]

        with stopped_child() as child:
            for look in (inspect.snapshot, inspect.maps):
                for pid in (None, child):
                    expected = plain if available(Feature.PROCMAP_QUERY) else escaped
                    assert told(look, pid) == expected
                    with without(Feature.PROCMAP_QUERY):
                        assert told(look, pid) == escaped
        kernel.libc.mmap(
            start,
            size,
            kernel.PROT_READ | kernel.PROT_WRITE,
            MAP_FIXED | kernel.MAP_PRIVATE | kernel.MAP_ANONYMOUS,
            -1,
            0,
        )
        del buffer

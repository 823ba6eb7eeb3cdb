"""Looking at mappings of this process and of others; the kernel's own files are the oracle."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import socket
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import COMMITTED, RESERVED, RW
from forked import in_child
from kernel_oracle import PAGE, USER_SPACE_END
from onlookers import plain, stopped_child, stopped_program
from smaps_texts import FORMS, HEADS
from vmm_linux import VMM, PageKind, PageState, Retcode, VmmError, VmmFlags, inspect
from vmm_linux._core.inspect import read_mappings
from vmm_linux._core.kernel import Feature, without
from vmm_linux.inspect import Mapping, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["query", "text"])
def ways_to_one(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to find one mapping."""
    with without(*([Feature.PROCMAP_QUERY] if request.param == "text" else [])):
        yield request.param


def lasting(mappings: list[kernel.Mapping]) -> list[kernel.Mapping]:
    """Without what grows while one looks: the heap and the stack."""
    return [mapping for mapping in mappings if mapping.pathname not in {"[heap]", "[stack]"}]


# ---- all mappings --------------------------------------------------------------------------------


def test_a_snapshot_has_every_mapping_of_this_process_with_every_figure(vmm: VMM) -> None:
    vmm.allocate(0, 4 * PAGE, COMMITTED)
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
    assert snapshot.at((1 << 64) - 1) is None


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


# ---- names ---------------------------------------------------------------------------------------

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


# ---- one mapping ---------------------------------------------------------------------------------


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


# ---- our own regions -----------------------------------------------------------------------------


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
    first = vmm.allocate(0, 16 * PAGE, RESERVED | guards)
    vmm.commit(first + 4 * PAGE, 4 * PAGE)
    vmm.protect(first + 6 * PAGE, PAGE, VmmFlags.READ)
    vmm.protect(first + 12 * PAGE, PAGE, VmmFlags.READ)
    pages_told(vmm, inspect.snapshot(), first - 3 * PAGE, first + 19 * PAGE)
    handle = vmm.mdl_create(4 * PAGE, RW)
    for _ in range(2):
        address = vmm.mdl_map(handle, 0, 4 * PAGE, 0, RW)
        pages_told(vmm, inspect.snapshot(), address - PAGE, address + 5 * PAGE)
    vmm.mdl_create_from_vm(first + 5 * PAGE, PAGE, RW)
    vmm.free(first + 8 * PAGE, PAGE)
    pages_told(vmm, inspect.maps(), first - 3 * PAGE, first + 19 * PAGE)


@pytest.mark.usefixtures("ways_to_one")
def test_regions_that_lie_side_by_side_are_told_apart(vmm: VMM) -> None:
    base = vmm.allocate(0, 12 * PAGE, COMMITTED)
    vmm.free(base, 12 * PAGE)
    with VMM() as other:
        vmm.allocate(base, 4 * PAGE, COMMITTED | VmmFlags.FIXED)
        other.allocate(base + 4 * PAGE, 4 * PAGE, COMMITTED | VmmFlags.FIXED)
        vmm.allocate(base + 8 * PAGE, 4 * PAGE, COMMITTED | VmmFlags.FIXED)
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
    base = vmm.allocate(0, 16 * PAGE, RESERVED)
    vmm.free(base, 16 * PAGE)
    first, second = (
        vmm.allocate(va, 8 * PAGE, RESERVED | VmmFlags.FIXED) for va in (base, base + 8 * PAGE)
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
    handle = vmm.mdl_create(8 * PAGE, RW)
    address = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
    # The kernel makes one mapping of pages of one buffer that lie side by side.
    with VMM() as other:
        gone = other.allocate(0, PAGE, COMMITTED)
    below, above = inspect.snapshot().at(address), inspect.at(address + 7 * PAGE)
    assert below is not None
    assert above is not None
    assert above.offset - below.offset == above.start - below.start
    assert gone not in {mapping.region.base for mapping in inspect.maps() if mapping.region}


# ---- differences ---------------------------------------------------------------------------------


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


# ---- as data -------------------------------------------------------------------------------------


def test_mappings_are_pickled_and_go_through_json_whole(vmm: VMM) -> None:
    base, _ = neighbours(vmm)
    vmm.commit(base + PAGE, PAGE)
    handle = vmm.mdl_create(PAGE, RW)
    vmm.mdl_map(handle, 0, PAGE, 0, RW)
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
        with pytest.raises(VmmError, match=f"{type(other).__name__}; expected a dict"):
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
    with pytest.raises(VmmError, match=r"^Snapshot\.at: va is a number of 71 bits"):
        found.at(1 << 70)
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

"""Query beside the kernel's own files, with and without the features it likes to use."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernel_oracle
from constants import GUARDS, RESERVE, RESERVE_COMMIT
from kernel_oracle import PAGE
from vmm_linux import VMM, PageKind, PageState, Retcode, VmmError, VmmFlags
from vmm_linux._core.kernel import Feature, user_space_end, without

NONE, READ, RW = VmmFlags(0), VmmFlags.READ, VmmFlags.READ | VmmFlags.WRITE


def record_at(address: int) -> kernel_oracle.SmapsRecord:
    """The kernel's record of the mapping that includes an address."""
    return next(
        record
        for record in kernel_oracle.smaps()
        if record.mapping.start <= address < record.mapping.end
    )


@pytest.fixture(
    params=[
        (),
        (Feature.PROCMAP_QUERY,),
        (Feature.PAGEMAP_SCAN,),
        (Feature.PAGEMAP_SCAN, Feature.PAGEMAP),
        (Feature.PROCMAP_QUERY, Feature.PAGEMAP_SCAN, Feature.PAGEMAP, Feature.PAGEMAP_GUARD),
    ],
    ids=lambda features: "-".join(feature.name for feature in features) or "everything",
)
def vmm(request: pytest.FixtureRequest) -> Iterator[VMM]:
    """A VMM on this kernel, and on kernels that have less."""
    with without(*request.param), VMM() as instance:
        yield instance


def test_each_page_of_a_region_is_told_as_it_is(vmm: VMM) -> None:
    """Reserved, committed, touched, protected: state, run and residency of each."""
    base = vmm.allocate(0, 8 * PAGE, RESERVE | RW)
    vmm.commit(base + 2 * PAGE, 4 * PAGE)
    vmm.protect(base + 4 * PAGE, 2 * PAGE, READ)
    vmm.write(base + 3 * PAGE, b"x")
    pages = [vmm.query(base + number * PAGE + 7, smaps=False) for number in range(8)]
    assert [page.va for page in pages] == [base + number * PAGE for number in range(8)]
    assert [page.state.name[0] for page in pages] == list("RRCCCCRR")
    assert [page.protection for page in pages] == [RW] * 4 + [READ] * 2 + [RW] * 2
    assert [page.resident for page in pages] == [number == 3 for number in range(8)]
    runs = [((page.run_start - base) // PAGE, (page.run_end - base) // PAGE) for page in pages]
    assert runs == [(0, 2)] * 2 + [(2, 4)] * 2 + [(4, 6)] * 2 + [(6, 8)] * 2
    assert {(page.base, page.size) for page in pages} == {(base, 8 * PAGE)}
    assert {page.kind for page in pages} == {PageKind.PRIVATE}
    assert {page.flags for page in pages} == {RESERVE | RW}
    assert {(page.mdl_offset, page.sid, page.smaps) for page in pages} == {(None, None, None)}


def test_the_smaps_record_is_the_kernels(vmm: VMM) -> None:
    """Every figure is what the file says, in bytes."""
    base = vmm.allocate(0, 64 * PAGE, RESERVE_COMMIT | RW | GUARDS)
    vmm.write(base, bytes(5 * PAGE))
    record = vmm.query(base + PAGE).smaps
    assert record is not None
    expected = record_at(base)
    assert (record.start, record.end) == expected.mapping[:2]
    assert record.permissions == "rw-p"
    assert record.rss == expected.figures["Rss"] >= 5 * PAGE
    assert record.vm_flags is not None
    assert "ac" in record.vm_flags


def test_guards_are_reserved_pages_of_their_region(vmm: VMM) -> None:
    """They are of kind GUARD; one page further, nothing is theirs."""
    flags = RESERVE_COMMIT | RW | GUARDS
    base = vmm.allocate(0, 2 * PAGE, flags)
    for va in (base - 1, base - PAGE, base + 2 * PAGE, base + 3 * PAGE - 1):
        guard = vmm.query(va)
        assert (guard.kind, guard.state, guard.protection) == (
            PageKind.GUARD,
            PageState.RESERVED,
            NONE,
        )
        assert (guard.base, guard.size, guard.flags) == (base, 2 * PAGE, flags)
        assert (guard.run_start, guard.run_end) == (guard.va, guard.va + PAGE)
    for va in (base - PAGE - 1, base + 3 * PAGE):
        assert vmm.query(va).kind in (PageKind.FREE, PageKind.FOREIGN)


def test_a_free_address_is_an_answer_with_the_holes_bounds(vmm: VMM) -> None:
    """From the end of the mapping below to the start of the one above."""
    base = vmm.allocate(0, 16 * PAGE, RESERVE)
    vmm.free(base + 4 * PAGE, 8 * PAGE)
    hole = vmm.query(base + 6 * PAGE)
    assert (hole.state, hole.kind) == (PageState.FREE, PageKind.FREE)
    assert (hole.base, hole.size) == (base + 4 * PAGE, 8 * PAGE)
    assert (hole.run_start, hole.run_end) == (base + 4 * PAGE, base + 12 * PAGE)
    assert (hole.flags, hole.protection, hole.smaps) == (NONE, NONE, None)
    assert (hole.resident, hole.swapped, hole.locked, hole.huge) == (False,) * 4


def test_the_lowest_and_the_highest_hole_end_where_user_space_does(vmm: VMM) -> None:
    """And above it is an invalid argument."""
    assert vmm.query(0, smaps=False).base == 0
    last = vmm.query(user_space_end() - 1, smaps=False)
    assert last.run_end == user_space_end() or last.kind is PageKind.FOREIGN
    for beyond in (user_space_end(), 1 << 63, (1 << 64) - 1):
        with pytest.raises(VmmError) as caught:
            vmm.query(beyond)
        assert caught.value.rc is Retcode.INVALID_ARGUMENT


def test_foreign_mappings_are_told_by_the_kernels_bounds(vmm: VMM) -> None:
    """Code of the interpreter is foreign; so is another VMM's region."""
    code = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value or 0
    page = vmm.query(code)
    assert (page.kind, page.state) == (PageKind.FOREIGN, PageState.COMMITTED)
    assert page.protection & VmmFlags.EXECUTE
    expected = record_at(code)
    assert (page.base, page.base + page.size) == expected.mapping[:2]
    assert page.smaps is not None
    assert Path(page.smaps.pathname or "").name.startswith(("libpython", "python"))
    with VMM() as other:
        theirs = other.allocate(0, PAGE, RESERVE | RW)
        assert vmm.query(theirs).kind is PageKind.FOREIGN
        assert vmm.query(theirs).state is PageState.RESERVED


def test_a_page_unmapped_behind_the_packages_back_reads_free(vmm: VMM) -> None:
    """The kernel's word wins."""
    libc = ctypes.CDLL(None, use_errno=True)
    base = vmm.allocate(0, 4 * PAGE, RESERVE_COMMIT | RW)
    assert libc.munmap(ctypes.c_void_p(base + PAGE), ctypes.c_size_t(PAGE)) == 0
    assert [vmm.query(base + number * PAGE).state.name[0] for number in range(4)] == list("CFCC")
    with pytest.raises(VmmError) as caught:
        vmm.read(base, 4 * PAGE)
    assert caught.value.rc is Retcode.FAIL
    with pytest.raises(VmmError) as caught:
        vmm.protect(base, 4 * PAGE, READ)
    assert caught.value.rc is Retcode.RESOURCE_NOT_FOUND
    assert vmm.query(base).protection == RW


def test_query_never_touches_the_page(vmm: VMM) -> None:
    """Neither private pages nor holes of shared memory become resident."""
    for flags in (RESERVE_COMMIT | RW, RESERVE_COMMIT | RW | VmmFlags.SHAREABLE):
        base = vmm.allocate(0, 16 * PAGE, flags | GUARDS)
        for _ in range(2):
            for number in range(16):
                assert vmm.query(base + number * PAGE).resident is False
        assert record_at(base).figures["Rss"] == 0


def test_locked_pages_are_told_by_the_kernel(vmm: VMM) -> None:
    """Not by what was asked for."""
    libc = ctypes.CDLL(None, use_errno=True)
    base = vmm.allocate(0, 4 * PAGE, RESERVE_COMMIT | RW | VmmFlags.LOCKED)
    assert vmm.query(base, smaps=False).locked is True
    assert libc.munlock(ctypes.c_void_p(base), ctypes.c_size_t(PAGE)) == 0
    assert vmm.query(base, smaps=False).locked is False
    assert vmm.query(base + PAGE, smaps=False).locked is True


def test_an_answer_cannot_be_changed_and_equals_the_same_answer(vmm: VMM) -> None:
    """It is a value."""
    base = vmm.allocate(0, PAGE, RESERVE)
    info = vmm.query(base)
    with pytest.raises(AttributeError):
        info.va = 0  # type: ignore[misc]
    assert info == vmm.query(base)
    assert hash(info) == hash(vmm.query(base))
    assert info != vmm.query(0)
    assert f"va=0x{base:x}" in repr(info)


def test_a_query_without_a_descriptor_left_says_so() -> None:
    """RLIMIT_NOFILE is a quota."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with VMM() as vmm:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(VmmError) as caught:
                vmm.query(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.rc is Retcode.QUOTA_EXCEEDED
        assert vmm.query(0).state is PageState.FREE

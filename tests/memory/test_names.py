"""The memory of regions has a name in maps, where the kernel gives names.

Most kernels can, some are built without: for these a library stands where the kernel would be
(``fault_injection.c``), and shows what would be named. Where the kernel can, it is asked itself.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import faults
from constants import GUARDS, RESERVED, RW
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, VmmFlags, inspect
from vmm_linux._core import memory
from vmm_linux._core.inspect import read_mappings
from vmm_linux._core.kernel import Feature, available, without
from vmm_linux.cli.map.model import entries_of

if TYPE_CHECKING:
    from collections.abc import Iterator

RESERVED_FIXED = RESERVED | VmmFlags.FIXED
NAME = "vmm_linux region"
SIZE = 16 * PAGE


@pytest.fixture
def _names_given() -> None:
    """Leave a test out where the kernel gives no names; asked now, as a child has a library do."""
    if not available(Feature.ANONYMOUS_NAMES):
        pytest.skip("this kernel names no anonymous memory (CONFIG_ANON_VMA_NAME)")


names_are_given = pytest.mark.usefixtures("_names_given")


def named() -> list[str]:
    """Ranges and permissions of what has the name, a mapping each."""
    lines = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
    return [" ".join(line.split()[:2]) for line in lines if line.endswith(f"[anon:{NAME}]")]


def mappings() -> int:
    """How many mappings this process has."""
    return len(Path("/proc/self/maps").read_bytes().splitlines())


# ---- where the kernel gives names ---------------------------------------------------------------


@names_are_given
def test_a_region_and_its_guards_have_the_name(vmm: VMM) -> None:
    vmm.allocate(ARENA, SIZE, RESERVED_FIXED | GUARDS)
    assert named() == [f"{ARENA - PAGE:08x}-{ARENA + SIZE + PAGE:08x} ---p"]
    vmm.commit(ARENA, SIZE)
    assert len(named()) == 3
    record = vmm.query(ARENA).smaps
    assert record is not None
    assert record.pathname == f"[anon:{NAME}]"


@names_are_given
def test_islands_that_are_decommitted_leave_one_mapping(vmm: VMM) -> None:
    with without(Feature.GUARD_REGIONS):
        vmm.allocate(ARENA, SIZE, RESERVED_FIXED)
        before = mappings()
        for _ in range(3):
            for page in range(0, SIZE, 2 * PAGE):
                vmm.commit(ARENA + page, PAGE)
                vmm.write(ARENA + page, b"touched")
            assert len(named()) == SIZE // PAGE
            for page in range(0, SIZE, 2 * PAGE):
                vmm.decommit(ARENA + page, PAGE)
            assert named() == [f"{ARENA:08x}-{ARENA + SIZE:08x} ---p"]
            assert mappings() == before


@names_are_given
def test_regions_side_by_side_are_one_mapping_and_free_apart(vmm: VMM) -> None:
    vmm.allocate(ARENA, SIZE, RESERVED_FIXED)
    vmm.allocate(ARENA + SIZE, SIZE, RESERVED_FIXED)
    assert named() == [f"{ARENA:08x}-{ARENA + 2 * SIZE:08x} ---p"]
    vmm.free(ARENA + PAGE, PAGE)
    assert len(named()) == 2
    vmm.free(ARENA, PAGE)
    vmm.free(ARENA + 2 * PAGE, SIZE - 2 * PAGE)
    assert named() == [f"{ARENA + SIZE:08x}-{ARENA + 2 * SIZE:08x} ---p"]


@names_are_given
def test_a_buffers_mapping_has_its_own_name_and_its_guards_ours(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, RW)
    va = vmm.mdl_map(handle, 0, SIZE, 0, RW | GUARDS)
    assert named() == [
        f"{va - PAGE:08x}-{va:08x} ---p",
        f"{va + SIZE:08x}-{va + SIZE + PAGE:08x} ---p",
    ]


@names_are_given
def test_without_the_feature_memory_has_no_name_and_is_told_as_ours(vmm: VMM) -> None:
    with without(Feature.ANONYMOUS_NAMES):
        vmm.allocate(ARENA, SIZE, RESERVED_FIXED)
        assert named() == []
        mapping = inspect.at(ARENA)
        assert mapping is not None
        assert mapping.region is not None


# ---- where a library is the kernel --------------------------------------------------------------


def call(name: str, *arguments: int) -> None:
    """Call a function of this module; runs in a child."""
    import test_names

    getattr(test_names, name)(*arguments)


def test_every_step_that_maps_private_memory_names_just_that(library: Path) -> None:
    faults.run(library, call, name_every_step.__name__)


@contextmanager
def names(library: faults.Faults, *expected: tuple[int, int]) -> Iterator[None]:
    """Check that just these ranges are named in the ``with`` block: where, and bytes."""
    library.answer_names(0)
    yield
    assert library.named() == [(start, size, NAME) for start, size in expected]


def name_every_step() -> None:
    """Go through all that maps private memory for a region."""
    library = faults.Faults()
    library.answer_names(0)
    assert available(Feature.ANONYMOUS_NAMES)
    assert [name for _, _, name in library.named()] == ["vmm_linux probe"]
    with VMM() as vmm:
        with names(library, (ARENA - PAGE, SIZE + 2 * PAGE)):
            vmm.allocate(ARENA, SIZE, RESERVED_FIXED | GUARDS)
        with names(library):
            vmm.commit(ARENA + PAGE, 4 * PAGE)
            vmm.protect(ARENA + PAGE, PAGE, VmmFlags.READ)
        with names(library, (ARENA + PAGE, 4 * PAGE)):
            vmm.decommit(ARENA, SIZE)
        with names(library):
            vmm.decommit(ARENA, SIZE)
            vmm.free(ARENA, SIZE)
        undo_by_name(library, vmm)
        close_by_name(library, vmm)
        with names(library):
            handle = vmm.mdl_create(SIZE, RW)
            vmm.mdl_map(handle, 0, SIZE, ARENA, RW | VmmFlags.FIXED)
            vmm.free(ARENA, SIZE)
            vmm.allocate(ARENA, SIZE, RESERVED_FIXED | VmmFlags.SHAREABLE)
            vmm.free(ARENA, SIZE)
        with names(library, (ARENA - PAGE, SIZE + 2 * PAGE)):
            vmm.mdl_map(handle, 0, SIZE, ARENA, RW | VmmFlags.FIXED | GUARDS)
        if available(Feature.TRANSPARENT_HUGE_PAGES):
            library.answer_names(0)
            va = vmm.allocate(0, 4 << 20, RESERVED | VmmFlags.HUGE)
            assert library.named() == [(va, 4 << 20, NAME)]


def undo_by_name(library: faults.Faults, vmm: VMM) -> None:
    """A commit that fails maps what it had made accessible anew, and names it again."""
    vmm.allocate(ARENA, SIZE, RESERVED_FIXED | VmmFlags.LOCKED)
    for n in count(1):
        library.answer_names(0)
        with library.armed(faults.Mode.ALONE, n), suppress(MemoryError):
            vmm.commit(ARENA, SIZE)
        if library.name == "madvise":  # which populates what is accessible by then
            break
        vmm.decommit(ARENA, SIZE)
    assert library.named() == [(ARENA, SIZE, NAME)]
    vmm.free(ARENA, SIZE)


def close_by_name(library: faults.Faults, vmm: VMM) -> None:
    """A chunk that was committed behind guards is mapped anew with its last page."""
    if not available(Feature.GUARD_REGIONS):
        return
    memory.set_rule(in_chunk=1)
    vmm.allocate(ARENA, SIZE, RESERVED_FIXED)
    with names(library):
        vmm.commit(ARENA, PAGE)
        vmm.commit(ARENA + 2 * PAGE, PAGE)
        vmm.decommit(ARENA, PAGE)
    with names(library, (ARENA, SIZE)):
        vmm.decommit(ARENA + 2 * PAGE, PAGE)
    vmm.free(ARENA, SIZE)
    memory.set_rule()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EINVAL, errno.EPERM, errno.EBADF])
def test_memory_that_cannot_be_named_is_as_good(library: Path, number: int) -> None:
    faults.run(library, call, go_on_without_names.__name__, number)


def go_on_without_names(number: int) -> None:
    """Find the feature there, and be refused every name after that."""
    library = faults.Faults()
    library.answer_names(0)
    assert available(Feature.ANONYMOUS_NAMES)
    library.answer_names(number)
    before = mappings()
    with without(Feature.GUARD_REGIONS), VMM() as vmm:
        vmm.allocate(ARENA, SIZE, RESERVED_FIXED | GUARDS)
        for page in range(0, SIZE, 2 * PAGE):
            vmm.commit(ARENA + page, PAGE)
            vmm.write(ARENA + page, b"touched")
        for page in range(0, SIZE, 2 * PAGE):
            vmm.decommit(ARENA + page, PAGE)
            vmm.commit(ARENA + page, PAGE)
            assert vmm.read(ARENA + page, 7) == bytes(7)
        handle = vmm.mdl_create_from_vm(ARENA, PAGE, RW)
        vmm.mdl_map(handle, 0, PAGE, 0, RW | GUARDS)
        vmm.free(ARENA + PAGE, 2 * PAGE)
        assert len(library.named()) > SIZE // PAGE // 2
    assert mappings() == before
    assert available(Feature.ANONYMOUS_NAMES)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.ENOSYS])
def test_a_kernel_that_refuses_names_is_not_asked_again(library: Path, number: int) -> None:
    faults.run(library, call, ask_once.__name__, number)


def ask_once(number: int) -> None:
    """Use memory where the kernel knows no names."""
    library = faults.Faults()
    library.answer_names(number)
    with VMM() as vmm:
        va = vmm.allocate(0, SIZE, RESERVED)
        vmm.commit(va, SIZE)
        vmm.decommit(va, SIZE)
    assert [name for _, _, name in library.named()] == ["vmm_linux probe"]
    assert not available(Feature.ANONYMOUS_NAMES)


# ---- how names are read -------------------------------------------------------------------------


TEXT = b"""\
10000000-10010000 ---p 00000000 00:00 0                  [anon:vmm_linux region]
10020000-10030000 rw-p 00000000 00:00 0                  [anon:a name]
10040000-10050000 rw-p 00000000 00:00 0                  [anon:an \xff odd  (deleted)]
10060000-10070000 rw-s 00000000 00:01 7                  [anon_shmem:shared]
10080000-10090000 r--s 00000000 00:01 7                  [anon_shmem:shared]
100a0000-100b0000 rw-p 00000000 00:01 7                  [anon_shmem:shared]
100c0000-100d0000 rw-p 00000000 00:00 0                  [anon: glibc: malloc]
100e0000-100f0000 rw-p 00000000 00:00 0                  [anon:thread stack]
"""


def test_names_are_read_and_known_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "maps"
    path.write_bytes(TEXT)
    with path.open("rb") as file:
        entries = entries_of(list(read_mappings(file.fileno(), False, False)), None)
    assert [(entry.group, entry.mapping.pathname) for entry in entries] == [
        ("ours", "[anon:vmm_linux region]"),
        ("anonymous", "[anon:a name]"),
        ("anonymous", "[anon:an \udcff odd  (deleted)]"),
        ("shared", "[anon_shmem:shared]"),
        ("shared", "[anon_shmem:shared]"),
        ("anonymous", "[anon_shmem:shared]"),
        ("heap", "[anon: glibc: malloc]"),
        ("stacks", "[anon:thread stack]"),
    ]
    assert not any(entry.mapping.deleted for entry in entries)

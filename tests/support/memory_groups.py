"""Memory cgroups: files that stand for one, and a real one that is filled.

Tests put files in a folder in the kernel's place. Only ``scripts/soak --memory-group`` makes a real
group.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from constants import COMMITTED, LOCKED, MIB, RW
from vmm_linux import VMM, Limits, VmmFlags
from vmm_linux._core import kernel
from vmm_linux._core.kernel import CGROUP_FILES, MemoryCgroup, memory_cgroup
from vmm_linux.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# ---- files that stand for a group


def cgroup(root: Path, version: str, levels: dict[str, tuple[str, int, int, int]]) -> MemoryCgroup:
    """A hierarchy without swap: for each path its limit, its use, and what of that is cache."""
    limit, usage, swap_limit, swap_usage, stat = CGROUP_FILES[version]
    prefix = "total_" if version == "v1" else ""
    for path, (bound, use, inactive, active) in levels.items():
        folder = root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{bound}\n")
        (folder / usage).write_text(f"{use}\n")
        # The first version counts memory and swap together.
        (folder / swap_limit).write_text(f"{bound if version == 'v1' else 0}\n")
        (folder / swap_usage).write_text(f"{use if version == 'v1' else 0}\n")
        (folder / stat).write_text(
            f"cache 99999\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"
            f"{prefix}shmem 77777\n"
        )
    return MemoryCgroup(version, root, max(levels, key=len))


@contextmanager
def in_place(group: MemoryCgroup | None) -> Iterator[None]:
    """Let this group be the one that the core asks."""
    real = kernel.set_cgroup(group)
    kernel.find_limits()
    try:
        yield
    finally:
        kernel.set_cgroup(real)
        kernel.find_limits()


# ---- a real group


@contextmanager
def real_group(limit: int) -> Iterator[Path]:
    """A new memory cgroup beside this process's own, or below it: its folder.

    Raises OSError with what to do where none can be made.
    """
    own = memory_cgroup()
    if own is None:
        raise OSError("no memory cgroup counts this process, or none is mounted")
    folder = Path(own.levels[:2][-1], f"vmm_linux-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as problem:
        raise OSError(f"a memory cgroup can be made as root alone: {problem}") from problem
    try:
        try:
            (folder / own.limit).write_text(f"{limit}")
        except OSError as problem:
            raise OSError(f"no memory is counted in {folder}: {problem}") from problem
        yield folder
    finally:
        folder.rmdir()


def fill(folder: str, name: str) -> None:
    """Become one of the group and take memory in this way until that is refused."""
    (Path(folder) / "cgroup.procs").write_text(f"{os.getpid()}")
    with VMM(limits=Limits.unlimited()) as vmm:
        try:
            WAYS[name](vmm)
        except OutOfMemory as refusal:
            print(refusal)


#: Bytes, so many that vm.max_map_count does not end it first: the kernel does not merge what was
#: touched apart.
PIECE = 64 << 10
#: Addresses, more than the group has memory.
SPACE = 1 << 40


def write(vmm: VMM, va: int, size: int, step: int = 0) -> None:
    data = b"x" * size
    while True:
        vmm.write(va, data)
        va += step or size


def private(vmm: VMM, flags: int = 0) -> int:
    """Much more committed memory than a group has, and less than the kernel refuses."""
    return vmm.allocate(0, 2 << 30, COMMITTED | flags)


def mapped(vmm: VMM) -> int:
    return vmm.mdl_map(vmm.mdl_create(SPACE, RW), 0, SPACE, 0, RW)


def read_holes(vmm: VMM, size: int) -> None:
    va = mapped(vmm)
    while True:
        vmm.read(va, size)
        va += size


def read_and_keep(vmm: VMM) -> None:
    va = mapped(vmm)
    vmm.write(va, b"x" * 3 * MIB)
    kept = []
    while True:
        kept.append(vmm.read(va, 3 * MIB))


def again(call: Callable[[], object]) -> None:
    while True:
        call()


def commit_pieces(vmm: VMM) -> None:
    va = vmm.allocate(0, 2 << 30, RW | VmmFlags.RESERVE | LOCKED)
    while True:
        vmm.commit(va, PIECE)
        va += PIECE


def commit_many(vmm: VMM) -> None:
    va = vmm.allocate(0, 2 << 30, RW | VmmFlags.RESERVE | LOCKED)
    while True:
        vmm.commit_ranges([(at, PIECE) for at in range(va, va + MIB, 2 * PIECE)])
        va += MIB


def map_parts(vmm: VMM) -> None:
    handle = vmm.mdl_create(SPACE, RW)
    for offset in range(0, SPACE, MIB):
        vmm.mdl_map(handle, offset, MIB, 0, RW | LOCKED)


def convert(vmm: VMM) -> None:
    while True:
        va = vmm.allocate(0, MIB, COMMITTED)
        vmm.write(va, b"x" * MIB)
        vmm.mdl_create_from_vm(va, MIB, RW)


def write_beside_objects(vmm: VMM) -> None:
    va = private(vmm)
    kept = []
    while True:
        vmm.write(va, b"x" * 4096)
        kept.append(bytearray(4096))
        va += 4096


#: How a process can fill its group through a VMM.
WAYS: dict[str, Callable[[VMM], None]] = {
    "write, private, 4 KiB": lambda vmm: write(vmm, private(vmm), 4096),
    "write, private, 1 MiB": lambda vmm: write(vmm, private(vmm), MIB),
    "write, HUGE, here and there": lambda vmm: write(vmm, private(vmm, VmmFlags.HUGE), 1, 2 * MIB),
    "write, SHAREABLE, 4 KiB": lambda vmm: write(vmm, private(vmm, VmmFlags.SHAREABLE), 4096),
    "write, buffer, 4 KiB": lambda vmm: write(vmm, mapped(vmm), 4096),
    "write, buffer, 1 MiB": lambda vmm: write(vmm, mapped(vmm), MIB),
    "write, objects beside": write_beside_objects,
    "read, holes, 4 KiB": lambda vmm: read_holes(vmm, 4096),
    "read, holes, 1 MiB": lambda vmm: read_holes(vmm, MIB),
    "read, kept": read_and_keep,
    "allocate, LOCKED": lambda vmm: again(lambda: vmm.allocate(0, MIB, COMMITTED | LOCKED)),
    "allocate, LOCKED, SHAREABLE": lambda vmm: again(
        lambda: vmm.allocate(0, MIB, COMMITTED | LOCKED | VmmFlags.SHAREABLE)
    ),
    "commit, LOCKED": commit_pieces,
    "commit_ranges, LOCKED": commit_many,
    "mdl_create, LOCKED": lambda vmm: again(lambda: vmm.mdl_create(MIB, RW | LOCKED)),
    "mdl_map, LOCKED": map_parts,
    "mdl_create_from_buf": lambda vmm: again(
        lambda: vmm.mdl_create_from_buf(b"x" * MIB, VmmFlags.READ)
    ),
    "mdl_create_from_vm": convert,
}

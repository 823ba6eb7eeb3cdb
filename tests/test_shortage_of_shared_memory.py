"""Shared memory that others take away, or that nobody has: an error, zeros, and no signal.

A real shortage comes from a memory cgroup (version 1) below this process's own, with the kernel's
out-of-memory killer turned off in it: where the killer is on, it ends a process of the group,
and no call of this package can prevent that. Version 2 cannot turn it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import kernel_oracle as kernel
from children import run_child
from kernel_oracle import PAGE, TESTS_IMPORTABLE
from vmm_linux import VMM, Rights, VmmFlags
from vmm_linux.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ = VmmFlags.READ
RW = VmmFlags.READ | VmmFlags.WRITE
LOCKED = VmmFlags.LOCKED
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MCL_CURRENT = 1

MIB = 1 << 20
#: What the group may have, and a buffer that is too large for it.
LIMIT, TOO_MUCH = 64 * MIB, 256 * MIB

libc = ctypes.CDLL(None, use_errno=True)


# ---- a peer that punches holes


class Shared(NamedTuple):
    """A buffer that a peer has for writing, and that it punches holes into."""

    vmm: VMM
    va: int
    size: int
    punched: int


def punch_until_the_end(sock: socket.socket, told: int) -> None:
    """In a child: receive a buffer, and punch out all of it again and again."""
    before = kernel.descriptors().keys()
    with VMM() as vmm:
        handle = vmm.recv_handle(sock)
        size = vmm.mdl_get_size(handle)
        (fd,) = kernel.descriptors().keys() - before
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        while libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(size)) == 0:
            os.write(told, b".")


@pytest.fixture
def shared() -> Iterator[Shared]:
    """Such a buffer, and such a peer."""
    size = 64 * PAGE
    ours, theirs = socket.socketpair()
    punched, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            ours.close()
            os.close(punched)
            punch_until_the_end(theirs, told)
        finally:
            os._exit(1)
    theirs.close()
    os.close(told)
    try:
        with VMM() as vmm, ours:
            handle = vmm.mdl_create(size, RW)
            va = vmm.mdl_map(handle, 0, size, 0, RW)
            vmm.write(va, b"x" * size)
            vmm.send_handle(ours, handle, Rights.MAP_READ | Rights.MAP_WRITE)
            yield Shared(vmm, va, size, punched)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(punched)


def test_holes_that_a_peer_punches_are_zeros_to_read_and_write(shared: Shared) -> None:
    vmm, va, size, punched = shared
    content = b"y" * size
    for _ in range(500):
        assert os.read(punched, 1) == b"."
        assert set(vmm.read(va, size)) <= set(b"\0xy")
        assert vmm.write(va, content) == size


def test_holes_that_a_peer_punches_are_zeros_to_a_view(shared: Shared) -> None:
    """The size is sealed: what is punched out is there again, empty, at the next touch."""
    vmm, va, size, punched = shared
    view = vmm.view(va, size)
    content = b"y" * size
    for _ in range(500):
        assert os.read(punched, 1) == b"."
        assert set(view.tobytes()) <= set(b"\0xy")
        view[:] = content


def test_a_hole_takes_the_memory_of_a_locked_buffer_too() -> None:
    """LOCKED holds against the kernel, not against somebody who may write."""
    before = kernel.descriptors().keys()
    with VMM() as vmm:
        handle = vmm.mdl_create(8 * PAGE, RW | LOCKED)
        va = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW | LOCKED)
        vmm.write(va, b"x" * 8 * PAGE)
        (fd,) = kernel.descriptors().keys() - before
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        held = [os.fstat(fd).st_blocks * 512]
        assert libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(8 * PAGE)) == 0
        held.append(os.fstat(fd).st_blocks * 512)
        assert held == [8 * PAGE, 0]
        assert vmm.read(va, 8 * PAGE) == bytes(8 * PAGE)


# ---- a full memory cgroup


def memory_group_of_this_process() -> Path | None:
    """Where the memory cgroup of this process lies, if it is one of version 1."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = [path for _, controllers, path in groups if "memory" in controllers.split(",")]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        root, mounted = fields.split()[3:5]
        kind, _, options = rest.split(" ", 2)
        if own and kind == "cgroup" and "memory" in options.split(","):
            below = os.path.relpath(own[0], root)
            if not below.startswith(".."):
                return Path(mounted, below)
    return None


@contextlib.contextmanager
def small_group(*, killer: bool) -> Iterator[str]:
    """A memory cgroup below our own with little memory, with or without the kernel's killer."""
    own = memory_group_of_this_process()
    if own is None:
        pytest.skip("there is no memory cgroup of version 1 here")
    group = own / f"vmm-linux-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as problem:
        pytest.skip(f"no memory cgroup can be made here: {problem}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        with contextlib.suppress(OSError):  # without an account of swap
            (group / "memory.memsw.limit_in_bytes").write_text(str(LIMIT))
        if not killer:
            (group / "memory.oom_control").write_text("1")
        yield str(group)
    finally:
        remove(group)


def remove(group: Path) -> None:
    """Remove a cgroup as soon as the last process is out of it."""
    deadline = time.monotonic() + 30
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
        else:
            return


def enter(group: str) -> None:
    """Go into the group with all the memory that Python will need there.

    Python itself must not touch a new page when the group is full: without the killer that waits.
    """
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    for option, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
        assert libc.mallopt(option, value)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    heap = libc.malloc(ctypes.c_size_t(8 * MIB))
    ctypes.memset(heap, 1, 8 * MIB)
    libc.free(heap)
    with VMM() as vmm, pytest.raises(OutOfMemory):
        vmm.mdl_create(1 << 45, RW | LOCKED)  # so that what an error needs was there once
    assert libc.mlockall(MCL_CURRENT) == 0


def touch_all(vmm: VMM, touch: Callable[[VMM, int], object]) -> None:
    """Touch a buffer that is too large piece by piece, and say how that went."""
    handle = vmm.mdl_create(TOO_MUCH, RW)
    va = vmm.mdl_map(handle, 0, TOO_MUCH, 0, RW)
    shortage = None
    try:
        for piece in range(va, va + TOO_MUCH, MIB):
            touch(vmm, piece)
    except OutOfMemory as problem:
        shortage = problem
    vmm.free(va, TOO_MUCH)
    vmm.handle_close(handle)
    assert shortage is not None
    assert "no memory could be had for a page of the shared memory" in str(shortage)
    assert 0 <= shortage.completed < MIB
    # There is memory again, and all goes on.
    handle = vmm.mdl_create(MIB, RW)
    va = vmm.mdl_map(handle, 0, MIB, 0, RW)
    assert vmm.write(va, b"x" * MIB) == MIB
    assert vmm.read(va, MIB) == b"x" * MIB


def meet_the_limit(group: str, how: str) -> None:
    """In the group: use more shared memory than it may have."""
    data = b"x" * MIB
    enter(group)
    with VMM() as vmm:
        if how == "write":
            touch_all(vmm, lambda vmm, va: vmm.write(va, data))
        elif how == "read":
            touch_all(vmm, lambda vmm, va: vmm.read(va, MIB))
        else:
            before = kernel.descriptors()
            with pytest.raises(OutOfMemory):
                vmm.mdl_create(TOO_MUCH, RW | LOCKED)
            assert kernel.descriptors() == before
            handle = vmm.mdl_create(TOO_MUCH, RW)
            with pytest.raises(OutOfMemory):
                vmm.mdl_map(handle, 0, TOO_MUCH, 0, RW | LOCKED)
    print("done")


@pytest.mark.parametrize("how", ["write", "read", "LOCKED"])
def test_a_full_memory_cgroup_is_out_of_memory(how: str) -> None:
    with small_group(killer=False) as group:
        child = run_child(
            f"from {__name__} import *\nmeet_the_limit({group!r}, {how!r})",
            environment=TESTS_IMPORTABLE,
        )
        used = int(Path(group, "memory.max_usage_in_bytes").read_text())
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr
    assert used == LIMIT


def test_where_the_kernels_killer_guards_a_cgroup_no_call_can_help() -> None:
    """The README says so. This is SIGKILL of the kernel's, for ``write`` as for any touch."""
    with small_group(killer=True) as group:
        child = run_child(
            f"from {__name__} import *\nmeet_the_limit({group!r}, 'write')",
            environment=TESTS_IMPORTABLE,
        )
    assert (child.returncode, child.stdout) == (-signal.SIGKILL, "")

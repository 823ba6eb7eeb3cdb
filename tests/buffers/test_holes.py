"""Shared memory that a peer takes away: zeros come, and no signal."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from typing import TYPE_CHECKING, NamedTuple

import pytest

import kernel_oracle as kernel
from constants import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, LOCKED, RW
from kernel_oracle import PAGE
from vmm_linux import VMM, Rights
from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator


libc = ctypes.CDLL(None, use_errno=True)


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
            die_with_parent()
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

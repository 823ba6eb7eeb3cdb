"""What calls on buffers are made on, and the calls, for every failure to be tried on."""

from __future__ import annotations

import ctypes
import os
import re
from typing import TYPE_CHECKING

from constants import COMMIT, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FIXED, RESERVE, RW
from faults import BASE, PAGES, SIZE, Ground, ask, nothing_to_take_back, pattern
from kernel_oracle import PAGE, descriptors, libc
from vmm_linux import Handle, Retcode, Rights, VmmError, VmmFlags
from walls import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

#: What making a buffer's memory calls.
MAKING = "malloc memfd_create ftruncate fcntl"
READ_ONLY = Rights.TRANSFER | Rights.COPY | Rights.MAP_READ


def first(*steps: Callable[[Ground], object]) -> Callable[[Ground], None]:
    """One state after the other."""

    def prepare(ground: Ground) -> None:
        for step in steps:
            step(ground)

    return prepare


def buffer(prot: VmmFlags = RW) -> Callable[[Ground], None]:
    """A buffer with something else in every page."""
    return lambda ground: ground.handles.append(ground.mdl_create_from_buf(pattern(SIZE), prot))


def holes(ground: Ground) -> None:
    """A buffer that has no memory yet."""
    ground.handles.append(ground.mdl_create(SIZE, RW))


def window(ground: Ground) -> None:
    """A clone of the newest buffer, a page smaller on either side."""
    newest = ground.handles[-1]
    size = ground.mdl_get_size(newest)
    ground.handles.append(ground.mdl_clone(newest, PAGE, size - 2 * PAGE))


def copied(rights: Rights) -> Callable[[Ground], None]:
    """A copy of the newest handle."""
    return lambda ground: ground.handles.append(ground.handle_copy(ground.handles[-1], rights))


def mapped(flags: VmmFlags) -> Callable[[Ground], None]:
    """The newest buffer, mapped at BASE."""

    def prepare(ground: Ground) -> None:
        newest = ground.handles[-1]
        ground.mdl_map(newest, 0, ground.mdl_get_size(newest), BASE, FIXED | flags)

    return prepare


def converted(first_page: int, pages: int) -> Callable[[Ground], None]:
    """Some pages of the region made a buffer."""
    call = convert(first_page, pages)
    return lambda ground: ground.handles.append(call(ground))


def closed(ground: Ground) -> None:
    """The newest handle closed."""
    ground.handle_close(ground.handles.pop())


def revoked(ground: Ground) -> None:
    """What came from the oldest handle revoked."""
    ground.handle_revoke(ground.handles[0])


def half_touched(flags: VmmFlags) -> Callable[[Ground], None]:
    """A committed region in which every other page was touched."""

    def prepare(ground: Ground) -> None:
        ground.allocate(BASE, SIZE, RESERVE | FIXED | COMMIT | RW | flags)
        for page in range(0, PAGES, 2):
            ground.write(BASE + page * PAGE, pattern(PAGE, page))

    return prepare


def connected(ground: Ground) -> None:
    """Two sockets."""
    assert ground.sockets


def newest(method: str, *arguments: object) -> Callable[[Ground], object]:
    """Call a method with the newest handle."""
    return lambda ground: getattr(ground, method)(ground.handles[-1], *arguments)


def oldest(method: str, *arguments: object) -> Callable[[Ground], object]:
    """Call a method with the oldest handle."""
    return lambda ground: getattr(ground, method)(ground.handles[0], *arguments)


def convert(first_page: int, pages: int, flags: VmmFlags = RW) -> Callable[[Ground], Handle]:
    """Make a buffer of some of the region's pages."""
    return lambda ground: ground.mdl_create_from_vm(BASE + first_page * PAGE, pages * PAGE, flags)


def send(rights: Rights | None = None) -> Callable[[Ground], None]:
    """Send the newest handle."""
    return lambda ground: ground.send_handle(ground.sockets[0], ground.handles[-1], rights)


def receive(ground: Ground) -> Handle:
    """Receive a handle."""
    return ground.recv_handle(ground.sockets[1])


def send_again(rights: Rights | None = None) -> Callable[[Ground, VmmError], None]:
    """A message that was received is gone, whatever became of it: it must be sent again."""

    def take_back(ground: Ground, _error: VmmError) -> None:
        assert ground.waiting() == b""
        send(rights)(ground)

    return take_back


def info(ground: Ground) -> tuple[object, ...]:
    """What is known of the newest handle, without its security ids."""
    told = ground.handle_info(ground.handles[-1])
    return told.rights, told.size, told.seals, told.sid != 0, told.origin_sid is None


def ask_buffer(*, smaps: bool) -> Callable[[Ground], object]:
    """Query of a page of a buffer, told as text without its security id and inode."""
    question = ask(BASE + 3 * PAGE, smaps=smaps)
    return lambda ground: re.sub("(sid|inode)=[0-9]+", "", str(question(ground)))


def make_holes_again(ground: Ground, error: VmmError) -> None:
    """A failed LOCKED mapping may leave memory in the buffer, which nobody can tell from holes.

    It cannot be given back: somebody else who has the buffer may have written to it meanwhile.
    """
    nothing_to_take_back(ground, error)
    for number, target in descriptors().items():
        if target.startswith("/memfd:"):
            assert _file_contents(number) == bytes(SIZE)
            punch = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            assert libc.fallocate(number, punch, ctypes.c_long(0), ctypes.c_long(SIZE)) == 0


def _file_contents(number: int) -> bytes:
    return os.pread(number, SIZE, 0)


def mapping(flags: VmmFlags, hint: int = 0, pages: int = PAGES) -> Callable[[Ground], object]:
    """Map the newest buffer from its start on."""
    return newest("mdl_map", 0, pages * PAGE, hint, flags)


def facts(ground: Ground) -> tuple[object, ...]:
    """What ``State`` does not see: handles that nobody was given, and the memory files."""
    files = [number for number, name in descriptors().items() if name.startswith("/memfd:")]
    status = {number: os.fstat(number) for number in sorted(files)}
    return (
        ground.strangers(),
        ground.waiting(),
        [(n, s.st_ino, s.st_blocks, s.st_mode) for n, s in status.items()],
    )


def refused(ground: Ground, method: str, *arguments: object) -> tuple[Retcode, str]:
    """Return code and message of a call that must fail, and change nothing, through both faces."""
    before = facts(ground)
    rc, message = refusal(ground, method, *arguments)
    assert facts(ground) == before, method
    return rc, message

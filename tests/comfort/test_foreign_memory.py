"""Memory of other programs: taken as it is where its owner cannot cut it, else copied.

A process that touches what was cut from a file that it maps ends with SIGBUS.
"""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from buffers import mapped_files
from children import in_own_process, run_child
from constants import MIB, RW
from kernel_oracle import PAGE
from memory_groups import cgroup, in_place
from vmm_linux import VMM, Mdl, Rights, Seal, _file_copies
from vmm_linux.errors import (
    Fail,
    InvalidArgument,
    NoCapability,
    OutOfMemory,
    QuotaExceeded,
    SecurityDisallow,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEYMAP = b'xkb_keymap {\nxkb_keycodes "(unnamed)" {\n' + b"<AE01> = 10;\n" * 1000 + b"};\n};\n\0"
SHRINK, GROW, WRITE = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE
MFD_HUGETLB = 0x4
HUGE_PAGE = 2 << 20
ADVICE = r"Mdl\.from_fd\(fd, copy=True\)"


def memfd(data: bytes, seals: int, name: str = "keymap") -> int:
    """A memfd of another program's: of just these bytes."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def reopened_for_reading(fd: int) -> int:
    """The same file for reading only; the other descriptor is closed."""
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return reader


# ---- taken as it is -----------------------------------------------------------------------------

KEYMAPS: dict[str, Callable[[], int]] = {
    "that can grow": lambda: memfd(KEYMAP, SHRINK),
    "of fixed size": lambda: memfd(KEYMAP, SHRINK | GROW | fcntl.F_SEAL_SEAL),
    "read-only": lambda: reopened_for_reading(memfd(KEYMAP, SHRINK | GROW)),
    "that nothing can write": lambda: memfd(KEYMAP, SHRINK | GROW | WRITE),
}


@pytest.mark.parametrize("make", KEYMAPS.values(), ids=KEYMAPS.keys())
def test_a_keymap_is_taken_to_the_byte_and_without_a_copy(
    make: Callable[[], int], vmm: VMM
) -> None:
    assert len(KEYMAP) % PAGE
    fd = make()
    inode = os.fstat(fd).st_ino
    keymap = Mdl.from_fd(fd, vmm=vmm)
    os.close(fd)
    assert (len(keymap), keymap.nbytes, keymap.size % PAGE) == (len(KEYMAP), len(KEYMAP), 0)
    assert bytes(keymap.buf) == keymap[:] == keymap.read() == KEYMAP
    assert keymap[-1] == 0
    assert [mapping.inode for mapping in mapped_files()] == [inode]


def test_a_keymap_arrives_with_its_length_at_every_receiver(vmm: VMM) -> None:
    import socket

    fd = memfd(KEYMAP, SHRINK)
    keymap = Mdl.from_fd(fd, vmm=vmm)
    ours, theirs = socket.socketpair()
    with ours, theirs, VMM() as other:
        keymap.send(ours, Rights.MAP_READ)
        received = Mdl.recv(theirs, vmm=other)
        assert received[:] == KEYMAP
        # The owner may let it grow; a buffer stays as long as it was.
        os.write(fd, b"more")
        os.close(fd)
        keymap.send(ours)
        again = Mdl.recv(theirs, vmm=other)
        assert len(keymap) == len(received) == len(again) == len(KEYMAP)
        assert keymap[:] == again[:] == KEYMAP


def test_the_owner_s_writes_are_seen_until_it_can_write_no_more(vmm: VMM) -> None:
    fd = memfd(bytes(PAGE), SHRINK | GROW, "wl_shm pool")
    pool = Mdl.from_fd(fd, vmm=vmm)
    seen = pool.read_only().buf
    os.pwrite(fd, b"pixels", 10)
    assert bytes(seen[10:16]) == b"pixels"
    assert pool.seals == Seal(0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, WRITE)
    os.close(fd)
    assert pool.seals == Seal.FREEZE
    with pytest.raises(NoCapability, match="sealed"):
        pool.map(RW)


# ---- refused with the reason --------------------------------------------------------------------


def unsealed() -> int:
    """A memfd that its owner can cut."""
    return memfd(KEYMAP, 0)


def in_dev_shm() -> int:
    """A file of POSIX shared memory."""
    path = Path(f"/dev/shm/vmm_linux test {os.getpid()}")  # noqa: S108
    path.write_bytes(KEYMAP)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    path.unlink()
    return fd


def on_disk() -> int:
    """A file on disk, or where temporary files are."""
    fd = os.open(Path(__file__).parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    os.write(fd, KEYMAP)
    return fd


CAN_BE_CUT: dict[str, tuple[Callable[[], int], str]] = {
    "a memfd without seals": (unsealed, "not sealed against shrinking: its owner can cut it"),
    "POSIX shared memory": (in_dev_shm, "not sealed against shrinking: its owner can cut it"),
    "a file on disk": (on_disk, "a descriptor that is no memfd"),
}
can_be_cut = pytest.mark.parametrize(("make", "why"), CAN_BE_CUT.values(), ids=CAN_BE_CUT.keys())


@can_be_cut
def test_memory_that_its_owner_can_cut_is_refused_with_the_reason_and_offered_as_a_copy(
    make: Callable[[], int], why: str, vmm: VMM
) -> None:
    fd = make()
    try:
        with pytest.raises(InvalidArgument, match=f"{why}.*{ADVICE}"):
            Mdl.from_fd(fd, vmm=vmm)
        copy = Mdl.from_fd(fd, copy=True, vmm=vmm)
        assert (len(copy), copy[:]) == (len(KEYMAP), KEYMAP)
        os.ftruncate(fd, 0)
        assert copy[:] == KEYMAP
        copy[0:3] = b"our"
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)
    copy.freeze()
    assert copy[:3] == b"our"


def share_by_the_standard_library() -> None:
    """Ask for memory of ``multiprocessing.shared_memory``, and copy it."""
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=1000)
    memory.buf[:4] = b"here"  # type: ignore[index]
    fd = memory._fd  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match=f"can cut it.*SIGBUS.*{ADVICE}"):
        Mdl.from_fd(fd)
    copy = Mdl.from_fd(fd, copy=True)
    memory.close()
    memory.unlink()
    assert (len(copy), copy[:5]) == (1000, b"here\0")


def test_memory_of_the_standard_library_is_refused_and_copied() -> None:
    in_own_process(share_by_the_standard_library)


def test_memory_of_huge_pages_is_refused_and_copied(vmm: VMM) -> None:
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_HUGETLB)
    try:
        os.ftruncate(fd, HUGE_PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SHRINK | GROW)
        with pytest.raises(InvalidArgument, match=f"no memfd of ordinary pages.*{ADVICE}"):
            Mdl.from_fd(fd, vmm=vmm)
        copy = Mdl.from_fd(fd, copy=True, vmm=vmm)
        assert copy[:] == bytes(HUGE_PAGE)
    finally:
        os.close(fd)


# ---- copies -------------------------------------------------------------------------------------


@pytest.fixture
def file() -> Iterator[int]:
    """A file of POSIX shared memory, which can be cut."""
    fd = in_dev_shm()
    yield fd
    os.close(fd)


def test_a_copy_has_the_limits_that_the_caller_gives(file: int, vmm: VMM) -> None:
    with pytest.raises(SecurityDisallow, match=f"{len(KEYMAP)} bytes.*max_size"):
        Mdl.from_fd(file, max_size=len(KEYMAP) - 1, copy=True, vmm=vmm)
    with pytest.raises(InvalidArgument, match="no seals to require"):
        Mdl.from_fd(file, Seal.FREEZE, copy=True, vmm=vmm)
    assert len(Mdl.from_fd(file, 0, len(KEYMAP), copy=True, vmm=vmm)) == len(KEYMAP)
    vmm.limits = vmm.limits.replace(mdl_bytes=len(KEYMAP) // PAGE * PAGE)
    with pytest.raises(QuotaExceeded, match="mdl_bytes"):
        Mdl.from_fd(file, copy=True, vmm=vmm)


def test_a_copy_needs_room_in_the_memory_group(file: int, vmm: VMM, tmp_path: Path) -> None:
    with in_place(cgroup(tmp_path, "v2", {"group": (str(64 * MIB), 64 * MIB, 0, 0)})):
        with pytest.raises(OutOfMemory, match="memory cgroup"):
            Mdl.from_fd(file, copy=True, vmm=vmm)
        assert vmm.usage().mdls.used == 0
    assert Mdl.from_fd(file, copy=True, vmm=vmm)[:] == KEYMAP


def test_a_copy_does_not_move_the_place_where_its_owner_reads(file: int, vmm: VMM) -> None:
    os.lseek(file, 5, os.SEEK_SET)
    assert Mdl.from_fd(file, copy=True, vmm=vmm)[:] == KEYMAP
    assert os.lseek(file, 0, os.SEEK_CUR) == 5


def test_what_has_no_bytes_to_read_cannot_be_copied(vmm: VMM) -> None:
    pipe, end = os.pipe()
    empty = memfd(b"", 0)
    writer = os.open(f"/proc/self/fd/{empty}", os.O_WRONLY | os.O_CLOEXEC)
    os.write(writer, b"unreadable")
    path = os.open("/proc/self/exe", os.O_PATH | os.O_CLOEXEC)
    nothing = memfd(b"", 0)
    os.close(end)
    unfit = {
        pipe: "no file with a size",
        nothing: "a file of 0 bytes",
        writer: "not open for reading",
        path: "not open for reading",
        2**31: "no descriptor",
        -1: "no descriptor",
    }
    for fd, why in unfit.items():
        with pytest.raises(InvalidArgument, match=f"from_fd: .*{why}"):
            Mdl.from_fd(fd, copy=True, vmm=vmm)
    for fd in (pipe, empty, writer, path, nothing):
        os.close(fd)
    with pytest.raises(InvalidArgument, match="not open for reading in this process"):
        Mdl.from_fd(nothing, copy=True, vmm=vmm)


def test_a_file_that_is_cut_during_its_copy_is_an_error(
    file: int, vmm: VMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    cut = 3 * PAGE + 100

    def read_and_cut(fd: int, size: int, offset: int) -> bytes:
        got = pread(fd, size, offset)
        os.ftruncate(fd, cut)
        return got

    monkeypatch.setattr(_file_copies, "AT_ONCE", 2 * PAGE)
    monkeypatch.setattr(os, "pread", read_and_cut)
    assert len(KEYMAP) > cut
    why = rf"cut to {cut} of {len(KEYMAP)} bytes during the copy"
    with pytest.raises(Fail, match=why):
        Mdl.from_fd(file, copy=True, vmm=vmm)
    assert vmm.usage().mdls.used == 0


def cut_while_it_is_copied(seconds: float) -> None:
    """Copy a file again and again, while a thread cuts it and lets it grow."""
    size = 16 << 20
    fd = os.memfd_create("cut", os.MFD_CLOEXEC)
    over = threading.Event()

    def cut() -> None:
        pauses = random.Random(1)  # noqa: S311
        while not over.is_set():
            os.ftruncate(fd, 0)
            over.wait(pauses.random() / 200)
            os.ftruncate(fd, size)
            over.wait(pauses.random() / 20)  # some copies come through

    os.ftruncate(fd, size)
    thread = threading.Thread(target=cut)
    thread.start()
    outcomes: set[int] = set()
    both = {-1, size}
    start = time.monotonic()
    while (spent := time.monotonic() - start) < seconds or (outcomes != both and spent < 50):
        try:
            with Mdl.from_fd(fd, copy=True) as copy:
                outcomes.add(len(copy))
        except Fail as problem:
            assert "during the copy" in str(problem)  # noqa: PT017
            outcomes.add(-1)
        except InvalidArgument as problem:
            assert "a file of 0 bytes" in str(problem)  # noqa: PT017
    over.set()
    thread.join()
    assert outcomes == both


def test_a_file_that_is_cut_all_the_time_is_copied_or_refused_and_never_a_signal() -> None:
    in_own_process(cut_while_it_is_copied, 1.0)


MAPPED_AND_CUT = """
import mmap, os
fd = os.memfd_create("cut")
os.ftruncate(fd, mmap.PAGESIZE)
memory = mmap.mmap(fd, mmap.PAGESIZE)
os.ftruncate(fd, 0)
memory[0]
"""


def test_without_the_check_a_cut_file_ends_the_process_that_touches_it() -> None:
    import signal

    assert run_child(MAPPED_AND_CUT).returncode == -signal.SIGBUS

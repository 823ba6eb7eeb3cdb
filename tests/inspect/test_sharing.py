"""Shared memory is found at whichever end it shows, and looking changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import struct
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from channels import (
    LIBC,
    SYS_EXIT,
    channel_of,
    give,
    holder,
    map_without_descriptor,
    mapper,
    memory_file,
    shm_file,
    take,
    take_and_map,
)
from constants import RW
from kernel_oracle import PAGE
from partners import partner
from vmm_linux import VMM, Rights, VmmFlags
from vmm_linux.inspect import Channel, Kind, Sharing, channels, maps, sharing, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


IPC_CREAT, IPC_RMID, CLONE_FILES, IN_OPEN = 0o1000, 0, 0x400, 0x20


# ---- every kind of channel -----------------------------------------------------------------------


def test_a_buffer_that_was_handed_over_is_found_with_the_rights_of_both_ends() -> None:
    def work(sock: socket.socket) -> object:
        vmm = VMM()
        handle = vmm.recv_handle(sock)
        vmm.mdl_map(handle, 0, PAGE, 0, VmmFlags.READ)
        return vmm

    with partner(work) as other, VMM() as vmm:
        handle = vmm.mdl_create(4 * PAGE, RW)
        vmm.write(vmm.mdl_map(handle, 0, 2 * PAGE, 0, RW), b"shared")
        vmm.send_handle(other.sock, handle, Rights.MAP_READ)
        other.wait_until_ready()
        fd = vmm.handle_fileno(handle)
        found = channel_of(fd)
        os.close(fd)
    assert (found.kind, found.name, found.size) == (Kind.MEMFD, "vmm_linux", 4 * PAGE)
    assert (found.resident, found.deleted, found.processes) == (PAGE, False, 2)
    assert found.seals is not None
    assert {"F_SEAL_SHRINK", "F_SEAL_GROW"} <= set(found.seals)
    assert holder(found, other.pid).access == "r"
    theirs = mapper(found, other.pid)
    assert (theirs.permissions, theirs.may_write, theirs.size) == ("r--s", False, PAGE)
    assert "rw" in {each.access for each in found.holders if each.pid == os.getpid()}
    ours = mapper(found, os.getpid())
    assert (ours.permissions, ours.may_write, ours.size) == ("rw-s", True, 2 * PAGE)
    assert ours.resident == PAGE


def test_memory_passed_on_without_the_package_is_found() -> None:
    with partner(take_and_map) as other, memory_file("innocent") as fd:
        give(other, fd)
        found = channel_of(fd)
    assert (found.kind, found.name, found.processes) == (Kind.MEMFD, "innocent", 2)
    assert [(each.pid, each.descriptors) for each in found.holders] == [(os.getpid(), (fd,))]
    assert [(each.pid, each.permissions, each.size) for each in found.mappers] == [
        (other.pid, "rw-s", 4 * PAGE)
    ]


def test_mappings_that_nobody_has_a_descriptor_of_are_found() -> None:
    with partner(take_and_map) as other, contextlib.ExitStack() as at_end:
        fd = os.memfd_create("gone", os.MFD_CLOEXEC)
        os.truncate(fd, 4 * PAGE)
        give(other, fd)
        inode = os.fstat(fd).st_ino
        address = map_without_descriptor(fd)
        at_end.callback(LIBC.munmap, ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE))
        (found,) = [each for each in sharing().channels if each.inode == inode]
    assert (found.kind, found.name, found.size) == (Kind.MEMFD, "gone", 4 * PAGE)
    assert found.holders == ()
    assert {each.pid for each in found.mappers} == {os.getpid(), other.pid}
    if os.geteuid() == 0:  # others may not ask a mapping for its file
        assert (found.seals, found.resident) == (("F_SEAL_SEAL",), 0)


def test_descriptors_that_nobody_maps_are_found() -> None:
    with partner(take) as other, memory_file() as fd:
        give(other, fd)
        found = channel_of(fd)
    assert found.mappers == ()
    assert {each.pid for each in found.holders} == {os.getpid(), other.pid}


@pytest.mark.parametrize("flags", [0x4, 0x4 | 21 << 26, 0x4 | 30 << 26])
def test_a_memory_file_of_huge_pages_is_found_without_taking_any(flags: int) -> None:
    try:
        fd = os.memfd_create("huge", flags | os.MFD_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no memory files of huge pages of this size here: {error}")
    with partner(take) as other:
        give(other, fd)
        found = channel_of(fd)
    os.close(fd)
    assert (found.kind, found.name, found.size) == (Kind.MEMFD, "huge", 0)
    assert found.processes == 2


@pytest.mark.parametrize("deleted", [False, True])
def test_a_file_of_dev_shm_is_found(deleted: bool) -> None:
    with partner(take) as other, shm_file() as (path, fd), mmap.mmap(fd, 2 * PAGE) as memory:
        memory[0] = 1
        if deleted:
            path.unlink()
        give(other, fd)
        found = channel_of(fd)
    assert (found.kind, found.name, found.deleted) == (Kind.DEV_SHM, str(path), deleted)
    assert (found.size, found.resident, found.seals) == (2 * PAGE, PAGE, None)
    assert mapper(found, os.getpid()).permissions == "rw-s"
    assert holder(found, other.pid).access == "rw"


def test_a_system_v_segment_is_found_and_its_attachments_counted() -> None:
    LIBC.shmat.restype = ctypes.c_void_p
    LIBC.shmdt.argtypes = [ctypes.c_void_p]
    segment = LIBC.shmget(0, 3 * PAGE, IPC_CREAT | 0o600)
    assert segment >= 0
    try:
        with partner(lambda _: LIBC.shmat(segment, None, 0)) as other:
            other.wait_until_ready()
            alone = segment_in(sharing(), segment)
            address = LIBC.shmat(segment, None, 0)
            both = segment_in(sharing(), segment)
            LIBC.shmdt(address)
        (left,) = segment_in(sharing(all=True), segment)
    finally:
        LIBC.shmctl(segment, IPC_RMID, None)
    assert alone == []  # one process is no sharing
    (found,) = both
    assert (found.kind, found.name) == (Kind.SYSTEM_V, "SYSV00000000")
    assert (found.size, found.resident, found.attached) == (3 * PAGE, 0, 2)
    assert {each.pid for each in found.mappers} == {os.getpid(), other.pid}
    assert (left.processes, left.attached) == (0, 0)


def segment_in(found: Sharing, segment: int) -> list[Channel]:
    return [e for e in found.channels if e.kind is Kind.SYSTEM_V and e.inode == segment]


def test_shared_anonymous_memory_is_found_after_a_fork() -> None:
    with mmap.mmap(-1, 5 * PAGE) as memory:
        memory[0] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with partner(lambda _: None) as other:
            other.wait_until_ready()
            (record,) = [each for each in maps() if each.start <= address < each.end]
            channels = sharing().channels
        (found,) = [each for each in channels if each.inode == record.inode]
    assert (found.kind, found.name, found.size) == (Kind.ANONYMOUS, "", 5 * PAGE)
    assert {each.pid for each in found.mappers} == {os.getpid(), other.pid}


def test_a_deleted_file_that_is_mapped_shared_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a file with blanks"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDWR)
    try:
        with partner(take_and_map) as other, mmap.mmap(fd, PAGE):
            give(other, fd)
            kept = [each for each in sharing().channels if each.name == str(path)]
            path.unlink()
            (found,) = [each for each in sharing().channels if each.name == str(path)]
    finally:
        os.close(fd)
    assert kept == []  # a file with a name hides nothing
    assert (found.kind, found.deleted, found.size) == (Kind.DELETED, True, PAGE)
    assert {each.pid for each in found.mappers} == {os.getpid(), other.pid}


# ---- ends ----------------------------------------------------------------------------------------


def test_read_only_ends_are_told_from_writable_ones() -> None:
    def work(sock: socket.socket) -> object:
        (fd,) = socket.recv_fds(sock, 1, 1)[1]
        return map_without_descriptor(fd, mmap.PROT_READ)

    with partner(work) as careful, partner(work) as careless, memory_file() as fd:
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        named = os.open(f"/proc/self/fd/{fd}", os.O_PATH)
        give(careful, read_only)
        give(careless, fd)
        found = channel_of(fd)
        os.close(read_only)
        os.close(named)
    assert (mapper(found, careful.pid).permissions, mapper(found, careful.pid).may_write) == (
        "r--s",
        False,
    )
    assert (mapper(found, careless.pid).permissions, mapper(found, careless.pid).may_write) == (
        "r--s",
        True,
    )
    access = {each.descriptors: each.access for each in found.holders if each.pid == os.getpid()}
    assert access == {(fd,): "rw", (read_only,): "r", (named,): "path"}


def test_a_private_mapping_sees_what_others_write_and_is_an_end_too() -> None:
    def work(sock: socket.socket) -> object:
        return map_without_descriptor(take(sock), mmap.PROT_READ, mmap.MAP_PRIVATE)

    with partner(work) as other, memory_file() as fd:
        give(other, fd)
        theirs = mapper(channel_of(fd), other.pid)
    assert (theirs.permissions, theirs.may_write) == ("r--p", False)


def test_one_process_alone_shares_nothing_but_could() -> None:
    with memory_file("one end") as fd:
        inode = os.fstat(fd).st_ino
        assert inode not in {each.inode for each in sharing().channels}
        assert channel_of(fd, sharing(all=True)).processes == 1


def test_a_file_of_dev_shm_that_nobody_has_open_waits_for_somebody() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "waiting")
        path.write_bytes(bytes(PAGE))
        Path(folder, "link").symlink_to("waiting")
        Path(folder, "loop").symlink_to("loop")
        os.mkfifo(Path(folder, "pipe"))
        named = [each for each in sharing(all=True).channels if each.name.startswith(folder)]
        assert not [each for each in sharing().channels if each.name.startswith(folder)]
    (found,) = named
    assert (found.name, found.processes) == (str(path), 0)
    assert (found.size, found.resident) == (PAGE, PAGE)


def test_a_thread_with_descriptors_of_its_own_hides_nothing() -> None:
    def work(sock: socket.socket) -> object:
        fd = take(sock)
        ready, end = threading.Event(), threading.Event()

        def keep() -> None:
            assert LIBC.unshare(CLONE_FILES) == 0
            ready.set()
            end.wait()

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        ready.wait()
        # The thread has its own; here its number and its name are another's.
        alike = os.memfd_create("a test's")
        os.dup2(alike, fd)
        os.close(alike)
        return thread

    with partner(work) as other, memory_file() as fd:
        give(other, fd)
        found = channel_of(fd)
    assert holder(found, other.pid).access == "rw"


@pytest.mark.skipif(SYS_EXIT is None, reason="no number of exit(2) is known for this processor")
def test_a_process_whose_first_thread_has_ended_hides_nothing() -> None:
    def work(sock: socket.socket) -> object:
        address = take_and_map(sock)

        def stay() -> None:
            while b") Z " not in Path(f"/proc/{os.getpid()}/stat").read_bytes():
                pass
            sock.sendall(b"ready")
            sock.recv(1)
            os._exit(address is None)

        threading.Thread(target=stay, daemon=True).start()
        LIBC.syscall(SYS_EXIT, 0)
        raise AssertionError

    with partner(work) as other, memory_file() as fd:
        give(other, fd)
        found = channel_of(fd)
    assert mapper(found, other.pid).permissions == "rw-s"


# ---- nothing is changed --------------------------------------------------------------------------


def test_holes_stay_holes() -> None:
    with partner(take_and_map) as other, memory_file(size=64 * PAGE) as fd:
        give(other, fd)
        found = channel_of(fd)
        assert os.fstat(fd).st_blocks == 0
    assert (found.resident, mapper(found, other.pid).resident) == (0, 0)


def test_no_pipe_and_no_file_with_a_path_is_opened() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        pipe, file = Path(folder, "memfd:pipe"), Path(folder, "file")
        os.mkfifo(pipe)
        file.write_bytes(bytes(PAGE))
        held = [os.open(pipe, os.O_RDWR), os.open(file, os.O_RDWR)]
        notify = LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        for path in (pipe, file):
            assert LIBC.inotify_add_watch(notify, os.fsencode(path), IN_OPEN) >= 0
        with partner(lambda _: None) as other:  # it inherits them
            other.wait_until_ready()
            found = channel_of(held[1])
            with pytest.raises(BlockingIOError):  # nobody opened anything
                os.read(notify, 4096)
            # But it would have been seen.
            os.close(os.open(file, os.O_RDONLY))
            assert struct.unpack_from("iI", os.read(notify, 4096))[1] == IN_OPEN
        for fd in (notify, *held):
            os.close(fd)
    assert found.processes == 2
    assert (found.size, found.resident) == (PAGE, PAGE)


# ---- processes come and go -----------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["maps", "snapshot"])
def test_a_process_that_dies_while_it_is_looked_at_is_missing_and_no_error(moment: str) -> None:
    with partner(take_and_map) as other, partner(take) as another, memory_file() as fd:
        give(other, fd)
        give(another, fd)

        def deadly(read: Callable[[int], Sequence[Any]]) -> Callable[[int], Sequence[Any]]:
            def killing(pid: int) -> Sequence[Any]:
                if pid == other.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                return read(pid)

            return killing

        readers: dict[str, Callable[[int], Sequence[Any]]] = {"maps": maps, "snapshot": snapshot}
        readers[moment] = deadly(readers[moment])
        found = channel_of(fd, channels.find(**readers, all=False))
    ends = {each.pid for each in found.mappers}
    if moment == "maps":
        assert ends == set()
    else:  # seen, but its figures are not to be had any more
        assert mapper(found, other.pid).resident is None
    assert {each.pid for each in found.holders} == {os.getpid(), another.pid}


def test_processes_that_come_and_go_disturb_nobody() -> None:
    def work(_: socket.socket) -> object:
        def fork_on() -> None:
            while True:
                if os.fork() == 0:
                    os._exit(0)
                os.wait()

        threading.Thread(target=fork_on, daemon=True).start()
        return None

    with partner(work) as other, memory_file() as fd, partner(lambda _: None) as third:
        other.wait_until_ready()
        third.wait_until_ready()
        for _ in range(20):
            assert {os.getpid(), third.pid} <= {e.pid for e in channel_of(fd).holders}
        os.kill(other.pid, signal.SIGKILL)

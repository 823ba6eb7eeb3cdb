"""Shared memory is found at whichever end it shows, and looking changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import platform
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import commands
from children import NOBODY, run_child
from partners import Partner, partner
from vmm_linux import VMM, Rights, VmmFlags, _sharing
from vmm_linux.inspect import Channel, Holder, Kind, Mapper, Sharing, maps, sharing, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE = os.sysconf("SC_PAGE_SIZE")
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
LIBC = ctypes.CDLL(None, use_errno=True)
IPC_CREAT, IPC_RMID, CLONE_FILES, IN_OPEN = 0o1000, 0, 0x400, 0x20
#: exit(2) of one thread alone.
SYS_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())
#: What a child answers that may not do what its test needs.
CANNOT_MOUNT = 77
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's processes")


def channel_of(fd: int, found: Sharing | None = None) -> Channel:
    """The one channel that is this file."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    channels = (found or sharing()).channels
    (channel,) = [e for e in channels if (e.device, e.inode) == (device, status.st_ino)]
    return channel


def holder(channel: Channel, pid: int) -> Holder:
    (found,) = [each for each in channel.holders if each.pid == pid]
    return found


def mapper(channel: Channel, pid: int) -> Mapper:
    (found,) = [each for each in channel.mappers if each.pid == pid]
    return found


@contextlib.contextmanager
def memory_file(name: str = "a test's", size: int = 4 * PAGE) -> Iterator[int]:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def shm_file() -> Iterator[tuple[Path, int]]:
    path = Path("/dev/shm", f"vmm_linux_test_{uuid.uuid4().hex}")  # noqa: S108
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(fd, 2 * PAGE)
        yield path, fd
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def give(other: Partner, *fds: int) -> None:
    """Hand descriptors over with nothing but the kernel's own means."""
    socket.send_fds(other.sock, [b"x"], list(fds))
    other.wait_until_ready()


def take(sock: socket.socket) -> int:
    (fd,) = socket.recv_fds(sock, 1, 1)[1]
    return fd


def take_and_map(sock: socket.socket) -> int:
    """Map what comes, and close the descriptor."""
    return map_without_descriptor(take(sock))


def map_without_descriptor(
    fd: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE, flags: int = mmap.MAP_SHARED
) -> int:
    """Map the whole file and close the descriptor, of which ``mmap.mmap`` would keep a copy."""
    size = ctypes.c_size_t(os.fstat(fd).st_size)
    LIBC.mmap.restype = ctypes.c_void_p
    address = LIBC.mmap(None, size, protection, flags, fd, ctypes.c_long(0))
    assert address != ctypes.c_void_p(-1).value
    os.close(fd)
    return int(address)


# ---- every kind of channel ----------------------------------------------------------------------


def test_a_buffer_that_was_handed_over_is_found_with_the_rights_of_both_ends() -> None:
    def work(sock: socket.socket) -> object:
        vmm = VMM()
        handle = vmm.recv_handle(sock)
        vmm.mdl_map(handle, 0, PAGE, 0, VmmFlags.READ)
        return vmm

    with partner(work) as other, VMM() as vmm:
        handle = vmm.mdl_create(4 * PAGE, READ_WRITE)
        vmm.write(vmm.mdl_map(handle, 0, 2 * PAGE, 0, READ_WRITE), b"shared")
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


# ---- ends ---------------------------------------------------------------------------------------


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


# ---- nothing is changed -------------------------------------------------------------------------


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


# ---- processes come and go ----------------------------------------------------------------------


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
        found = channel_of(fd, _sharing.find(**readers, all=False))
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


# ---- what somebody does so as not to be seen -----------------------------------------------------


def map_in_deep_folder(sock: socket.socket, top: Path, depth: int, *, close: bool) -> object:
    """Share a file whose path has more characters than a system call would take."""
    os.chdir(top)
    for _ in range(depth):
        os.mkdir("d" * 200)  # noqa: PTH102 (the path is too long for anything else)
        os.chdir("d" * 200)
    fd = os.open("file", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(fd, PAGE)
    sock.sendall(os.fstat(fd).st_ino.to_bytes(8, "little"))
    mapped = mmap.mmap(fd, PAGE)
    if close:
        os.close(fd)
    return mapped


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    folder = tempfile.mkdtemp(dir="/dev/shm")
    try:
        yield Path(folder)
    finally:  # shutil.rmtree goes by recursion
        subprocess.run(["/bin/rm", "-rf", folder], check=True)


@pytest.mark.parametrize("depth", [30, 400])
def test_a_path_of_any_length_hides_nothing(depth: int) -> None:
    with (
        folder_in_memory() as top,
        partner(lambda sock: map_in_deep_folder(sock, top, depth, close=False)) as other,
    ):
        inode = int.from_bytes(other.sock.recv(8), "little")
        other.wait_until_ready()
        (channel,) = [e for e in sharing(all=True).channels if e.inode == inode]
        assert channel.name == f"{top}{'/' + 'd' * 200}" + f"/{'d' * 200}" * (depth - 1) + "/file"
        assert holder(channel, other.pid).access == "rw"
        assert mapper(channel, other.pid).size == PAGE
        assert [e.pathname for e in snapshot(other.pid) if e.inode == inode] == [channel.name]


@needs_root
def test_a_carriage_return_in_the_name_of_a_mount_hides_nothing(tmp_path: Path) -> None:
    done = run_child(share_beside_odd_mount, str(tmp_path))
    if done.returncode == CANNOT_MOUNT:
        pytest.skip("this process may not mount")
    assert (done.returncode, done.stdout, done.stderr) == (0, "seen\n", "")


def share_beside_odd_mount(top: str) -> None:
    """Look at this process, which has mounts of its own; 77 if it may not."""
    import ctypes
    import os
    import sys
    from pathlib import Path

    from vmm_linux.doctor import diagnose
    from vmm_linux.inspect import sharing

    libc = ctypes.CDLL(None)
    point = f"{top}/a\r b\x0bc\u2028d"
    Path(point).mkdir()
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):
        sys.exit(77)
    if libc.mount(b"x", os.fsencode(point), b"tmpfs", 0, None):
        sys.exit(77)
    fd = os.memfd_create("seen")
    sys.stdout.write("".join(f"{e.name}\n" for e in sharing(all=True).channels if e.name == "seen"))
    os.close(fd)
    diagnose()


@needs_root
def test_a_file_system_that_was_taken_away_hides_nothing(tmp_path: Path) -> None:
    done = run_child(share_without_mount, str(tmp_path))
    if done.returncode == CANNOT_MOUNT:
        pytest.skip("this process may not mount")
    assert (done.returncode, done.stdout, done.stderr) == (0, "detached file /kept\n", "")


def share_without_mount(point: str) -> None:
    """Map a file of a tmpfs, take the mount away, and look at this process; 77 if it may not."""
    import ctypes
    import mmap
    import os
    import sys
    from pathlib import Path

    from vmm_linux.inspect import sharing

    libc = ctypes.CDLL(None)
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):
        sys.exit(77)
    if libc.mount(b"x", os.fsencode(point), b"tmpfs", 0, None):
        sys.exit(77)
    with Path(point, "kept").open("w+b") as file:
        file.truncate(4096)
        mapped = mmap.mmap(file.fileno(), 4096)
    if libc.umount2(os.fsencode(point), 2):
        sys.exit(77)
    channels = [each for each in sharing(all=True).channels if each.name == "/kept"]
    sys.stdout.write("".join(f"{each.kind} {each.name}\n" for each in channels))
    mapped.close()


@needs_root
def test_processes_of_which_nothing_is_told_are_counted_too() -> None:
    done = run_child(look_with_hidden_processes)
    if done.returncode == CANNOT_MOUNT:
        pytest.skip("this process may not mount")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def look_with_hidden_processes() -> None:
    """Look as a user to whom /proc tells no more than that processes are there (hidepid=1)."""
    import ctypes
    import os
    import sys

    from vmm_linux.inspect import sharing

    libc = ctypes.CDLL(None)
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):
        sys.exit(77)
    if libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=1"):
        sys.exit(77)
    parent = os.getppid()
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    libc.prctl(4, 1, 0, 0, 0)
    sys.stdout.write(f"{parent in [each.pid for each in sharing().unread]}\n")


# ---- what may not be read -----------------------------------------------------------------------


@needs_root
def test_what_an_ordinary_user_may_not_read_is_counted_and_named() -> None:
    with memory_file() as fd, partner(lambda _: None) as other:
        other.wait_until_ready()
        done = run_child(look_as_nobody, nobody=True)
        assert done.stderr == ""
        answer = json.loads(done.stdout)
        inode = os.fstat(fd).st_ino
    unread = {each["pid"]: each for each in answer["unread"]}
    assert {os.getpid(), other.pid} <= unread.keys()
    assert unread[other.pid]["uid"] == 0
    assert answer["own"]
    assert inode not in answer["inodes"]
    assert answer["uid"] == NOBODY


def look_as_nobody() -> None:
    """Print what this user sees, of a memfd of its own that it shares with a child, too."""
    import json
    import os
    import traceback  # by errors

    from vmm_linux.inspect import sharing

    fd = os.memfd_create("nobody's")
    os.truncate(fd, 4096)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    # Of a process that changed its user, the child may not be read; its own it may.
    found = sharing(all=True)
    os.close(writer)
    os.waitpid(child, 0)
    own = [each for each in found.channels if each.inode == os.fstat(fd).st_ino]
    answer = {
        "uid": os.geteuid(),
        "own": [each.name for each in own] == ["nobody's"] and own[0].seals is not None,
        "inodes": [each.inode for each in found.channels],
        "unread": [{"pid": each.pid, "uid": each.uid} for each in found.unread],
    }
    print(json.dumps(answer), end=traceback.__name__[:0])


def test_kernel_threads_are_neither_read_nor_missed() -> None:
    found = sharing(all=True)
    kernel_threads = {
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdecimal() and not cmdline(path) and is_kernels(path)
    }
    assert kernel_threads.isdisjoint(each.pid for each in found.unread)
    assert os.getpid() not in {each.pid for each in found.unread}
    assert found.read > 0


def cmdline(path: Path) -> bytes:
    try:
        return (path / "cmdline").read_bytes()
    except (OSError, ProcessLookupError):
        return b"gone"


def is_kernels(path: Path) -> bool:
    try:
        return (path / "status").read_text().count("Kthread:\t1") == 1
    except OSError as error:
        assert error.errno in {errno.ENOENT, errno.ESRCH}  # noqa: PT017  gone meanwhile
        return False


# ---- the command --------------------------------------------------------------------------------


def test_the_command_shows_both_ends_in_plain_text() -> None:
    with partner(take_and_map) as other, memory_file("seen \x1b[31m") as fd:
        give(other, fd)
        inode = os.fstat(fd).st_ino
        done = commands.run("sharing")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    (at,) = [n for n, line in enumerate(lines) if f" {inode}]" in line and "memfd" in line]
    ends = lines[at : at + 2]
    (ours,) = [line for line in ends if f" {os.getpid()} " in line]
    (theirs,) = [line for line in ends if f" {other.pid} " in line]
    assert f"rw fd {fd}" in ours
    assert "rw-s 16 KiB" in theirs or PAGE != 4096
    assert any(line.startswith("Channels: ") for line in lines)


def test_the_command_writes_json() -> None:
    with partner(take_and_map) as other, memory_file("for programs") as fd:
        give(other, fd)
        inode = os.fstat(fd).st_ino
        done = commands.run("sharing", "--json")
        lone = os.memfd_create("alone", os.MFD_CLOEXEC)
        all_of_it = commands.run("sharing", "--json", "--all")
        alone = os.fstat(lone).st_ino
        os.close(lone)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer.keys() == {"channels", "unread", "read"}
    (found,) = [e for e in answer["channels"] if (e["kind"], e["inode"]) == ("memfd", inode)]
    assert (found["name"], found["size"], found["processes"]) == ("for programs", 4 * PAGE, 2)
    assert [each["pid"] for each in found["mappers"]] == [other.pid]
    assert alone not in [each["inode"] for each in answer["channels"]]
    assert alone in [each["inode"] for each in json.loads(all_of_it.stdout)["channels"]]


@pytest.mark.parametrize("columns", [80, 160])
def test_on_a_terminal_no_line_is_wider_than_it(columns: int) -> None:
    with partner(take_and_map) as other, memory_file() as fd:
        give(other, fd)
        shown = commands.run_on_terminal(columns, commands.SCRIPT, "sharing")
    assert shown.returncode == 0
    assert str(other.pid) in "".join(shown.lines)
    assert max(len(line) for line in shown.lines if not line.startswith("NOT")) <= columns


@needs_root
def test_the_command_says_what_it_could_not_read() -> None:
    done = run_child(command_as_nobody, nobody=True)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NOT to be read")]
    assert " processes (1, " in line


def command_as_nobody() -> None:
    """Run the command as whom it may be."""
    import gettext  # by argparse
    import locale
    import shutil
    import sys

    from vmm_linux import _sharing_command, cli

    modules = (gettext, locale, shutil, _sharing_command)
    assert {module.__name__ for module in modules} <= sys.modules.keys()
    sys.exit(cli.main(["sharing"]))

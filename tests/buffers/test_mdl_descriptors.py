"""Descriptors come of handles, and make handles."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from constants import ALL_BUT_EXECUTE, READ, READ_ONLY, RESIZING, RW
from descriptors import a_memfd, memory_files, reopened
from kernel_oracle import PAGE, maps_between
from leaks import read_descriptors
from vmm_linux import VMM, Mdl, Rights, Seal, VmmFlags
from vmm_linux.errors import (
    HandleRevoked,
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    QuotaExceeded,
    SecurityDisallow,
)

if TYPE_CHECKING:
    from collections.abc import Callable


SIZE = 4 * PAGE
O_PATH = 0o10000000
MFD_HUGETLB = 4


# ---- descriptors out -----------------------------------------------------------------------------


def test_a_descriptor_is_fresh_close_on_exec_and_open_for_what_the_rights_say(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, RW)
    for rights, mode in ((None, os.O_RDWR), (READ_ONLY, os.O_RDONLY), (0, os.O_RDONLY)):
        fds = [vmm.handle_fileno(handle, rights) for _ in range(2)]
        assert fds[0] != fds[1]
        for fd in fds:
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == mode
            assert not os.get_inheritable(fd)
            assert os.fstat(fd).st_size == SIZE
            os.close(fd)
    vmm.handle_close(handle)


def test_a_descriptor_needs_transfer_and_the_rights_asked_for(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, READ)
    before = read_descriptors()
    for refused, rights in (
        (handle, Rights.MAP_WRITE),
        (vmm.handle_copy(handle, Rights.MAP_READ), None),
    ):
        with pytest.raises(NoCapability, match="handle_fileno"):
            vmm.handle_fileno(refused, rights)
    with pytest.raises(InvalidArgument, match="unknown bits"):
        vmm.handle_fileno(handle, 0x40)
    for wrong in (True, "1", 0, 2**64 - 1, handle + 1):
        with pytest.raises(InvalidArgument, match="handle_fileno"):
            vmm.handle_fileno(wrong)  # type: ignore[arg-type]
    assert read_descriptors() == before


def test_a_clone_has_no_descriptor_and_none_is_opened_for_it(vmm: VMM) -> None:
    clone = vmm.mdl(SIZE).clone(PAGE, PAGE)
    before = read_descriptors()
    with pytest.raises(InvalidOperation, match="a clone or in segments"):
        vmm.handle_fileno(clone.handle, Rights.MAP_READ)
    with pytest.raises(InvalidOperation, match="a clone or in segments"):
        clone.fileno()
    assert read_descriptors() == before


def test_a_buffer_in_segments_has_no_one_descriptor_and_its_clone_has_just_its_own() -> None:
    with VMM() as vmm, vmm.mdl(8 * PAGE, segment_size=2 * PAGE) as whole:
        with pytest.raises(InvalidOperation, match="a clone or in segments"):
            whole.fileno()
        there = whole.map()
        there.write(b"x" * 8 * PAGE)
        files = [mapping.inode for mapping in maps_between(there.base, there.base + 8 * PAGE)]
        assert len(set(files)) == 4
        with whole.clone(2 * PAGE, 2 * PAGE) as window:
            part = window.map()
            (mapping,) = maps_between(part.base, part.base + 2 * PAGE)
            assert mapping.inode == files[1]
            assert len(window) == 2 * PAGE


def test_fileno_ends_with_the_handle(vmm: VMM) -> None:
    origin = vmm.mdl(SIZE)
    copy = origin.read_only()
    copy.fileno()
    vmm.handle_revoke(origin.handle)
    with pytest.raises(HandleRevoked):
        copy.fileno()
    with VMM() as other:
        mdl = other.mdl(SIZE)
        mdl.fileno()
    with pytest.raises(InvalidOperation, match="closed"):
        mdl.fileno()


def test_fileno_is_made_once(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    assert mdl.fileno() == mdl.fileno()
    barrier = threading.Barrier(8)
    other = vmm.mdl(SIZE)
    before = memory_files()
    found: list[int] = []

    def ask() -> None:
        barrier.wait()
        found.append(other.fileno())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found)), memory_files()) == (8, 1, before + 1)


# ---- descriptors in ------------------------------------------------------------------------------


@pytest.mark.parametrize("rights", [READ_ONLY, ALL_BUT_EXECUTE], ids=["read-only", "read-write"])
def test_a_descriptor_of_a_buffer_becomes_a_handle_of_it(rights: Rights, vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.map().write(b"the same")
    fd = vmm.handle_fileno(mdl.handle, rights)
    with VMM() as other:
        came = Mdl.from_fd(fd, vmm=other)
        assert (came.rights, came.size, came.sid) == (rights, SIZE, mdl.sid)
        assert came.map().read(8) == b"the same"
        os.fstat(fd)  # still the caller's
        os.close(fd)
        assert came.map().query().protection == (RW if rights & Rights.MAP_WRITE else READ)
        with pytest.raises(NoCapability, match="EXECUTE"):
            came.map(READ | VmmFlags.EXECUTE)


def test_a_memfd_of_somebody_else_s_is_fine_if_it_is_sealed(vmm: VMM) -> None:
    fd = a_memfd()
    os.pwrite(fd, b"theirs", PAGE)
    mdl = Mdl.from_fd(fd, vmm=vmm)
    os.close(fd)
    assert mdl.map().read(6, PAGE) == b"theirs"
    assert mdl.rights == ALL_BUT_EXECUTE


def test_a_memfd_frozen_by_somebody_else_is_read(vmm: VMM) -> None:
    fd = a_memfd(seals=RESIZING | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    mdl = Mdl.from_fd(fd, Seal.FREEZE, SIZE, vmm=vmm)
    os.close(fd)
    assert mdl.seals == Seal.FREEZE
    assert mdl.map().query().protection == READ
    with pytest.raises(NoCapability, match="sealed"):
        mdl.map(RW)
    with pytest.raises(NoCapability, match="no more seals"):
        mdl.publish()


def unsealed_file(folder: Path) -> int:
    """A file in /dev/shm, which knows of seals and has the one that forbids them."""
    del folder
    path = Path(f"/dev/shm/vmm_linux test {os.getpid()}")  # noqa: S108
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    path.unlink()
    os.ftruncate(fd, PAGE)
    return fd


def end_of_a_pipe(folder: Path) -> int:
    """A pipe's end for reading."""
    del folder
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


def file_on_disk(folder: Path) -> int:
    """An ordinary file of whole pages."""
    path = folder / "file"
    path.write_bytes(bytes(PAGE))
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


UNFIT: dict[str, tuple[Callable[[Path], int], str]] = {
    "a file": (file_on_disk, "no memfd"),
    "a file in /dev/shm": (unsealed_file, "seals"),
    "a folder": (lambda folder: os.open(folder, os.O_RDONLY | os.O_CLOEXEC), "no memfd"),
    "a pipe": (end_of_a_pipe, "no memfd"),
    "a socket": (lambda _: socket.socket(socket.AF_UNIX).detach(), "no memfd"),
    "/dev/null": (lambda _: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "no memfd"),
    "an eventfd": (lambda _: os.eventfd(0, os.EFD_CLOEXEC), "no memfd"),
    "an unsealed memfd": (lambda _: a_memfd(seals=0), "seals 0x0"),
    "one that can shrink": (lambda _: a_memfd(seals=fcntl.F_SEAL_GROW), "seals 0x4"),
    "one without seals": (lambda _: os.memfd_create("x", os.MFD_CLOEXEC), "seals 0x1"),
    "an empty one": (lambda _: a_memfd(0), "0 bytes"),
    "huge pages": (lambda _: a_memfd(0, flags=os.MFD_ALLOW_SEALING | MFD_HUGETLB), "ordinary"),
    "open for writing only": (lambda _: reopened(a_memfd(), os.O_WRONLY), "access mode 1"),
    "a mere path": (lambda _: reopened(a_memfd(), O_PATH), "no memfd"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_memory_of_a_buffer_is_refused_and_left_alone(
    name: str, vmm: VMM, tmp_path: Path
) -> None:
    make, why = UNFIT[name]
    fd = make(tmp_path)
    before = read_descriptors()
    try:
        with pytest.raises(InvalidArgument, match=f"handle_from_fd: .*{why}"):
            vmm.handle_from_fd(fd)
        with pytest.raises(InvalidArgument, match=why):
            Mdl.from_fd(fd, vmm=vmm)
        assert read_descriptors() == before
    finally:
        os.close(fd)


def test_a_number_that_is_no_descriptor_is_refused(vmm: VMM) -> None:
    closed = a_memfd()
    os.close(closed)
    for wrong in (closed, -1, 2**31, 2**32 + closed, 2**64 - 1, 2**70, True, 1.0, "3", None):
        with pytest.raises(InvalidArgument, match="handle_from_fd"):
            vmm.handle_from_fd(wrong)  # type: ignore[arg-type]


def test_the_receiver_s_demands_hold_for_descriptors_too(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    fd = mdl.fileno()
    before = read_descriptors()
    for require, most in ((Seal.FREEZE, None), (Seal.PUBLISH, None), (0, SIZE - 1)):
        with pytest.raises(SecurityDisallow, match="handle_from_fd"):
            vmm.handle_from_fd(fd, require, most)
    wrong: list[tuple[Any, Any]] = [(4, None), ("x", None), (0, -1), (0, True)]
    for require, most in wrong:
        with pytest.raises(InvalidArgument, match="handle_from_fd"):
            vmm.handle_from_fd(fd, require, most)
    assert read_descriptors() == before
    mdl.publish()
    assert Mdl.from_fd(mdl.fileno(), Seal.PUBLISH, SIZE, vmm=vmm).size == SIZE


def test_where_no_descriptor_is_left_the_limit_is_named(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    fd = mdl.fileno()
    before = read_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, limits[1]))
    try:
        with pytest.raises(QuotaExceeded, match=r"handle_from_fd: .*RLIMIT_NOFILE"):
            vmm.handle_from_fd(fd)
        with pytest.raises(QuotaExceeded, match=r"handle_fileno: .*RLIMIT_NOFILE"):
            vmm.handle_fileno(mdl.handle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read_descriptors() == before


USE_A_DESCRIPTOR = """
import sys
from vmm_linux import Mdl
mdl = Mdl.from_fd(int(sys.argv[1]), max_size=1 << 20)
region = mdl.map()
print(mdl.rights.name, region.read(5))
if sys.argv[2] == "write":
    region.write(b"child")
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_program_that_is_started_gets_a_buffer_by_its_descriptor(
    writable: bool, vmm: VMM
) -> None:
    mdl = vmm.mdl(SIZE)
    region = mdl.map()
    region.write(b"hello")
    sent = mdl if writable else mdl.read_only()
    child = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c", USE_A_DESCRIPTOR),
            *(str(sent.fileno()), "write" if writable else "read"),
        ],
        pass_fds=[sent.fileno()],
        check=True,
        capture_output=True,
        text=True,
    )
    rights = ALL_BUT_EXECUTE if writable else READ_ONLY
    assert (child.stdout, child.stderr) == (f"{rights.name} b'hello'\n", "")
    assert region.read(5) == (b"child" if writable else b"hello")

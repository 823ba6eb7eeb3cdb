"""``Mdl.from_fd(fd, copy=True)`` has a copy of a file's bytes, of any file that has a size."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from channels import memory_file, shm_file
from constants import LOCKED, READ, RW
from descriptors import reopened
from kernel_oracle import PAGE
from vmm_linux import VMM, Limits, Mdl, Seal, VmmError
from vmm_linux import _file_copies as copies
from vmm_linux.errors import Fail, InvalidArgument, QuotaExceeded, SecurityDisallow

if TYPE_CHECKING:
    from collections.abc import Callable

#: Sizes of files: of pages and beside them, and of more than one read.
SIZES = [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 7]


def file_of(data: bytes) -> int:
    """A file without a name on disk."""
    fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.write(fd, data)
    return fd


@pytest.mark.parametrize("at_once", [PAGE, 7, copies.AT_ONCE])
@pytest.mark.parametrize("size", SIZES)
def test_a_file_on_disk_is_copied_to_the_byte(
    size: int, at_once: int, vmm: VMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "AT_ONCE", at_once)
    data = bytes(number % 251 for number in range(size))
    fd = file_of(data)
    os.lseek(fd, 3, os.SEEK_SET)
    mdl = Mdl.from_fd(fd, copy=True, vmm=vmm)
    assert (bytes(mdl), len(mdl), mdl.seals) == (data, size, Seal(0))
    assert os.lseek(fd, 0, os.SEEK_CUR) == 3, "the offset of the caller's is not moved"
    os.ftruncate(fd, 0)
    os.close(fd)
    assert bytes(mdl) == data
    mdl.freeze()


def test_memory_whose_owner_can_cut_it_is_copied(vmm: VMM) -> None:
    with shm_file() as (_, fd):
        os.pwrite(fd, b"hello", 0)
        with pytest.raises(InvalidArgument, match=r"Mdl\.from_fd\(fd, copy=True\)"):
            Mdl.from_fd(fd, vmm=vmm)
        mdl = Mdl.from_fd(fd, copy=True, vmm=vmm)
        os.ftruncate(fd, 0)
        assert (mdl[:6], len(mdl)) == (b"hello\0", 2 * PAGE)
    with memory_file(size=10) as fd:
        assert len(Mdl.from_fd(fd, copy=True, vmm=vmm)) == 10
    whole = Mdl.from_bytes(b"hello", vmm=vmm)
    other = Mdl.from_fd(whole.fileno(), copy=True, vmm=vmm)
    assert (bytes(other), other.sid != whole.sid) == (b"hello", True)


def test_holes_of_a_file_are_zeros(vmm: VMM) -> None:
    fd = file_of(b"")
    os.ftruncate(fd, 3 * PAGE)
    os.pwrite(fd, b"x", 2 * PAGE)
    mdl = Mdl.from_fd(fd, copy=True, vmm=vmm)
    os.close(fd)
    assert (mdl.read(2 * PAGE), mdl[2 * PAGE]) == (bytes(2 * PAGE), ord("x"))


NO_FILES: dict[str, tuple[Callable[[], int], str]] = {
    "pipe": (lambda: os.pipe()[0], "no file with a size"),
    "folder": (lambda: os.open("/", os.O_RDONLY), "no file with a size"),
    "device": (lambda: os.open("/dev/zero", os.O_RDONLY), "no file with a size"),
    "socket": (lambda: socket.socket(socket.AF_UNIX).detach(), "no file with a size"),
    "no bytes": (lambda: file_of(b""), "a file of 0 bytes"),
    "of /proc": (lambda: os.open("/proc/self/status", os.O_RDONLY), "a file of 0 bytes"),
    "only to be written": (lambda: reopened(file_of(b"abc"), os.O_WRONLY), "not open for reading"),
    "path": (lambda: reopened(file_of(b"abc"), os.O_PATH), "not open for reading"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_with_bytes_is_refused_in_words(name: str, vmm: VMM) -> None:
    make, why = NO_FILES[name]
    before = kernel.descriptors()
    fd = make()
    opened = kernel.descriptors()
    with pytest.raises(InvalidArgument, match=f"^from_fd: .*{why}"):
        Mdl.from_fd(fd, copy=True, vmm=vmm)
    assert (kernel.descriptors(), vmm.usage().mdls.used) == (opened, 0)
    for number in opened.keys() - before.keys():
        os.close(number)


WRONG: list[tuple[Any, str]] = [
    (-1, "fd -1 is no descriptor"),
    (2**31, "is no descriptor"),
    (2**31 - 1, "not open for reading in this process"),
    (True, "fd is True"),
    ("0", "fd is '0'"),
    (None, "fd is None"),
]


@pytest.mark.parametrize(("fd", "why"), WRONG)
def test_what_is_no_descriptor_is_refused(fd: Any, why: str, vmm: VMM) -> None:  # noqa: ANN401
    with pytest.raises(InvalidArgument, match=why):
        Mdl.from_fd(fd, copy=True, vmm=vmm)
    assert vmm.usage().mdls.used == 0


def test_the_most_bytes_are_exact_and_seals_are_not_to_be_had(vmm: VMM) -> None:
    fd = file_of(b"hello")
    assert bytes(Mdl.from_fd(fd, 0, 5, copy=True, vmm=vmm)) == b"hello"
    with pytest.raises(SecurityDisallow, match="a file of 5 bytes; max_size=4"):
        Mdl.from_fd(fd, 0, 4, copy=True, vmm=vmm)
    for require in (Seal.FREEZE, Seal.PUBLISH, 64):
        with pytest.raises(InvalidArgument, match="no seals to require; freeze it"):
            Mdl.from_fd(fd, require, copy=True, vmm=vmm)
    with pytest.raises(InvalidArgument, match="max_size"):
        Mdl.from_fd(fd, 0, "5", copy=True, vmm=vmm)  # type: ignore[arg-type]
    vmm.limits = Limits(mdl_bytes=PAGE - 1)
    with pytest.raises(QuotaExceeded):
        Mdl.from_fd(fd, copy=True, vmm=vmm)
    os.close(fd)
    assert vmm.usage().mdls.used == 0


def test_a_file_that_is_cut_meanwhile_is_said_to_be(
    vmm: VMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "AT_ONCE", PAGE)
    fd = file_of(bytes(4 * PAGE))
    read = os.pread

    def cutting(number: int, size: int, offset: int) -> bytes:
        if offset == 2 * PAGE:
            os.ftruncate(fd, PAGE)
        return read(number, size, offset)

    monkeypatch.setattr(os, "pread", cutting)
    with pytest.raises(Fail, match=f"cut to {2 * PAGE} of {4 * PAGE} bytes during the copy"):
        Mdl.from_fd(fd, copy=True, vmm=vmm)
    assert vmm.usage().mdls.used == vmm.usage().mdl_mappings.used == 0
    os.close(fd)


def test_a_file_that_grows_meanwhile_is_what_it_was(
    vmm: VMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = file_of(b"hello")
    read = os.pread

    def growing(number: int, size: int, offset: int) -> bytes:
        os.pwrite(fd, b"x" * PAGE, 5)
        return read(number, size, offset)

    monkeypatch.setattr(os, "pread", growing)
    assert bytes(Mdl.from_fd(fd, copy=True, vmm=vmm)) == b"hello"
    os.close(fd)


def test_a_kernel_that_cannot_read_is_quoted(vmm: VMM, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = file_of(b"hello")
    for code, rc in ((errno.EIO, "FAIL"), (errno.ENOMEM, "OUT_OF_MEMORY")):

        def failing(*_arguments: object, code: int = code) -> bytes:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "pread", failing)
        with pytest.raises(VmmError, match="from_fd: ") as caught:
            Mdl.from_fd(fd, copy=True, vmm=vmm)
        assert (caught.value.rc.name, caught.value.errno) == (rc, code)
        monkeypatch.undo()
    os.close(fd)
    assert vmm.usage().mdls.used == vmm.usage().mdl_mappings.used == 0


def test_a_copy_can_be_written_and_locked_memory_is_copied_too(vmm: VMM) -> None:
    first = Mdl(10, RW | LOCKED, vmm=vmm)
    first[:] = b"0123456789"
    copied = Mdl.from_fd(first.fileno(), copy=True, vmm=vmm)
    copied[0] = 65
    assert (copied[:2], first[:2]) == (b"A1", b"01")
    assert Mdl(10, READ, vmm=vmm).buf.readonly

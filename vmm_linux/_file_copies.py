"""Buffers with a copy of a file's bytes, for files whose owner could cut them."""

from __future__ import annotations

import errno
import os
import stat

from vmm_linux._core.endpoint import MOST_FD
from vmm_linux._core.values import counted, index
from vmm_linux.errors import (
    RETCODES,
    Fail,
    InvalidArgument,
    Retcode,
    SecurityDisallow,
    VmmError,
    error,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeVar

    from vmm_linux._core.endpoint import VMM
    from vmm_linux.mdl import Mdl

    Buffer = TypeVar("Buffer", bound=Mdl)

METHOD: Final = "from_fd"
AT_ONCE: Final = 1 << 20
"""Bytes that one system call reads."""


def copy_of_file(
    kind: type[Buffer], vmm: VMM, fd: object, require: object, max_size: object
) -> Buffer:
    """A new buffer with the bytes of a file (see ``Mdl.from_fd``).

    The kernel copies them: where the file is cut meanwhile, its read is short, and no process
    touches what is gone.
    """
    number = index(METHOD, "fd", fd)
    if index(METHOD, "require", require) != 0:
        raise InvalidArgument(METHOD, "a copy has no seals to require; freeze it")
    try:
        size = size_of(number)
        most = size if max_size is None else index(METHOD, "max_size", max_size)
        if size > most:
            raise SecurityDisallow(METHOD, f"a file of {counted(size, 'byte')}; max_size={most}")
        mdl = kind(size, vmm=vmm)
        try:
            fill(mdl, number, size)
        except BaseException:
            mdl.close()
            raise
    except OSError as problem:
        if isinstance(problem, VmmError):
            raise
        raise refused(number, problem) from problem
    return mdl


def size_of(fd: int) -> int:
    """The bytes of a file."""
    if not 0 <= fd <= MOST_FD:
        raise InvalidArgument(METHOD, f"fd {fd} is no descriptor")
    file = os.fstat(fd)
    if not stat.S_ISREG(file.st_mode):
        raise InvalidArgument(METHOD, f"fd {fd} is no file with a size: neither memory nor on disk")
    if file.st_size == 0:
        raise InvalidArgument(METHOD, f"fd {fd} is a file of 0 bytes")
    return file.st_size


def fill(mdl: Mdl, fd: int, size: int) -> None:
    """Read a file into a buffer of its size, which takes memory as ``VMM.write`` does."""
    done = 0
    while done < size:
        piece = os.pread(fd, min(AT_ONCE, size - done), done)
        if not piece:
            raise Fail(METHOD, f"the file was cut to {done} of {size} bytes during the copy")
        done += mdl.write(piece, done)


def refused(fd: int, problem: OSError) -> VmmError:
    """The exception for a refusal of the kernel."""
    code = problem.errno or 0
    if code == errno.EBADF:
        return InvalidArgument(METHOD, f"fd {fd} is not open for reading in this process")
    return error(RETCODES.get(code, Retcode.FAIL), METHOD, str(problem), code)

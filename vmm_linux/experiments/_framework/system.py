"""The system for experiments: the C library, other users, the kernel's figures."""

import ctypes
import errno
import os
from pathlib import Path

from vmm_linux import VmmError
from vmm_linux._core.kernel import value_of
from vmm_linux._tools.children import die_with_parent
from vmm_linux.experiments._framework.results import NotObservable

NOBODY = 65534
"""A user without privileges anywhere."""
PR_SET_DUMPABLE = 4
RETURN_LONG = {"mmap", "mremap", "process_vm_writev", "shmat", "syscall"}
"""The functions of the C library that are called here and return a long; all others an int."""


def libc(function: str, *arguments: int) -> int:
    """Call a function of the C library with numbers and addresses; OSError where it returns -1."""
    called = getattr(ctypes.CDLL(None, use_errno=True), function)
    called.restype = ctypes.c_long if function in RETURN_LONG else ctypes.c_int
    result = int(called(*map(ctypes.c_long, arguments)))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), function)
    return result


def errno_of(refusal: OSError | VmmError) -> str:
    """The name of the kernel's errno, as "ENOMEM"; "?" if the error is not the kernel's."""
    return errno.errorcode.get(refusal.errno or 0, "?")


def become(user: int) -> None:
    """In a child, become this user and group, like a program that the user starts.

    Errors:
        OSError: only root is permitted, and not everywhere.
    """
    if user == os.geteuid():
        return
    parent = os.getppid()
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    # A change of user resets both: inspection by the same user, and the end with the parent.
    libc("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    die_with_parent(parent)


def status(figure: str, pid: int | None = None) -> int:
    """A figure of a process (None: this one) in its status, as "VmPTE", in bytes; as ``told``."""
    return told(f"/proc/{pid or 'self'}/status", figure)


def meminfo(figure: str) -> int:
    """A figure of the whole machine in /proc/meminfo, as "Shmem", in bytes; as ``told``."""
    return told("/proc/meminfo", figure)


def told(file: str, figure: str) -> int:
    """A labelled number in a kernel file, as "/proc/self/io"; kB become bytes.

    Errors:
        NotObservable: the kernel does not report it.
    """
    value = value_of(Path(file).read_text(encoding="utf-8", errors="replace"), figure)
    if value is None:
        raise NotObservable(f"this kernel does not tell {figure}")
    return value


def sysctl(name: str, otherwise: int | None = None) -> int:
    """A setting of the administrator, as printed by the command of the same name.

    Args:
        name: as "vm.max_map_count".
        otherwise: the value for a kernel without the setting.

    Errors:
        NotObservable: the kernel has no such setting, and ``otherwise`` is None.
    """
    try:
        return int(Path("/proc/sys", *name.split(".")).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if otherwise is None:
            raise NotObservable(f"this kernel has no {name}") from None
        return otherwise


def mappings() -> int:
    """The number of entries in the kernel's list of this process's mappings."""
    with Path("/proc/self/maps").open("rb") as lines:
        return sum(1 for _ in lines)

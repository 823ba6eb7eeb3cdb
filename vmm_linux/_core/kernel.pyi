from contextlib import AbstractContextManager
from enum import IntEnum
from os import PathLike
from typing import Literal, final

# Only what takes no pointer can be called from Python. Results: the call's, or -errno.

def mmap(address: int, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    """``mmap(2)``: the address of the mapping."""

def munmap(address: int, length: int) -> int:
    """``munmap(2)``."""

def mprotect(address: int, length: int, protection: int) -> int:
    """``mprotect(2)``. A failure can leave the mappings before the refused one changed."""

def mremap(old_address: int, old_size: int, new_size: int, flags: int, new_address: int) -> int:
    """``mremap(2)``: the address of the moved mapping."""

def madvise(address: int, length: int, advice: int) -> int:
    """``madvise(2)``."""

def mlock(address: int, length: int) -> int:
    """``mlock(2)``. A failure can leave part of the range locked."""

def munlock(address: int, length: int) -> int:
    """``munlock(2)``."""

def msync(address: int, length: int, flags: int) -> int:
    """``msync(2)``; with MS_INVALIDATE it does nothing but answer EBUSY for locked pages."""

def ftruncate(fd: int, length: int) -> int:
    """``ftruncate(2)``, without SIGXFSZ."""

def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """``fallocate(2)``. EINTR leaves nothing allocated."""

def fcntl(fd: int, command: int, argument: int) -> int:
    """``fcntl(2)`` with an integer argument."""

def fchmod(fd: int, mode: int) -> int:
    """``fchmod(2)``."""

def close(fd: int) -> int:
    """``close(2)``. The descriptor is gone whatever the result."""

RESOURCES: dict[str, int]

def resource_limit(resource: int) -> int:
    """``getrlimit(2)``: the soft limit, 2**64 - 1 where there is none."""

def prctl(option: int, argument: int, second: int = 0) -> int:
    """``prctl(2)`` with two arguments: its result, or -errno."""

def drop_capabilities() -> int:
    """``capset(2)`` of no capability at all, in no set: 0, or -errno."""

def fork_generation() -> int:
    """How many forks lie between the first process that imported this module and this one."""

def fork_children() -> int:
    """How often this process has forked; never less, but a fork that failed counts as well.

    Counted by the forking thread before the child exists. A child begins with 0.
    """

class Feature(IntEnum):
    """What a kernel may lack, with the version that brought it."""

    PROCMAP_QUERY = 0
    PAGEMAP_SCAN = 1
    PAGEMAP = 2
    PAGEMAP_GUARD = 3
    GUARD_REGIONS = 4
    DONTNEED_LOCKED = 5
    MEMFD_NOEXEC_SEAL = 6
    PROCESS_VM = 7
    TRANSPARENT_HUGE_PAGES = 8
    FILE_HANDLES = 9
    VECTORED_GUARDS = 10
    ANONYMOUS_NAMES = 11

def available(feature: int) -> bool:
    """Whether this process may use ``feature``; a number that names none is a ValueError."""

def state(feature: int) -> Literal["present", "absent", "switched off", "unknown"]:
    """The state of ``feature``, as one of four words.

    ``"present"``, ``"absent"``, ``"switched off"`` (by ``without`` or the environment), or
    ``"unknown"``: the probe could not be made, and the feature counts as absent until it can.
    """

def without(*features: int) -> AbstractContextManager[None]:
    """In the ``with`` block these features are absent, for every thread; for tests."""

def page_size() -> int:
    """The kernel's page in bytes."""

def user_space_end() -> int:
    """The first address that no process on this machine can ever map.

    Asked of the kernel once. Where it cannot say (see the two searches below), the answer is the
    next power of two above this thread's stack, and the next call asks again.
    """

def user_space_end_by_pagemap() -> int:
    """``user_space_end`` as the end of ``/proc/self/pagemap``, 0 where that does not say.

    It maps nothing, so neither the map-count limit nor RLIMIT_AS matters.
    """

def user_space_end_by_mmap() -> int:
    """``user_space_end`` found by mapping single pages, 0 where not even one can be mapped.

    ENOMEM is what the kernel answers beyond user space, and at the map-count limit and under
    RLIMIT_AS too. So a page anywhere must be mapped before and after.
    """

def mmap_min_addr() -> int:
    """The lowest address that may be mapped: sysctl ``vm.mmap_min_addr``, a page at least.

    Asked once; 65536, the usual value, for as long as the sysctl cannot be read.
    """

def huge_page_size() -> int:
    """The size of a transparent huge page in bytes, asked once; 0 where the kernel has none."""

def text_of(path: str | PathLike[str]) -> str | None:
    """The text of a file without the blanks around it, or None where it cannot be read."""

def number_in(path: str | PathLike[str]) -> int | None:
    """The number that is all of a file's text, or None where it holds something else."""

NO_LIMIT: int
CGROUP_FILES: dict[str, tuple[str, str, str, str, str]]

@final
class MemoryCgroup:
    """A memory cgroup.

    Args:
        version: ``"v1"`` or ``"v2"``.
        mount: the folder where its hierarchy is mounted.
        path: its own folder, below that.

    Attributes:
        version, mount: the same.
        limit, usage: the names of the files with the limit and the use of memory.
        levels: its own folder and those above it, which bind it too.
    """
    @property
    def version(self) -> str: ...
    @property
    def mount(self) -> str: ...
    @property
    def limit(self) -> str: ...
    @property
    def usage(self) -> str: ...
    @property
    def levels(self) -> list[str]: ...
    def __init__(self, version: str, mount: str | PathLike[str], path: str) -> None: ...

def memory_cgroup() -> MemoryCgroup | None:
    """The ``MemoryCgroup`` that counts this process's memory; None where none does."""

def set_cgroup(cgroup: MemoryCgroup | None) -> MemoryCgroup | None:
    """Ask this cgroup from now on, where ``find_limits`` finds limits in it.

    Args:
        cgroup: a ``MemoryCgroup``, or None to ask none until the next VMM is made.

    Returns:
        What was asked before.
    """

def find_limits() -> None:
    """See which levels have a limit now that binds before the machine's memory is used up.

    A limit that is found here and changes later is noticed at every reading.
    """

def tightest() -> tuple[int, int, bytes] | None:
    """The level with the least headroom: ``(bytes, limit, path of the limit)``; None without."""

def has_headroom(size: int) -> bool:
    """``group_has_headroom``, for tests."""

def available_bytes() -> int:
    """Bytes of memory and swap that can be taken now; 2**64 - 1 where that is unknown."""

def available_without_swap() -> int:
    """Bytes of memory, swap left out; without a descriptor to ask with, those that are free."""

def memory_headroom(available: int) -> int:
    """Bytes that this process can take, of those that the machine has available.

    That is what the memory cgroup leaves, swap left out, where it leaves less.
    """

MOST_REGIONS: int
MOST_HANDLES: int
MOST_MDLS: int

def bounds_for(memory: int) -> tuple[int | None, ...]:
    """The default limits where so many bytes are available; None: no limit."""

@final
class Descriptor:
    """An open descriptor of this package's, closed with the last reference to this object.

    Code that uses the number holds this object meanwhile, so no number is used that another thread
    closed. It asks for the number at each use, which finds out whether the program closed it or put
    another file under it.

    Anonymous files, as eventfds are, all have one inode, so they are marked too. A peer that
    removes the mark makes the object lost. An event that the program puts under the number of
    another (``os.dup2``) goes unnoticed.
    """
    def take(self, fd: int) -> int:
        """Take charge of a descriptor that was just made; where that fails, it is closed.

        The object is made before its descriptor, which so has an owner from the start, however
        short memory is.

        Args:
            fd: its number, or the -errno of why there is none.

        Errors:
            OSError: there is none, or it is not open.
        """
    def close(self) -> None:
        """Close it now, if it is still what it was. A second call does nothing."""
    @property
    def is_open(self) -> bool:
        """Whether the number still names the file."""
    @property
    def number(self) -> int:
        """The descriptor, for one use at once.

        Errors:
            OSError (EBADF): the program closed it, or put another file under its number.
        """

def duplicate(fd: int) -> Descriptor:
    """A ``Descriptor`` of the file that any descriptor names.

    Errors:
        OSError: it is not open, or no descriptor is left.
    """

def new_eventfd() -> Descriptor:
    """A ``Descriptor`` of a new eventfd, close-on-exec and non-blocking.

    Errors:
        OSError: no descriptor, or no file, is left.
    """

def value_of(text: str | None, label: str) -> int | None:
    """A figure of a text as that of /proc/meminfo or /proc/PID/status, or None where it lacks.

    Args:
        text: lines, each a label, a colon and a number. None counts as no lines.
        label: the figure's.

    Returns:
        Bytes, where the text has kB; else the number as it is.
    """

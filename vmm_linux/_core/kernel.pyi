from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
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

def filesystem_type(fd: int) -> int:
    """``fstatfs(2)``: the magic number of the file system."""

def close(fd: int) -> int:
    """``close(2)``. The descriptor is gone whatever the answer."""

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
    """What is known of ``feature``: one of four words.

    ``"present"``, ``"absent"``, ``"switched off"`` (by ``without`` or the environment), or
    ``"unknown"``: it could not be asked for now, and counts as absent until it can.
    """

def without(*features: int) -> AbstractContextManager[None]:
    """In the ``with`` block these features are absent, for every thread; for tests."""

def page_size() -> int:
    """The kernel's page in bytes, asked once."""

def user_space_end() -> int:
    """The first address that no process on this machine can ever map.

    Asked of the kernel once. Should it not be able to say (see the two searches below),
    the answer is the next power of two above this thread's stack, and the next call asks
    again.
    """

def user_space_end_by_pagemap() -> int:
    """:func:`user_space_end` as the end of ``/proc/self/pagemap``, or 0 if that does not tell.

    It maps nothing, so that neither the map-count limit nor RLIMIT_AS matter.
    """

def user_space_end_by_mmap() -> int:
    """:func:`user_space_end` found by mapping single pages, or 0 if not even one can be had.

    ENOMEM is what the kernel says beyond user space, and at the map-count limit and under
    RLIMIT_AS too. So a page anywhere must be had before and after.
    """

def mmap_min_addr() -> int:
    """The lowest address that may be mapped: sysctl ``vm.mmap_min_addr``, a page at least.

    Asked once; 65536, the usual value, for as long as the sysctl cannot be read.
    """

def huge_page_size() -> int:
    """The size of a transparent huge page in bytes, asked once; 0 where the kernel has none."""

def watch(found: Sequence[tuple[bytes, ...]], first_version: bool) -> None:
    """Ask these levels of a group, once their limits were looked for.

    Args:
        found: for each, from the group itself upwards, the paths of its files as bytes: limit and
            use of memory, limit and use of swap, statistics.
        first_version: whether they are of cgroup version 1.
    """

def look_for_limits() -> None:
    """See which levels have a limit now that binds before the machine's memory is used up.

    One that is found here and lowered or raised later is noticed at every look.
    """

def tightest() -> tuple[int, int, bytes] | None:
    """The level with the least room: ``(room, limit, path of the limit)``; None without a limit."""

def has_room_for(size: int) -> bool:
    """``group_has_headroom``, for tests."""

def available_bytes() -> int:
    """Bytes of memory and swap that could be taken now; 2**64 - 1: it is not told."""

def available_without_swap() -> int:
    """Bytes of memory, swap left out; without a descriptor to ask with, those that are free."""

@final
class Descriptor:
    """An open descriptor of this package's, closed when nobody refers to this any more.

    Whoever uses the number holds this meanwhile: so no number is used that another thread closed.
    And it is asked for at each use, which finds out whether the program closed it or put another
    file under it.

    Anonymous files, as eventfds are, all have one inode, so they are marked too. A peer who takes
    the mark away makes the object lost. What remains unseen is one event that the program puts
    under the number of another (``os.dup2``).
    """
    def take(self, fd: int) -> int:
        """Take charge of a descriptor that was just made; where that fails, it is closed.

        The object is there before its descriptor, which so has an owner from birth, whatever
        memory is short.

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
    """A ``Descriptor`` of the same file as a descriptor of anybody's.

    Errors:
        OSError: it is not open, or no descriptor is left.
    """

def new_eventfd() -> Descriptor:
    """A ``Descriptor`` of a new eventfd, close-on-exec and non-blocking.

    Errors:
        OSError: no descriptor, or no file, is left.
    """

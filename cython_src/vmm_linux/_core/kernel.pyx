"""Layer kernel: what the package asks of Linux, and the facts about this kernel and machine.

Above the system calls nothing here changes memory. The functions of ``kernel.pxd`` need no GIL,
never raise and return -errno where they fail; those that need the GIL say so by ``except``. What
this kernel lacks is found out here, and the layers above ask ``has(FEATURE_...)``; page sizes and
the ends of user space are asked for here, and are literal nowhere.

Its parts: ``syscalls`` (one function a system call) with ``signals`` (those held off meanwhile);
``fork`` and ``mutex`` (what a child of a fork must know, and locks that it can use); ``files``
(small files of /proc and /sys); ``features`` (probes with switches) and ``machine`` (pages and
addresses); ``cgroup`` and ``headroom`` (how much memory can be taken, and the default limits that
follow); ``open_file`` (descriptors known by the file that they name).
"""

cimport cython
from libc.errno cimport EAGAIN, EBADF, EDQUOT, EEXIST, EINTR, EMFILE, ENFILE, ENOMEM, EPERM, errno
from libc.stdint cimport int64_t, intptr_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, strtoull
from libc.string cimport memset, strlen, strstr
from libcpp.atomic cimport atomic
from posix.signal cimport SIG_BLOCK, SIG_SETMASK, sigaddset, sigemptyset, sigismember, sigpending
from posix.time cimport clock_gettime, timespec
from posix.types cimport sigset_t

import os
import warnings
from enum import IntEnum

from vmm_linux.errors import refuse_copies

include "kernel/signals.pxi"
include "kernel/syscalls.pxi"
include "kernel/fork.pxi"
include "kernel/mutex.pxi"
include "kernel/files.pxi"
include "kernel/features.pxi"
include "kernel/machine.pxi"
include "kernel/cgroup.pxi"
include "kernel/headroom.pxi"
include "kernel/open_file.pxi"

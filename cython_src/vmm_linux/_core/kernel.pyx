"""Layer kernel."""

cimport cython
from libc.errno cimport EAGAIN, EBADF, EDQUOT, EEXIST, EINTR, EMFILE, ENFILE, ENOMEM, EPERM, errno
from libc.stdint cimport int64_t, intptr_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, strtoull
from libc.string cimport memset, strlen, strstr
from libcpp.atomic cimport atomic

import os
import warnings
from contextlib import contextmanager
from enum import IntEnum

from vmm_linux.errors import refuse_copies

include "kernel/signals.pxi"
include "kernel/syscalls.pxi"
include "kernel/fork.pxi"
include "kernel/mutex.pxi"
include "kernel/features.pxi"
include "kernel/cgroup.pxi"
include "kernel/headroom.pxi"
include "kernel/open_file.pxi"

"""Layer procfs."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cython cimport final, no_gc
from libc.errno cimport EACCES, EBADF, EBADMSG, EBUSY, EEXIST, EINVAL, ENOENT, ENOMEM, EPERM, ESRCH
from libc.stdint cimport intptr_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset, strlen

from vmm_linux._core cimport kernel
from vmm_linux._core.kernel cimport (
    check_mark,
    mark,
    Mark,
    MARK_MAPS,
    MARK_PAGEMAP,
    MARK_SMAPS,
    O_CLOEXEC,
    O_RDONLY,
)

import os
import re
from types import MappingProxyType

from vmm_linux.errors import refuse_copies

include "procfs/maps.pxi"
include "procfs/pagemap.pxi"
include "procfs/record.pxi"
include "procfs/store.pxi"
include "procfs/parser.pxi"
include "procfs/own_process.pxi"

"""Layer procfs: what /proc knows of the memory of a process, as records.

It reads and decides nothing. A value that this kernel does not have is unknown, and None in
Python, never guessed. The functions without the GIL return 0 or -errno and make no Python object;
nothing touches the memory that it asks about. Each format has one reader, each encoding one
decoder.

Its parts: ``reader`` (the text of a file, in pieces and in lines); ``maps`` (a line of maps) and
``mapping_query`` (the same by ioctl); ``pagemap`` (pages); ``record`` (a record of smaps as a
Python object), ``store`` (all records of a text, as C structures) and ``parser`` (which fills a
store); ``own_process`` (questions to /proc/self, by files that stay open).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cython cimport final, no_gc
from libc.errno cimport (
    EACCES, EBADF, EBADMSG, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, EPERM, ESRCH,
)
from libc.stdint cimport int64_t, intptr_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset, strlen

from vmm_linux._core cimport kernel
from vmm_linux._core.kernel cimport (
    check_mark, mark, Mark, MARK_MAPS, MARK_PAGEMAP, MARK_SMAPS, O_CLOEXEC, O_RDONLY,
)

import os
from types import MappingProxyType

from vmm_linux.errors import refuse_copies

include "procfs/reader.pxi"
include "procfs/maps.pxi"
include "procfs/mapping_query.pxi"
include "procfs/pagemap.pxi"
include "procfs/record.pxi"
include "procfs/store.pxi"
include "procfs/parser.pxi"
include "procfs/own_process.pxi"

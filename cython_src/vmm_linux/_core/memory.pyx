"""Memory: objects, mappings, plans and their executor, address spaces, handles and buffers."""

cimport cython
from cython.operator cimport dereference, predecrement, preincrement
from libc.errno cimport (
    EACCES,
    EAGAIN,
    EBADF,
    EBUSY,
    EDQUOT,
    EEXIST,
    EFAULT,
    EINTR,
    EMFILE,
    ENOENT,
    ENOMEM,
    ENXIO,
    EPERM,
)
from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t, uintptr_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from libcpp.vector cimport vector

from vmm_linux._core cimport kernel, procfs
from vmm_linux._core.containers cimport *
from vmm_linux._core.kernel cimport *
from vmm_linux._core.ledger cimport *
from vmm_linux._core.vocabulary cimport *

from vmm_linux.errors import refuse_copies

include "memory/request.pxi"
include "memory/identity.pxi"
include "memory/object.pxi"
include "memory/contents.pxi"
include "memory/mapping.pxi"
include "memory/guards.pxi"
include "memory/plan.pxi"
include "memory/executor.pxi"
include "memory/conversion.pxi"
include "memory/copy.pxi"
include "memory/access.pxi"
include "memory/limits.pxi"
include "memory/address_space.pxi"
include "memory/pages.pxi"
include "memory/batches.pxi"
include "memory/intent.pxi"
include "memory/handles.pxi"
include "memory/buffers.pxi"
include "memory/buffer_mappings.pxi"
include "memory/parcel.pxi"
include "memory/dispatch.pxi"

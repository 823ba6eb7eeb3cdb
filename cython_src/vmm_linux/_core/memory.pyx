"""Layer memory: the address space of a VMM, where ledger and kernel change together.

A call comes in as a ``Request`` and returns an ``Answer``, both numbers alone. It runs under the
VMM's mutex, without the GIL where it can be long, and touches no Python object there. A call that
fails leaves everything as it was. System calls that map or unmap are in ``mapping`` alone.

Its parts: ``request`` (answers of calls); ``object``, ``identity``, ``contents`` (memory that can
be shared); ``mapping``; ``plan`` and ``executor`` (steps, carried out all or none); ``guards`` (a
second way to commit); ``conversion`` and ``copy``; ``access`` and ``limits`` (what is allowed);
``address_space``, ``pages`` and ``batches`` (methods over regions); ``intent`` (what the ledger
says); ``handles``, ``buffers``, ``buffer_mappings`` and ``parcel`` (methods over buffers);
``dispatch`` (one call).
"""

cimport cython
from cython.operator cimport dereference, predecrement, preincrement
from libc.errno cimport (
    EACCES, EAGAIN, EBADF, EBUSY, EDQUOT, EEXIST, EFAULT, EINTR, EMFILE, ENOENT, ENOMEM, ENXIO,
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

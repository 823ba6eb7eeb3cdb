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
from libc.string cimport memcmp, memcpy
from libcpp.vector cimport vector

from vmm_linux._core cimport kernel, procfs
from vmm_linux._core.containers cimport *
from vmm_linux._core.kernel cimport (
    access_mode,
    F_ADD_SEALS,
    F_GET_SEALS,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FileStatus,
    iovec,
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_HUGEPAGE,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_SHARED,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_EXEC,
    MFD_NOEXEC_SEAL,
    MOST_RANGES,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    mutex_delete,
    mutex_lock,
    mutex_new,
    mutex_try,
    mutex_unlock,
    O_CLOEXEC,
    O_NONBLOCK,
    O_RDONLY,
    O_RDWR,
    open_file_close,
    open_file_number,
    open_file_own,
    open_file_status,
    open_file_take,
    open_file_take_same,
    OpenFile,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    SEEK_DATA,
    SEEK_HOLE,
    user_space_end,
)
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

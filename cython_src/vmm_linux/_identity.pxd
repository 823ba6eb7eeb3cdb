"""Identities: what a clone, and a buffer in segments, is known by (see ``_identity.pyx``)."""

from libc.stdint cimport uint64_t

from vmm_linux._open_file cimport OpenFile

cdef enum:
    MOST_SEGMENTS = 1 << 20     # that an identity can name

cdef struct Window:
    # A part of a memory that lies in files side by side.
    const OpenFile *files       # those that the part touches, in order
    size_t stride               # bytes from one to the next
    size_t count
    uint64_t offset             # of the part in the first of them
    uint64_t size
    uint64_t segment_size       # bytes of each file but the last

cdef int identity_new(const Window *window) noexcept nogil
cdef int identity_is_of(int fd, const Window *window) noexcept nogil
cdef int identity_includes(int fd, const Window *window) noexcept nogil

"""Memory objects: what can back pages and be shared.

A memory object is a window on the memory of a root, which is itself the window on all of it. A
root's memory is one memfd or several, its segments, sealed against shrinking and growing at birth;
mapped side by side they are one range. A clone is any other window. Who has a window on the border
of segments can do without the other segments: they are the most that can be kept from a receiver.

What another process knows an object by is a memfd too: the memory itself of a root with one
segment, an identity (see ``_identity.pyx``) of any other object.

An object lives as long as something refers to it: a mapping counts one for each of its pages (so
that cutting a mapping in two changes nothing), a handle one, a clone of it one. The mutex of the
VMM that made it guards its count.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vmm_linux._open_file cimport OpenFile

cdef struct Segment:
    OpenFile file               # the memory
    OpenFile read_only          # its read-only description once needed; the same where that is all
    uint64_t described          # which of the root's descriptions this was

cdef struct Buffers:
    # What a VMM has of MDL buffers; the mutex of the VMM guards it.
    uint64_t mdls
    uint64_t bytes              # of memory, a clone's not again
    uint64_t locked             # bytes of buffers made with LOCKED

cdef struct MemoryObject:
    MemoryObject *root          # whose memory it is: its own, or what it is a window on
    MemoryObject *origin        # what it was cloned from, or NULL
    uint64_t offset             # of the window in the root's memory
    uint64_t size               # bytes, a page multiple
    int64_t references
    OpenFile identity           # of a root with one segment that is the memory
    uint64_t sid                # the security id once asked for, else 0
    uint32_t generation         # of the process that made it
    uint32_t children           # which that process had at its birth
    Buffers *counted            # where it counts as an MDL buffer, or NULL
    bint locked                 # whether its memory counts as locked there
    # Of a root:
    uint64_t segment_size       # of each segment but the last, which may be shorter
    size_t segment_count        # 0: not a root
    uint64_t descriptions       # how many were opened so far
    Segment *segments           # right behind this

cdef struct Piece:
    # Part of a window that lies in one segment.
    Segment *segment
    uint64_t offset             # in the segment
    uint64_t size

cdef MemoryObject *memory_object_new(uint64_t size, bint executable, int *error) noexcept nogil
cdef MemoryObject *memory_object_new_of_segments(uint64_t size, uint64_t segment_size,
                                                 bint executable, int *error) noexcept nogil
cdef MemoryObject *memory_object_clone(MemoryObject *origin, uint64_t offset, uint64_t size,
                                       int *error) noexcept nogil
cdef MemoryObject *memory_object_adopt(const OpenFile *memory, size_t count, bint writable,
                                       OpenFile identity, uint64_t segment_size,
                                       uint64_t size) noexcept nogil
cdef MemoryObject *memory_object_adopt_clone(MemoryObject *origin, OpenFile identity,
                                             uint64_t offset, uint64_t size) noexcept nogil
cdef void memory_object_count(MemoryObject *self, Buffers *buffers, bint locked) noexcept nogil
cdef void memory_object_acquire(MemoryObject *self, int64_t references) noexcept nogil
cdef void memory_object_release(MemoryObject *self, int64_t references) noexcept nogil
cdef Piece memory_object_piece(const MemoryObject *self, uint64_t offset,
                               uint64_t size) noexcept nogil
cdef uint64_t memory_object_seams(const MemoryObject *self, uint64_t start,
                                  uint64_t end) noexcept nogil
cdef bint memory_object_has_own_identity(const MemoryObject *self) noexcept nogil
cdef int memory_object_descriptor(MemoryObject *self, Segment *segment,
                                  bint writable) noexcept nogil
cdef int memory_object_leaving(MemoryObject *self, Segment *segment, bint writable) noexcept nogil
cdef uint64_t memory_object_descriptions(const MemoryObject *self) noexcept nogil
cdef void memory_object_undescribe(MemoryObject *self, uint64_t since) noexcept nogil
cdef int memory_object_sid(MemoryObject *self, uint64_t *sid) noexcept nogil
cdef int memory_object_seal(MemoryObject *self, uint32_t seals, uint64_t *done) noexcept nogil
cdef int memory_object_seals(MemoryObject *self) noexcept nogil
cdef bint memory_object_is_inherited(const MemoryObject *self) noexcept nogil
cdef bint memory_object_is_exclusive(const MemoryObject *self) noexcept nogil
cdef uint64_t memory_object_holes(MemoryObject *self, uint64_t offset,
                                  uint64_t size) noexcept nogil
cdef uint64_t memory_object_missing(MemoryObject *self, uint64_t offset,
                                    uint64_t size) noexcept nogil
cdef int memory_object_ask(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil
cdef int memory_object_fill(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil
cdef int memory_object_store(MemoryObject *self, uint64_t offset, const void *data,
                             uint64_t size) noexcept nogil
cdef int memory_object_punch(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil

"""The handles of one VMM: which there are, what each allows, and which came from which.

A handle is a serial number that no other in this process ever had, with rights. Its value has
the lower 32 bits of the serial in bits 0-31 (the number), the rights in bits 32-47, the
upper 15 in bits 48-62 (the number's generation), and 0 in bit 63.

The caller holds the mutex. The table refers to the memory object of every handle once.
"""

cdef extern from *:
    """
    #include <atomic>
    #include <cstdint>

    /* The next serial number of this process; 0 is never a handle. */
    static std::atomic<uint64_t> vmm_next_serial{1};

    static inline uint64_t vmm_take_serials(uint64_t count) noexcept
    {
        return vmm_next_serial.fetch_add(count, std::memory_order_relaxed);
    }
    """
    uint64_t take_serials "vmm_take_serials"(uint64_t count) noexcept nogil

cdef enum:
    NUMBER_BITS = 32
    RIGHTS_BITS = 16
    SERIAL_BITS = 47
    # Serials are taken from the process in blocks, so that a table can tell all that it ever
    # handed out from its list of blocks: neighbouring blocks are one.
    BLOCK = 4096


cdef uint64_t value_of(uint64_t serial, uint32_t rights) noexcept nogil:
    """The handle of a serial number and rights."""
    return (
        serial & ((<uint64_t>1 << NUMBER_BITS) - 1)
        | <uint64_t>rights << NUMBER_BITS
        | serial >> NUMBER_BITS << (NUMBER_BITS + RIGHTS_BITS)
    )


cdef uint64_t serial_of(uint64_t value) noexcept nogil:
    """The serial number in a handle."""
    return (
        value & ((<uint64_t>1 << NUMBER_BITS) - 1)
        | value >> (NUMBER_BITS + RIGHTS_BITS) << NUMBER_BITS
    )


cdef uint32_t rights_of(uint64_t value) noexcept nogil:
    """The rights in a handle."""
    return <uint32_t>(value >> NUMBER_BITS & ((<uint64_t>1 << RIGHTS_BITS) - 1))


@cython.no_gc
@cython.final
cdef class HandleTable:
    """Every handle of one VMM."""

    __reduce__ = refuse_copies("each belongs to one VMM")

    def __dealloc__(self):
        self.close_all()

    cdef uint64_t next(self, uint32_t rights) noexcept nogil:
        """The handle that ``add`` makes next with these rights; 0 when memory is short."""
        if self.unused == self.unused_end and not self.take_block():
            return 0
        return value_of(self.unused, rights)

    cdef Entry *add(self, MemoryObject *buffer, uint32_t rights, Entry *parent) noexcept nogil:
        """A new handle of a buffer, which may be NULL for now; NULL when memory is short."""
        cdef Entry entry
        cdef Entry *added
        entry.value = self.next(rights)
        if entry.value == 0:
            return NULL
        entry.buffer = buffer
        entry.parent = parent
        entry.child = entry.next = entry.previous = NULL
        if not insert_or_fail(self.live, self.unused, entry):
            return NULL
        added = &dereference(self.live.find(self.unused)).second
        self.unused += 1
        if parent != NULL:
            link(added, parent)
        if buffer != NULL:
            memory_object_acquire(buffer, 1)
        return added

    cdef Answer find(self, uint64_t value, uint32_t rights, Entry **found) noexcept nogil:
        """The handle with this very value, if it has these rights; else why not."""
        cdef unordered_map[uint64_t, Entry].iterator place = self.live.find(serial_of(value))
        if place == self.live.end():
            return refused(
                CLOSED_HANDLE if self.handed_out(serial_of(value)) else UNKNOWN_HANDLE)
        found[0] = &dereference(place).second
        if found[0].value != value:
            return refused(UNKNOWN_HANDLE)
        if found[0].buffer == NULL:
            return refused(REVOKED)
        if rights & ~rights_of(value):
            return refused(LACKS_RIGHTS, rights & ~rights_of(value))
        return done()

    cdef void give(self, Entry *entry, MemoryObject *buffer) noexcept nogil:
        """Give a handle that was added without one its buffer."""
        memory_object_acquire(buffer, 1)
        entry.buffer = buffer

    cdef void withdraw(self, Entry *entry) noexcept nogil:
        """Take back the newest handle, which nobody was told."""
        self.close(entry)
        self.unused -= 1

    cdef void close(self, Entry *entry) noexcept nogil:
        """End a handle. What came from it counts as coming from where it came from."""
        cdef Entry *child = entry.child
        cdef Entry *following
        unlink(entry)
        while child != NULL:
            following = child.next
            child.parent = child.next = child.previous = NULL
            if entry.parent != NULL:
                link(child, entry.parent)
            child = following
        if entry.buffer != NULL:
            memory_object_release(entry.buffer, 1)
        self.live.erase(serial_of(entry.value))

    cdef void revoke_descendants(self, Entry *entry) noexcept nogil:
        """Revoke all that came from a handle, and what came from that."""
        cdef Entry *at = entry.child
        while at != NULL:
            if at.buffer != NULL:
                memory_object_release(at.buffer, 1)
                at.buffer = NULL
            if at.child != NULL:
                at = at.child
                continue
            while at.next == NULL:
                at = at.parent
                if at == entry:
                    return
            at = at.next

    cdef void close_all(self) noexcept nogil:
        """End every handle."""
        cdef unordered_map[uint64_t, Entry].iterator place = self.live.begin()
        while place != self.live.end():
            if dereference(place).second.buffer != NULL:
                memory_object_release(dereference(place).second.buffer, 1)
            preincrement(place)
        self.live.clear()

    cdef bint take_block(self) noexcept nogil:
        """Take more serial numbers; false when memory or the numbers are used up."""
        cdef uint64_t start = take_serials(BLOCK)
        cdef ordered_map[uint64_t, uint64_t].iterator last = self.blocks.end()
        if start + BLOCK > <uint64_t>1 << SERIAL_BITS:
            return False
        if not self.blocks.empty() and start == self.unused_end:
            predecrement(last)
            dereference(last).second = start + BLOCK
        elif not insert_or_fail(self.blocks, start, start + BLOCK):
            return False
        self.unused = start
        self.unused_end = start + BLOCK
        return True

    cdef bint handed_out(self, uint64_t serial) noexcept nogil:
        """Whether this table ever gave a handle this number."""
        cdef ordered_map[uint64_t, uint64_t].iterator block = self.blocks.upper_bound(serial)
        if block == self.blocks.begin() or self.unused <= serial < self.unused_end:
            return False
        predecrement(block)
        return serial < dereference(block).second


cdef void link(Entry *entry, Entry *parent) noexcept nogil:
    """Make an entry its parent's first child."""
    entry.parent = parent
    entry.previous = NULL
    entry.next = parent.child
    if entry.next != NULL:
        entry.next.previous = entry
    parent.child = entry


cdef void unlink(Entry *entry) noexcept nogil:
    """Take an entry out of its parent's children."""
    if entry.next != NULL:
        entry.next.previous = entry.previous
    if entry.previous != NULL:
        entry.previous.next = entry.next
    elif entry.parent != NULL:
        entry.parent.child = entry.next

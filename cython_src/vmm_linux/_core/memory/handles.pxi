"""The handles of one VMM: which there are, what each allows, and which came from which.

A handle is a serial number that no other in this process ever had, with rights. Its value has
the lower 32 bits of the serial in bits 0-31 (the number), the rights in bits 32-47, the
upper 15 in bits 48-62 (the number's generation), and 0 in bit 63.

The caller holds the mutex.
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
    NUMBER_BITS = 32, RIGHTS_BITS = 16, SERIAL_BITS = 47
    # A table takes serials from the process in blocks, so that its list of blocks, in which
    # neighbours are one, shows all that it ever handed out.
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
    """Every handle of one VMM. The table has a reference to the memory object of each."""

    __reduce__ = refuse_copies("each belongs to one VMM")

    def __dealloc__(self):
        close_all_entries(self)


cdef uint64_t next_value(HandleTable table, uint32_t rights) noexcept nogil:
    """The handle that ``add_entry`` makes next with these rights; 0 when memory is short."""
    if table.unused == table.unused_end and not take_block(table):
        return 0
    return value_of(table.unused, rights)


cdef HandleEntry *add_entry(HandleTable table, MemoryObject *buffer, uint32_t rights,
                            HandleEntry *parent) noexcept nogil:
    """A new handle of a buffer, which may be NULL for now; NULL when memory is short."""
    cdef HandleEntry entry
    cdef HandleEntry *added
    entry.value = next_value(table, rights)
    if entry.value == 0:
        return NULL
    entry.buffer = buffer
    entry.parent = parent
    entry.child = entry.next = entry.previous = NULL
    if not insert_or_fail(table.live, table.unused, entry):
        return NULL
    added = &dereference(table.live.find(table.unused)).second
    table.unused += 1
    if parent != NULL:
        link(added, parent)
    if buffer != NULL:
        memory_object_acquire(buffer, 1)
    return added


cdef Answer find_entry(HandleTable table, uint64_t value, uint32_t rights,
                       HandleEntry **found) noexcept nogil:
    """The handle with exactly this value, if it has these rights; else why not."""
    cdef uint64_t serial = serial_of(value)
    cdef unordered_map[uint64_t, HandleEntry].iterator place = table.live.find(serial)
    if place == table.live.end():
        return refused(CLOSED_HANDLE if was_handed_out(table, serial) else UNKNOWN_HANDLE)
    found[0] = &dereference(place).second
    if found[0].value != value:
        return refused(UNKNOWN_HANDLE)
    if found[0].buffer == NULL:
        return refused(REVOKED)
    if rights & ~rights_of(value):
        return refused(LACKS_RIGHTS, rights & ~rights_of(value))
    return done()


cdef void give_buffer(HandleEntry *entry, MemoryObject *buffer) noexcept nogil:
    """Give a handle that was added without one its buffer."""
    memory_object_acquire(buffer, 1)
    entry.buffer = buffer


cdef void withdraw_entry(HandleTable table, HandleEntry *entry) noexcept nogil:
    """Take back the newest handle, which no caller has seen."""
    close_entry(table, entry)
    table.unused -= 1


cdef void close_entry(HandleTable table, HandleEntry *entry) noexcept nogil:
    """End a handle. Those that came from it pass to its parent."""
    cdef HandleEntry *child = entry.child
    cdef HandleEntry *following
    unlink(entry)
    while child != NULL:
        following = child.next
        child.parent = child.next = child.previous = NULL
        if entry.parent != NULL:
            link(child, entry.parent)
        child = following
    if entry.buffer != NULL:
        memory_object_release(entry.buffer, 1)
    table.live.erase(serial_of(entry.value))


cdef void revoke_descendants(HandleEntry *entry) noexcept nogil:
    """Revoke every handle that came from this one, directly or not."""
    cdef HandleEntry *at = entry.child
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


cdef void close_all_entries(HandleTable table) noexcept nogil:
    """End every handle."""
    cdef unordered_map[uint64_t, HandleEntry].iterator place = table.live.begin()
    while place != table.live.end():
        if dereference(place).second.buffer != NULL:
            memory_object_release(dereference(place).second.buffer, 1)
        preincrement(place)
    table.live.clear()


cdef bint take_block(HandleTable table) noexcept nogil:
    """Take more serial numbers; false when memory or the numbers are used up."""
    cdef uint64_t start = take_serials(BLOCK)
    cdef ordered_map[uint64_t, uint64_t].iterator last = table.blocks.end()
    if start + BLOCK > <uint64_t>1 << SERIAL_BITS:
        return False
    if not table.blocks.empty() and start == table.unused_end:
        predecrement(last)
        dereference(last).second = start + BLOCK
    elif not insert_or_fail(table.blocks, start, start + BLOCK):
        return False
    table.unused = start
    table.unused_end = start + BLOCK
    return True


cdef bint was_handed_out(HandleTable table, uint64_t serial) noexcept nogil:
    """Whether this table ever gave a handle this number."""
    cdef ordered_map[uint64_t, uint64_t].iterator block = table.blocks.upper_bound(serial)
    if block == table.blocks.begin() or table.unused <= serial < table.unused_end:
        return False
    predecrement(block)
    return serial < dereference(block).second


cdef void link(HandleEntry *entry, HandleEntry *parent) noexcept nogil:
    """Make an entry its parent's first child."""
    entry.parent = parent
    entry.previous = NULL
    entry.next = parent.child
    if entry.next != NULL:
        entry.next.previous = entry
    parent.child = entry


cdef void unlink(HandleEntry *entry) noexcept nogil:
    """Take an entry out of its parent's children."""
    if entry.next != NULL:
        entry.next.previous = entry.previous
    if entry.previous != NULL:
        entry.previous.next = entry.next
    elif entry.parent != NULL:
        entry.parent.child = entry.next


cdef Answer copy_handle(AddressSpace space, const Request *request) noexcept nogil:
    """Another handle of the same buffer, with the same rights or fewer."""
    cdef HandleEntry *entry = NULL
    cdef Answer answer = find_entry(
        space.handles, request.handle, RIGHT_COPY | request.rights, &entry)
    if answer.reason == DONE:
        answer = check_limit(space, HANDLES, 1)
    if answer.reason != DONE:
        return answer
    return new_handle(space, entry.buffer, request.rights, entry)


cdef Answer close_handle(AddressSpace space, const Request *request) noexcept nogil:
    """Close a handle, a revoked one too."""
    cdef HandleEntry *entry = NULL
    cdef Answer answer = find_entry(space.handles, request.handle, 0, &entry)
    if answer.reason != DONE and answer.reason != REVOKED:
        return answer
    close_entry(space.handles, entry)
    return done()


cdef Answer revoke_handle(AddressSpace space, const Request *request) noexcept nogil:
    """Revoke every handle that came from this one."""
    cdef HandleEntry *entry = NULL
    cdef Answer answer = find_entry(space.handles, request.handle, 0, &entry)
    if answer.reason == DONE:
        revoke_descendants(entry)
    return answer


cdef Answer describe_handle(AddressSpace space, const Request *request) noexcept nogil:
    """Fill in the HandleFacts that the request points to."""
    cdef HandleFacts *facts = request.facts
    cdef HandleEntry *entry = NULL
    cdef int result
    cdef Answer answer = find_entry(space.handles, request.handle, 0, &entry)
    if answer.reason != DONE:
        return answer
    facts.rights = rights_of(entry.value)
    facts.size = entry.buffer.size
    facts.nbytes = memory_object_nbytes(entry.buffer)
    facts.segments = window_of(entry.buffer).count
    facts.cloned = entry.buffer.origin != NULL
    facts.origin_sid = 0
    facts.seals = memory_object_seals(entry.buffer)
    result = min(0, facts.seals)
    if result == 0:
        result = memory_object_sid(entry.buffer, &facts.sid)
    if result == 0 and facts.cloned:
        result = memory_object_sid(entry.buffer.origin, &facts.origin_sid)
    return answer if result == 0 else kernel_refused(result)

"""An address space whose pages can be an MDL buffer's: mapped from one, or turned into one.

The caller holds the mutex, as everywhere in ``_address_space.pyx``.
"""

cdef Answer map_buffer(AddressSpace self, const Request *request, MemoryObject *buffer) noexcept nogil:
    """Map a part of a memory object, which lies inside it; a failure leaves no descriptor."""
    cdef uint64_t descriptions = memory_object_descriptions(buffer)
    cdef Answer answer = map_described(self, request, buffer)
    if answer.reason != DONE:
        memory_object_undescribe(buffer, descriptions)
    return answer


cdef Answer map_described(AddressSpace self, const Request *request, MemoryObject *buffer) noexcept nogil:
    """``map_buffer``, which may leave read-only descriptions behind when it fails."""
    cdef uint32_t protection = request.flags & FLAG_RWX_MASK
    cdef Plan plan
    cdef uint64_t mappings = 0
    cdef int result
    cdef Answer answer = check_place(request)
    if answer.reason == DONE:
        answer = check_mapping_limits(self, request, buffer)
    if answer.reason != DONE:
        return answer
    answer = map_segments(self, request, buffer)
    if answer.error == -EPERM and protection & FLAG_WRITE:
        return refused(SEALED)
    if answer.error == -EACCES and protection & FLAG_WRITE:
        return kernel_refused(-EBADF)       # ours is open for writing: it is another one
    if answer.reason != DONE or not request.flags & FLAG_LOCKED or protection == 0:
        return answer
    result = memory_object_ask(buffer, request.offset, request.size)
    if result == 0 and not plan_residence(
            answer.result, request.size, protection, buffer, plan):
        result = -ENOMEM
    if result == 0:
        result = carry_out(plan, &mappings)
    if result < 0:
        unmap_region(self, answer.result)
        return kernel_refused(result, 0, mappings)
    return answer


cdef Answer check_mapping_limits(AddressSpace self, const Request *request,
                             MemoryObject *buffer) noexcept nogil:
    """Whether a part of a memory object may be mapped once more."""
    cdef Answer answer = check_region_limits(self, request, memory_object_seams(
        buffer, request.offset, request.offset + request.size - 1))
    if answer.reason == DONE:
        answer = check_limit(self, MDL_MAPPINGS, 1)
    if answer.reason == DONE and request.flags & FLAG_LOCKED:
        answer = check_limit(self, LOCKED, request.size)
    return answer


cdef Answer map_segments(AddressSpace self, const Request *request, MemoryObject *buffer) noexcept nogil:
    """Map each segment of a part of a memory object, side by side, and enter the region.

    Without WRITE their read-only descriptions are mapped, so that the kernel holds the ceiling.

    The first is mapped as long as all of them, which reserves the range; each other one is put
    over what is behind its predecessor. So the kernel never has to cut a mapping in three, and
    the way back needs no mapping that it could refuse, as taking a part of reserved memory
    back would that it merged with a neighbour.
    """
    cdef uint32_t protection = request.flags & FLAG_RWX_MASK
    cdef bint writable = protection & FLAG_WRITE != 0
    cdef Piece piece = memory_object_piece(buffer, request.offset, request.size)
    cdef uint64_t mapped = piece.size
    cdef uint64_t mappings
    cdef Py_ssize_t result = memory_object_descriptor(buffer, piece.segment, writable)
    cdef Answer answer
    if result < 0:
        return kernel_refused(<int>result)
    answer = place_region(
        self, request,
        run_of(buffer, request.offset, KIND_MDL, STATE_COMMITTED, <uint32_t>request.flags, protection),
        <int>result, piece.offset)
    if answer.reason == DONE:
        self.ledger.seams += memory_object_seams(
            buffer, request.offset, request.offset + request.size - 1)
    while answer.reason == DONE and mapped < request.size:
        piece = memory_object_piece(buffer, request.offset + mapped, request.size - mapped)
        result = memory_object_descriptor(buffer, piece.segment, writable)
        if result >= 0:
            result = kernel.mmap(
                answer.result + mapped, request.size - mapped,
                page_access(STATE_COMMITTED, protection), MAP_SHARED | MAP_FIXED,
                <int>result, piece.offset)
        if result < 0:
            # The way back makes room for mappings: how many there are is asked before.
            mappings = kernel.mapping_count() if result == -ENOMEM else 0
            unmap_region(self, answer.result)
            return kernel_refused(<int>result, LIMIT_AS, mappings)
        mapped += piece.size
    return answer


cdef Answer convert_to_buffer(AddressSpace self, const Request *request, MemoryObject **buffer) noexcept nogil:
    """Make a memory object of convertible pages, which then is mapped there.

    A whole SHAREABLE region is one already, unless a parent process has it too.
    """
    cdef uintptr_t va = request.va
    cdef uintptr_t end = va + request.size
    cdef uint32_t flags = self.ledger.region_at(va).value().flags
    cdef uint64_t mappings = 0
    cdef int result = 0
    if not self.ledger.isolate(va, end):
        return no_run(self)
    buffer[0] = whole_object(self, va, end)
    if buffer[0] == NULL:
        buffer[0] = memory_object_new(
            request.size, request.flags & FLAG_EXECUTE != 0, &result)
        if buffer[0] != NULL:
            result = -convert_pages(self.ledger, flags, va, end, buffer[0], &mappings)
        if result != 0:
            if buffer[0] != NULL:
                memory_object_release(buffer[0], 0)
            self.ledger.coalesce(va, end)
            return kernel_refused(-result, LIMIT_AS, mappings)
        release_backing(self, self.ledger.runs.lower_bound(va), end)
        memory_object_acquire(buffer[0], request.size // kernel.page_size())
    self.ledger.set_backing(
        va, end, buffer[0], 0, KIND_MDL, FLAG_RWX_MASK & ~request.forbidden)
    return done()


cdef Answer check_convertible(AddressSpace self, uintptr_t va, uintptr_t end,
                              uint32_t forbidden) noexcept nogil:
    """Whether every page is committed, private, in no view, and gives no forbidden access."""
    cdef uintptr_t pinned
    cdef Runs.iterator run = self.ledger.run_at(va)
    while self.ledger.starts_below(run, end):
        if run.value().state != STATE_COMMITTED:
            return refused(NOT_COMMITTED, max(va, run.key()))
        if run.value().kind == KIND_MDL:
            return refused(ALREADY_MDL, max(va, run.key()))
        if run.value().protection & forbidden:
            return refused(FORBIDDEN_OF_MDL, max(va, run.key()))
        preincrement(run)
    pinned = first_pinned(self, self.ledger.run_at(va), va, end)
    return done() if pinned == 0 else refused(PINNED, pinned)


cdef MemoryObject *whole_object(AddressSpace self, uintptr_t va, uintptr_t end) noexcept nogil:
    """The memory object of which these pages are all, in order, or NULL."""
    cdef Runs.iterator run = self.ledger.run_at(va)
    cdef MemoryObject *backing = <MemoryObject *>run.value().backing
    if backing == NULL or backing.size != end - va or memory_object_is_inherited(backing):
        return NULL
    while self.ledger.starts_below(run, end):
        if (run.value().backing != backing
                or run.value().offset != run.key() - va):
            return NULL
        preincrement(run)
    return backing



"""The executor of plans: every step is carried out, or none."""


cdef int carry_out(const Plan &plan, uint64_t *mappings) noexcept nogil:
    """Carry out every step, or none: 0 or -errno of the step that failed.

    After an ENOMEM ``mappings`` is how many the process had then: undoing steps gives some back.
    """
    cdef size_t done
    cdef int result
    for done in range(plan.size()):
        result = do_step(plan[done])
        if result < 0:
            if result == -ENOMEM:
                mappings[0] = kernel.mapping_count()
            while True:
                undo_step(plan[done])
                if done == 0:
                    return result
                done -= 1
    return 0


cdef int do_step(const Step &this) noexcept nogil:
    """Carry out one step: 0 or -errno."""
    if this.kind == STEP_ACCESS or this.kind == STEP_PROTECT:
        return kernel.mprotect(this.start, this.size, this.protection)
    elif this.kind == STEP_ADVISE_HUGE:
        return again_is_no_memory(kernel.madvise(this.start, this.size, MADV_HUGEPAGE))
    elif this.kind == STEP_FILL:
        return memory_object_fill(this.backing, this.offset, this.size)
    elif this.kind == STEP_POPULATE:
        return populate(this)
    elif this.kind == STEP_LOCK:
        lock_what_fits(this.start, this.size)
        return 0
    elif this.kind == STEP_UNLOCK:
        return kernel.munlock(this.start, this.size)
    elif this.kind == STEP_GUARD:
        return install_guards(this.start, this.size)
    elif this.kind == STEP_UNGUARD:
        return remove_guards(this.start, this.size)
    elif this.kind == STEP_DISCARD:
        return reserve_afresh(this.start, this.size)
    return memory_object_punch(this.backing, this.offset, this.size)


cdef void undo_step(const Step &this) noexcept nogil:
    """Undo one step, which may have failed halfway."""
    if this.kind == STEP_ACCESS:
        if this.backing != NULL or reserve_afresh(this.start, this.size) < 0:
            kernel.mprotect(this.start, this.size, PROT_NONE)
    elif this.kind == STEP_PROTECT:
        kernel.mprotect(this.start, this.size, this.before)
    elif this.kind == STEP_FILL:
        if memory_object_is_exclusive(this.backing):
            memory_object_punch(this.backing, this.offset, this.size)
    elif this.kind == STEP_LOCK:
        kernel.munlock(this.start, this.size)
    elif this.kind == STEP_UNLOCK:
        lock_what_fits(this.start, this.size)
    elif this.kind == STEP_GUARD:
        remove_guards(this.start, this.size)
    elif this.kind == STEP_UNGUARD:
        install_guards(this.start, this.size)


cdef int populate(const Step &this) noexcept nogil:
    """Make pages resident: 0 or -errno, before the first where private ones have no headroom."""
    cdef int result = kernel.check_headroom(this.size) if this.backing == NULL else 0
    if result == 0:
        result = populate_pages(this.start, this.size, this.protection)
    return result


cdef int populate_pages(uintptr_t start, size_t size, int protection) noexcept nogil:
    """Make pages resident, by writing where that is allowed: 0 or -errno."""
    return again_is_no_memory(kernel.madvise(
        start, size, MADV_POPULATE_WRITE if protection & PROT_WRITE else MADV_POPULATE_READ))


cdef int again_is_no_memory(int result) noexcept nogil:
    """The result of madvise(2), which says EAGAIN where others say ENOMEM."""
    return -ENOMEM if result == -EAGAIN else result


cdef void lock_what_fits(uintptr_t start, size_t size) noexcept nogil:
    """Lock the longest leading part that RLIMIT_MEMLOCK allows, found by halving."""
    cdef uintptr_t end = start + size
    cdef size_t length = size
    cdef int result
    while length != 0 and start != end:
        length = min(length, end - start)
        result = kernel.mlock(start, length)
        if result == -EPERM:
            return
        if result == 0:
            start += length
        else:
            length = round_down(length // 2, PAGE_SIZE)

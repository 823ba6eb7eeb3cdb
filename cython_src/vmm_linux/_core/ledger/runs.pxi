"""Runs of pages: which may be one, what they add to the counts, and how one is cut."""

cdef bint alike(const Run *left, const Run *right, size_t distance) noexcept nogil:
    """Whether two neighbouring runs may be one: ``distance`` is the length of the left one."""
    return (
        left.pins == 0
        and right.pins == 0
        and left.state == right.state
        and left.protection == right.protection
        and left.ceiling == right.ceiling
        and left.kind == right.kind
        and left.opened == right.opened
        and left.backing == right.backing
        and (left.backing == NULL or left.offset + distance == right.offset)
    )


cdef bint is_mapping(const Region *region) noexcept nogil:
    """Whether MdlMap made the region: Allocate's have RESERVE."""
    return not region.flags & FLAG_RESERVE


cdef uint64_t guards_of(const Region *region) noexcept nogil:
    """How many guard pages a region has."""
    return <uint64_t>(region.low_guard != 0) + <uint64_t>(region.high_guard != 0)


cdef uint64_t private_bytes(uintptr_t start, const Run *run) noexcept nogil:
    """Bytes of a run that are committed and not a buffer's."""
    return run.end - start if run.state == STATE_COMMITTED and run.kind == KIND_PRIVATE else 0


cdef uint64_t locked_bytes(uintptr_t start, const Run *run) noexcept nogil:
    """Bytes of a run that are committed in a LOCKED region."""
    return run.end - start if run.state == STATE_COMMITTED and run.locked else 0


cdef void count(Ledger ledger, Runs.iterator run) noexcept nogil:
    """Add a run's bytes to the counts."""
    ledger.committed += private_bytes(run.key(), run.value())
    ledger.locked += locked_bytes(run.key(), run.value())


cdef void discount(Ledger ledger, Runs.iterator run) noexcept nogil:
    """Subtract what ``count`` added; before a change of state or kind."""
    ledger.committed -= private_bytes(run.key(), run.value())
    ledger.locked -= locked_bytes(run.key(), run.value())


cdef bint cut_run(Ledger ledger, Runs.iterator *run, uintptr_t at) noexcept nogil:
    """Cut a run, and move on to its right part; false when memory is short, or at the limit."""
    cdef Runs.iterator right = run[0]
    cdef Run part = run[0].value()[0]
    part.offset += at - run[0].key()
    if ledger.mappings() >= ledger.most_mappings or not ledger.runs.insert_after(&right, at, part):
        return False
    run[0].value().end = at
    run[0] = right
    return True


cdef void undo_cut(Ledger ledger, Runs.iterator right) noexcept nogil:
    """Undo ``cut_run``, even if the run is pinned."""
    cdef Runs.iterator left = right
    predecrement(left)
    left.value().end = right.value().end
    ledger.runs.erase(right)

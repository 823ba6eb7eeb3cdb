"""Query: the kernel's word and the ledger's intent put together.

The kernel says whether something is mapped, with which access, and where the page's memory is;
the ledger says whose it is and what it is meant to be. Where they differ, the kernel wins.
Nothing here touches the page.
"""


@cython.final
cdef class PageInfo:
    """PageInfo()\n--\n
    What ``VMM.query`` found out about one page. Immutable.

    Attributes:
        va: start of the page that includes the address asked for.
        state: ``PageState`` of the page.
        kind: ``PageKind``: whose it is.
        protection: ``VmmFlags`` of the access it gives, or will give once committed.
        flags: ``VmmFlags`` of its region, as allocated.
        base: start of its region; of the hole or the foreign mapping where it has none.
        size: bytes of that, guard pages not counted.
        run_start: start of the pages around it with the same state and protection.
        run_end: end of these.
        mdl_offset: bytes from the start of the MDL buffer, None for other pages.
        sid: security id of the MDL buffer, None for other pages.
        resident: whether the page has memory of its own or shared memory mapped now.
        swapped: whether its contents are in swap.
        locked: whether it is pinned in memory (mlock).
        huge: whether it is part of a huge page.
        smaps: the whole ``/proc/self/smaps`` record of the mapping that holds the page, sizes
            in bytes; None for a free address, and after ``query(va, smaps=False)``.

    The last five are None where this kernel does not report them.
    """

    cdef uint32_t _state, _kind, _protection, _flags
    cdef uintptr_t _end
    cdef PageFacts _facts
    cdef readonly uintptr_t va, base, run_start, run_end
    cdef readonly object mdl_offset, sid, smaps

    @property
    def state(self):
        return PageState(self._state)

    @property
    def kind(self):
        return PageKind(self._kind)

    @property
    def protection(self):
        return VmmFlags(self._protection)

    @property
    def flags(self):
        return VmmFlags(self._flags)

    @property
    def size(self):
        return self._end - self.base

    @property
    def resident(self):
        return page_fact(self._facts, PAGE_PRESENT)

    @property
    def swapped(self):
        return page_fact(self._facts, PAGE_SWAPPED)

    @property
    def locked(self):
        return page_fact(self._facts, PAGE_LOCKED)

    @property
    def huge(self):
        return page_fact(self._facts, PAGE_HUGE)

    def __init__(self):
        """Raise TypeError: ``VMM.query`` makes them."""
        raise TypeError("a PageInfo is what VMM.query returns")

    def __repr__(self):
        return (
            f"PageInfo(va=0x{self.va:x}, state={self.state.name}, kind={self.kind.name}, "
            f"protection={self.protection!r}, flags={self.flags!r}, base=0x{self.base:x}, "
            f"size={self.size}, run=0x{self.run_start:x}-0x{self.run_end:x}, "
            f"mdl_offset={self.mdl_offset}, sid={self.sid}, resident={self.resident}, "
            f"swapped={self.swapped}, locked={self.locked}, huge={self.huge})")

    def __reduce__(self):
        return restore_page_info, (
            self.va, self._state, self._kind, self._protection, self._flags,
            (self.base, self._end), (self.run_start, self.run_end), self.mdl_offset, self.sid,
            pickled_facts(self._facts), self.smaps)

    def __eq__(self, other):
        if not isinstance(other, PageInfo):
            return NotImplemented
        return contents(self) == contents(other)

    def __hash__(self):
        return hash((self.va, self.base, self._end, self._state, self._protection))


def restore_page_info(uintptr_t va, state, kind, protection, flags, tuple region, tuple run,
                      mdl_offset, sid, tuple facts, SmapsRecord smaps):
    """A new answer with what ``PageInfo.__reduce__`` says of one."""
    cdef PageInfo made = PageInfo.__new__(PageInfo)
    made.va = va
    # As the enumerations have them, which refuse others.
    made._state = int(PageState(state))
    made._kind = int(PageKind(kind))
    made._protection = int(VmmFlags(protection))
    made._flags = int(VmmFlags(flags))
    made.base, made._end = region
    made.run_start, made.run_end = run
    if made.base > made._end or made.run_start > made.run_end:
        raise ValueError("no PageInfo: a range of it ends before it starts")
    for number in (mdl_offset, sid):
        if number is not None and not (type(number) is int and 0 <= number < 1 << 64):
            raise ValueError("no PageInfo: mdl_offset and sid are numbers of 64 bits, or None")
    if not all(fact in (-1, 0, 1) for fact in facts):
        raise ValueError("no PageInfo: a fact about its page is neither 1, 0 nor -1")
    made.mdl_offset = mdl_offset
    made.sid = sid
    made._facts.known = made._facts.flags = 0
    for flag, fact in zip(PICKLED_FACTS, facts, strict=True):
        made._facts.known |= <uint32_t>flag if fact >= 0 else 0
        made._facts.flags |= <uint32_t>flag if fact > 0 else 0
    made.smaps = smaps
    return made


cdef tuple PICKLED_FACTS = (
    PAGE_PRESENT, PAGE_SWAPPED, PAGE_HUGE, PAGE_GUARD, PAGE_LOCKED, PAGE_SHARED)


cdef tuple pickled_facts(PageFacts facts):
    """The facts in a pickle, in the order of ``PICKLED_FACTS``: 1 true, 0 false, -1 unknown."""
    cdef list pickled = []
    for flag in PICKLED_FACTS:
        fact = page_fact(facts, flag)
        pickled.append(-1 if fact is None else int(fact))
    return tuple(pickled)


cdef tuple contents(PageInfo info):
    """Everything that makes two answers equal."""
    return (
        info.va, info._state, info._kind, info._protection, info._flags, info.base, info._end,
        info.run_start, info.run_end, info.mdl_offset, info.sid, info.resident, info.swapped,
        info.locked, info.huge, info.smaps)


cdef struct Found:
    # What the kernel and the ledger say of one page.
    bint closed                 # the VMM is closed, and all else is unset
    Location where
    Span span
    PageFacts facts
    uint64_t sid
    Text smaps


cdef int ask_kernel(AddressSpace space, OwnProcess process, uintptr_t page, bint smaps,
                    Found *found) noexcept nogil:
    """Find out about a page: 0 or -errno. The caller holds the mutex."""
    cdef int result
    found.smaps = [NULL, 0, 0]
    found.closed = space.closed
    if found.closed:
        return 0
    found.where = locate(space.ledger, page)
    result = process.span_at(page, &found.span)
    if result == 0 and found.span.mapped:
        result = process.page_at(page, &found.facts)
        if result == 0 and smaps:
            result = process.smaps_text_at(page, &found.smaps)
        if result == 0 and found.where.buffer != NULL:
            result = memory_object_sid(found.where.buffer, &found.sid)
            if result == -EBADF:
                result = 0      # the program closed our descriptor; what is mapped goes on
    return result


cdef int put_together(PageInfo info, const Location &where, const Span &span,
                      uint64_t sid) except -1:
    """Fill in what is known of the page: the kernel's word first, then the ledger's intent."""
    info.base = info.run_start = span.start
    info._end = info.run_end = span.end
    info._protection = span.permissions & FLAG_RWX_MASK
    info._flags = 0
    if not span.mapped:
        info._kind = KIND_FREE
        info._state = STATE_FREE
        info._facts.known = PAGE_PRESENT | PAGE_SWAPPED | PAGE_HUGE | PAGE_LOCKED
        info._facts.flags = 0
    elif where.kind == KIND_FREE:
        # The kernel merges a foreign mapping with a region that lies next to it.
        info.base = info.run_start = max(span.start, where.base)
        info._end = info.run_end = min(span.end, where.end)
        info._kind = KIND_FOREIGN
        info._state = STATE_COMMITTED if info._protection else STATE_RESERVED
    else:
        info._kind = where.kind
        info._state = where.state
        info._flags = where.flags
        info.base = where.base
        info._end = where.end
        info.run_start = where.run_start
        info.run_end = where.run_end
        if where.state == STATE_RESERVED:
            info._protection = where.protection
        if where.buffer != NULL:
            info.mdl_offset = where.mdl_offset
            info.sid = sid if sid != 0 else None
    return 0


cdef object record_in(const Text &smaps):
    """The one record in this text."""
    try:
        return parse_smaps(smaps.data[:smaps.length])[0]
    except MemoryError:
        raise OutOfMemory("query", "no memory for the record of smaps") from None


cdef int settle(AddressSpace space, OwnProcess process, SmapsRecord record) except -1:
    """Ask the kernel for a name that the text of smaps leaves ambiguous."""
    cdef NamedQuery found
    cdef int result = -1
    if is_ambiguous(record.pathname):
        lock_space(space)
        if not space.closed:
            result = process.name_at(record.span.start, &found)
        unlock_space(space)
        if result == 0:
            record.pathname = settled_name(record.pathname, record.span.start, &found)
    return 0


cdef PageInfo query(AddressSpace space, OwnProcess process, uintptr_t va, bint smaps):
    """What is known of the page that includes ``va``, with its smaps record if asked."""
    cdef PageInfo info = PageInfo.__new__(PageInfo)
    cdef uintptr_t page = round_down(va, PAGE_SIZE)
    cdef Found found
    cdef int result
    if smaps:
        with nogil:
            wait_for_space(space)
            result = ask_kernel(space, process, page, True, &found)
            unlock_space(space)
    else:
        lock_space(space)
        result = ask_kernel(space, process, page, False, &found)
        unlock_space(space)
    try:
        if found.closed:
            raise InvalidOperation("query", "this VMM is closed; make another one")
        check_result(
            result, "query", "the kernel did not tell about this process's memory (/proc/self)")
        if found.smaps.length != 0:
            info.smaps = record_in(found.smaps)
            settle(space, process, info.smaps)
    finally:
        free_text(&found.smaps)
    info.va = page
    info._facts = found.facts
    put_together(info, found.where, found.span, found.sid)
    return info

"""Questions to ``/proc/self``: one mapping, one page, one record of smaps.

They go to an ``OwnProcess``, which holds the open files. None touches the page asked about, makes a
Python object or raises. Each uses the newest interface that this kernel has, and an older one where
it has none (see the kernel's features).
"""

cdef enum:
    # See hole_by_query.
    STEP_GROWTH = 64, DIRECT_TRIES = 8


cdef int ensure_open(int *fd, Mark kind, const char *path) noexcept nogil:
    """The file's number, or -errno. It is opened if it was not, or if the program closed it."""
    cdef int result = check_mark(fd[0], kind)
    if result != -EBADF:
        return fd[0] if result == 0 else result
    fd[0] = kernel.openat(path, O_RDONLY | O_CLOEXEC)
    if fd[0] < 0:
        return fd[0]
    result = mark(fd[0], kind)
    if result < 0:
        kernel.close(fd[0])
        fd[0] = result
    return fd[0]


cdef void close_file(int *fd, Mark kind) noexcept nogil:
    """Close the file, if it still is ours."""
    if check_mark(fd[0], kind) != -EBADF:
        kernel.close(fd[0])
    fd[0] = -1


cdef inline void fill_hole(Span *span, uintptr_t start, uintptr_t end) noexcept nogil:
    memset(span, 0, sizeof(Span))
    span.start = start
    span.end = end


cdef inline void add_facts(PageFacts *facts, uint32_t known, uint32_t flags) noexcept nogil:
    """Add what is known of a page."""
    # Where guards are unmarked, one is stored as a swapped page is, and reads as one.
    if (flags & known & PAGE_SWAPPED and not known & PAGE_GUARD
            and kernel.has(kernel.FEATURE_GUARD_REGIONS)):
        known &= ~<uint32_t>PAGE_SWAPPED
    facts.known |= known
    facts.flags |= flags & known


@final
cdef class OwnProcess:
    """The open files of ``/proc/self``, and questions to them.

    A file is opened when first needed and kept. After a fork the parent's are closed and the
    child's own opened. ``close()`` closes them; a later question opens them again.

    They are those of the calling thread's folder, ``/proc/thread-self``, which say the same: the
    process's own are empty once its first thread has ended. When the thread that opened a text
    ends, reading it fails (ESRCH), and it is opened anew; the ioctls go on.
    """

    __reduce__ = refuse_copies("each owns its descriptors; make another one")

    def __cinit__(self):
        self.maps = self.pagemap = self.smaps = -1
        self.generation = kernel.fork_generation()

    def __dealloc__(self):
        self.release()

    def close(self):
        """Close the files. May be called again."""
        self.release()

    cdef void release(self) noexcept nogil:
        close_file(&self.maps, MARK_MAPS)
        close_file(&self.pagemap, MARK_PAGEMAP)
        close_file(&self.smaps, MARK_SMAPS)
        free_text(&self.lines)

    cdef int span_at(self, uintptr_t va, Span *span) noexcept nogil:
        """The mapping or the hole that ``va`` lies in; -EINVAL beyond user space.

        A hole begins at the end of the mapping before it, or at 0, and ends at the start
        of the next, or at the end of user space.
        """
        if va >= kernel.user_space_end():
            return -EINVAL
        notice_fork(self)
        if kernel.has(kernel.FEATURE_PROCMAP_QUERY):
            return span_by_query(self, va, span)
        return span_by_text(self, va, span)

    cdef int name_at(self, uintptr_t va, NamedQuery *query) noexcept nogil:
        """``query_with_name`` for this process."""
        cdef int result
        notice_fork(self)
        result = ensure_open(&self.maps, MARK_MAPS, b"/proc/thread-self/maps")
        return result if result < 0 else query_with_name(result, va, query)

    cdef int page_at(self, uintptr_t va, PageFacts *facts) noexcept nogil:
        """What the kernel knows of the page that includes ``va``; -EINVAL beyond user space.

        Of an unmapped page ``locked`` is unknown and the rest 0. Without pagemap ``present`` is
        what mincore(2) says, which for files and shared memory means that the page is in memory,
        be it in this process's page table or not; it is the only fact then.
        """
        cdef uintptr_t page = va & ~<uintptr_t>(kernel.PAGE_SIZE - 1)
        cdef unsigned char residency
        cdef int result
        if va >= kernel.user_space_end():
            return -EINVAL
        notice_fork(self)
        facts.known = facts.flags = 0
        # This advice does nothing here but to answer EBUSY for a locked mapping.
        result = kernel.msync(page, kernel.PAGE_SIZE, kernel.MS_ASYNC | kernel.MS_INVALIDATE)
        if result == 0 or result == -EBUSY:
            add_facts(facts, PAGE_LOCKED, PAGE_LOCKED if result == -EBUSY else 0)
        result = -EACCES
        if kernel.has(kernel.FEATURE_PAGEMAP_SCAN):
            result = facts_by_scan(self, page, facts)
        elif kernel.has(kernel.FEATURE_PAGEMAP):
            result = facts_by_entry(self, page, facts)
        if result == -EACCES or result == -EPERM:
            # Closed to us: a kernel, a sandbox, or this process after setuid.
            result = kernel.mincore(page, kernel.PAGE_SIZE, &residency)
            if result == 0:
                add_facts(facts, PAGE_PRESENT, PAGE_PRESENT if residency & 1 else 0)
            elif result == -ENOMEM:
                add_facts(facts, PAGE_PRESENT, 0)
                result = 0
        return result

    cdef int smaps_text_at(self, uintptr_t va, Text *text) noexcept nogil:
        """The text of the record of ``/proc/self/smaps`` that covers ``va``; empty for a hole.

        The time grows with the number of mappings below. -EINVAL beyond user space.
        """
        cdef int result = read_smaps(self, va, text)
        if result == -ESRCH:
            close_file(&self.smaps, MARK_SMAPS)
            result = read_smaps(self, va, text)
        return result

    def span(self, uintptr_t va):
        """``span_at`` as ``(start, end, mapped, permissions, offset, inode, device)``."""
        cdef Span span
        kernel.check(self.span_at(va, &span))
        return (span.start, span.end, bool(span.mapped), span.permissions, span.offset,
                span.inode, device_text(span.device_major, span.device_minor))

    def page(self, uintptr_t va):
        """``page_at`` as a dict; None for what is unknown."""
        cdef PageFacts facts
        kernel.check(self.page_at(va, &facts))
        return {
            "present": page_fact(facts, PAGE_PRESENT),
            "swapped": page_fact(facts, PAGE_SWAPPED),
            "huge": page_fact(facts, PAGE_HUGE),
            "guard": page_fact(facts, PAGE_GUARD),
            "locked": page_fact(facts, PAGE_LOCKED),
            "file_or_shared": page_fact(facts, PAGE_SHARED),
        }

    def record(self, uintptr_t va):
        """The ``SmapsRecord`` of the mapping that ``va`` lies in, or None for a hole."""
        cdef Text text = [NULL, 0, 0]
        cdef NamedQuery query
        cdef SmapsRecord made
        try:
            kernel.check(self.smaps_text_at(va, &text))
            if text.length == 0:
                return None
            made = record_from(text.data, text.length)
            if is_ambiguous(made.pathname) and self.name_at(va, &query) == 0:
                made.pathname = settled_name(made.pathname, made.span.start, &query)
            return made
        finally:
            free_text(&text)


cdef void notice_fork(OwnProcess process) noexcept nogil:
    cdef uint32_t generation = kernel.fork_generation()
    if process.generation != generation:
        process.release()
        process.generation = generation


cdef int span_by_query(OwnProcess process, uintptr_t va, Span *span) noexcept nogil:
    cdef kernel.ProcmapQuery query
    cdef int result = ensure_open(&process.maps, MARK_MAPS, b"/proc/thread-self/maps")
    if result < 0:
        return result
    result = query_mapping(process.maps, va, &query)
    if result == -ENOENT:
        fill_hole(span, 0, kernel.user_space_end())
        return hole_by_query(process, va, span)
    if result < 0:
        return result
    if query.vma_start > va:
        fill_hole(span, 0, query.vma_start)
        return hole_by_query(process, va, span)
    fill_span(span, &query)
    return 0


cdef int hole_by_query(OwnProcess process, uintptr_t va, Span *span) noexcept nogil:
    """Find where the hole around ``va`` begins: the end of the mapping before it.

    The kernel only finds the mapping at or after an address. So the beginning is searched: an
    address from which nothing is mapped up to ``va`` lies in the hole; else the hole begins at
    the end of the mapping found there, or higher. First in growing steps down from ``va``,
    until a mapping is met; its end is tried next, as that is often the beginning; then by
    halves. That is 1 to 10 queries in real processes, and never more than some forty: an
    address has no more bits above the page.
    """
    cdef kernel.ProcmapQuery query
    cdef uintptr_t page_mask = ~<uintptr_t>(kernel.PAGE_SIZE - 1)
    cdef uintptr_t low = 0
    cdef uintptr_t high = va & page_mask
    cdef uintptr_t step = kernel.PAGE_SIZE
    cdef uintptr_t at = high - min(step, high)
    cdef bint met = False
    cdef int tries = DIRECT_TRIES, result
    while low < high:
        result = query_mapping(process.maps, at, &query)
        if result == -ENOENT or result == 0 and query.vma_start > va:
            high = at
            if not met:
                step = high if step > high // STEP_GROWTH else step * STEP_GROWTH
                at = high - min(step, high)
                continue
        elif result < 0:
            return result
        elif query.vma_end > va:
            # Another thread has mapped something here meanwhile.
            return span_by_text(process, va, span)
        else:
            met = True
            low = query.vma_end
            if tries > 0:
                tries -= 1
                at = low
                continue
        at = low + ((high - low) // 2 & page_mask)
    span.start = low
    return 0


cdef int span_by_text(OwnProcess process, uintptr_t va, Span *span) noexcept nogil:
    """``span_at`` by reading ``/proc/self/maps`` as far as needed."""
    cdef int result = read_span(process, va, span)
    if result == -ESRCH:
        close_file(&process.maps, MARK_MAPS)
        result = read_span(process, va, span)
    return result


cdef int read_span(OwnProcess process, uintptr_t va, Span *span) noexcept nogil:
    """``span_by_text`` of the file that is open."""
    cdef Reader reader
    cdef Line line
    cdef const char *text
    cdef const char *end
    cdef uintptr_t before = 0
    cdef int result = ensure_open(&process.maps, MARK_MAPS, b"/proc/thread-self/maps")
    if result < 0:
        return result
    start_reading(&reader, result, &process.lines)
    while True:
        reader.kept = reader.next
        result = next_line(&reader, &text, &end)
        if result < 0:
            return result
        if result == 0:
            break
        if not scan_mapping(text, end, &line):
            return -EBADMSG
        if line.span.end <= va:
            before = line.span.end
        elif line.span.start <= va:
            span[0] = line.span
            return 0
        else:
            # Above user space is the kernel's own page, which some machines show at the end.
            fill_hole(span, before, min(line.span.start, kernel.user_space_end()))
            return 0
    fill_hole(span, before, kernel.user_space_end())
    return 0


cdef int facts_by_scan(OwnProcess process, uintptr_t page, PageFacts *facts) noexcept nogil:
    cdef uint64_t categories = (kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
                                | kernel.PAGE_IS_FILE | kernel.PAGE_IS_HUGE)
    cdef uint32_t known = PAGE_PRESENT | PAGE_SWAPPED | PAGE_SHARED | PAGE_HUGE
    cdef uint32_t flags
    cdef int result = ensure_open(&process.pagemap, MARK_PAGEMAP, b"/proc/thread-self/pagemap")
    if result < 0:
        return result
    if kernel.has(kernel.FEATURE_PAGEMAP_GUARD):
        categories |= kernel.PAGE_IS_GUARD
        known |= PAGE_GUARD
    result = scan_page(process.pagemap, page, categories, &flags)
    if result == -EINVAL and known & PAGE_GUARD:
        # 6.15 marks guards in pagemap, but not here yet.
        result = facts_by_entry(process, page, facts)
        if result < 0:
            return result
        result = scan_page(process.pagemap, page, kernel.PAGE_IS_HUGE, &flags)
        known = PAGE_HUGE
    if result == 0:
        add_facts(facts, known, flags)
    return result


cdef int facts_by_entry(OwnProcess process, uintptr_t page, PageFacts *facts) noexcept nogil:
    cdef uint64_t entry = 0
    cdef intptr_t count
    cdef bint guards = kernel.has(kernel.FEATURE_PAGEMAP_GUARD)
    cdef int result = ensure_open(&process.pagemap, MARK_PAGEMAP, b"/proc/thread-self/pagemap")
    if result < 0:
        return result
    count = read_entries(process.pagemap, page, &entry, 1)
    if count < 0:
        return <int>count
    add_facts(facts, PAGE_PRESENT | PAGE_SWAPPED | PAGE_SHARED | (PAGE_GUARD if guards else 0),
              flags_of_entry(entry, guards))
    return 0


cdef int read_smaps(OwnProcess process, uintptr_t va, Text *text) noexcept nogil:
    """``smaps_text_at`` of the file that is open."""
    cdef Reader reader
    cdef Line line
    cdef const char *begin
    cdef const char *end
    cdef bint found = False
    cdef size_t record_end = 0
    cdef int result
    text.length = 0
    if va >= kernel.user_space_end():
        return -EINVAL
    notice_fork(process)
    result = ensure_open(&process.smaps, MARK_SMAPS, b"/proc/thread-self/smaps")
    if result < 0:
        return result
    start_reading(&reader, result, text)
    while True:
        if not found:
            reader.kept = reader.next
        result = next_line(&reader, &begin, &end)
        if result < 0:
            text.length = 0
            return result
        if result == 0:
            record_end = text.length
            break
        if not starts_mapping(begin):
            continue
        if found:
            record_end = <size_t>(begin - text.data)
            break
        if not scan_mapping(begin, end, &line):
            text.length = 0
            return -EBADMSG
        if line.span.start > va:
            break
        if line.span.end > va:
            found = True
    if found:
        text.length = record_end - reader.kept
        memmove(text.data, text.data + reader.kept, text.length)
    else:
        text.length = 0
    return 0

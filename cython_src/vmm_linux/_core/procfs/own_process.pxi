"""Questions to ``/proc/self``: one mapping, one page, one record of smaps.

They go to an :class:`OwnProcess`, which holds the open files. None touches the page asked about,
makes a Python object or raises. Each is answered by the newest interface that this kernel
has, and by an older one where it has not (see ``_features``).
"""

cdef enum:
    # See hole_by_query.
    STEP_GROWTH = 64
    DIRECT_TRIES = 8



cdef int ensure_open(int *fd, Mark kind, const char *path) noexcept nogil:
    """The file's number, or ``-errno``. It is opened if it was not, or if the program closed it."""
    cdef int result = check_mark(fd[0], kind)
    if result != -EBADF:
        return fd[0] if result == 0 else result
    fd[0] = kernel.openat(path, kernel.O_RDONLY | kernel.O_CLOEXEC)
    if fd[0] < 0:
        return fd[0]
    result = mark(fd[0], kind)
    if result < 0:
        kernel.close(fd[0])
        fd[0] = result
    return fd[0]


cdef void close_file(int *fd, Mark kind) noexcept nogil:
    """Closes the file, if it still is ours."""
    if check_mark(fd[0], kind) != -EBADF:
        kernel.close(fd[0])
    fd[0] = -1


cdef inline void fill_span(Span *span, uintptr_t start, uintptr_t end,
                           bint mapped) noexcept nogil:
    memset(span, 0, sizeof(Span))
    span.start = start
    span.end = end
    span.mapped = mapped


@final
cdef class OwnProcess:
    """The open files of ``/proc/self``, and questions to them.

    A file is opened when first needed and kept. After a fork the parent's are closed and
    the child's own opened. ``close()`` closes them; a later question opens them again.

    They are those of the calling thread's folder, ``/proc/thread-self``, which tell the same: the
    process's own have nothing to tell once its first thread has ended. With the thread that
    opened it a text ends too (ESRCH), and is opened anew then; the ioctls go on.
    """

    __reduce__ = refuse_copies("each owns its descriptors; make another one")

    def __cinit__(self):
        self.maps = self.pagemap = self.smaps = -1
        self.generation = kernel.fork_generation()

    def __dealloc__(self):
        self.release()

    def close(self):
        """Closes the files. May be called again."""
        self.release()

    cdef void release(self) noexcept nogil:
        close_file(&self.maps, MARK_MAPS)
        close_file(&self.pagemap, MARK_PAGEMAP)
        close_file(&self.smaps, MARK_SMAPS)
        free_text(&self.lines)

    cdef void notice_fork(self) noexcept nogil:
        cdef uint32_t generation = kernel.fork_generation()
        if self.generation != generation:
            self.release()
            self.generation = generation

    # -- one mapping

    cdef int span_at(self, uintptr_t va, Span *span) noexcept nogil:
        """The mapping or the hole that ``va`` lies in; -EINVAL beyond user space.

        A hole begins at the end of the mapping before it, or at 0, and ends at the start
        of the next, or at the end of user space.
        """
        if va >= kernel.user_space_end():
            return -EINVAL
        self.notice_fork()
        if kernel.has(kernel.FEATURE_PROCMAP_QUERY):
            return self.span_by_query(va, span)
        return self.span_by_text(va, span)

    cdef int span_by_query(self, uintptr_t va, Span *span) noexcept nogil:
        cdef kernel.ProcmapQuery query
        cdef int result = ensure_open(&self.maps, MARK_MAPS, b"/proc/thread-self/maps")
        if result < 0:
            return result
        result = query_mapping(self.maps, va, &query)
        if result == -ENOENT:
            fill_span(span, 0, kernel.user_space_end(), False)
            return self.hole_by_query(va, span)
        if result < 0:
            return result
        if query.vma_start > va:
            fill_span(span, 0, query.vma_start, False)
            return self.hole_by_query(va, span)
        fill_span(span, query.vma_start, query.vma_end, True)
        span.permissions = <uint32_t>query.vma_flags & (
            SPAN_READ | SPAN_WRITE | SPAN_EXECUTE | SPAN_SHARED)
        span.offset = query.vma_offset
        span.inode = query.inode
        span.device_major = query.dev_major
        span.device_minor = query.dev_minor
        return 0

    cdef int hole_by_query(self, uintptr_t va, Span *span) noexcept nogil:
        """Finds where the hole around ``va`` begins: the end of the mapping before it.

        The kernel only tells the mapping at or after an address. So the beginning is
        searched: an address from which nothing is mapped up to ``va`` lies in the hole; else
        the hole begins at the end of the mapping found there, or higher. First in growing
        steps down from ``va``, until a mapping is met; its end is tried next, for that is
        often it; then by halves. That is 1 to 10 queries in real processes, and never
        more than some forty: an address has not more bits above the page.
        """
        cdef kernel.ProcmapQuery query
        cdef uintptr_t page_mask = ~<uintptr_t>(kernel.page_size() - 1)
        cdef uintptr_t low = 0
        cdef uintptr_t high = va & page_mask
        cdef uintptr_t step = kernel.page_size()
        cdef uintptr_t at = high - min(step, high)
        cdef bint met = False
        cdef int tries = DIRECT_TRIES
        cdef int result
        while low < high:
            result = query_mapping(self.maps, at, &query)
            if result == -ENOENT or result == 0 and query.vma_start > va:
                high = at
                if not met:
                    step = high if step > high // STEP_GROWTH else step * STEP_GROWTH
                    at = high - min(step, high)
                    continue
            elif result < 0:
                return result
            elif query.vma_end > va:
                # Another thread has mapped something here since.
                return self.span_by_text(va, span)
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

    cdef int span_by_text(self, uintptr_t va, Span *span) noexcept nogil:
        """:meth:`span_at` by reading ``/proc/self/maps`` as far as needed."""
        cdef int result = self.read_span(va, span)
        if result == -ESRCH:
            close_file(&self.maps, MARK_MAPS)
            result = self.read_span(va, span)
        return result

    cdef int read_span(self, uintptr_t va, Span *span) noexcept nogil:
        """:meth:`span_by_text` of the file that is open."""
        cdef Reader reader
        cdef Line line
        cdef const char *text
        cdef const char *end
        cdef uintptr_t before = 0
        cdef int result = ensure_open(&self.maps, MARK_MAPS, b"/proc/thread-self/maps")
        if result < 0:
            return result
        start_reading(&reader, result, &self.lines)
        while True:
            reader.kept = reader.next
            result = next_line(&reader, &text, &end)
            if result < 0:
                return result
            if result == 0:
                break
            if not scan_mapping(text, end, &line):
                return -EBADMSG
            if line.end <= va:
                before = line.end
            elif line.start <= va:
                fill_span(span, line.start, line.end, True)
                span.permissions = line.permissions
                span.offset = line.offset
                span.inode = line.inode
                span.device_major = line.device_major
                span.device_minor = line.device_minor
                return 0
            elif line.start < kernel.user_space_end():
                fill_span(span, before, line.start, False)
                return 0
            else:
                break       # The kernel's own page, which some machines show at the end.
        fill_span(span, before, kernel.user_space_end(), False)
        return 0

    cdef int name_at(self, uintptr_t va, kernel.ProcmapQuery *query, char *name,
                     size_t room) noexcept nogil:
        """:func:`query_with_name` for this process."""
        cdef int result
        self.notice_fork()
        result = ensure_open(&self.maps, MARK_MAPS, b"/proc/thread-self/maps")
        return result if result < 0 else query_with_name(result, va, query, name, room)

    # -- one page

    cdef int page_at(self, uintptr_t va, PageFacts *facts) noexcept nogil:
        """What the kernel knows of the page that includes ``va``; -EINVAL beyond user space.

        Nothing is mapped there: all 0, but ``locked`` -1. Without pagemap ``present`` is
        what mincore(2) says, which for files and shared memory means that the page is in
        memory, be it in this process's page table or not; it is the only fact then.
        """
        cdef uintptr_t page = va & ~<uintptr_t>(kernel.page_size() - 1)
        cdef unsigned char residency
        cdef int result
        if va >= kernel.user_space_end():
            return -EINVAL
        self.notice_fork()
        memset(facts, -1, sizeof(PageFacts))
        # This advice does nothing here but to answer EBUSY for a locked mapping.
        result = kernel.msync(page, kernel.page_size(),
                                 kernel.MS_ASYNC | kernel.MS_INVALIDATE)
        if result == 0 or result == -EBUSY:
            facts.locked = result == -EBUSY
        result = -EACCES
        if kernel.has(kernel.FEATURE_PAGEMAP_SCAN):
            result = self.facts_by_scan(page, facts)
        elif kernel.has(kernel.FEATURE_PAGEMAP):
            result = self.facts_by_pagemap(page, facts)
        if result == -EACCES or result == -EPERM:
            # Closed to us: a kernel, a sandbox, or this process after setuid.
            result = kernel.mincore(page, kernel.page_size(), &residency)
            if result == 0:
                facts.present = residency & 1
            elif result == -ENOMEM:
                facts.present = 0
                result = 0
        return result

    cdef int facts_by_scan(self, uintptr_t page, PageFacts *facts) noexcept nogil:
        cdef kernel.ScanArgument scan
        cdef kernel.PageRegion region
        cdef bint guards_told = kernel.has(kernel.FEATURE_PAGEMAP_GUARD)
        cdef int result = ensure_open(&self.pagemap, MARK_PAGEMAP, b"/proc/thread-self/pagemap")
        if result < 0:
            return result
        memset(&scan, 0, sizeof(scan))
        region.categories = 0
        scan.size = sizeof(scan)
        scan.start = page
        scan.end = page + kernel.page_size()
        scan.vec = <uint64_t>&region
        scan.vec_len = 1
        scan.return_mask = (kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
                            | kernel.PAGE_IS_FILE | kernel.PAGE_IS_HUGE)
        if guards_told:
            scan.return_mask |= kernel.PAGE_IS_GUARD
        result = kernel.pagemap_scan(self.pagemap, &scan)
        if result == -EINVAL and guards_told:
            # 6.15 tells guards, but not here yet.
            result = self.facts_by_pagemap(page, facts)
            if result < 0:
                return result
            guards_told = False
            scan.return_mask = kernel.PAGE_IS_HUGE
            result = kernel.pagemap_scan(self.pagemap, &scan)
            if result >= 0:
                facts.huge = region.categories & kernel.PAGE_IS_HUGE != 0
                return 0
        if result < 0:
            return result
        facts.present = region.categories & kernel.PAGE_IS_PRESENT != 0
        facts.swapped = region.categories & kernel.PAGE_IS_SWAPPED != 0
        facts.file_or_shared = region.categories & kernel.PAGE_IS_FILE != 0
        facts.huge = region.categories & kernel.PAGE_IS_HUGE != 0
        if guards_told:
            facts.guard = region.categories & kernel.PAGE_IS_GUARD != 0
        tell_guard_from_swap(facts)
        return 0

    cdef int facts_by_pagemap(self, uintptr_t page, PageFacts *facts) noexcept nogil:
        cdef uint64_t entry = 0
        cdef intptr_t length
        cdef int result = ensure_open(&self.pagemap, MARK_PAGEMAP, b"/proc/thread-self/pagemap")
        if result < 0:
            return result
        length = kernel.pread(self.pagemap, &entry, ENTRY,
                                 page // kernel.page_size() * ENTRY)
        if length < 0:
            return <int>length
        facts.present = entry & PM_PRESENT != 0
        facts.swapped = entry & PM_SWAP != 0
        facts.file_or_shared = entry & PM_FILE != 0
        if kernel.has(kernel.FEATURE_PAGEMAP_GUARD):
            facts.guard = entry & PM_GUARD_REGION != 0
        tell_guard_from_swap(facts)
        return 0

    # -- one record of smaps

    cdef int smaps_text_at(self, uintptr_t va, Text *text) noexcept nogil:
        """The record of ``/proc/self/smaps`` that covers ``va``, as text; empty for a hole.

        The time grows with the number of mappings below. -EINVAL beyond user space.
        """
        cdef int result = self.read_smaps(va, text)
        if result == -ESRCH:
            close_file(&self.smaps, MARK_SMAPS)
            result = self.read_smaps(va, text)
        return result

    cdef int read_smaps(self, uintptr_t va, Text *text) noexcept nogil:
        """:meth:`smaps_text_at` of the file that is open."""
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
        self.notice_fork()
        result = ensure_open(&self.smaps, MARK_SMAPS, b"/proc/thread-self/smaps")
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
            if line.start > va:
                break
            if line.end > va:
                found = True
        if found:
            text.length = record_end - reader.kept
            memmove(text.data, text.data + reader.kept, text.length)
        else:
            text.length = 0
        return 0

    # -- the same from Python

    def span(self, uintptr_t va):
        """:meth:`span_at` as ``(start, end, mapped, permissions, offset, inode, device)``."""
        cdef Span span
        check(self.span_at(va, &span))
        return (span.start, span.end, bool(span.mapped), span.permissions, span.offset,
                span.inode, device_text(span.device_major, span.device_minor))

    def page(self, uintptr_t va):
        """:meth:`page_at` as a dict; None for what this kernel does not tell."""
        cdef PageFacts facts
        check(self.page_at(va, &facts))
        return {
            name: None if fact < 0 else bool(fact)
            for name, fact in (
                ("present", facts.present), ("swapped", facts.swapped), ("huge", facts.huge),
                ("guard", facts.guard), ("locked", facts.locked),
                ("file_or_shared", facts.file_or_shared))
        }

    def record(self, uintptr_t va):
        """The :class:`SmapsRecord` of the mapping that ``va`` lies in, or None for a hole."""
        cdef Text text = [NULL, 0, 0]
        cdef kernel.ProcmapQuery query
        cdef char name[NAME_ROOM]
        cdef SmapsRecord made
        try:
            check(self.smaps_text_at(va, &text))
            if text.length == 0:
                return None
            made = record_from(text.data, text.length)
            if can_mean_two(made.pathname) and self.name_at(va, &query, name, NAME_ROOM) == 0:
                made.pathname = settled_name(made.pathname, made.range_start, &query, name)
            return made
        finally:
            free_text(&text)


cdef inline int query_mapping(int fd, uintptr_t va,
                              kernel.ProcmapQuery *query) noexcept nogil:
    """The mapping at ``va`` or the next above; -ENOENT where there is none."""
    memset(query, 0, sizeof(kernel.ProcmapQuery))
    query.size = sizeof(kernel.ProcmapQuery)
    query.query_flags = kernel.PROCMAP_COVERING_OR_NEXT
    query.query_addr = va
    return kernel.procmap_query(fd, query)


cdef int query_with_name(int fd, uintptr_t va, kernel.ProcmapQuery *query, char *name,
                         size_t room) noexcept nogil:
    """The mapping that covers ``va`` and its name, with a zero at the end; -ENOENT for a hole.

    A name too long for the room is -ENAMETOOLONG. Unlike the text of maps, the name has its
    newlines as they are.
    """
    memset(query, 0, sizeof(kernel.ProcmapQuery))
    query.size = sizeof(kernel.ProcmapQuery)
    query.query_addr = va
    query.vma_name_addr = <uint64_t>name
    query.vma_name_size = <uint32_t>room
    return kernel.procmap_query(fd, query)


cdef bint can_mean_two(object pathname) except -1:
    """Whether a name read in the text of maps can be another one, and the kernel can tell.

    The text has ``\\012`` for a newline, and for these four characters too.
    """
    return (pathname is not None and "\n" in pathname
            and kernel.has(kernel.FEATURE_PROCMAP_QUERY))


cdef object settled_name(object pathname, uintptr_t start, const kernel.ProcmapQuery *query,
                         const char *name):
    """The name that PROCMAP_QUERY gave, if the text has it as ``pathname``; else that one.

    Between the two looks another mapping can have taken the place.
    """
    cdef bytes told = name[:query.vma_name_size - 1] if query.vma_name_size else b""
    cdef bytes read = os.fsencode(pathname)
    if query.vma_start != start or told.replace(b"\n", b"\\012") != read.replace(b"\n", b"\\012"):
        return pathname
    return os.fsdecode(told)


cdef inline void tell_guard_from_swap(PageFacts *facts) noexcept nogil:
    # A guard is stored where a swapped page's place would be, and reads as swapped.
    if facts.guard == 1:
        facts.swapped = 0
    elif (facts.guard == -1 and facts.swapped == 1
            and kernel.has(kernel.FEATURE_GUARD_REGIONS)):
        facts.swapped = -1


cdef int check(int result) except -1:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return 0

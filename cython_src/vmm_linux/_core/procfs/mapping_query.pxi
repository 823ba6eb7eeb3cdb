"""PROCMAP_QUERY: one mapping of a process, from its open ``/proc/PID/maps``."""


cdef inline void begin_query(kernel.ProcmapQuery *query, uintptr_t va) noexcept nogil:
    memset(query, 0, sizeof(kernel.ProcmapQuery))
    query.size = sizeof(kernel.ProcmapQuery)
    query.query_addr = va


cdef inline int query_mapping(int fd, uintptr_t va, kernel.ProcmapQuery *query) noexcept nogil:
    """The mapping at ``va`` or the next above: 0 or -errno, -ENOENT where there is none."""
    begin_query(query, va)
    query.query_flags = kernel.PROCMAP_COVERING_OR_NEXT
    return kernel.procmap_query(fd, query)


cdef int query_with_name(int fd, uintptr_t va, NamedQuery *query) noexcept nogil:
    """The mapping that covers ``va``, with its name: 0 or -errno.

    -ENOENT for a hole, -ENAMETOOLONG for a name that is too long.
    """
    begin_query(&query.mapping, va)
    query.mapping.vma_name_addr = <uint64_t>query.name
    query.mapping.vma_name_size = sizeof(query.name)
    return kernel.procmap_query(fd, &query.mapping)


cdef void fill_span(Span *span, const kernel.ProcmapQuery *query) noexcept nogil:
    """The mapping that a query found."""
    span.start = query.vma_start
    span.end = query.vma_end
    span.mapped = True
    span.permissions = <uint32_t>query.vma_flags & (
        SPAN_READ | SPAN_WRITE | SPAN_EXECUTE | SPAN_SHARED)
    span.offset = query.vma_offset
    span.inode = query.inode
    span.device_major = query.dev_major
    span.device_minor = query.dev_minor


cdef bint is_ambiguous(object pathname) except -1:
    """Whether a name in the text of maps can mean two files, and the kernel can say which.

    The text has ``\\012`` for a newline, and for these four characters too.
    """
    return pathname is not None and "\n" in pathname and kernel.has(kernel.FEATURE_PROCMAP_QUERY)


cdef object settled_name(object pathname, uintptr_t start, const NamedQuery *query):
    """The name that a query gave, if the text has it as ``pathname``; else that one.

    Between the text and the query another mapping can have taken the place.
    """
    cdef uint32_t size = query.mapping.vma_name_size
    cdef bytes queried = query.name[:size - 1] if size else b""
    cdef bytes read = os.fsencode(pathname)
    if (query.mapping.vma_start != start
            or queried.replace(b"\n", b"\\012") != read.replace(b"\n", b"\\012")):
        return pathname
    return os.fsdecode(queried)

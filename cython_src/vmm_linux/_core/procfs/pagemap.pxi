"""What the kernel knows of pages, from an open ``/proc/PID/pagemap``.

PAGEMAP_SCAN answers run by run. What it does not know, or where there is none (see the kernel's
features), is read from pagemap itself, eight bytes a page. Nothing here touches a page, makes a
Python object or raises.
"""

cdef enum:
    RUNS = 512                  # that one PAGEMAP_SCAN finds at most
    ENTRIES = 1024              # pages whose entries are read at once
    FROM_ENTRIES = PAGE_PRESENT | PAGE_SWAPPED | PAGE_SHARED | PAGE_EXCLUSIVE | PAGE_WRITE_PROTECTED


cdef inline uint32_t flags_of_categories(uint64_t categories) noexcept nogil:
    """The PAGE_ flags of what PAGEMAP_SCAN found."""
    cdef uint32_t flags = 0
    if categories & kernel.PAGE_IS_PRESENT:
        flags |= PAGE_PRESENT
    if categories & kernel.PAGE_IS_SWAPPED:
        flags |= PAGE_SWAPPED
    if categories & kernel.PAGE_IS_FILE:
        flags |= PAGE_SHARED
    if categories & kernel.PAGE_IS_HUGE:
        flags |= PAGE_HUGE
    if categories & kernel.PAGE_IS_PFNZERO:
        flags |= PAGE_ZERO
    if categories & kernel.PAGE_IS_GUARD:
        # A guard is stored where a swapped page's place would be, and reads as swapped.
        flags = flags & ~<uint32_t>PAGE_SWAPPED | PAGE_GUARD
    elif flags & (PAGE_PRESENT | PAGE_SWAPPED) and not categories & kernel.PAGE_IS_WRITTEN:
        # "Written" is what userfaultfd(2) does not hold back.
        flags |= PAGE_WRITE_PROTECTED
    return flags


cdef inline uint32_t flags_of_entry(uint64_t entry, bint guards) noexcept nogil:
    """The PAGE_ flags of an entry of pagemap; ``guards``: this kernel marks them there."""
    cdef uint32_t flags = 0
    if guards and entry & kernel.PAGEMAP_GUARD:
        return PAGE_GUARD
    if entry & kernel.PAGEMAP_PRESENT:
        flags |= PAGE_PRESENT
    if entry & kernel.PAGEMAP_SWAPPED:
        flags |= PAGE_SWAPPED
    if entry & kernel.PAGEMAP_FILE:
        flags |= PAGE_SHARED
    if entry & kernel.PAGEMAP_WRITE_PROTECTED:
        flags |= PAGE_WRITE_PROTECTED
    if entry & kernel.PAGEMAP_EXCLUSIVE:
        flags |= PAGE_EXCLUSIVE
    return flags


cdef inline intptr_t read_entries(int pagemap, uintptr_t start, uint64_t *entries,
                                  size_t count) noexcept nogil:
    """The entries of pages from ``start`` on: how many there were, or -errno."""
    cdef intptr_t length = kernel.pread(
        pagemap, entries, count * kernel.PAGEMAP_ENTRY,
        start // kernel.PAGE_SIZE * kernel.PAGEMAP_ENTRY)
    return length if length < 0 else length // kernel.PAGEMAP_ENTRY


cdef inline void begin_scan(kernel.ScanArgument *scan, uintptr_t start, uintptr_t end,
                            uint64_t categories, kernel.PageRegion *regions,
                            size_t count) noexcept nogil:
    """Have a PAGEMAP_SCAN of a range fill these regions."""
    memset(scan, 0, sizeof(kernel.ScanArgument))
    scan.size = sizeof(kernel.ScanArgument)
    scan.start = start
    scan.end = end
    scan.vec = <uint64_t>regions
    scan.vec_len = count
    scan.return_mask = categories


cdef int scan_page(int pagemap, uintptr_t page, uint64_t categories,
                   uint32_t *flags) noexcept nogil:
    """The PAGE_ flags of one page by PAGEMAP_SCAN, of these categories: 0 or -errno."""
    cdef kernel.PageRegion region
    cdef kernel.ScanArgument scan
    cdef int result
    region.categories = 0
    begin_scan(&scan, page, page + kernel.PAGE_SIZE, categories, &region, 1)
    result = kernel.pagemap_scan(pagemap, &scan)
    flags[0] = flags_of_categories(region.categories)
    return min(result, 0)


cdef uint32_t known_flags(bint exclusive) noexcept nogil:
    """The flags that ``find_pages`` can find out at all."""
    cdef uint32_t known = FROM_ENTRIES
    if not exclusive:
        known &= ~<uint32_t>PAGE_EXCLUSIVE
    if kernel.has(kernel.FEATURE_PAGEMAP_GUARD):
        known |= PAGE_GUARD
    if kernel.has(kernel.FEATURE_PAGEMAP_SCAN):
        known |= PAGE_HUGE | PAGE_ZERO
    return known


cdef int add_pages(PagesFound *found, uintptr_t start, uintptr_t end,
                   uint32_t flags) noexcept nogil:
    """Add pages that follow the last, to its run if they are like it: 0 or -ENOMEM."""
    cdef size_t capacity
    cdef Pages *list
    if start == end:
        return 0
    if found.count > 0 and found.list[found.count - 1].flags == flags:
        found.list[found.count - 1].end = end
        return 0
    if found.count == found.capacity:
        capacity = 2 * found.capacity + 16
        list = <Pages *>realloc(found.list, capacity * sizeof(Pages))
        if list == NULL:
            return -ENOMEM
        found.list = list
        found.capacity = capacity
    found.list[found.count].start = start
    found.list[found.count].end = end
    found.list[found.count].flags = flags
    found.count += 1
    return 0


cdef int add_by_entries(int pagemap, uintptr_t start, uintptr_t end, uint32_t known,
                        uint32_t wanted, PagesFound *found) noexcept nogil:
    """Add pages by their entries: of each the ``wanted`` flags, beside those ``known``."""
    cdef uint64_t entries[ENTRIES]
    cdef bint guards = wanted & PAGE_GUARD
    cdef intptr_t count, i
    cdef int result
    while start < end:
        count = read_entries(pagemap, start, entries,
                             min(<size_t>ENTRIES, (end - start) // kernel.PAGE_SIZE))
        if count < 0:
            return <int>count
        if count == 0:
            # Beyond what this process can map: a program of 32 bits.
            return add_pages(found, start, end, known)
        for i in range(count):
            result = add_pages(found, start, start + kernel.PAGE_SIZE,
                               known | flags_of_entry(entries[i], guards) & wanted)
            if result < 0:
                return result
            start += kernel.PAGE_SIZE
    return 0


cdef int add_by_scan(int pagemap, uintptr_t start, uintptr_t end, uint64_t categories,
                     PagesFound *found) noexcept nogil:
    """Add pages by PAGEMAP_SCAN."""
    cdef kernel.PageRegion regions[RUNS]
    cdef kernel.ScanArgument scan
    cdef int i, count, result = 0
    begin_scan(&scan, start, end, categories, regions, RUNS)
    while scan.start < end and result >= 0:
        count = kernel.pagemap_scan(pagemap, &scan)
        if count < 0:
            return count
        for i in range(count):
            # What it leaves out is not mapped.
            result = add_pages(found, start, regions[i].start, 0)
            if result == 0:
                result = add_pages(found, regions[i].start, regions[i].end,
                                   flags_of_categories(regions[i].categories))
            if result < 0:
                return result
            start = regions[i].end
        scan.start = scan.walk_end
    return add_pages(found, start, end, 0)


cdef int refine(int pagemap, uint32_t which, uint32_t wanted, PagesFound *found) noexcept nogil:
    """Read pages that have one of the flags ``which`` again, for their ``wanted`` ones."""
    cdef PagesFound before = found[0]
    cdef Pages *pages
    cdef size_t i
    cdef int result = 0
    found.list = NULL
    found.count = found.capacity = 0
    for i in range(before.count):
        pages = &before.list[i]
        if pages.flags & which:
            result = add_by_entries(
                pagemap, pages.start, pages.end, pages.flags & ~wanted, wanted, found)
        else:
            result = add_pages(found, pages.start, pages.end, pages.flags)
        if result < 0:
            break
    free(before.list)
    return result


cdef bint has_any(const PagesFound *found, uint32_t which) noexcept nogil:
    cdef size_t i
    for i in range(found.count):
        if found.list[i].flags & which:
            return True
    return False


cdef int find_pages(int pagemap, uintptr_t start, uintptr_t end, bint exclusive,
                    PagesFound *found) noexcept nogil:
    """What is known of the pages of a range, which begins and ends with one: 0 or -errno.

    ``exclusive`` asks for that flag too, for which every page that is present is read a second
    time. The caller frees the list, after an error too.
    """
    cdef uint64_t categories = (
        kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED | kernel.PAGE_IS_FILE
        | kernel.PAGE_IS_HUGE | kernel.PAGE_IS_PFNZERO | kernel.PAGE_IS_WRITTEN)
    cdef bint guards = kernel.has(kernel.FEATURE_PAGEMAP_GUARD)
    cdef int result
    if not kernel.has(kernel.FEATURE_PAGEMAP_SCAN):
        return add_by_entries(pagemap, start, end, 0, known_flags(exclusive), found)
    result = -EINVAL
    if guards:
        result = add_by_scan(pagemap, start, end, categories | kernel.PAGE_IS_GUARD, found)
    if result == -EINVAL:
        result = add_by_scan(pagemap, start, end, categories, found)
        # 6.15 marks guards in pagemap, but not here yet.
        if result == 0 and guards and has_any(found, PAGE_SWAPPED):
            result = refine(
                pagemap, PAGE_SWAPPED, PAGE_SWAPPED | PAGE_GUARD | PAGE_WRITE_PROTECTED, found)
    if result == 0 and exclusive and has_any(found, PAGE_PRESENT):
        result = refine(pagemap, PAGE_PRESENT, PAGE_EXCLUSIVE, found)
    return result


cdef int find_touched(int pagemap, uintptr_t at, uintptr_t until, uintptr_t *start,
                      uintptr_t *end) noexcept nogil:
    """The next pages, side by side, that have memory or had it (it is in swap): 0 or -errno.

    They are at ``at`` or above; both ends are ``until`` where there are none.
    """
    cdef uint64_t entries[ENTRIES]
    cdef intptr_t count, i
    cdef bint found = False
    start[0] = end[0] = until
    while at < until:
        count = read_entries(pagemap, at, entries,
                             min(<size_t>ENTRIES, (until - at) // kernel.PAGE_SIZE))
        if count <= 0:
            return <int>count if count < 0 else -EFAULT
        for i in range(count):
            if (entries[i] & (kernel.PAGEMAP_PRESENT | kernel.PAGEMAP_SWAPPED) != 0) != found:
                if found:
                    end[0] = at
                    return 0
                start[0] = at
                found = True
            at += kernel.PAGE_SIZE
    return 0


cdef uint64_t without_own_memory(uintptr_t start, uintptr_t end) noexcept nogil:
    """How many bytes of private pages take memory when they are written to.

    These are pages that were never touched, are swapped out, were only read, or are shared with a
    process by a fork. The range begins and ends with a page. 0 where that is unknown.
    """
    cdef PagesFound found
    cdef uint64_t size = 0
    cdef size_t i
    cdef int pagemap = kernel.openat(b"/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC)
    if pagemap < 0:
        return 0
    memset(&found, 0, sizeof(found))
    if find_pages(pagemap, start, end, True, &found) == 0:
        for i in range(found.count):
            if not found.list[i].flags & PAGE_EXCLUSIVE:
                size += found.list[i].end - found.list[i].start
    free(found.list)
    kernel.close(pagemap)
    return size


cdef bint is_alive(int pagemap) noexcept nogil:
    """Whether the process that the file was opened for still has the memory it had then."""
    cdef uint64_t entry
    return read_entries(pagemap, 0, &entry, 1) == 1

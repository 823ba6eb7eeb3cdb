"""What the kernel knows of many pages, from an open ``/proc/PID/pagemap``.

PAGEMAP_SCAN tells it run by run. What it does not tell, or where there is none (see
``_features``), is read from pagemap itself, eight bytes a page. Nothing here touches a page, makes
a Python object or raises.
"""

cdef enum:
    # The numbers of ``vmm_linux.inspect.PageFlags``.
    PAGE_PRESENT = 0x1
    PAGE_SWAPPED = 0x2
    PAGE_SHARED = 0x4
    PAGE_EXCLUSIVE = 0x8
    PAGE_HUGE = 0x10
    PAGE_GUARD = 0x20
    PAGE_WRITE_PROTECTED = 0x40
    PAGE_ZERO = 0x80

cdef enum:
    SCANNED = 512               # runs that one PAGEMAP_SCAN tells at most
    ENTRIES = 1024              # pages whose entries are read at once
    ENTRY = 8                   # bytes of one

cdef uint64_t PM_PRESENT = <uint64_t>1 << 63
cdef uint64_t PM_SWAP = <uint64_t>1 << 62
cdef uint64_t PM_FILE = <uint64_t>1 << 61
cdef uint64_t PM_GUARD_REGION = <uint64_t>1 << 58
cdef uint64_t PM_WRITE_PROTECTED = <uint64_t>1 << 57
cdef uint64_t PM_EXCLUSIVE = <uint64_t>1 << 56

cdef uint32_t FROM_ENTRIES = (PAGE_PRESENT | PAGE_SWAPPED | PAGE_SHARED | PAGE_EXCLUSIVE
                              | PAGE_WRITE_PROTECTED)


cdef uint32_t flags_told(bint exclusive) noexcept nogil:
    """The flags that can be found out here at all."""
    cdef uint32_t told = FROM_ENTRIES
    if not exclusive:
        told &= ~<uint32_t>PAGE_EXCLUSIVE
    if kernel.has(kernel.FEATURE_PAGEMAP_GUARD):
        told |= PAGE_GUARD
    if kernel.has(kernel.FEATURE_PAGEMAP_SCAN):
        told |= PAGE_HUGE | PAGE_ZERO
    return told


cdef int add(PagesFound *found, uintptr_t start, uintptr_t end, uint32_t flags) noexcept nogil:
    """Adds pages that follow the last, to its run if they are like it: 0 or -ENOMEM."""
    cdef size_t room
    cdef Pages *list
    if start == end:
        return 0
    if found.count > 0 and found.list[found.count - 1].flags == flags:
        found.list[found.count - 1].end = end
        return 0
    if found.count == found.room:
        room = 2 * found.room + 16
        list = <Pages *>realloc(found.list, room * sizeof(Pages))
        if list == NULL:
            return -ENOMEM
        found.list = list
        found.room = room
    found.list[found.count].start = start
    found.list[found.count].end = end
    found.list[found.count].flags = flags
    found.count += 1
    return 0


cdef inline uint32_t from_categories(uint64_t categories) noexcept nogil:
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


cdef inline uint32_t from_entry(uint64_t entry, bint guards) noexcept nogil:
    cdef uint32_t flags = 0
    if guards and entry & PM_GUARD_REGION:
        return PAGE_GUARD
    if entry & PM_PRESENT:
        flags |= PAGE_PRESENT
    if entry & PM_SWAP:
        flags |= PAGE_SWAPPED
    if entry & PM_FILE:
        flags |= PAGE_SHARED
    if entry & PM_WRITE_PROTECTED:
        flags |= PAGE_WRITE_PROTECTED
    if entry & PM_EXCLUSIVE:
        flags |= PAGE_EXCLUSIVE
    return flags


cdef int add_by_entries(int pagemap, uintptr_t start, uintptr_t end, uint32_t known,
                        uint32_t wanted, PagesFound *found) noexcept nogil:
    """Adds pages by their entries: of each the ``wanted`` flags, beside those ``known``."""
    cdef uint64_t entries[ENTRIES]
    cdef size_t page = kernel.page_size()
    cdef bint guards = wanted & PAGE_GUARD
    cdef size_t count, i
    cdef intptr_t length
    cdef int result
    while start < end:
        count = min(<size_t>ENTRIES, (end - start) // page)
        length = kernel.pread(pagemap, entries, count * ENTRY, start // page * ENTRY)
        if length < 0:
            return <int>length
        if length < ENTRY:
            # Beyond what this process can map: a program of 32 bits.
            return add(found, start, end, known)
        for i in range(<size_t>length // ENTRY):
            result = add(found, start, start + page, known | from_entry(
                entries[i], guards) & wanted)
            if result < 0:
                return result
            start += page
    return 0


cdef int add_by_scan(int pagemap, uintptr_t start, uintptr_t end, uint64_t categories,
                     PagesFound *found) noexcept nogil:
    """Adds pages by PAGEMAP_SCAN."""
    cdef kernel.PageRegion regions[SCANNED]
    cdef kernel.ScanArgument scan
    cdef int i, count
    cdef int result = 0
    memset(&scan, 0, sizeof(scan))
    scan.size = sizeof(scan)
    scan.start = start
    scan.end = end
    scan.vec = <uint64_t>regions
    scan.vec_len = SCANNED
    scan.return_mask = categories
    while scan.start < end and result >= 0:
        count = kernel.pagemap_scan(pagemap, &scan)
        if count < 0:
            return count
        for i in range(count):
            # What it leaves out is not mapped.
            result = add(found, start, regions[i].start, 0)
            if result == 0:
                result = add(found, regions[i].start, regions[i].end,
                             from_categories(regions[i].categories))
            if result < 0:
                return result
            start = regions[i].end
        scan.start = scan.walk_end
    return add(found, start, end, 0)


cdef int refine(int pagemap, uint32_t which, uint32_t wanted, PagesFound *found) noexcept nogil:
    """Looks again at pages that have one of the flags ``which``, for their ``wanted`` ones."""
    cdef PagesFound before = found[0]
    cdef Pages *pages
    cdef size_t i
    cdef int result = 0
    found.list = NULL
    found.count = found.room = 0
    for i in range(before.count):
        pages = &before.list[i]
        if pages.flags & which:
            result = add_by_entries(
                pagemap, pages.start, pages.end, pages.flags & ~wanted, wanted, found)
        else:
            result = add(found, pages.start, pages.end, pages.flags)
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
    """What is known of the pages of a range, which borders on pages: 0 or ``-errno``.

    ``exclusive`` asks for that flag too, for which every page that is present is looked at a
    second time. The caller frees the list, after an error too.
    """
    cdef uint64_t categories = (
        kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED | kernel.PAGE_IS_FILE
        | kernel.PAGE_IS_HUGE | kernel.PAGE_IS_PFNZERO | kernel.PAGE_IS_WRITTEN)
    cdef bint guards = kernel.has(kernel.FEATURE_PAGEMAP_GUARD)
    cdef int result
    if not kernel.has(kernel.FEATURE_PAGEMAP_SCAN):
        return add_by_entries(pagemap, start, end, 0, flags_told(exclusive), found)
    result = -EINVAL
    if guards:
        result = add_by_scan(pagemap, start, end, categories | kernel.PAGE_IS_GUARD, found)
    if result == -EINVAL:
        result = add_by_scan(pagemap, start, end, categories, found)
        # 6.15 tells guards in pagemap, but not here yet.
        if result == 0 and guards and has_any(found, PAGE_SWAPPED):
            result = refine(
                pagemap, PAGE_SWAPPED, PAGE_SWAPPED | PAGE_GUARD | PAGE_WRITE_PROTECTED, found)
    if result == 0 and exclusive and has_any(found, PAGE_PRESENT):
        result = refine(pagemap, PAGE_PRESENT, PAGE_EXCLUSIVE, found)
    return result


cdef uint64_t without_own_memory(uintptr_t start, uintptr_t end) noexcept nogil:
    """How many bytes of private pages take memory when they are written to.

    Those that were never touched, are swapped out, were only read, or are shared with a process
    that came of a fork. The range borders on pages. None where the kernel does not tell.
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
    return kernel.pread(pagemap, &entry, ENTRY, 0) == ENTRY

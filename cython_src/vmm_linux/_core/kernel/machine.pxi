"""Facts of this machine: page sizes, and the addresses that a process can map."""

cdef atomic[uintptr_t] found_end, found_minimum
cdef atomic[size_t] found_huge

cdef enum:
    MAX_ERRNO = 4095            # addresses this close below 2^64 are -errno
    USUAL_MINIMUM = 65536       # of vm.mmap_min_addr


def page_size():
    """The kernel's page in bytes."""
    return PAGE_SIZE


cdef bint failed(intptr_t address) noexcept nogil:
    """Whether a result of ``mmap`` is -errno."""
    return -MAX_ERRNO <= address < 0


cdef intptr_t spare_page() noexcept nogil:
    """A new page, readable and writable, or -errno; the caller unmaps it."""
    cdef intptr_t address = mmap(
        0, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if not failed(address):
        # Where mlockall(MCL_FUTURE) is in force it is born locked, and most advice is
        # refused for locked memory.
        munlock(<uintptr_t>address, PAGE_SIZE)
    return address


cdef int open_pagemap() noexcept nogil:
    return openat(b"/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC)


cdef intptr_t read_pagemap(int fd, uintptr_t address, uint64_t *entry) noexcept nogil:
    """The entry of one page: its size in bytes, 0 beyond user space, or -errno."""
    return pread(fd, entry, PAGEMAP_ENTRY, address // PAGE_SIZE * PAGEMAP_ENTRY)


cpdef uintptr_t user_space_end() noexcept nogil:
    """The first address that no process on this machine can ever map.

    Asked of the kernel once. Where it cannot say (see the two searches below), the answer is the
    next power of two above this thread's stack, and the next call asks again.
    """
    cdef uintptr_t end = found_end.load()
    cdef uintptr_t here
    if end == 0:
        end = user_space_end_by_pagemap()
        if end == 0:
            end = user_space_end_by_mmap()
        if end != 0:
            found_end.store(end)
        else:
            here = <uintptr_t>&here
            end = 1
            while end != 0 and end <= here:
                end <<= 1
    return end


cpdef uintptr_t user_space_end_by_pagemap() noexcept nogil:
    """``user_space_end`` as the end of ``/proc/self/pagemap``, 0 where that does not say.

    It maps nothing, so neither the map-count limit nor RLIMIT_AS matters.
    """
    cdef uintptr_t last = 0
    cdef uintptr_t bit = <uintptr_t>1 << 55
    cdef uint64_t entry
    cdef intptr_t length
    cdef int fd
    if is_switched_off(FEATURE_PAGEMAP):
        return 0
    fd = open_pagemap()
    if fd < 0:
        return 0
    # The highest page of user space, bit by bit. Bits above 55 can be a tag that the kernel
    # takes away (aarch64, x86 with LAM), which would let a page answer under two addresses.
    while bit >= PAGE_SIZE:
        length = read_pagemap(fd, last | bit, &entry)
        if length < 0:
            close(fd)
            return 0
        if length == PAGEMAP_ENTRY:
            last |= bit
        bit >>= 1
    close(fd)
    # Nothing found: not readable. Everything found: it may go on above bit 55.
    if last == 0 or last + PAGE_SIZE == <uintptr_t>1 << 56:
        return 0
    return last + PAGE_SIZE


cpdef uintptr_t user_space_end_by_mmap() noexcept nogil:
    """``user_space_end`` found by mapping single pages, 0 where not even one can be mapped.

    ENOMEM is what the kernel answers beyond user space, and at the map-count limit and under
    RLIMIT_AS too. So a page anywhere must be mapped before and after.
    """
    cdef uintptr_t last = 0
    cdef uintptr_t bit = (<uintptr_t>1) << (sizeof(uintptr_t) * 8 - 1)
    if not can_map_somewhere():
        return 0
    while bit >= PAGE_SIZE:
        if can_be_mapped(last | bit):
            last |= bit
        bit >>= 1
    return last + PAGE_SIZE if can_map_somewhere() else 0


cdef bint can_map_somewhere() noexcept nogil:
    cdef intptr_t address = spare_page()
    if failed(address):
        return False
    munmap(<uintptr_t>address, PAGE_SIZE)
    return True


cdef bint can_be_mapped(uintptr_t address) noexcept nogil:
    """Whether the page at ``address`` belongs to user space."""
    cdef intptr_t result = mmap(
        address, PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
    if failed(result):
        # Taken, too low for an ordinary user, or not to be locked (mlockall): all inside.
        return -result in (EEXIST, EPERM, EAGAIN)
    munmap(<uintptr_t>result, PAGE_SIZE)
    # A kernel before 4.17 takes the address as a hint.
    return <uintptr_t>result == address


cpdef uintptr_t mmap_min_addr() noexcept nogil:
    """The lowest address that may be mapped: sysctl ``vm.mmap_min_addr``, a page at least.

    Asked once; 65536, the usual value, for as long as the sysctl cannot be read.
    """
    cdef uintptr_t value = found_minimum.load()
    if value == 0:
        value = read_number(b"/proc/sys/vm/mmap_min_addr")
        if value == 0 or value == NO_NUMBER:
            return max(<uintptr_t>USUAL_MINIMUM, PAGE_SIZE)
        value = max(value, PAGE_SIZE)
        found_minimum.store(value)
    return value


cpdef size_t huge_page_size() noexcept nogil:
    """The size of a transparent huge page in bytes, asked once; 0 where the kernel has none."""
    cdef size_t value = found_huge.load()
    if value == 0:
        value = read_number(b"/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
        if value == NO_NUMBER:
            return 0
        found_huge.store(value)
    return value

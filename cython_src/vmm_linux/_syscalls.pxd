"""One function a system call: what the kernel answers, as it answers it.

Contract of this module:
* nothing is decided, remembered, retried or checked here;
* a result is what the call returns, or ``-errno``: the caller never reads ``errno``;
* every function may be called without the GIL and never raises;
* calls go through the C library's symbols, so that a preloaded library can make
  any of them fail: that is how the tests provoke every roll-back.

The headers of a C library can be older than the kernel, so constants newer than
Linux 5.14 are written out here with the version that brought them.
"""

from libc.stdint cimport int64_t, intptr_t, uint32_t, uint64_t, uintptr_t

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        PROT_EXEC
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_FIXED
        MAP_FIXED_NOREPLACE
        MREMAP_MAYMOVE
        MREMAP_FIXED
        MADV_DONTNEED
        MADV_HUGEPAGE
        MADV_NOHUGEPAGE
        MADV_REMOVE
        MFD_CLOEXEC
        MFD_ALLOW_SEALING
        MS_ASYNC
        MS_INVALIDATE

cdef extern from *:
    """
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22       /* Linux 5.14 */
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
    #endif
    #ifndef MADV_DONTNEED_LOCKED
    #define MADV_DONTNEED_LOCKED 24     /* Linux 5.18 */
    #endif
    #ifndef MADV_GUARD_INSTALL
    #define MADV_GUARD_INSTALL 102      /* Linux 6.13 */
    #endif
    #ifndef MADV_GUARD_REMOVE
    #define MADV_GUARD_REMOVE 103       /* Linux 6.13 */
    #endif
    #ifndef MFD_NOEXEC_SEAL
    #define MFD_NOEXEC_SEAL 0x8U        /* Linux 6.3 */
    #endif
    #ifndef MFD_EXEC
    #define MFD_EXEC 0x10U              /* Linux 6.3 */
    #endif
    #include <sys/prctl.h>
    #ifndef PR_SET_VMA
    #define PR_SET_VMA 0x53564d41       /* Linux 5.17 */
    #define PR_SET_VMA_ANON_NAME 0
    #endif
    """
    enum:
        MADV_POPULATE_READ
        MADV_POPULATE_WRITE
        MADV_DONTNEED_LOCKED
        MADV_GUARD_INSTALL
        MADV_GUARD_REMOVE
        MFD_NOEXEC_SEAL
        MFD_EXEC

cdef extern from "<fcntl.h>" nogil:
    enum:
        FALLOC_FL_KEEP_SIZE
        FALLOC_FL_PUNCH_HOLE
        F_ADD_SEALS
        F_GET_SEALS
        F_GETFL
        F_DUPFD_CLOEXEC
        F_GETSIG
        F_SETSIG
        F_SEAL_SEAL
        F_SEAL_SHRINK
        F_SEAL_GROW
        F_SEAL_WRITE
        F_SEAL_FUTURE_WRITE
        O_ACCMODE
        O_RDONLY
        O_RDWR
        O_CLOEXEC
        O_NONBLOCK
        O_PATH

cdef extern from *:
    """
    #include <unistd.h>
    #ifndef SEEK_DATA
    #define SEEK_DATA 3
    #define SEEK_HOLE 4
    #endif
    """
    enum:
        SEEK_DATA
        SEEK_HOLE

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/ioctl.h>

    /* ioctl on /proc/PID/maps, Linux 6.11 */
    struct vmm_procmap_query {
        uint64_t size, query_flags, query_addr;
        uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
        uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
        uint64_t vma_name_addr, build_id_addr;
    };
    #define VMM_PROCMAP_QUERY _IOWR('f', 17, struct vmm_procmap_query)
    #define VMM_PROCMAP_COVERING_OR_NEXT 0x10

    /* ioctl on /proc/PID/pagemap, Linux 6.7 */
    struct vmm_pm_scan_arg {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    struct vmm_page_region { uint64_t start, end, categories; };
    #define VMM_PAGEMAP_SCAN _IOWR('f', 16, struct vmm_pm_scan_arg)
    #define VMM_PAGE_IS_WRITTEN (1u << 1)
    #define VMM_PAGE_IS_FILE    (1u << 2)
    #define VMM_PAGE_IS_PRESENT (1u << 3)
    #define VMM_PAGE_IS_SWAPPED (1u << 4)
    #define VMM_PAGE_IS_PFNZERO (1u << 5)
    #define VMM_PAGE_IS_HUGE    (1u << 6)
    #define VMM_PAGE_IS_GUARD   (1u << 8)       /* newer than PAGEMAP_SCAN itself */
    """
    struct ProcmapQuery "vmm_procmap_query":
        uint64_t size, query_flags, query_addr
        uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode
        uint32_t dev_major, dev_minor, vma_name_size, build_id_size
        uint64_t vma_name_addr, build_id_addr
    struct ScanArgument "vmm_pm_scan_arg":
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask
    struct PageRegion "vmm_page_region":
        uint64_t start, end, categories
    enum:
        PROCMAP_COVERING_OR_NEXT "VMM_PROCMAP_COVERING_OR_NEXT"
        PAGE_IS_WRITTEN "VMM_PAGE_IS_WRITTEN"
        PAGE_IS_FILE "VMM_PAGE_IS_FILE"
        PAGE_IS_PRESENT "VMM_PAGE_IS_PRESENT"
        PAGE_IS_SWAPPED "VMM_PAGE_IS_SWAPPED"
        PAGE_IS_PFNZERO "VMM_PAGE_IS_PFNZERO"
        PAGE_IS_HUGE "VMM_PAGE_IS_HUGE"
        PAGE_IS_GUARD "VMM_PAGE_IS_GUARD"

# Memory
cpdef intptr_t mmap(uintptr_t address, size_t length, int protection, int flags,
                    int fd, uint64_t offset) noexcept nogil
cpdef int munmap(uintptr_t address, size_t length) noexcept nogil
cpdef int mprotect(uintptr_t address, size_t length, int protection) noexcept nogil
cpdef intptr_t mremap(uintptr_t old_address, size_t old_size, size_t new_size, int flags,
                      uintptr_t new_address) noexcept nogil
cpdef int madvise(uintptr_t address, size_t length, int advice) noexcept nogil
cpdef int mlock(uintptr_t address, size_t length) noexcept nogil
cpdef int munlock(uintptr_t address, size_t length) noexcept nogil
cpdef int msync(uintptr_t address, size_t length, int flags) noexcept nogil
cdef int name_memory(uintptr_t address, size_t length, const char *name) noexcept nogil
cdef int mincore(uintptr_t address, size_t length, unsigned char *vector) noexcept nogil

# Files
cdef extern from "<sys/stat.h>" nogil:
    struct FileStatus "stat":
        uint64_t st_dev
        uint64_t st_ino
        uint32_t st_mode
        uint64_t st_nlink
        int64_t st_size
        uint64_t st_blocks

cdef int memfd_create(const char *name, unsigned int flags) noexcept nogil
cpdef int ftruncate(int fd, uint64_t length) noexcept nogil
cpdef int fallocate(int fd, int mode, uint64_t offset, uint64_t length) noexcept nogil
cpdef int fcntl(int fd, int command, int argument) noexcept nogil
cdef int eventfd() noexcept nogil
cpdef int fchmod(int fd, uint32_t mode) noexcept nogil
cdef int openat(const char *path, int flags) noexcept nogil
cpdef int close(int fd) noexcept nogil
cdef intptr_t pread(int fd, void *buffer, size_t length, uint64_t offset) noexcept nogil
cdef intptr_t pwrite(int fd, const void *buffer, size_t length, uint64_t offset) noexcept nogil
cdef int64_t lseek(int fd, int64_t offset, int whence) noexcept nogil
cdef intptr_t read(int fd, void *buffer, size_t length) noexcept nogil
cdef int ioctl(int fd, unsigned long request, void *argument) noexcept nogil
cdef int fstat(int fd, FileStatus *status) noexcept nogil
cdef int file_handle(int fd, uint64_t *low, uint64_t *high) noexcept nogil
cpdef int64_t filesystem_type(int fd) noexcept nogil

# Sockets
cdef intptr_t send_at_once(int sock, const void *data, size_t size, const int *descriptors,
                           size_t count) noexcept nogil

# Many ranges at once
cdef extern from *:
    """
    #include <sys/uio.h>
    #ifndef UIO_MAXIOV
    #define UIO_MAXIOV 1024
    #endif
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    enum:
        MOST_RANGES "UIO_MAXIOV"        # that one call takes

cdef int pidfd_open_self() noexcept nogil
cdef intptr_t process_madvise(int pidfd, const iovec *ranges, size_t count,
                              int advice) noexcept nogil

# Questions to the files of /proc/PID
cdef int procmap_query(int maps_fd, ProcmapQuery *query) noexcept nogil
cdef int pagemap_scan(int pagemap_fd, ScanArgument *scan) noexcept nogil

# Copies with the kernel's checks
cdef intptr_t process_vm_readv(void *local, uintptr_t remote, size_t length) noexcept nogil
cdef intptr_t process_vm_writev(const void *local, uintptr_t remote, size_t length) noexcept nogil

cpdef size_t page_size() noexcept nogil
cdef uint64_t most_descriptors() noexcept nogil

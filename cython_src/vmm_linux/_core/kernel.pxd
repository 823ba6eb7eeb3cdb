"""What the layers above use of the kernel layer; see ``kernel.pyx``."""

from libc.stdint cimport int64_t, intptr_t, uint32_t, uint64_t, uintptr_t
from posix.types cimport sigset_t

# ---- syscalls ----------------------------------------------------------------------------------

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC
        MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE
        MREMAP_MAYMOVE, MREMAP_FIXED
        MADV_DONTNEED, MADV_HUGEPAGE
        MFD_CLOEXEC, MFD_ALLOW_SEALING
        MS_ASYNC, MS_INVALIDATE

cdef extern from *:
    """
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22       /* Linux 5.14 */
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
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
    """
    enum:
        MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE
        MFD_NOEXEC_SEAL, MFD_EXEC

cdef extern from "<sys/resource.h>" nogil:
    int RLIMIT_NOFILE

cdef extern from "<fcntl.h>" nogil:
    enum:
        FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
        F_ADD_SEALS, F_GET_SEALS, F_GETFL, F_DUPFD_CLOEXEC
        F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE
        O_ACCMODE, O_RDONLY, O_RDWR, O_CLOEXEC, O_NONBLOCK

cdef extern from *:
    """
    #include <unistd.h>
    #ifndef SEEK_DATA
    #define SEEK_DATA 3
    #define SEEK_HOLE 4
    #endif
    """
    enum:
        SEEK_DATA, SEEK_HOLE

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

    /* ioctl on /proc/PID/pagemap, Linux 6.7 */
    struct vmm_pm_scan_arg {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    struct vmm_page_region { uint64_t start, end, categories; };
    #define VMM_PAGEMAP_SCAN _IOWR('f', 16, struct vmm_pm_scan_arg)

    /* Bits of an entry of /proc/PID/pagemap */
    #define VMM_PAGEMAP_PRESENT         (1ull << 63)
    #define VMM_PAGEMAP_SWAPPED         (1ull << 62)
    #define VMM_PAGEMAP_FILE            (1ull << 61)
    #define VMM_PAGEMAP_GUARD           (1ull << 58)    /* Linux 6.15 */
    #define VMM_PAGEMAP_WRITE_PROTECTED (1ull << 57)
    #define VMM_PAGEMAP_EXCLUSIVE       (1ull << 56)
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
    const uint64_t PAGEMAP_PRESENT "VMM_PAGEMAP_PRESENT"
    const uint64_t PAGEMAP_SWAPPED "VMM_PAGEMAP_SWAPPED"
    const uint64_t PAGEMAP_FILE "VMM_PAGEMAP_FILE"
    const uint64_t PAGEMAP_GUARD "VMM_PAGEMAP_GUARD"
    const uint64_t PAGEMAP_WRITE_PROTECTED "VMM_PAGEMAP_WRITE_PROTECTED"
    const uint64_t PAGEMAP_EXCLUSIVE "VMM_PAGEMAP_EXCLUSIVE"

cdef enum:
    PROCMAP_COVERING_OR_NEXT = 0x10
    PAGEMAP_ENTRY = 8           # bytes of an entry of /proc/PID/pagemap
    # Categories of pages:
    PAGE_IS_WRITTEN = 1 << 1, PAGE_IS_FILE = 1 << 2, PAGE_IS_PRESENT = 1 << 3
    PAGE_IS_SWAPPED = 1 << 4, PAGE_IS_PFNZERO = 1 << 5, PAGE_IS_HUGE = 1 << 6
    PAGE_IS_GUARD = 1 << 8      # newer than PAGEMAP_SCAN itself

cdef int check(int result) except -1

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
        uint64_t st_dev, st_ino, st_nlink, st_blocks
        uint32_t st_mode
        int64_t st_size

cdef int memfd_create(const char *name, unsigned int flags) noexcept nogil
cpdef int ftruncate(int fd, uint64_t length) noexcept nogil
cpdef int fallocate(int fd, int mode, uint64_t offset, uint64_t length) noexcept nogil
cpdef int fcntl(int fd, int command, int argument) noexcept nogil
cpdef int fchmod(int fd, uint32_t mode) noexcept nogil
cdef int openat(const char *path, int flags) noexcept nogil
cpdef int close(int fd) noexcept nogil
cdef intptr_t pread(int fd, void *buffer, size_t length, uint64_t offset) noexcept nogil
cdef intptr_t pwrite(int fd, const void *buffer, size_t length, uint64_t offset) noexcept nogil
cdef int64_t lseek(int fd, int64_t offset, int whence) noexcept nogil
cdef intptr_t read(int fd, void *buffer, size_t length) noexcept nogil
cdef int fstat(int fd, FileStatus *status) noexcept nogil
cdef int file_handle(int fd, uint64_t *name) noexcept nogil
cdef int64_t filesystem_type(int fd) noexcept nogil

# Sockets
cdef intptr_t send_at_once(int sock, const void *data, size_t size, const int *descriptors,
                           size_t count) noexcept nogil
cdef intptr_t receive_at_once(int sock, void *data, size_t size, size_t room, int *descriptors,
                              int *count, int *flags) noexcept nogil
cdef int getsockopt(int sock, int level, int option, void *value, unsigned int *size) noexcept nogil

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
        MOST_RANGES "UIO_MAXIOV"    # that one call takes

cdef int pidfd_open_self() noexcept nogil
cdef intptr_t process_madvise(int pidfd, const iovec *ranges, size_t count,
                              int advice) noexcept nogil

# Questions to the files of /proc/PID
cdef int procmap_query(int maps_fd, ProcmapQuery *query) noexcept nogil
cdef int pagemap_scan(int pagemap_fd, ScanArgument *scan) noexcept nogil

# Copies with the kernel's checks
cdef intptr_t process_vm_readv(void *local, uintptr_t remote, size_t length) noexcept nogil
cdef intptr_t process_vm_writev(const void *local, uintptr_t remote, size_t length) noexcept nogil
cpdef uint64_t resource_limit(int resource) noexcept nogil

# ---- signals -----------------------------------------------------------------------------------

cdef struct HeldSignals:
    sigset_t both
    sigset_t waiting            # those that waited before the call
    sigset_t blocked            # what the thread blocks otherwise

cdef void hold_signals(HeldSignals *held) noexcept nogil
cdef void drop_signals(HeldSignals *held, bint failed) noexcept nogil

# ---- fork --------------------------------------------------------------------------------------

cpdef uint32_t fork_generation() noexcept nogil
cpdef uint32_t fork_children() noexcept nogil

# ---- mutex -------------------------------------------------------------------------------------

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef struct Mutex:
    pthread_mutex_t native
    Mutex *next
    Mutex *previous

cdef Mutex *mutex_new() noexcept nogil
cdef void mutex_delete(Mutex *mutex) noexcept nogil

cdef inline void mutex_lock(Mutex *mutex) noexcept nogil:
    """Wait for the mutex. The caller does not hold the GIL while it waits."""
    pthread_mutex_lock(&mutex.native)

cdef inline bint mutex_try(Mutex *mutex) noexcept nogil:
    """Take the mutex if it is free; whether it was."""
    return pthread_mutex_trylock(&mutex.native) == 0

cdef inline void mutex_unlock(Mutex *mutex) noexcept nogil:
    """Release the mutex."""
    pthread_mutex_unlock(&mutex.native)

# ---- features ----------------------------------------------------------------------------------

# The numbers of the Python enum ``Feature``.
cdef enum:
    FEATURE_PROCMAP_QUERY, FEATURE_PAGEMAP_SCAN, FEATURE_PAGEMAP, FEATURE_PAGEMAP_GUARD
    FEATURE_GUARD_REGIONS, FEATURE_DONTNEED_LOCKED, FEATURE_MEMFD_NOEXEC_SEAL, FEATURE_PROCESS_VM
    FEATURE_TRANSPARENT_HUGE_PAGES, FEATURE_FILE_HANDLES, FEATURE_VECTORED_GUARDS
    FEATURE_ANONYMOUS_NAMES, FEATURE_COUNT

cdef bint has(int feature) noexcept nogil
cdef bint lacks(int feature) noexcept nogil

# ---- machine -----------------------------------------------------------------------------------

cdef extern from *:
    """
    #include <unistd.h>

    /* One for each module: every call uses it, and reading another module's would cost time. */
    static const size_t vmm_page_size = (size_t)sysconf(_SC_PAGESIZE);
    """
    const size_t PAGE_SIZE "vmm_page_size"      # the kernel's page in bytes

cpdef uintptr_t user_space_end() noexcept nogil
cpdef uintptr_t mmap_min_addr() noexcept nogil
cpdef size_t huge_page_size() noexcept nogil

# ---- cgroup ------------------------------------------------------------------------------------

cdef bint group_has_limit() noexcept nogil
cdef bint is_huge_everywhere() noexcept nogil
cdef bint group_has_headroom(uint64_t size) noexcept nogil

# ---- headroom ----------------------------------------------------------------------------------

cdef uint64_t mapping_count() noexcept nogil
cdef int check_headroom(uint64_t size) noexcept nogil
cdef const uint64_t *default_bounds() except NULL

# ---- open_file ---------------------------------------------------------------------------------

cdef struct OpenFile:
    int fd                      # -1: none
    uint32_t taking             # which of the package's descriptors this is
    uint64_t device, inode

cdef int open_file_note(OpenFile *self, FileStatus *status) noexcept nogil
cdef int open_file_take(OpenFile *self, int fd) noexcept nogil
cdef int open_file_take_same(OpenFile *self, const OpenFile *other, int fd) noexcept nogil
cdef int open_file_status(const OpenFile *self, FileStatus *status) noexcept nogil
cdef int open_file_number(const OpenFile *self) noexcept nogil
cdef int open_file_own(OpenFile *self) noexcept nogil
cdef int access_mode(int fd) noexcept nogil
cdef void open_file_close(OpenFile *self) noexcept nogil

cdef class Descriptor:
    cdef OpenFile file
    cdef bint is_anonymous
    cdef object __weakref__
    cpdef int take(self, int fd) except -1
    cpdef void close(self) noexcept

cdef enum Mark:
    # Signals that no program chooses, see ``mark``.
    MARK_AUDIT = 60, MARK_MAPS = 61, MARK_PAGEMAP = 62, MARK_SMAPS = 63, MARK_ANONYMOUS = 64

cdef int mark(int fd, Mark which) noexcept nogil
cdef int check_mark(int fd, Mark which) noexcept nogil

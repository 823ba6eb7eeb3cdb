"""One function a system call: what the kernel answers, as it answers it.

* Nothing is decided, remembered, retried or checked here.
* A result is what the call returns, or ``-errno``: the caller never reads ``errno``.
* Every function may be called without the GIL and never raises.
* Calls go through the C library's symbols, so that a preloaded library can make any of them fail:
  that is how the tests provoke every roll-back.

The headers of a C library can be older than the kernel, so constants newer than
Linux 5.14 are written out here with the version that brought them.
"""

cdef extern from "<sys/mman.h>" nogil:
    void *MAP_FAILED
    void *c_mmap "mmap"(void *, size_t, int, int, int, long)
    int c_munmap "munmap"(void *, size_t)
    int c_mprotect "mprotect"(void *, size_t, int)
    void *c_mremap "mremap"(void *, size_t, size_t, int, ...)
    int c_madvise "madvise"(void *, size_t, int)
    int c_mlock "mlock"(const void *, size_t)
    int c_munlock "munlock"(const void *, size_t)
    int c_msync "msync"(void *, size_t, int)
    int c_mincore "mincore"(void *, size_t, unsigned char *)
    int c_memfd_create "memfd_create"(const char *, unsigned int)

cdef extern from "<sys/eventfd.h>" nogil:
    int c_eventfd "eventfd"(unsigned int, int)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from *:
    """
    #include <sys/prctl.h>
    #ifndef PR_SET_VMA
    #define PR_SET_VMA 0x53564d41       /* Linux 5.17 */
    #define PR_SET_VMA_ANON_NAME 0
    #endif
    """
    int c_prctl "prctl"(int, ...) nogil
    int PR_SET_VMA
    unsigned long PR_SET_VMA_ANON_NAME

cdef extern from *:
    """
    #include <linux/capability.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* capset(2) of the calling thread. */
    static int vmm_drop_capabilities(void)
    {
        struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3];
        memset(none, 0, sizeof none);
        return (int)syscall(SYS_capset, &head, none);
    }
    """
    int c_drop_capabilities "vmm_drop_capabilities"()

cdef extern from "<sys/resource.h>" nogil:
    int RLIMIT_AS, RLIMIT_DATA

cdef extern from "<fcntl.h>" nogil:
    int c_fallocate "fallocate"(int, int, long, long)
    int c_fcntl "fcntl"(int, int, ...)
    int c_open "open"(const char *, int, ...)

cdef extern from "<unistd.h>" nogil:
    int c_ftruncate "ftruncate"(int, long)
    int c_close "close"(int)
    long c_pread "pread"(int, void *, size_t, long)
    long c_pwrite "pwrite"(int, const void *, size_t, long)
    long c_read "read"(int, void *, size_t)
    long c_lseek "lseek"(int, long, int)
    int getpid()

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <limits.h>
    #ifndef SYS_pidfd_open
    #define SYS_pidfd_open 434          /* Linux 5.3 */
    #endif
    #ifndef SYS_process_madvise
    #define SYS_process_madvise 440     /* Linux 5.10 */
    #endif
    """
    long c_syscall "syscall"(long, ...) nogil
    long SYS_pidfd_open, SYS_process_madvise

cdef extern from *:
    int c_ioctl "ioctl"(int, unsigned long, ...) nogil
    unsigned long PROCMAP_QUERY "VMM_PROCMAP_QUERY", PAGEMAP_SCAN "VMM_PAGEMAP_SCAN"

cdef extern from "<sys/stat.h>" nogil:
    int c_fstat "fstat"(int, FileStatus *)
    int c_fchmod "fchmod"(int, unsigned int)

cdef extern from "<sys/vfs.h>" nogil:
    struct filesystem_status "statfs":
        long f_type
    int c_fstatfs "fstatfs"(int, filesystem_status *)

cdef extern from *:
    """
    #include <fcntl.h>
    #include <string.h>

    /* name_to_handle_at(2): how the file system identifies a file, at most 16 bytes here. */
    static int vmm_file_handle(int fd, uint64_t *name)
    {
        struct { struct file_handle head; unsigned char bytes[16]; } handle;
        int mount;
        memset(&handle, 0, sizeof handle);
        handle.head.handle_bytes = sizeof handle.bytes;
        if (name_to_handle_at(fd, "", &handle.head, &mount, AT_EMPTY_PATH) != 0)
            return -1;
        memcpy(name, handle.head.f_handle, sizeof *name);
        return 0;
    }
    """
    int c_file_handle "vmm_file_handle"(int, uint64_t *) nogil

cdef extern from "<sys/uio.h>" nogil:
    long c_process_vm_readv "process_vm_readv"(
        int, const iovec *, unsigned long, const iovec *, unsigned long, unsigned long)
    long c_process_vm_writev "process_vm_writev"(
        int, const iovec *, unsigned long, const iovec *, unsigned long, unsigned long)

cdef inline intptr_t result_of(intptr_t result) noexcept nogil:
    """What a system call returned, with ``-errno`` in place of -1."""
    return -errno if result == -1 else result

cdef int check(int result) except -1:
    """Raise the ``OSError`` of a -errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return 0

cpdef intptr_t mmap(uintptr_t address, size_t length, int protection, int flags,
                    int fd, uint64_t offset) noexcept nogil:
    """``mmap(2)``: the address of the mapping."""
    return result_of(<intptr_t>c_mmap(<void *>address, length, protection, flags, fd, <long>offset))

cpdef int munmap(uintptr_t address, size_t length) noexcept nogil:
    """``munmap(2)``."""
    return <int>result_of(c_munmap(<void *>address, length))

cpdef int mprotect(uintptr_t address, size_t length, int protection) noexcept nogil:
    """``mprotect(2)``. A failure can leave the mappings before the refused one changed."""
    return <int>result_of(c_mprotect(<void *>address, length, protection))

cpdef intptr_t mremap(uintptr_t old_address, size_t old_size, size_t new_size, int flags,
                      uintptr_t new_address) noexcept nogil:
    """``mremap(2)``: the address of the moved mapping."""
    return result_of(<intptr_t>c_mremap(
        <void *>old_address, old_size, new_size, flags, <void *>new_address))

cpdef int madvise(uintptr_t address, size_t length, int advice) noexcept nogil:
    """``madvise(2)``."""
    return <int>result_of(c_madvise(<void *>address, length, advice))

cpdef int mlock(uintptr_t address, size_t length) noexcept nogil:
    """``mlock(2)``. A failure can leave part of the range locked."""
    return <int>result_of(c_mlock(<void *>address, length))

cpdef int munlock(uintptr_t address, size_t length) noexcept nogil:
    """``munlock(2)``."""
    return <int>result_of(c_munlock(<void *>address, length))

cpdef int msync(uintptr_t address, size_t length, int flags) noexcept nogil:
    """``msync(2)``; with MS_INVALIDATE it does nothing but answer EBUSY for locked pages."""
    return <int>result_of(c_msync(<void *>address, length, flags))

cdef int mincore(uintptr_t address, size_t length, unsigned char *vector) noexcept nogil:
    """``mincore(2)``."""
    return <int>result_of(c_mincore(<void *>address, length, vector))

cdef int name_memory(uintptr_t address, size_t length, const char *name) noexcept nogil:
    """``prctl(2)`` with PR_SET_VMA_ANON_NAME: what maps calls private anonymous memory."""
    return <int>result_of(c_prctl(
        PR_SET_VMA, PR_SET_VMA_ANON_NAME, <unsigned long>address, <unsigned long>length, name))


def prctl(int option, unsigned long argument, unsigned long second=0):
    """``prctl(2)`` with two arguments: its result, or -errno."""
    return result_of(c_prctl(option, argument, second, 0, 0))


def drop_capabilities():
    """``capset(2)`` of no capability at all, in no set: 0, or -errno."""
    return result_of(c_drop_capabilities())


cdef int memfd_create(const char *name, unsigned int flags) noexcept nogil:
    """``memfd_create(2)``: a descriptor."""
    return <int>result_of(c_memfd_create(name, flags))

cpdef int ftruncate(int fd, uint64_t length) noexcept nogil:
    """``ftruncate(2)``, without SIGXFSZ."""
    cdef HeldSignals held
    cdef intptr_t result
    if not is_past_file_limit(length):
        return <int>result_of(c_ftruncate(fd, <long>length))
    hold_signals(&held)
    result = result_of(c_ftruncate(fd, <long>length))
    drop_signals(&held, result < 0)
    return <int>result

cpdef int fallocate(int fd, int mode, uint64_t offset, uint64_t length) noexcept nogil:
    """``fallocate(2)``. EINTR leaves nothing allocated."""
    return <int>result_of(c_fallocate(fd, mode, <long>offset, <long>length))

cpdef int fcntl(int fd, int command, int argument) noexcept nogil:
    """``fcntl(2)`` with an integer argument."""
    return <int>result_of(c_fcntl(fd, command, argument))

cdef int eventfd() noexcept nogil:
    """``eventfd(2)``, close-on-exec and non-blocking: a descriptor."""
    return <int>result_of(c_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))

cdef int openat(const char *path, int flags) noexcept nogil:
    """``open(2)``: a descriptor."""
    return <int>result_of(c_open(path, flags))

cpdef int close(int fd) noexcept nogil:
    """``close(2)``. The descriptor is gone whatever the result."""
    return <int>result_of(c_close(fd))

cdef intptr_t pread(int fd, void *buffer, size_t length, uint64_t offset) noexcept nogil:
    """``pread(2)``: bytes read."""
    return result_of(c_pread(fd, buffer, length, <long>offset))

cdef intptr_t pwrite(int fd, const void *buffer, size_t length, uint64_t offset) noexcept nogil:
    """``pwrite(2)``, without SIGXFSZ: bytes written."""
    cdef HeldSignals held
    cdef intptr_t result
    if not is_past_file_limit(offset + length):
        return result_of(c_pwrite(fd, buffer, length, <long>offset))
    hold_signals(&held)
    result = result_of(c_pwrite(fd, buffer, length, <long>offset))
    drop_signals(&held, result < 0)
    return result

cdef intptr_t read(int fd, void *buffer, size_t length) noexcept nogil:
    """``read(2)``: bytes read."""
    return result_of(c_read(fd, buffer, length))

cdef int64_t lseek(int fd, int64_t offset, int whence) noexcept nogil:
    """``lseek(2)``: the new offset."""
    return result_of(c_lseek(fd, offset, whence))

cdef int fstat(int fd, FileStatus *status) noexcept nogil:
    """``fstat(2)``: which file it is, and how large."""
    return <int>result_of(c_fstat(fd, status))

cpdef int fchmod(int fd, uint32_t mode) noexcept nogil:
    """``fchmod(2)``."""
    return <int>result_of(c_fchmod(fd, mode))

cdef int file_handle(int fd, uint64_t *name) noexcept nogil:
    """``name_to_handle_at(2)``: the first 8 bytes by which the file system identifies a file."""
    return <int>result_of(c_file_handle(fd, name))

cdef int64_t filesystem_type(int fd) noexcept nogil:
    """``fstatfs(2)``: the magic number of the file system."""
    cdef filesystem_status status
    cdef int result = <int>result_of(c_fstatfs(fd, &status))
    return result if result < 0 else status.f_type

cdef extern from *:
    """
    #include <string.h>
    #include <sys/socket.h>
    #include <unistd.h>

    /* sendmsg(2) of bytes with descriptors (at most SCM_MAX_FD, 253), without waiting. */
    static ssize_t vmm_send_at_once(int sock, const void *data, size_t size, const int *descriptors,
                                    size_t count)
    {
        union {
            struct cmsghdr head;
            char space[CMSG_SPACE(253 * sizeof(int))];
        } control;
        struct iovec bytes = {(void *)data, size};
        struct msghdr message;
        memset(&message, 0, sizeof message);
        message.msg_iov = &bytes;
        message.msg_iovlen = 1;
        message.msg_control = &control;
        message.msg_controllen = CMSG_LEN(count * sizeof(int));
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(&control.head), descriptors, count * sizeof(int));
        return sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }

    /* recvmsg(2) of bytes with descriptors, without waiting. `descriptors` takes 253. What came
       beside them is closed: pidfds, which the kernel may add (SO_PASSPIDFD). */
    static ssize_t vmm_receive_at_once(int sock, void *data, size_t size, size_t room,
                                       int *descriptors, int *count, int *flags)
    {
        union {
            struct cmsghdr head;
            char space[8192];
        } control;
        struct iovec bytes = {data, size};
        struct msghdr message;
        struct cmsghdr *part;
        ssize_t came;
        memset(&message, 0, sizeof message);
        message.msg_iov = &bytes;
        message.msg_iovlen = 1;
        message.msg_control = &control;
        message.msg_controllen = room < sizeof control ? room : sizeof control;
        *count = *flags = 0;
        came = recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (came < 0)
            return came;
        *flags = message.msg_flags;
        for (part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
            size_t i, numbers = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            if (part->cmsg_level != SOL_SOCKET
                || (part->cmsg_type != SCM_RIGHTS && part->cmsg_type != 4 /* SCM_PIDFD */))
                continue;
            for (i = 0; i < numbers; i++) {
                int fd;
                memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
                if (part->cmsg_type == SCM_RIGHTS && *count < 253)
                    descriptors[(*count)++] = fd;
                else if (fd >= 0)
                    close(fd);
            }
        }
        return came;
    }
    """
    long c_send_at_once "vmm_send_at_once"(int, const void *, size_t, const int *, size_t) nogil
    long c_receive_at_once "vmm_receive_at_once"(
        int, void *, size_t, size_t, int *, int *, int *) nogil
    int c_getsockopt "getsockopt"(int, int, int, void *, unsigned int *) nogil

cdef intptr_t send_at_once(int sock, const void *data, size_t size, const int *descriptors,
                           size_t count) noexcept nogil:
    """``sendmsg(2)`` with SCM_RIGHTS, without waiting and without SIGPIPE: bytes sent."""
    return result_of(c_send_at_once(sock, data, size, descriptors, count))

cdef intptr_t receive_at_once(int sock, void *data, size_t size, size_t room, int *descriptors,
                              int *count, int *flags) noexcept nogil:
    """``recvmsg(2)`` with close-on-exec, without waiting: bytes received.

    ``room`` is bytes for control data, 8192 at most; ``descriptors`` takes 253. ``count`` is set to
    how many of them came, ``flags`` to MSG_TRUNC and its like.
    """
    return result_of(c_receive_at_once(sock, data, size, room, descriptors, count, flags))

cdef int getsockopt(int sock, int level, int option, void *value,
                    unsigned int *size) noexcept nogil:
    """``getsockopt(2)``: ``size`` is that of ``value``, and set to what is used of it."""
    return <int>result_of(c_getsockopt(sock, level, option, value, size))

cdef int pidfd_open_self() noexcept nogil:
    """``pidfd_open(2)`` of this process: a descriptor."""
    return <int>result_of(c_syscall(SYS_pidfd_open, getpid(), 0))

cdef intptr_t process_madvise(int pidfd, const iovec *ranges, size_t count,
                              int advice) noexcept nogil:
    """``process_madvise(2)``: bytes advised, perhaps fewer than asked."""
    return result_of(c_syscall(SYS_process_madvise, pidfd, ranges, count, advice, 0))

cdef int procmap_query(int maps_fd, ProcmapQuery *query) noexcept nogil:
    """``ioctl(PROCMAP_QUERY)`` on a ``/proc/PID/maps``: one mapping of that process."""
    return <int>result_of(c_ioctl(maps_fd, PROCMAP_QUERY, query))

cdef int pagemap_scan(int pagemap_fd, ScanArgument *scan) noexcept nogil:
    """``ioctl(PAGEMAP_SCAN)`` on a ``/proc/PID/pagemap``: how many regions were filled in."""
    return <int>result_of(c_ioctl(pagemap_fd, PAGEMAP_SCAN, scan))

cdef intptr_t process_vm_readv(void *local, uintptr_t remote, size_t length) noexcept nogil:
    """``process_vm_readv(2)`` from this process itself: bytes copied, perhaps fewer than asked."""
    cdef iovec here, there
    here.iov_base = local
    there.iov_base = <void *>remote
    here.iov_len = there.iov_len = length
    return result_of(c_process_vm_readv(getpid(), &here, 1, &there, 1, 0))

cdef intptr_t process_vm_writev(const void *local, uintptr_t remote, size_t length) noexcept nogil:
    """``process_vm_writev(2)`` into this process itself: bytes copied, perhaps fewer than asked."""
    cdef iovec here, there
    here.iov_base = <void *>local
    there.iov_base = <void *>remote
    here.iov_len = there.iov_len = length
    return result_of(c_process_vm_writev(getpid(), &here, 1, &there, 1, 0))

cpdef uint64_t resource_limit(int resource) noexcept nogil:
    """``getrlimit(2)``: the soft limit, 2**64 - 1 where there is none."""
    cdef rlimit_values limit
    return limit.rlim_cur if c_getrlimit(resource, &limit) == 0 else 0

RESOURCES = {"RLIMIT_AS": RLIMIT_AS, "RLIMIT_DATA": RLIMIT_DATA, "RLIMIT_NOFILE": RLIMIT_NOFILE}
"""What ``resource_limit`` takes, by name."""

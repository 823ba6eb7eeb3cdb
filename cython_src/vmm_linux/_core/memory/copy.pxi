"""Copies between a buffer and addresses of this process, which the kernel checks.

A bad address is -EFAULT, never a signal. process_vm_readv(2) and process_vm_writev(2) copy once;
where a sandbox forbids them, a scratch memory file copies twice. /proc/self/mem is no
alternative: it ignores protection.
"""


cdef enum:
    SCRATCH = 1 << 20           # bytes in the scratch file at a time


cdef int open_scratch() noexcept nogil:
    """A descriptor of an empty memory file, or -errno."""
    cdef unsigned int flags = MFD_CLOEXEC
    if kernel.has(kernel.FEATURE_MEMFD_NOEXEC_SEAL):
        flags |= kernel.MFD_NOEXEC_SEAL
    return kernel.memfd_create(b"vmm_linux scratch", flags)


cdef int through_scratch(void *target, const void *source, size_t size,
                         size_t *done) noexcept nogil:
    """Copy with write(2) and read(2), which check both addresses: 0 or -errno."""
    cdef int fd = open_scratch()
    cdef Py_ssize_t moved = fd
    while moved >= 0 and done[0] < size:
        moved = kernel.pwrite(
            fd, <const char *>source + done[0], min(size - done[0], <size_t>SCRATCH), 0)
        if moved > 0:
            moved = kernel.pread(fd, <char *>target + done[0], moved, 0)
        if moved == 0:
            moved = -EFAULT
        if moved > 0:
            done[0] += moved
    if fd >= 0:
        kernel.close(fd)
    return <int>min(moved, 0)


cdef int copy_out(void *buffer, uintptr_t va, size_t size, size_t *done) noexcept nogil:
    """Copy ``size`` bytes at ``va`` to the buffer: 0 or -errno; ``done`` counts bytes copied."""
    cdef Py_ssize_t moved = 0
    done[0] = 0
    if not kernel.has(kernel.FEATURE_PROCESS_VM):
        return through_scratch(buffer, <const void *>va, size, done)
    while done[0] < size:
        moved = kernel.process_vm_readv(
            <char *>buffer + done[0], va + done[0], size - done[0])
        if moved <= 0:
            return <int>moved if moved < 0 else -EFAULT
        done[0] += moved
    return 0


cdef int copy_in(const void *buffer, uintptr_t va, size_t size, size_t *done) noexcept nogil:
    """Copy ``size`` bytes of the buffer to ``va``: 0 or -errno; ``done`` counts bytes copied."""
    cdef Py_ssize_t moved = 0
    done[0] = 0
    if not kernel.has(kernel.FEATURE_PROCESS_VM):
        return through_scratch(<void *>va, buffer, size, done)
    while done[0] < size:
        moved = kernel.process_vm_writev(
            <const char *>buffer + done[0], va + done[0], size - done[0])
        if moved <= 0:
            return <int>moved if moved < 0 else -EFAULT
        done[0] += moved
    return 0

"""Copies between a buffer and addresses of this process, which the kernel checks.

A bad address is -EFAULT, never a signal. process_vm_readv(2) and process_vm_writev(2) copy once;
where a sandbox forbids them, a scratch memory file copies twice. /proc/self/mem is no
alternative: it ignores protection.
"""

cdef enum:
    SCRATCH = 1 << 20           # bytes in the scratch file at a time


cdef int through_scratch(void *target, const void *source, size_t size,
                         size_t *done) noexcept nogil:
    """Copy with write(2) and read(2), which check both addresses: 0 or -errno."""
    cdef int fd = kernel.memfd_create(b"vmm_linux scratch", creation_flags(False))
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


cdef int copy(bint out, void *buffer, uintptr_t va, size_t size, size_t *done) noexcept nogil:
    """Copy bytes at ``va`` out to the buffer, or in from it: 0 or -errno.

    ``done`` is how many bytes are copied, after a failure too.
    """
    cdef Py_ssize_t moved
    cdef char *local = <char *>buffer
    done[0] = 0
    if not kernel.has(kernel.FEATURE_PROCESS_VM):
        return (through_scratch(buffer, <void *>va, size, done) if out
                else through_scratch(<void *>va, buffer, size, done))
    while done[0] < size:
        if out:
            moved = kernel.process_vm_readv(local + done[0], va + done[0], size - done[0])
        else:
            moved = kernel.process_vm_writev(local + done[0], va + done[0], size - done[0])
        if moved <= 0:
            return <int>moved if moved < 0 else -EFAULT
        done[0] += moved
    return 0

"""Counts the forks of this process and above it.

A descriptor of ``/proc/self/...`` opened before a fork answers about the parent, and shared pages
inherited from a parent are not the child's to empty. Code that keeps such a thing notes the
generation that it was made in and compares.

``fork(3)`` runs the handlers registered here. A bare ``clone(2)`` and ``_Fork(3)`` do not, and
``vfork(2)`` needs none: such a child only calls exec.
"""

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)

cdef uint32_t forks_above = 0, forks_made = 0


cdef void count_fork() noexcept nogil:
    # Before the child exists, not in the parent afterwards: otherwise another thread of the
    # parent could find a child that lives and is not counted yet.
    global forks_made
    forks_made += 1


cdef void count_as_child() noexcept nogil:
    global forks_above, forks_made
    forks_above += 1
    forks_made = 0


cpdef uint32_t fork_generation() noexcept nogil:
    """How many forks lie between the first process that imported this module and this one."""
    return forks_above


cpdef uint32_t fork_children() noexcept nogil:
    """How often this process has forked; never less, but a fork that failed counts as well.

    Counted by the forking thread before the child exists. A child begins with 0.
    """
    return forks_made


if pthread_atfork(&count_fork, NULL, &count_as_child) != 0:
    raise MemoryError("pthread_atfork: no memory for the handlers that notice a fork")

"""SIGPIPE and SIGXFSZ, held off around a call that can cause one and answers by an errno too."""

cdef extern from "<signal.h>" nogil:
    int SIGPIPE, SIGXFSZ
    int pthread_sigmask(int, const sigset_t *, sigset_t *)
    int sigtimedwait(const sigset_t *, void *, const timespec *)
    int raise_signal "raise"(int)

cdef extern from "<sys/resource.h>" nogil:
    struct rlimit_values "rlimit":
        unsigned long rlim_cur
    int RLIMIT_FSIZE
    int c_getrlimit "getrlimit"(int, rlimit_values *)


cdef void hold_signals(HeldSignals *held) noexcept nogil:
    """Block the two signals in this thread until ``drop_signals``."""
    sigemptyset(&held.both)
    sigaddset(&held.both, SIGPIPE)
    sigaddset(&held.both, SIGXFSZ)
    sigpending(&held.waiting)
    pthread_sigmask(SIG_BLOCK, &held.both, &held.blocked)


cdef void drop_signals(HeldSignals *held, bint failed) noexcept nogil:
    """Take the signal of a call that ``failed``; block what was blocked before."""
    cdef timespec at_once
    cdef sigset_t waiting
    cdef int taken = 0
    at_once.tv_sec = at_once.tv_nsec = 0
    if failed:
        taken = sigtimedwait(&held.both, NULL, &at_once)
        while taken < 0 and errno == EINTR:
            taken = sigtimedwait(&held.both, NULL, &at_once)
    if taken > 0 and sigismember(&held.waiting, taken):
        # It may be the one that waited: a signal waits once for a thread, and once for them all.
        sigpending(&waiting)
        if not sigismember(&waiting, taken):
            raise_signal(taken)
    pthread_sigmask(SIG_SETMASK, &held.blocked, NULL)


cdef inline bint is_past_file_limit(uint64_t end) noexcept nogil:
    """Whether a file of so many bytes is longer than this process may make one."""
    cdef rlimit_values limit
    return c_getrlimit(RLIMIT_FSIZE, &limit) != 0 or end > limit.rlim_cur

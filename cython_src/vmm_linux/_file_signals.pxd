"""Calls to the system on files, without the signals that some of them raise when they fail.

A write to a pipe that nobody reads raises SIGPIPE, and growing a file past RLIMIT_FSIZE SIGXFSZ.
Python ignores both, but a program may have set them back, and then they end the process. Each
comes to the thread that makes the call: it is blocked there meanwhile, and taken afterwards. One
that waited already is left waiting, and other threads notice nothing.

Blocking takes three calls to the system, so whether a file would come past its limit is looked at
first, which takes one.

Source: pthread_sigmask(3), sigpending(2), sigtimedwait(2), getrlimit(2), signal(7).
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint64_t
from posix.signal cimport SIG_BLOCK, SIG_SETMASK, sigaddset, sigemptyset, sigismember, sigpending
from posix.time cimport timespec
from posix.types cimport sigset_t

cdef extern from "<signal.h>" nogil:
    int SIGPIPE
    int SIGXFSZ
    int pthread_sigmask(int, const sigset_t *, sigset_t *)
    int sigtimedwait(const sigset_t *, void *, const timespec *)
    int raise_signal "raise"(int)

cdef extern from "<sys/resource.h>" nogil:
    struct file_limit "rlimit":
        unsigned long rlim_cur
    int RLIMIT_FSIZE
    int getrlimit(int, file_limit *)

cdef struct HeldSignals:
    sigset_t both
    sigset_t waiting            # those that waited before the call
    sigset_t blocked            # what the thread blocks otherwise


cdef inline bint is_past_file_limit(uint64_t end) noexcept nogil:
    """Whether a file of so many bytes is longer than this process may make one."""
    cdef file_limit limit
    return getrlimit(RLIMIT_FSIZE, &limit) != 0 or end > limit.rlim_cur


cdef inline void hold_signals(HeldSignals *held) noexcept nogil:
    """Block the two signals in this thread until ``drop_signals``."""
    sigemptyset(&held.both)
    sigaddset(&held.both, SIGPIPE)
    sigaddset(&held.both, SIGXFSZ)
    sigpending(&held.waiting)
    pthread_sigmask(SIG_BLOCK, &held.both, &held.blocked)


cdef inline void drop_signals(HeldSignals *held, bint failed) noexcept nogil:
    """Take the signal that came of a call which ``failed``; block what was blocked before."""
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

"""A mutex that a fork leaves usable in parent and child (see ``_mutex.pyx``)."""

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
    """Take the mutex if it is free."""
    return pthread_mutex_trylock(&mutex.native) == 0


cdef inline void mutex_unlock(Mutex *mutex) noexcept nogil:
    """Let go of the mutex."""
    pthread_mutex_unlock(&mutex.native)

"""A mutex that a fork leaves usable in parent and child."""

cdef struct Mutex

cdef Mutex *mutex_new() noexcept nogil
cdef void mutex_delete(Mutex *mutex) noexcept nogil
cdef void mutex_lock(Mutex *mutex) noexcept nogil
cdef bint mutex_try(Mutex *mutex) noexcept nogil
cdef void mutex_unlock(Mutex *mutex) noexcept nogil

"""A mutex that a fork leaves usable in parent and child.

fork(2) copies one thread: a mutex that another thread holds at that moment would stay locked in the
child for ever, and the data behind it half changed. So the prepare handler of pthread_atfork(3)
takes every mutex, and both sides release them afterwards. The handlers run inside fork itself, with
no Python code between them, so no hook of the interpreter can meet a locked mutex. A thread that
holds one never waits for the GIL, for another of these mutexes, or for a fork: so the handler never
waits for ever.
"""

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)

cdef pthread_mutex_t list_mutex     # guards the list of all mutexes
cdef Mutex *first = NULL


cdef Mutex *mutex_new() noexcept nogil:
    """A mutex, or NULL when memory is short."""
    global first
    cdef Mutex *mutex = <Mutex *>malloc(sizeof(Mutex))
    if mutex == NULL:
        return NULL
    pthread_mutex_init(&mutex.native, NULL)
    pthread_mutex_lock(&list_mutex)
    mutex.previous = NULL
    mutex.next = first
    if first != NULL:
        first.previous = mutex
    first = mutex
    pthread_mutex_unlock(&list_mutex)
    return mutex


cdef void mutex_delete(Mutex *mutex) noexcept nogil:
    """End a mutex that no thread holds."""
    global first
    if mutex == NULL:
        return
    pthread_mutex_lock(&list_mutex)
    if mutex.previous != NULL:
        mutex.previous.next = mutex.next
    else:
        first = mutex.next
    if mutex.next != NULL:
        mutex.next.previous = mutex.previous
    pthread_mutex_unlock(&list_mutex)
    pthread_mutex_destroy(&mutex.native)
    free(mutex)


cdef void lock_all() noexcept nogil:
    cdef Mutex *mutex
    pthread_mutex_lock(&list_mutex)
    mutex = first
    while mutex != NULL:
        pthread_mutex_lock(&mutex.native)
        mutex = mutex.next


cdef void unlock_all() noexcept nogil:
    cdef Mutex *mutex = first
    while mutex != NULL:
        pthread_mutex_unlock(&mutex.native)
        mutex = mutex.next
    pthread_mutex_unlock(&list_mutex)


pthread_mutex_init(&list_mutex, NULL)
pthread_atfork(lock_all, unlock_all, unlock_all)

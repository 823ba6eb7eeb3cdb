"""A descriptor that is kept: known by the file that it names, not by its number.

Any code of the process can close a descriptor of this package (``os.closerange`` of a program that
becomes a daemon), or put another file under its number (``os.dup2``, or just the next ``open``).
So the file is noted when the descriptor is made, and compared before each use, each sending and
each closing. A descriptor that names another file is not ours: it is neither used nor closed.
Nor is a number that the package has taken since for another of its descriptors: the kernel gives a
number out again only after it was closed, and the same memory can come twice.

Between the check and the use another thread can still close the number and open a file: the kernel
has no call that does both, and that gap remains. What is kept while other threads go on (a handle
that waits until a socket takes it) is a duplicate, which is checked after it is made.

-EBADF means that the number names nothing, or another file.
"""

cdef extern from "<fcntl.h>" nogil:
    int F_GETSIG, F_SETSIG, O_PATH

cdef extern from "<sys/stat.h>" nogil:
    unsigned int S_IFMT

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #define VMM_NUMBERS_OF_PAGE (1u << 14)
    /* Which descriptor of the package's got a number last. Pages of numbers are made when one is
       taken, and stay. Without a lock, which a child of a fork could not take. */
    static uint32_t *vmm_takings[(1u << 31) / VMM_NUMBERS_OF_PAGE];
    static uint32_t vmm_last_taking;

    static uint32_t *vmm_taking_of(int fd, int make)
    {
        uint32_t **place = &vmm_takings[(unsigned)fd / VMM_NUMBERS_OF_PAGE];
        uint32_t *page = __atomic_load_n(place, __ATOMIC_ACQUIRE);
        if (page == NULL && make) {
            uint32_t *made = (uint32_t *)calloc(VMM_NUMBERS_OF_PAGE, sizeof *made);
            if (made == NULL)
                return NULL;
            if (__atomic_compare_exchange_n(
                    place, &page, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
                page = made;
            else
                free(made);         /* another thread's page is there by now */
        }
        return page == NULL ? NULL : page + (unsigned)fd % VMM_NUMBERS_OF_PAGE;
    }

    static uint32_t vmm_take_number(int fd)
    {
        uint32_t taking, *place = vmm_taking_of(fd, 1);
        if (place == NULL)
            return 0;
        do
            taking = __atomic_add_fetch(&vmm_last_taking, 1, __ATOMIC_RELAXED);
        while (taking == 0);
        __atomic_store_n(place, taking, __ATOMIC_RELEASE);
        return taking;
    }

    static int vmm_has_number(int fd, uint32_t taking)
    {
        uint32_t *place = vmm_taking_of(fd, 0);
        return place != NULL && __atomic_load_n(place, __ATOMIC_ACQUIRE) == taking;
    }
    """
    uint32_t take_number "vmm_take_number"(int fd) nogil    # 0 when memory is short
    bint has_number "vmm_has_number"(int fd, uint32_t taking) nogil


cdef int mark(int fd, Mark which) noexcept nogil:
    """Mark the file behind a descriptor: 0 or -errno.

    The mark is the signal for input (fcntl(2) F_SETSIG), which such a file never sends: so it does
    nothing, and is 0 in every file that is not ours. A process that shares the file can remove it.
    """
    return fcntl(fd, F_SETSIG, which)


cdef int check_mark(int fd, Mark which) noexcept nogil:
    """Whether a descriptor names a file with this mark: 0, -EBADF where not, or another -errno.

    At less than half the cost of fstat(2).
    """
    cdef int found = -EBADF if fd < 0 else fcntl(fd, F_GETSIG, 0)
    if found < 0:
        return found
    return 0 if found == which else -EBADF


cdef int open_file_note(OpenFile *self, FileStatus *status) noexcept nogil:
    """Note which file a descriptor names that was just made: 0 or -errno."""
    cdef int result = fstat(self.fd, status)
    if result < 0:
        return result
    self.device = status.st_dev
    self.inode = status.st_ino
    self.taking = take_number(self.fd)
    return 0 if self.taking != 0 else -ENOMEM


cdef int open_file_take(OpenFile *self, int fd) noexcept nogil:
    """Take charge of a descriptor that was just made: 0, or -errno and it is closed.

    A negative ``fd`` is the -errno of the call that did not make it.
    """
    cdef FileStatus status
    cdef int result
    self.fd = fd
    if fd < 0:
        return fd
    result = open_file_note(self, &status)
    if result < 0:
        close(fd)
        self.fd = -1
    return result


cdef int open_file_take_same(OpenFile *self, const OpenFile *other, int fd) noexcept nogil:
    """``open_file_take`` of a descriptor that names the file of another, or else is closed."""
    cdef FileStatus status
    cdef int result = fd
    self[0] = other[0]
    self.fd = fd
    if fd < 0:
        return fd
    result = open_file_is(other, fd, &status)
    if result == 0:
        self.taking = take_number(fd)
        result = 0 if self.taking != 0 else -ENOMEM
    if result < 0:
        close(fd)
        self.fd = -1
    return result


cdef int open_file_is(const OpenFile *self, int fd, FileStatus *status) noexcept nogil:
    """Whether a descriptor names this file: 0, -EBADF where it does not, or another -errno."""
    cdef int result = fstat(fd, status)
    if result == 0 and (status.st_dev != self.device or status.st_ino != self.inode):
        return -EBADF
    return result


cdef int open_file_status(const OpenFile *self, FileStatus *status) noexcept nogil:
    """What the kernel says of the file: 0, or -errno as of ``open_file_is``."""
    if self.fd < 0 or not has_number(self.fd, self.taking):
        return -EBADF
    return open_file_is(self, self.fd, status)


cdef int open_file_number(const OpenFile *self) noexcept nogil:
    """The descriptor, for one use at once, or -errno."""
    cdef FileStatus status
    cdef int result = open_file_status(self, &status)
    return result if result < 0 else self.fd


cdef int open_file_own(OpenFile *self) noexcept nogil:
    """Have a duplicate in place of a descriptor that was lent: 0 or -errno, with none."""
    cdef OpenFile lent = self[0]
    cdef int mode = access_mode(lent.fd)
    cdef int result = mode
    self.fd = -1
    if mode >= 0:
        result = open_file_take_same(self, &lent, fcntl(lent.fd, F_DUPFD_CLOEXEC, 0))
    if result < 0:
        return result
    result = access_mode(self.fd)
    if result == mode:
        return 0
    open_file_close(self)
    return result if result < 0 else -EBADF


cdef int access_mode(int fd) noexcept nogil:
    """O_RDONLY, O_WRONLY or O_RDWR, or -errno; -EBADF of one that only names its file (O_PATH)."""
    cdef int flags = fcntl(fd, F_GETFL, 0)
    if flags < 0:
        return flags
    return -EBADF if flags & O_PATH else flags & O_ACCMODE


cdef void open_file_close(OpenFile *self) noexcept nogil:
    """Close the descriptor, if it is still this file's. A second call does nothing."""
    cdef FileStatus status
    if open_file_status(self, &status) != -EBADF:
        close(self.fd)
    self.fd = -1


@cython.final
cdef class Descriptor:
    """An open descriptor of this package's, closed with the last reference to this object.

    Code that uses the number holds this object meanwhile, so no number is used that another thread
    closed. It asks for the number at each use, which finds out whether the program closed it or put
    another file under it.

    Anonymous files, as eventfds are, all have one inode, so they are marked too. A peer that
    removes the mark makes the object lost. An event that the program puts under the number of
    another (``os.dup2``) goes unnoticed.
    """

    __reduce__ = refuse_copies("each owns its descriptor; duplicate that")

    def __cinit__(self):
        self.file.fd = -1

    def __dealloc__(self):
        self.close()

    cpdef int take(self, int fd) except -1:
        """Take charge of a descriptor that was just made; where that fails, it is closed.

        The object is made before its descriptor, which so has an owner from the start, however
        short memory is.

        Args:
            fd: its number, or the -errno of why there is none.

        Errors:
            OSError: there is none, or it is not open.
        """
        cdef FileStatus status
        cdef int result
        if self.file.fd >= 0:
            raise ValueError("a Descriptor does not change; make another one")
        result = open_file_take(&self.file, fd)
        if result == 0:
            result = fstat(self.file.fd, &status)
        if result == 0 and status.st_mode & S_IFMT == 0:
            self.is_anonymous = True
            result = mark(self.file.fd, MARK_ANONYMOUS)
        if result < 0:
            open_file_close(&self.file)
        return check(result)

    cpdef void close(self) noexcept:
        """Close it now, if it is still what it was. A second call does nothing."""
        if self.is_open:
            close(self.file.fd)
        self.file.fd = -1

    @property
    def is_open(self):
        """Whether the number still names the file."""
        return (
            open_file_number(&self.file) >= 0
            and (not self.is_anonymous or check_mark(self.file.fd, MARK_ANONYMOUS) == 0))

    @property
    def number(self):
        """The descriptor, for one use at once.

        Errors:
            OSError (EBADF): the program closed it, or put another file under its number.
        """
        if not self.is_open:
            check(-EBADF)
        return self.file.fd


def duplicate(int fd):
    """A ``Descriptor`` of the file that any descriptor names.

    Errors:
        OSError: it is not open, or no descriptor is left.
    """
    cdef Descriptor made = Descriptor()
    made.take(fcntl(fd, F_DUPFD_CLOEXEC, 0))
    return made


def new_eventfd():
    """A ``Descriptor`` of a new eventfd, close-on-exec and non-blocking.

    Errors:
        OSError: no descriptor, or no file, is left.
    """
    cdef Descriptor made = Descriptor()
    made.take(eventfd())
    return made

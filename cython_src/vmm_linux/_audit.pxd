"""What is written down of calls (see ``_audit.pyx``)."""

from libc.stdint cimport int64_t, uint64_t

from vmm_linux._open_file cimport OpenFile

cdef class Record:
    cdef readonly uint64_t call
    cdef readonly int64_t time          # nanoseconds since 1970
    cdef readonly int64_t duration      # nanoseconds; of a call that still runs 0
    cdef readonly long pid
    cdef readonly long thread
    cdef readonly str method
    cdef dict numbers                   # the arguments; None where they were no numbers
    cdef readonly str decision          # "allow", "deny"; None before there was one
    cdef readonly str rule              # that decided
    cdef readonly object rc             # a Retcode; None of a call that still runs
    cdef readonly str error             # what was raised that is no return code
    cdef readonly object result         # the address, handle, descriptor or count, or None
    cdef readonly object sid
    cdef readonly object origin_sid
    cdef readonly object peer
    cdef int64_t began                  # of the clock that never jumps

    cdef str line(self, str event)

cdef class Audit:
    cdef object ring                    # the last records, the newest at the end
    cdef object logger                  # or None
    cdef readonly object file           # its path, or None
    cdef readonly str failure           # "deny" or "continue"
    cdef OpenFile opened                # its descriptor is -1 where it could not be opened
    cdef bint linked                    # whether it had a name when it was opened
    cdef bint torn                      # whether the last line in the file is a half one
    cdef bint warned
    cdef set logging                    # threads whose record is just going to the logger
    cdef bint made

    cdef int check_unmade(self) except -1
    cdef void keep(self, int fd) noexcept
    cdef Record begin(self, str method)
    cdef int write_before(self, Record record) except -1
    cdef int end(self, Record record) except -1
    cdef int write(self, str line)
    cdef bint writes_first(self, object failure)
    cdef int warn(self, int error) except -1
    cdef int log(self, Record record) except -1

cdef void tell_unraisable(object where, BaseException problem) noexcept

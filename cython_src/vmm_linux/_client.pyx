"""The life of a VMM: made, closed, warned of when nobody closes it."""

from libc.stdint cimport uintptr_t

from vmm_linux._answer cimport CLOSE, Request
from vmm_linux._arguments cimport request_of
from vmm_linux._mdl cimport BufferSpace
from vmm_linux._own_process cimport OwnProcess

import atexit
import os
import sys
import warnings
import weakref

from vmm_linux.errors import InvalidOperation


cdef class Client:
    """What every method needs: the address space, the open files of /proc, and whether it lives."""

    # Whether one that is never closed is a mistake of somebody's.
    _warns = True

    def __cinit__(self, *arguments, **keywords):
        self.space = BufferSpace()
        self.process = OwnProcess()
        caller = sys._getframe()
        self.made_at = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        self.made_by = os.getpid()
        STILL_OPEN.add(self)

    def __init__(self):
        """Make a VMM without regions. It asks the kernel for nothing yet."""

    def __del__(self):
        self.warn_if_open()

    cdef int warn_if_open(self) except -1:
        """Warn once, in the process that made this VMM, if nobody closed it."""
        if self.space is None or self.space.closed or self.warned or self.made_by != os.getpid():
            return 0
        self.warned = True
        if not self._warns:
            return 0
        warnings.warn(
            f"a VMM made at {self.made_at} was never closed", ResourceWarning, source=self)
        return 0

    def __enter__(self):
        check_open(self, "__enter__")
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self):
        return f"<VMM made at {self.made_at}, {'closed' if self.space.closed else 'open'}>"

    def _check(self):
        """Raise AssertionError if an invariant of the ledger does not hold. For tests."""
        cdef uintptr_t where = 0
        cdef const char *flaw
        self.space.enter()
        flaw = self.space.ledger.flaw(&where)
        self.space.leave()
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()} at 0x{where:x}")

    @property
    def closed(self):
        """Whether ``close`` was called."""
        return self.space.closed

    def close(self):
        """Free everything this VMM made. A second call does nothing.

        Regions that a view holds are unmapped when the last view of them is gone.

        Errors:
            OUT_OF_MEMORY: at the kernel's map count a region could not be unmapped; the VMM
                stays open, and another call tries again.
        """
        cdef Request request = request_of(CLOSE, 0, 0, 0)
        if self.space.closed:
            return
        self.space.call(&request)
        # No query opens these files again: the VMM is closed.
        self.space.enter()
        self.process.release()
        self.space.leave()


cdef int refuse_closed(str method) except -1:
    """Say that the VMM is closed."""
    raise InvalidOperation(method, "this VMM is closed; make another one")


STILL_OPEN = weakref.WeakSet()


@atexit.register
def _warn_of_open_vmms():
    """Warn of every VMM that is still open when the interpreter exits."""
    cdef Client vmm
    for vmm in list(STILL_OPEN):
        vmm.warn_if_open()

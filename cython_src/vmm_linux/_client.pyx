"""The life of a VMM: made, closed, warned of when nobody closes it."""

from cpython.object cimport PyObject
from libc.stdint cimport uintptr_t
from libcpp.vector cimport vector

from vmm_linux._answer cimport CLOSE, Request
from vmm_linux._arguments cimport request_of
from vmm_linux._calls cimport CALL_CLOSE
from vmm_linux._location cimport Intent, add_intents, intent_at
from vmm_linux._mdl cimport BufferSpace
from vmm_linux._own_process cimport OwnProcess
from vmm_linux._watched cimport Watched

import atexit
import os
import sys
import warnings
import weakref

from vmm_linux.errors import InvalidOperation

cdef extern from "Python.h":
    PyObject *PyWeakref_GetObject(object)


cdef class Client(Watched):
    """What every method needs: the address space, the open files of /proc, and whether it lives."""

    # Whether one that is never closed is a mistake of somebody's.
    _warns = True

    def __cinit__(self, *arguments, **keywords):
        self.space = BufferSpace()
        self.process = OwnProcess()
        caller = sys._getframe()
        self.made_at = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        self.made_by = os.getpid()
        ALL[<uintptr_t><PyObject *>self] = weakref.ref(self)

    def __dealloc__(self):
        ALL.pop(<uintptr_t><PyObject *>self, None)

    def __init__(self, *, policy=None, audit=None):
        """Make a VMM without regions. It asks the kernel for nothing yet.

        Args:
            policy: a ``Policy``, which is asked before every call, or None for the one in the file
                that ``VMM_LINUX_POLICY`` of the environment names, if it names one.
            audit: an ``Audit``, which writes every call down, or None for one to the file that
                ``VMM_LINUX_AUDIT`` names, if it names one.

        Errors:
            INVALID_ARGUMENT: another kind of object; a file of the environment that is no policy.
            INVALID_OPERATION: this VMM has been made already, with others.
            OSError: a file of the environment cannot be opened.
        """
        try:
            self.settle(policy, audit)
        except BaseException:
            self.warned = True      # nobody gets it who could close it
            raise

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
        if self.space.closed:
            return
        if self.is_watched:
            self.watch(CALL_CLOSE, ())
        else:
            do_close(self)

    def history(self):
        """The last calls that this VMM's audit wrote down, the oldest first.

        A closed VMM has them too. An audit that several VMMs share has the calls of all.

        Returns:
            A tuple of ``vmm_linux.audit.Record``.

        Errors:
            INVALID_OPERATION: this VMM was made without an audit.
        """
        if self.audit is None:
            raise InvalidOperation(
                "history", "this VMM has no audit; make it with VMM(audit=Audit())")
        return self.audit.history()


cdef object do_close(Client self):
    """See ``VMM.close``."""
    cdef Request request = request_of(CLOSE, 0, 0, 0)
    if self.space.closed:
        return None
    self.space.call(&request)
    # No query opens these files again: the VMM is closed.
    self.space.enter()
    self.process.release()
    self.space.leave()
    return None


cdef int refuse_closed(str method) except -1:
    """Say that the VMM is closed."""
    raise InvalidOperation(method, "this VMM is closed; make another one")


# Weak references to every VMM there is, by its address: a WeakSet takes as long to walk through
# as a whole question to the kernel.
cdef dict ALL = {}


cdef list every_vmm():
    """Every VMM there is, closed ones too."""
    cdef list found = []
    cdef object vmm
    for reference in list(ALL.values()):
        vmm = <object>PyWeakref_GetObject(reference)
        if vmm is not None:
            found.append(vmm)
    return found


cdef bint intent_of_any(uintptr_t va, Intent *intent) except -1:
    """What a VMM of this process made of the pages around ``va``.

    False where none made any: then only ``start`` and ``end`` of that are told.
    """
    cdef Client vmm
    cdef bint found
    cdef uintptr_t start = 0
    cdef uintptr_t end = <uintptr_t>-1
    for vmm in every_vmm() if ALL else ():
        vmm.space.enter()
        found = False
        if not vmm.space.closed:
            found = intent_at(vmm.space.ledger, va, intent)
            start = max(start, intent.start)
            end = min(end, intent.end)
        vmm.space.leave()
        if found:
            return True
    intent.start = start
    intent.end = end
    return False


cdef int add_intents_of_all(vector[Intent] *intents) except -1:
    """Adds what every VMM of this process made, each read at one moment."""
    cdef Client vmm
    for vmm in every_vmm():
        vmm.space.enter()
        try:
            if not vmm.space.closed:
                add_intents(vmm.space.ledger, intents)
        finally:
            vmm.space.leave()
    return 0


@atexit.register
def _warn_of_open_vmms():
    """Warn of every VMM that is still open when the interpreter exits."""
    cdef Client vmm
    for vmm in every_vmm():
        vmm.warn_if_open()

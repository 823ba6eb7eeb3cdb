"""The life of a VMM: made, closed, warned of when nobody closes it."""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport uint64_t, uintptr_t
from libcpp.vector cimport vector

from vmm_linux._answer cimport CLOSE, FIGURES, NO_BOUND, Request
from vmm_linux._arguments cimport plain_limits, request_of
from vmm_linux._calls cimport CALL_CLOSE, CALL_LIMITS
from vmm_linux._location cimport Intent, add_intents, intent_at
from vmm_linux._mdl cimport BufferSpace
from vmm_linux._own_process cimport OwnProcess
from vmm_linux._watched cimport Watched

import atexit
import os
import sys
import warnings
import weakref
from operator import attrgetter

from vmm_linux._core import default_limits
from vmm_linux.errors import InvalidOperation
from vmm_linux.limits import FIGURES as FIGURE_NAMES
from vmm_linux.limits import Limits, Usage, Use

cdef extern from "Python.h":
    PyObject *PyWeakref_GetObject(object)


# As the policy, the files of /proc must not be cleared while the VMM can still be called.
@cython.no_gc_clear
cdef class Client(Watched):
    """What every method needs: the address space, the open files of /proc, and whether it lives."""

    def __cinit__(self, *arguments, **keywords):
        self.space = BufferSpace()
        self.process = OwnProcess()
        caller = sys._getframe()
        self.made_at = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        self.made_by = os.getpid()
        ALL[<uintptr_t><PyObject *>self] = weakref.ref(self)

    def __dealloc__(self):
        ALL.pop(<uintptr_t><PyObject *>self, None)

    def __init__(self, limits=None, *, policy=None, audit=None):
        """Make a VMM without regions: no memory is taken yet.

        Args:
            limits: ``Limits``, or None for what keeps a runaway loop from taking the machine: at
                most 262,144 regions and as many handles, 65,536 MDL buffers, and three quarters
                of the memory that can be had now, each for committed pages, locked ones and
                buffers. ``vmm.limits`` tells the numbers.
            policy: a ``Policy``, which is asked before every call, or None for the one in the file
                that ``VMM_LINUX_POLICY`` of the environment names, if it names one.
            audit: an ``Audit``, which writes every call down, or None for one to the file that
                ``VMM_LINUX_AUDIT`` names, if it names one.

        Errors:
            INVALID_ARGUMENT: another kind of object; a file of the environment that is no policy.
            INVALID_OPERATION: this VMM has been made already, with others.
            OSError: a file of the environment cannot be opened.
        """
        cdef bint settled = False
        try:
            if limits is not None:
                limits = plain_limits("VMM", limits)
            settled = self.settle(policy, audit)
        except BaseException:
            # Nobody gets it who could close it, unless somebody called it in the meantime.
            self._warned = self._warned or not self.is_settled
            raise
        if limits is not None:
            if settled:
                do_set_limits(self, limits)
            else:
                self.limits = limits

    cdef int settle(self, object policy, object audit) except -1:
        """Say once who is to be asked and told, and bound what nobody has bounded yet."""
        if not self.is_settled:
            look_up_defaults()
        if not Watched.settle(self, policy, audit):
            return False
        set_bounds(self.space, defaults)
        return True

    cdef object carry_out(self, int call, tuple a):
        """Carry out what every VMM has."""
        if call == CALL_LIMITS:
            return do_set_limits(self, a[0])
        if call == CALL_CLOSE:
            return do_close(self)
        return Watched.carry_out(self, call, a)

    def __del__(self):
        self.warn_if_open()

    cdef int warn_if_open(self) except -1:
        """Warn once, in the process that made this VMM, if nobody closed it."""
        if self.space is None or self.space.closed or self._warned or self.made_by != os.getpid():
            return 0
        self._warned = True
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
        flaw = self.space.flaw(&where)
        self.space.leave()
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()} at 0x{where:x}")

    @property
    def limits(self):
        """``Limits`` of this VMM; set others any time.

        A bound below what there is takes nothing away: from then on, calls that take more are
        refused until enough was given back.

        Errors:
            INVALID_ARGUMENT: set to something else than ``Limits``.
            SECURITY_DISALLOW: the policy says no to setting them.
            INVALID_OPERATION: the VMM is closed.
        """
        cdef uint64_t used[FIGURES]
        cdef uint64_t bounds[FIGURES]
        cdef int figure
        check_open(self, "limits")
        look(self.space, used, bounds)
        return Limits(**{FIGURE_NAMES[figure]: told(bounds[figure]) for figure in range(FIGURES)})

    @limits.setter
    def limits(self, limits):
        if self.is_watched:
            self.watch(CALL_LIMITS, (limits,))
        else:
            do_set_limits(self, limits)

    def usage(self):
        """What this VMM uses of each figure, and the bound of that, all at one moment.

        Returns:
            A ``Usage``: ``usage().committed.used`` and ``.bound``, in bytes where ``Limits`` says
            so. A child of fork begins with its parent's figures.

        Errors:
            INVALID_OPERATION: the VMM is closed.
        """
        cdef uint64_t used[FIGURES]
        cdef uint64_t bounds[FIGURES]
        cdef int figure
        cdef list uses = []
        check_open(self, "usage")
        look(self.space, used, bounds)
        for figure in range(FIGURES):
            uses.append(Use(used[figure], told(bounds[figure])))
        return Usage(*uses)

    @property
    def closed(self):
        """Whether ``close`` was called."""
        return self.space.closed

    def close(self):
        """Free everything this VMM made. A second call does nothing.

        Regions that a view holds are unmapped when the last view of them is gone. An audit that
        cannot write this down holds it up in no case, and says so.

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


cdef object do_set_limits(Client self, object limits):
    """See ``VMM.limits``."""
    cdef uint64_t bounds[FIGURES]
    check_open(self, "limits")
    limits = plain_limits("limits", limits)
    fill(bounds, attrgetter(*FIGURE_NAMES)(limits))
    set_bounds(self.space, bounds)
    return None


cdef extern from "<time.h>" nogil:
    int CLOCK_MONOTONIC_COARSE
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
    int clock_gettime(int, timespec *)


cdef uint64_t defaults[FIGURES]
cdef time_t looked_up = -1


cdef int look_up_defaults() except -1:
    """Bring ``defaults`` up to date if they are of another second."""
    global looked_up
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    if now.tv_sec != looked_up:
        fill(defaults, default_limits.bounds())
        looked_up = now.tv_sec
    return 0


cdef object told(uint64_t bound):
    """A bound as Python has it."""
    return None if bound == NO_BOUND else bound


cdef int fill(uint64_t *numbers, tuple bounds) except -1:
    """Bounds as numbers."""
    cdef int figure
    for figure in range(FIGURES):
        numbers[figure] = NO_BOUND if bounds[figure] is None else bounds[figure]
    return 0


cdef void look(BufferSpace space, uint64_t *used, uint64_t *bounds) noexcept:
    """What is used and what bounds it, at one moment."""
    cdef int figure
    space.enter()
    for figure in range(FIGURES):
        used[figure] = space.used(figure)
        bounds[figure] = space.bounds[figure]
    space.leave()


cdef void set_bounds(BufferSpace space, const uint64_t *bounds) noexcept:
    """Bound what is made from now on."""
    space.enter()
    space.set_bounds(bounds)
    space.leave()


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

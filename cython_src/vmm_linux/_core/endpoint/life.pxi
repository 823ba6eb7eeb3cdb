"""The life of a VMM: made, closed, warned of when nobody closes it."""


cdef inline int check_open(Client self, str method) except -1:
    """Every method but ``close`` begins with this."""
    return refuse_closed(method) if self.space.closed else 0


cdef extern from "Python.h":
    PyObject *PyWeakref_GetObject(object)


# As the policy, the files of /proc must not be cleared while the VMM can still be called.
@cython.no_gc_clear
cdef class Client(Watched):
    """What every method needs: the address space, the open files of /proc, and whether it lives."""

    cdef OwnProcess process
    cdef object __weakref__
    cdef str made_at
    cdef int made_by
    cdef bint warned

    # Whether one that is never closed is a mistake of somebody's.
    _warns = True

    def __cinit__(self, *arguments, **keywords):
        self.space = AddressSpace()
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
            self.warned = self.warned or not self.is_settled
            raise
        if limits is not None:
            if settled:
                do_set_limits(self, limits)
            else:
                self.limits = limits

    cdef int settle(self, object policy, object audit) except -1:
        """Say once who is to be asked and told, and bound what nobody has bounded yet."""
        cdef const uint64_t *bounds = NULL
        if not self.is_settled:
            bounds = kernel.default_bounds()
        if not Watched.settle(self, policy, audit):
            return False
        bound_space(self.space, bounds)
        return True

    cdef object carry_out(self, int call, tuple a):
        """Carry out what every VMM has."""
        if call == SET_LIMITS:
            return do_set_limits(self, a[0])
        if call == CLOSE:
            return do_close(self)
        return Watched.carry_out(self, call, a)

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
        lock_space(self.space)
        flaw = find_flaw(self.space, &where)
        unlock_space(self.space)
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
        read_usage(self.space, used, bounds)
        return Limits(**{FIGURE_NAMES[figure]: bound_or_none(bounds[figure]) for figure in range(FIGURES)})

    @limits.setter
    def limits(self, limits):
        if self.is_watched:
            self.watch(SET_LIMITS, (limits,))
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
        read_usage(self.space, used, bounds)
        for figure in range(FIGURES):
            uses.append(Use(used[figure], bound_or_none(bounds[figure])))
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
            self.watch(CLOSE, ())
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
    call(self.space, &request)
    # No query opens these files again: the VMM is closed.
    lock_space(self.space)
    self.process.release()
    unlock_space(self.space)
    return None


cdef object do_set_limits(Client self, object limits):
    """See ``VMM.limits``."""
    cdef uint64_t bounds[FIGURES]
    check_open(self, "limits")
    limits = plain_limits("limits", limits)
    fill(bounds, attrgetter(*FIGURE_NAMES)(limits))
    bound_space(self.space, bounds)
    return None


cdef object bound_or_none(uint64_t bound):
    """A bound as Python has it."""
    return None if bound == NO_BOUND else bound


cdef int fill(uint64_t *numbers, tuple bounds) except -1:
    """Bounds as numbers."""
    cdef int figure
    for figure in range(FIGURES):
        numbers[figure] = NO_BOUND if bounds[figure] is None else bounds[figure]
    return 0


cdef void read_usage(AddressSpace space, uint64_t *used, uint64_t *bounds) noexcept:
    """What is used and what bounds it, at one moment."""
    cdef int figure
    lock_space(space)
    for figure in range(FIGURES):
        used[figure] = usage_of(space, figure)
        bounds[figure] = space.bounds[figure]
    unlock_space(space)


cdef void bound_space(AddressSpace space, const uint64_t *bounds) noexcept:
    """Bound what is made from now on."""
    lock_space(space)
    set_bounds(space, bounds)
    unlock_space(space)


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
        lock_space(vmm.space)
        found = False
        if not vmm.space.closed:
            found = intent_at(vmm.space.ledger, va, intent)
            start = max(start, intent.start)
            end = min(end, intent.end)
        unlock_space(vmm.space)
        if found:
            return True
    intent.start = start
    intent.end = end
    return False


cdef int add_intents_of_all(vector[Intent] *intents) except -1:
    """Adds what every VMM of this process made, each read at one moment."""
    cdef Client vmm
    for vmm in every_vmm():
        lock_space(vmm.space)
        try:
            if not vmm.space.closed:
                add_intents(vmm.space.ledger, intents)
        finally:
            unlock_space(vmm.space)
    return 0


@atexit.register
def _warn_of_open_vmms():
    """Warn of every VMM that is still open when the interpreter exits."""
    cdef Client vmm
    for vmm in every_vmm():
        vmm.warn_if_open()

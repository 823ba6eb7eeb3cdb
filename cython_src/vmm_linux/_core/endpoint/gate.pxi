"""The gate of a VMM: its policy decides about a call, and its audit records it.

Every call of a VMM that has a policy or an audit passes here, by either face: its arguments become
numbers, the policy decides about these, the method is carried out with these, and the audit records
the result. Nothing here runs under the VMM's mutex.
"""

cdef struct Facts:
    # What a rule compares. 0 where a call has no such value; -1 without a peer, and for what is
    # unknown of one.
    uint64_t flags
    uint64_t size               # bytes
    uint64_t rights, seals
    int64_t pid                 # of the peer
    int64_t uid, gid


cdef Facts facts_of(const Request *request) noexcept:
    """What rules look at, as far as the arguments say."""
    cdef Facts facts
    facts.flags = request.flags
    facts.size = request.size
    facts.rights = request.rights
    facts.seals = request.seals
    facts.pid = facts.uid = facts.gid = -1
    return facts


@cython.final
cdef class Question:
    """Question()\n--\n
    A call that a policy's callable decides about. Immutable.

    Attributes:
        method: its Python name.
        arguments: by name, as numbers; of data and ranges how many there are.
    """

    cdef object vmm
    cdef Facts facts
    cdef readonly str method
    cdef readonly dict arguments

    __reduce__ = refuse_copies("each is of one call of one VMM; keep its method and arguments")

    def __init__(self):
        """Raise TypeError: a VMM makes them."""
        raise TypeError("questions are put by a VMM")

    def __repr__(self):
        return f"<Question: {self.method} {self.arguments}>"

    @property
    def flags(self):
        """The flags or the protection that the caller requests."""
        return VmmFlags(self.facts.flags) if self.facts.flags < 1 << 63 else self.facts.flags

    @property
    def size(self):
        """Bytes that the call is about: of ranges all of them; of what is received at most."""
        return self.facts.size

    @property
    def rights(self):
        """The rights of the copy, the receiver or the descriptor."""
        return Rights(self.facts.rights & <uint64_t>int(~Rights(0)))

    @property
    def seals(self):
        """The seals of a buffer that leaves; else those to put on or to require."""
        return Seal(self.facts.seals & <uint64_t>int(~Seal(0)))

    @property
    def peer(self):
        """``(pid, uid, gid)`` of who made the other end of the socket, or None.

        The user, and the group, is None where it is unknown: this user namespace does not map it.
        """
        if self.facts.pid < 0:
            return None
        return (self.facts.pid, None if self.facts.uid < 0 else self.facts.uid,
                None if self.facts.gid < 0 else self.facts.gid)

    @property
    def usage(self):
        """What the VMM uses (``VMM.usage``), asked for when it is looked at."""
        return usage_of_vmm(self.vmm)


cdef object usage_of_vmm(object vmm):
    """What a VMM uses, for a policy's callable.

    This calls the package's own method, even if a subclass overrides it.
    """
    for kind in reversed(type(vmm).__mro__):
        if "usage" in vars(kind):
            return vars(kind)["usage"].__get__(vmm)()
    raise AttributeError("this VMM tells no usage")


# The policy must not be cleared while the VMM can still be called: without one, all is allowed.
@cython.no_gc_clear
@cython.final
cdef class Gate:
    """What a VMM's calls go through where there is a policy to ask or an audit to write."""

    cdef RuleTable policy       # None: everything is allowed
    cdef Audit audit            # None: nothing is written down
    cdef uint32_t forbidden     # access that pages of MDL buffers never have
    cdef set deciding           # threads in which the policy's callable runs

    __reduce__ = refuse_copies("each belongs to one VMM")

    def __cinit__(self):
        self.deciding = set()

    cdef object call(self, VMM vmm, Method method, MethodBody body, PyObject **given):
        """Carry out a method if it may be, and write down how that ended."""
        cdef Record record
        if self.audit is None:
            return self.call_if_allowed(vmm, method, body, given, None)
        try:
            record = self.audit.begin(name_of(method))
        except MemoryError as problem:
            if method != CLOSE:
                raise
            # Closing only gives memory back: it does not fail because a record has none.
            report_unraisable(self.audit, problem)
            return self.call_if_allowed(vmm, method, body, given, None)
        try:
            result = self.call_if_allowed(vmm, method, body, given, record)
        except BaseException as problem:
            self.end(vmm, record, None, problem)
            raise
        self.end(vmm, record, result, None)
        return result

    cdef int end(self, VMM vmm, Record record, object result, BaseException problem) except -1:
        """Write down how a call ended, as far as there is memory for that.

        The caller gets what the call made, or why it failed, even if there is none.
        """
        try:
            if problem is None:
                record.rc = Retcode.OK
                if isinstance(result, int):
                    record.result = int(result)     # a handle without its class
                if isinstance(result, Handle):
                    self.look_up_handle(vmm, result, NULL, record)
            elif isinstance(problem, VmmError):
                record.rc = problem.rc
                record.error = words_of(problem)
            else:
                record.error = kind_of(problem)
        except Exception as shortage:
            report_unraisable(vmm, shortage)
        return self.audit.end(record)

    cdef object call_if_allowed(self, VMM vmm, Method method, MethodBody body, PyObject **given,
                                Record record):
        """Carry out a method if it may be."""
        cdef Call call
        cdef Ranges ranges
        begin_call(&call, method, &ranges)
        # Closing only gives back, and leaves nothing that could be called.
        if method == CLOSE:
            return body(vmm, &call, None)
        if vmm.space.closed:
            refuse_closed(name_of(method))
        try:
            argument = read_arguments(&call, given)
            if record is not None:
                record.numbers = arguments_of(&call, argument)
            if self.policy is None or method != SEND_HANDLE and method != RECV_HANDLE:
                return self.decide_and_call(vmm, &call, body, argument, record, None)
            return self.call_with_duplicate(vmm, &call, body, argument, record)
        finally:
            end_call(&call)

    cdef object call_with_duplicate(self, VMM vmm, Call *call, MethodBody body, object sock,
                                    Record record):
        """The same with a socket that only this package has.

        The policy decides about what is used, even if the caller's class overrides methods, or
        another thread puts another file under the descriptor's number.
        """
        cdef Duplicate own = duplicate_socket(name_of(call.request.method), sock)
        try:
            return self.decide_and_call(vmm, call, body, own, record, own.held)
        finally:
            own.held.close()

    cdef object decide_and_call(self, VMM vmm, Call *call, MethodBody body, object argument,
                                Record record, Descriptor held):
        """Carry out a method with these very arguments if it may be.

        ``held`` is the descriptor of a duplicated socket, or None.
        """
        cdef Method method = call.request.method
        cdef Facts facts = facts_of(&call.request)
        self.look_up(vmm, call, argument, &facts, record)
        self.decide(vmm, call, argument, &facts, record)
        if held is not None and not held.is_open:
            raise InvalidOperation(
                name_of(method), "the program closed the socket's duplicate that the policy was "
                "asked about, or put another file under its number (os.closerange, os.dup2)")
        if record is not None and self.audit.writes_first(
                None if self.policy is None else self.policy.audit_failure):
            self.audit.write_before(record)
        # The policy's callable may have closed it, or another thread: no message is received then.
        if vmm.space.closed:
            refuse_closed(name_of(method))
        try:
            return body(vmm, call, argument)
        except SecurityDisallow:
            # The one rule that looks at the pages themselves, under the mutex.
            if record is not None and method == MDL_CREATE_FROM_VM:
                record.decision, record.rule = "deny", "no executable MDL"
            raise

    # ---- the decision -------------------------------------------------------------------------

    cdef int decide(self, VMM vmm, Call *call, object argument, const Facts *facts,
                    Record record) except -1:
        """Raise SECURITY_DISALLOW for what the policy denies."""
        cdef Method method = call.request.method
        cdef bint allowed = True
        cdef int number
        cdef str rule = None
        cause = None
        if self.policy is not None:
            number = self.policy.answer(method, facts)
            if self.deciding and (getpid(), get_ident()) in self.deciding:
                allowed, rule = False, "no calls from inside the policy"
            elif number != NO_RULE:
                allowed = number >= 0
                if record is not None or not allowed:
                    rule = self.policy.name_of_rule(number if allowed else -1 - number)
            elif self.policy.ask is not None:
                allowed, rule, cause = self.ask(vmm, call, argument, facts)
            else:
                allowed, rule = self.policy.allows_otherwise, "default"
        if record is not None:
            record.decision = "allow" if allowed else "deny"
            record.rule = rule
        if not allowed:
            raise SecurityDisallow(
                name_of(method),
                f"the policy does not allow it (rule: {one_line(rule)})") from cause
        return 0

    cdef tuple ask(self, VMM vmm, Call *call, object argument, const Facts *facts):
        """Ask the policy's callable: whether the call is allowed, by whom, and what it raised."""
        cdef Question question = Question.__new__(Question)
        cdef object asking = (getpid(), get_ident())
        cdef str name = name_of_callable(self.policy.ask)
        question.vmm = vmm
        question.facts = facts[0]
        question.method = name_of(call.request.method)
        question.arguments = arguments_of(call, argument)
        self.deciding.add(asking)
        try:
            answer = self.policy.ask(question)
        except Exception as problem:
            return False, f"{name} raised {kind_of(problem)}", problem
        finally:
            self.deciding.discard(asking)
        if answer is True:
            return True, name, None
        # The answer's own code must not run outside of this call.
        return False, f"{name}: {one_line(answer)}" if isinstance(answer, str) else name, None

    # ---- facts about handles and peers --------------------------------------------------------

    cdef int look_up(self, VMM vmm, const Call *call, object argument, Facts *facts,
                     Record record) except -1:
        """Find out what rules and the audit need beside the arguments."""
        cdef RuleTable policy = self.policy
        cdef int method = call.request.method
        cdef bint leaves = method == SEND_HANDLE or method == HANDLE_FILENO
        cdef bint asked = policy is not None and policy.ask is not None
        if call.request.handle != 0 and (
                record is not None
                or leaves and (asked or policy is not None and policy.asks_seals[method])):
            self.look_up_handle(vmm, call.request.handle, facts if leaves else NULL, record)
        if ((method == SEND_HANDLE or method == RECV_HANDLE)
                and (record is not None or asked
                     or policy is not None and policy.asks_peer[method])):
            peer = peer_of(argument)
            if peer is not None:
                facts.pid, uid, gid = peer
                facts.uid = -1 if uid is None else uid
                facts.gid = -1 if gid is None else gid
                if record is not None:
                    record.peer = peer
        return 0

    cdef int look_up_handle(self, VMM vmm, uint64_t handle, Facts *facts, Record record) except -1:
        """Find out what a handle names, if it is one.

        Seals are never removed and values of handles never used again: what is true now is true
        when the call is carried out, or stricter.
        """
        cdef HandleFacts found
        cdef Request request = new_request(HANDLE_INFO)
        request.handle = handle
        request.facts = &found
        if perform(vmm.space, &request).reason != DONE:
            return 0
        if facts != NULL:
            facts.seals = found.seals
        if record is not None:
            record.sid = found.sid
            record.origin_sid = found.origin_sid if found.cloned else None
        return 0


cdef str name_of_callable(object called):
    """The name of a callable, or its class if it has none."""
    try:
        name = called.__qualname__
    except Exception:
        name = None
    return one_line(name) if type(name) is str else kind_of(called)


cdef str words_of(object problem):
    """The message of an exception: a socket of the caller's may raise any class."""
    try:
        text = str(problem)
    except Exception:
        text = kind_of(problem)
    return str.__str__(text)

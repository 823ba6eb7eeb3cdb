"""A VMM's policy and audit, asked once, before every call.

Every public method begins with one test: whether the VMM is watched. One that is goes through
here, whoever called it and by which face: the arguments become plain numbers, the policy decides
about these, the method is carried out with these, and the audit writes down what came of it.
Nothing here runs under the VMM's mutex.
"""

cimport cython
from libc.stdint cimport uint64_t
from posix.unistd cimport getpid

from vmm_linux._answer cimport DONE, HANDLE_INFO, Request
from vmm_linux._arguments cimport handle_request
from vmm_linux._audit cimport Audit, Record, tell_unraisable
from vmm_linux._calls cimport (
    CALL_CLOSE,
    CALL_HANDLE_FILENO,
    CALL_MDL_CREATE_FROM_VM,
    CALL_RECV_HANDLE,
    CALL_SEND_HANDLE,
    Facts,
    Question,
    as_numbers,
    name_of,
    normalised,
)
from vmm_linux._mdl cimport HandleFacts
from vmm_linux._open_file cimport Descriptor
from vmm_linux._rules cimport NOBODY, RuleTable

import os
from socket import SocketType
from threading import get_ident

from vmm_linux import _transfer
from vmm_linux._core import imports
from vmm_linux._core.values import describe, kind_of, one_line
from vmm_linux.errors import (
    InvalidArgument,
    InvalidOperation,
    Retcode,
    SecurityDisallow,
    VmmError,
    refuse_copies,
)
from vmm_linux.handles import Handle

# The environment of a program that is not to be edited, and of the VMM that a process gets
# without asking.
POLICY_VARIABLE = "VMM_LINUX_POLICY"
AUDIT_VARIABLE = "VMM_LINUX_AUDIT"
POLICY_MODULE = "vmm_linux.policy"
AUDIT_MODULE = "vmm_linux.audit"

# Who is to have them gets them with the package: the making of a VMM is no time for imports.
for variable, module in ((POLICY_VARIABLE, POLICY_MODULE), (AUDIT_VARIABLE, AUDIT_MODULE)):
    if os.environ.get(variable):
        __import__(module)

cdef object close_socket = SocketType.close


# The policy must not be cleared while the VMM can still be called: without one, all is allowed.
@cython.no_gc_clear
cdef class Watched:
    """The base of every VMM: what its methods go through when somebody is to be asked or told."""

    __reduce__ = refuse_copies(
        "each owns its memory; make another VMM, and share memory by an Mdl")

    def __cinit__(self, *arguments, **keywords):
        # Until somebody says so, it is not known that nobody is to be asked. Nothing here may fail:
        # the classes above are not there yet, and theirs is what would be called at the end.
        self.is_watched = True

    cdef int settle(self, object policy, object audit) except -1:
        """Say once who is to be asked and told; who is not named comes from the environment.

        Whether it was this call that said so.
        """
        cdef bint given = policy is not None or audit is not None
        if self.is_settled:
            return refuse_late(given)
        if policy is None:
            policy = policy_of_environment()
        elif not isinstance(policy, RuleTable) or not (<RuleTable>policy).compiled:
            raise InvalidArgument("VMM", f"policy is {describe(policy)}, not a Policy")
        if audit is None:
            audit = audit_of_environment(policy)
        elif not isinstance(audit, Audit) or not (<Audit>audit).made:
            raise InvalidArgument("VMM", f"audit is {describe(audit)}, not an Audit")
        deciding = set()
        # Another thread may have called a method while files were read, or memory was cleaned up.
        if self.is_settled:
            return refuse_late(given)
        self.deciding = deciding
        self.policy = policy
        self.audit = audit
        self.forbidden = self.policy.forbidden if policy is not None else 0
        self.is_watched = policy is not None or audit is not None
        self.is_settled = True
        return True

    cdef object carry_out(self, int call, tuple arguments):
        """Carry out a method, whoever would be asked. The methods are those of classes above."""
        raise AssertionError(name_of(call))

    cdef object watch(self, int call, tuple arguments):
        """A method of a VMM that is watched."""
        if not self.is_settled:
            if call == CALL_CLOSE:
                return self.carry_out(call, arguments)
            self.settle(None, None)
            if not self.is_watched:
                return self.carry_out(call, arguments)
        if self.audit is not None:
            return self.record(call, arguments)
        return self.checked(call, arguments, None)

    cdef object record(self, int call, tuple arguments):
        """Carry out a method if it may be, and write down how that ended."""
        cdef Record record
        try:
            record = self.audit.begin(name_of(call))
        except MemoryError as problem:
            if call != CALL_CLOSE:
                raise
            # Closing only gives back, and memory too: it does not fail for want of a record.
            tell_unraisable(self.audit, problem)
            return self.carry_out(call, arguments)
        try:
            result = self.checked(call, arguments, record)
        except BaseException as problem:
            self.end(record, None, problem)
            raise
        self.end(record, result, None)
        return result

    cdef int end(self, Record record, object result, BaseException problem) except -1:
        """Write down how a call ended, as far as there is memory to tell of it.

        The caller gets what the call made, or why it failed, even if there is none.
        """
        try:
            if problem is None:
                record.rc = Retcode.OK
                if isinstance(result, int):
                    record.result = int(result)     # a handle without its class
                if isinstance(result, Handle):
                    self.look_at_handle(result, NULL, record)
            elif isinstance(problem, VmmError):
                record.rc = problem.rc
                record.error = words_of(problem)
            else:
                record.error = kind_of(problem)
        except Exception as shortage:
            tell_unraisable(self, shortage)
        return self.audit.end(record)

    cdef object checked(self, int call, tuple arguments, Record record):
        """Carry out a method if it may be."""
        cdef Facts facts
        cdef tuple plain
        # Closing only gives back, and leaves nothing that could be called.
        if call == CALL_CLOSE or self.space.closed:
            return self.carry_out(call, arguments)
        plain = normalised(call, arguments, &facts)
        if record is not None:
            record.numbers = as_numbers(call, plain)
        if call != CALL_SEND_HANDLE and call != CALL_RECV_HANDLE or self.policy is None:
            return self.checked_plain(call, plain, &facts, record, None)
        # A socket of this package's own: what the policy looks at is what is used, whatever the
        # caller's class overrides, or another thread puts under the descriptor's number.
        held = Descriptor()
        sock = _transfer.duplicate(name_of(call), plain[0], held)
        try:
            return self.checked_plain(call, (sock,) + plain[1:], &facts, record, held)
        finally:
            # Not by Python code, which takes memory: what came is the caller's already.
            if held.is_open:
                close_socket(sock)
            else:
                sock.detach()

    cdef object checked_plain(self, int call, tuple plain, Facts *facts, Record record,
                              Descriptor held):
        """Carry out a method with these very arguments if it may be.

        ``held`` is the descriptor of a socket of this package's own, or None.
        """
        self.look(call, plain, facts, record)
        self.decide(call, plain, facts, record)
        if held is not None and not held.is_open:
            raise InvalidOperation(
                name_of(call), "the program closed the socket's duplicate that the policy was "
                "asked about, or put another file under its number (os.closerange, os.dup2)")
        if record is not None and self.audit.writes_first(
                None if self.policy is None else self.policy.audit_failure):
            self.audit.write_before(record)
        try:
            return self.carry_out(call, plain)
        except SecurityDisallow:
            # The one rule that looks at the pages themselves, under the mutex.
            if record is not None and call == CALL_MDL_CREATE_FROM_VM:
                record.decision, record.rule = "deny", "no executable MDL"
            raise

    # ---- the decision -------------------------------------------------------------------------

    cdef int decide(self, int call, tuple plain, Facts *facts, Record record) except -1:
        """Raise what the policy says no to."""
        cdef bint allowed = True
        cdef int number
        cdef str rule = None
        cause = None
        if self.policy is not None:
            number = self.policy.answer(call, facts)
            if self.deciding and (getpid(), get_ident()) in self.deciding:
                allowed, rule = False, "no calls from inside the policy"
            elif number != NOBODY:
                allowed = number >= 0
                if record is not None or not allowed:
                    rule = self.policy.name_of_rule(number if allowed else -1 - number)
            elif self.policy.ask is not None:
                allowed, rule, cause = self.ask(call, plain, facts)
            else:
                allowed, rule = self.policy.allows_otherwise, "default"
        if record is not None:
            record.decision = "allow" if allowed else "deny"
            record.rule = rule
        if not allowed:
            raise SecurityDisallow(
                name_of(call), f"the policy does not allow it (rule: {one_line(rule)})") from cause
        return 0

    cdef tuple ask(self, int call, tuple plain, Facts *facts):
        """Ask the policy's callable: whether the call is allowed, by whom, and what it raised."""
        cdef Question question = Question.__new__(Question)
        cdef object asking = (getpid(), get_ident())
        cdef str name = name_of_callable(self.policy.ask)
        question.vmm = self
        question.facts = facts[0]
        question.method = name_of(call)
        question.arguments = as_numbers(call, plain)
        self.deciding.add(asking)
        try:
            answer = self.policy.ask(question)
        except Exception as problem:
            return False, f"{name} raised {kind_of(problem)}", problem
        finally:
            self.deciding.discard(asking)
        if answer is True:
            return True, name, None
        # No code of the answer's own is to run outside of the questioning.
        return False, f"{name}: {one_line(answer)}" if isinstance(answer, str) else name, None

    # ---- what there is to know ------------------------------------------------------------------

    cdef int look(self, int call, tuple plain, Facts *facts, Record record) except -1:
        """Find out what rules ask about, and the audit writes down, beside the arguments."""
        cdef RuleTable policy = self.policy
        cdef bint leaves = call == CALL_SEND_HANDLE or call == CALL_HANDLE_FILENO
        cdef bint asked = policy is not None and policy.ask is not None
        if facts.handle != 0 and (
                record is not None
                or leaves and (asked or policy is not None and policy.asks_seals[call])):
            self.look_at_handle(facts.handle, facts if leaves else NULL, record)
        if ((call == CALL_SEND_HANDLE or call == CALL_RECV_HANDLE)
                and (record is not None or asked
                     or policy is not None and policy.asks_peer[call])):
            peer = _transfer.peer_of(plain[0])
            if peer is not None:
                facts.pid, uid, gid = peer
                facts.uid = -1 if uid is None else uid
                facts.gid = -1 if gid is None else gid
                if record is not None:
                    record.peer = peer
        return 0

    cdef int look_at_handle(self, uint64_t handle, Facts *facts, Record record) except -1:
        """Find out what a handle names, if it is one. Seals are never lifted, and values of
        handles never used again: what is so now is so when the call is carried out, or stricter.
        """
        cdef HandleFacts found
        cdef Request request = handle_request(HANDLE_INFO, handle, 0)
        request.buffer = &found
        if self.space.perform(&request).reason != DONE:
            return 0
        if facts != NULL:
            facts.seals = found.seals
        if record is not None:
            record.sid = found.sid
            record.origin_sid = found.origin_sid if found.cloned else None
        return 0


cdef str name_of_callable(object called):
    """What a callable says that it is called, if it says that; else its class."""
    try:
        name = called.__qualname__
    except Exception:
        name = None
    return one_line(name) if type(name) is str else kind_of(called)


cdef str words_of(object problem):
    """What an exception says, if it says that: a socket of the caller's may raise any class."""
    try:
        text = str(problem)
    except Exception:
        text = kind_of(problem)
    return str.__str__(text)


cdef bint refuse_late(bint given) except -1:
    """It is settled who is asked and told: whoever names others now is not to think they are."""
    if not given:
        return False
    raise InvalidOperation(
        "VMM", "a VMM keeps the policy and the audit that it was made with, or that its first "
        "call found in the environment; make another one")


cdef object policy_of_environment():
    """The policy that the environment names, or None."""
    path = os.environ.get(POLICY_VARIABLE)
    if not path:
        return None
    return imports.needed("VMM", POLICY_MODULE).Policy.from_toml(path)


cdef object audit_of_environment(RuleTable policy):
    """The audit that the environment names, or None."""
    path = os.environ.get(AUDIT_VARIABLE)
    if not path:
        return None
    audit = imports.needed("VMM", AUDIT_MODULE)
    return audit.Audit(
        path, failure=(None if policy is None else policy.audit_failure) or "deny")

"""A policy's rules, compiled: for each method a list of masks and bounds, gone through in order.

The first rule that matches a call answers. No Python code runs, so that nothing can come between
a question and its answer.
"""

cimport cython
from libc.stdint cimport int64_t, uint64_t

cdef extern from "<unistd.h>" nogil:
    unsigned int geteuid()


@cython.no_gc_clear
cdef class RuleTable:
    """What a ``Policy`` is at its core. Compiled once, and never changed."""

    def __cinit__(self, *arguments, **keywords):
        self.rules.resize(CALLS)

    cdef int answer(self, int call, const Facts *facts) noexcept:
        """The number of the rule that matches, negative (``-1 - number``) where it denies.

        ``NOBODY`` where none does.
        """
        cdef size_t place
        for place in range(self.rules[call].size()):
            if matches(&self.rules[call][place], facts):
                if self.rules[call][place].allows:
                    return self.rules[call][place].number
                return -1 - self.rules[call][place].number
        return NOBODY

    cdef str name_of_rule(self, int number):
        """What a rule is called."""
        return <str>self.names[number]

    def _compile(self, rules, names, allows_otherwise, ask, forbidden, audit_failure):
        """Take the rules: tuples ``(calls, allows, number, flags, rights, seals, sizes, peers)``.

        ``flags``, ``rights`` and ``seals`` are triples (all, any, none), ``sizes`` a pair,
        ``peers`` the users, the groups, and whether it has to be another user.
        """
        cdef Rule rule
        cdef int call
        if self.compiled:
            raise RuntimeError("a policy does not change; make another one")
        for calls, allows, number, flags, rights, seals, sizes, peers in rules:
            rule.allows = allows
            rule.number = number
            rule.flags.all, rule.flags.any, rule.flags.none = flags
            rule.rights.all, rule.rights.any, rule.rights.none = rights
            rule.seals.all, rule.seals.any, rule.seals.none = seals
            rule.min_size, rule.max_size = sizes
            rule.uids, rule.gids, rule.other_user = peers
            for call in calls:
                self.rules.at(call).push_back(rule)     # an IndexError where there is none
                if any(seals):
                    self.asks_seals[call] = True
                if any(peers):
                    self.asks_peer[call] = True
        self.names = names
        self.allows_otherwise = allows_otherwise
        self.ask = ask
        self.forbidden = forbidden
        self.audit_failure = audit_failure
        self.compiled = True


cdef bint matches(const Rule *rule, const Facts *facts) noexcept:
    """Whether every condition of a rule holds."""
    return (
        has(&rule.flags, facts.flags)
        and rule.min_size <= facts.size <= rule.max_size
        and has(&rule.rights, facts.rights)
        and has(&rule.seals, facts.seals)
        and among(rule.uids, facts.uid)
        and among(rule.gids, facts.gid)
        and (not rule.other_user or facts.uid != <int64_t>geteuid())
    )


cdef bint has(const Bits *bits, uint64_t value) noexcept:
    """Whether a value has the bits that are wanted, and not the others."""
    return (
        value & bits.all == bits.all
        and (bits.any == 0 or value & bits.any != 0)
        and value & bits.none == 0
    )


cdef bint among(const vector[int64_t] &wanted, int64_t found) noexcept:
    """Whether a number is one of those that are wanted, if any is."""
    cdef size_t place
    if wanted.empty():
        return True
    for place in range(wanted.size()):
        if wanted[place] == found:
            return True
    return False

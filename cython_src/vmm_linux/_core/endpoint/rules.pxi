"""A policy's rules, compiled: for each method a list of masks and bounds, gone through in order.

The first rule that matches a call answers. No Python code runs, so that nothing can come between
a question and its answer.
"""

cdef enum:
    NO_RULE = 0x7FFFFFFF         # what ``answer`` returns where none matches

cdef struct Bits:
    uint64_t all                # every one of these
    uint64_t any                # one of these at least; 0: any
    uint64_t none               # none of these

cdef struct Rule:
    uint64_t calls              # which it is for, a bit for each
    bint allows
    int number                  # in the policy's list of names
    uint64_t min_size, max_size
    Bits flags, rights, seals
    vector[int64_t] uids        # of the peer, in order; empty: any
    vector[int64_t] gids
    bint other_user             # whether the peer must be another user than this process's

cdef extern from "<algorithm>" namespace "std" nogil:
    bint includes(const int64_t *, const int64_t *, const int64_t *, const int64_t *)

cdef extern from "<unistd.h>" nogil:
    unsigned int geteuid()


@cython.no_gc_clear
cdef class RuleTable:
    """What a ``Policy`` is at its core. Compiled once, and never changed."""

    cdef vector[vector[Rule]] rules     # of every method
    cdef bint asks_seals[METHOD_COUNT]
    cdef bint asks_peer[METHOD_COUNT]
    cdef bint compiled, allows_otherwise
    cdef readonly object ask            # a callable, asked where no rule matches, or None
    cdef readonly uint32_t forbidden    # access that pages of MDL buffers never have
    cdef readonly object audit_failure  # "deny", "continue", or None
    cdef tuple names

    __reduce__ = refuse_copies("they never change; use the same one, or make one of the same rules")

    def __cinit__(self, *arguments, **keywords):
        self.rules.resize(METHOD_COUNT)

    cdef int answer(self, int call, const Facts *facts) noexcept:
        """The number of the rule that matches, negative (``-1 - number``) where it denies.

        ``NO_RULE`` where none does.
        """
        cdef size_t place
        for place in range(self.rules[call].size()):
            if matches(&self.rules[call][place], facts):
                if self.rules[call][place].allows:
                    return self.rules[call][place].number
                return -1 - self.rules[call][place].number
        return NO_RULE

    cdef str name_of_rule(self, int number):
        """What a rule is called."""
        return <str>self.names[number]

    def _decide(self, int call, uint64_t size, uint64_t rights, uint64_t seals, peer, passed):
        """Decide about a call of a tool's own, whose numbers are the tool's too.

        Args:
            call: its number, as in ``_compile``.
            size: bytes of the call.
            rights: that it gives.
            seals: that it puts on.
            peer: ``(uid, gid)``, each None where it is unknown.
            passed: numbers of rules that are passed over.

        Returns:
            Whether it is allowed, and the name of the rule that says so.
        """
        cdef Facts facts
        cdef Rule *rule
        cdef size_t place
        uid, gid = peer
        facts.flags = 0
        facts.size, facts.rights, facts.seals = size, rights, seals
        facts.pid = -1
        facts.uid = -1 if uid is None else uid
        facts.gid = -1 if gid is None else gid
        if not 0 <= call < <int>METHOD_COUNT:
            raise ValueError(f"call {call}")
        for place in range(self.rules[call].size()):
            rule = &self.rules[call][place]
            if matches(rule, &facts) and not (passed and rule.number in passed):
                return rule.allows, self.name_of_rule(rule.number)
        return self.allows_otherwise, "default"

    def _compile(self, rules, tuple names not None, bint allows_otherwise, ask, uint32_t forbidden,
                 audit_failure):
        """Take the rules: tuples ``(calls, allows, number, flags, rights, seals, sizes, peers)``.

        ``flags``, ``rights`` and ``seals`` are triples (all, any, none), ``sizes`` a pair,
        ``peers`` the users, the groups, and whether it must be another user.
        """
        cdef vector[vector[Rule]] of_calls
        cdef Rule rule
        cdef int call
        cdef size_t place
        of_calls.resize(METHOD_COUNT)
        if not all(isinstance(name, str) for name in names):
            raise TypeError("names of rules are strings")
        for numbers in rules:
            rule = rule_of(numbers)
            if not 0 <= rule.number < len(names):
                raise ValueError(f"rule {rule.number} has no name")
            for call in range(METHOD_COUNT):
                if rule.calls >> call & 1:
                    of_calls[call].push_back(rule)
        # From here on no other code runs that could compile it, or use it, meanwhile.
        if self.compiled:
            raise InvalidOperation("Policy", "a policy does not change; make another one")
        self.rules.swap(of_calls)
        for call in range(METHOD_COUNT):
            for place in range(self.rules[call].size()):
                self.asks_seals[call] |= has_bits(&self.rules[call][place].seals)
                self.asks_peer[call] |= has_peers(&self.rules[call][place])
        self.names = names
        self.allows_otherwise = allows_otherwise
        self.ask = ask
        self.forbidden = forbidden
        self.audit_failure = audit_failure
        self.compiled = True


def first_hidden(rules, size_t start):
    """The first rule that never answers, as earlier ones match all calls that it matches.

    Every two rules are compared; as numbers, that is some nanoseconds.

    Args:
        rules: as ``RuleTable`` takes them.
        start: the place of the first that is looked at.

    Returns:
        Its place, and that of the rule which answers calls of the method that it names first; or
        None.
    """
    cdef vector[Rule] compiled
    cdef uint64_t left, first
    cdef size_t place, earlier, answering = 0
    for numbers in rules:
        compiled.push_back(rule_of(numbers))
    for place in range(start, compiled.size()):
        left = compiled[place].calls
        first = <uint64_t>1 << <int>rules[place][0][0]
        for earlier in range(place):
            if left & compiled[earlier].calls == 0 or not covers(
                    &compiled[earlier], &compiled[place]):
                continue
            if left & compiled[earlier].calls & first:
                answering = earlier
            left &= ~compiled[earlier].calls
            if left == 0:
                return place, answering
    return None


cdef Rule rule_of(tuple numbers) except *:
    """A rule out of what ``RuleTable`` takes."""
    cdef Rule rule
    calls, rule.allows, rule.number, flags, rights, seals, sizes, peers = numbers
    rule.calls = 0
    for call in calls:
        rule.calls |= <uint64_t>1 << <int>call
    rule.flags.all, rule.flags.any, rule.flags.none = flags
    rule.rights.all, rule.rights.any, rule.rights.none = rights
    rule.seals.all, rule.seals.any, rule.seals.none = seals
    rule.min_size, rule.max_size = sizes
    rule.uids, rule.gids, rule.other_user = peers
    return rule


cdef bint matches(const Rule *rule, const Facts *facts) noexcept:
    """Whether every condition of a rule holds."""
    return (
        bits_match(&rule.flags, facts.flags)
        and rule.min_size <= facts.size <= rule.max_size
        and bits_match(&rule.rights, facts.rights)
        and bits_match(&rule.seals, facts.seals)
        and (not has_peers(rule) or peer_matches(rule, facts))
    )


cdef bint peer_matches(const Rule *rule, const Facts *facts) noexcept:
    """Whether a rule is about this peer; an unknown user or group counts where the rule denies."""
    return (
        among(rule.uids, facts.uid, not rule.allows)
        and among(rule.gids, facts.gid, not rule.allows)
        and (not rule.other_user
             or (facts.uid != <int64_t>geteuid() if facts.uid >= 0 else not rule.allows))
    )


cdef bint bits_match(const Bits *bits, uint64_t value) noexcept:
    """Whether a value has the bits that are wanted, and not the others."""
    return (
        value & bits.all == bits.all
        and (bits.any == 0 or value & bits.any != 0)
        and value & bits.none == 0
    )


cdef bint among(const vector[int64_t] &wanted, int64_t found, bint unknown) noexcept:
    """Whether a number is one of those that are wanted, if any is; ``unknown`` for one below 0."""
    cdef size_t place
    if wanted.empty():
        return True
    if found < 0:
        return unknown
    for place in range(wanted.size()):
        if wanted[place] == found:
            return True
    return False


cdef bint covers(const Rule *wide, const Rule *narrow) noexcept:
    """Whether a rule matches every call that another matches, as far as the conditions show."""
    return (
        wide.min_size <= narrow.min_size
        and narrow.max_size <= wide.max_size
        and bits_cover(&wide.flags, &narrow.flags)
        and bits_cover(&wide.rights, &narrow.rights)
        and bits_cover(&wide.seals, &narrow.seals)
        and (not has_peers(wide) or peers_cover(wide, narrow))
    )


cdef bint peers_cover(const Rule *wide, const Rule *narrow) noexcept:
    """Whether every peer that a rule is about is one that another is about, the unknown too."""
    return (
        ids_cover(wide.uids, narrow.uids)
        and ids_cover(wide.gids, narrow.gids)
        and (not wide.other_user or narrow.other_user)
        and (not wide.allows or narrow.allows)
    )


cdef bint bits_cover(const Bits *wide, const Bits *narrow) noexcept:
    """Whether every value that has some bits has others."""
    return (
        wide.all & ~narrow.all == 0
        and wide.none & ~narrow.none == 0
        and (
            wide.any == 0
            or wide.any & narrow.all != 0
            or (narrow.any != 0 and narrow.any & ~wide.any == 0)
        )
    )


cdef bint ids_cover(const vector[int64_t] &wide, const vector[int64_t] &narrow) noexcept:
    """Whether every number that is one of some, if any are, is one of others."""
    return wide.empty() or not narrow.empty() and includes(
        wide.data(), wide.data() + wide.size(), narrow.data(), narrow.data() + narrow.size())


cdef bint has_bits(const Bits *bits) noexcept:
    """Whether any bit matters."""
    return bits.all | bits.any | bits.none != 0


cdef bint has_peers(const Rule *rule) noexcept:
    """Whether it matters who is at the other end."""
    return not rule.uids.empty() or not rule.gids.empty() or rule.other_user

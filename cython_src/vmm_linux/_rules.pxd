"""A policy's rules, compiled (see ``_rules.pyx``)."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp.vector cimport vector

from vmm_linux._calls cimport CALLS, Facts

cdef enum:
    NOBODY = 0x7FFFFFFF         # what ``answer`` returns where no rule matches

cdef struct Bits:
    uint64_t all                # every one of these
    uint64_t any                # one of these at least; 0: no matter
    uint64_t none               # none of these

cdef struct Rule:
    uint64_t calls              # which it is for, a bit for each
    bint allows
    int number                  # in the policy's list of names
    uint64_t min_size
    uint64_t max_size
    Bits flags
    Bits rights
    Bits seals
    vector[int64_t] uids        # of the peer, in order; empty: no matter
    vector[int64_t] gids
    bint other_user             # whether the peer has to be another user than this process's

cdef class RuleTable:
    cdef vector[vector[Rule]] rules     # of every method
    cdef bint asks_seals[CALLS]
    cdef bint asks_peer[CALLS]
    cdef bint compiled
    cdef bint allows_otherwise
    cdef readonly object ask            # a callable, asked where no rule matches, or None
    cdef readonly uint32_t forbidden    # access that pages of MDL buffers never have
    cdef readonly object audit_failure  # "deny", "continue", or None
    cdef tuple names

    cdef int answer(self, int call, const Facts *facts) noexcept
    cdef str name_of_rule(self, int number)

"""The ledger: pure data, no I/O."""

cimport cython
from cython.operator cimport predecrement, preincrement
from libc.string cimport memset

from vmm_linux._core.vocabulary cimport (
    FLAG_RESERVE,
    FLAG_RWX_MASK,
    KIND_PRIVATE,
    STATE_COMMITTED,
    STATE_RESERVED,
)

from vmm_linux.errors import refuse_copies

include "ledger/runs.pxi"
include "ledger/ledger.pxi"

"""Layer ledger: what a VMM intends with its memory: regions, and the runs of pages in them.

Pure data: no I/O and no lock. The caller holds the mutex of the VMM. What can run out of memory
returns false with nothing changed; what follows a system call cannot fail.

Its parts: ``runs`` (which runs are alike, what they add to the counts) and ``ledger`` (the class).
The ordered map that holds both is ``ordered_map.h``; ``containers.pxd`` declares it.
"""

cimport cython
from cython.operator cimport predecrement, preincrement
from libc.string cimport memset

from vmm_linux._core.vocabulary cimport (
    FLAG_RESERVE, FLAG_RWX_MASK, KIND_PRIVATE, STATE_COMMITTED, STATE_RESERVED,
)

from vmm_linux.errors import refuse_copies

include "ledger/runs.pxi"
include "ledger/ledger.pxi"

"""How far this process has come from its ancestors by fork (see ``_fork.pyx``)."""

from libc.stdint cimport uint32_t

cpdef uint32_t generation() noexcept nogil
cpdef uint32_t children() noexcept nogil

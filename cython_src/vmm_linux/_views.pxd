"""Views: memory as a Python buffer, held as long as somebody looks (see ``_views.pyx``)."""

from libc.stdint cimport uintptr_t

from vmm_linux._address_space cimport AddressSpace

cdef object pinned_view(AddressSpace space, uintptr_t va, size_t size, object writable)

"""One mapping of a process as a Python object (see ``_smaps_record.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

cdef enum:
    FIGURES = 24                # how many figures of smaps have an attribute of their own
    FIGURE_SIZE = 0
    FIGURE_KERNEL_PAGE_SIZE = 1
    FIGURE_MMU_PAGE_SIZE = 2
    FIGURE_PROTECTION_KEY = 23

cdef class SmapsRecord:
    cdef uintptr_t range_start
    cdef uintptr_t range_end
    cdef uint64_t file_offset
    cdef uint64_t file_inode
    cdef uint32_t device_major
    cdef uint32_t device_minor
    cdef uint32_t permission_bits
    cdef uint32_t known         # bit i: values[i] was given
    cdef uint64_t *values       # FIGURES of them, or NULL
    cdef dict others            # figures with no attribute of their own, or None
    cdef readonly object pathname
    cdef readonly object vm_flags

    cdef object figure(self, int index)

cdef str device_text(uint32_t major, uint32_t minor)
cdef int restore_into(SmapsRecord record, tuple said) except -1
cdef int set_figure(SmapsRecord record, int i, uint64_t value) except -1

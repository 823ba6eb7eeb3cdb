"""What a caller may pass (see ``_arguments.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._answer cimport Method, Request

cdef uint64_t number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF
cdef str describe(object value)
cdef object iterate(str method, object ranges)
cdef tuple pair(str method, object item)
cdef int check_size(str method, uint64_t size, str name=?) except -1
cdef int check_multiple(str method, str name, uint64_t value) except -1
cdef int check_end(str method, str name, uint64_t va, uint64_t size) except -1
cdef int check_bytes(str method, uint64_t va, uint64_t size) except -1
cdef int check_pages(str method, str name, uint64_t va, uint64_t size,
                     str size_name=?) except -1
cdef int check_protection(str method, uint64_t protection) except -1
cdef int check_some_access(str method, uint64_t flags) except -1
cdef int check_bits(str method, str name, uint64_t value, uint64_t known) except -1
cdef int check_fixed(str method, str name, uint64_t flags, uint64_t addr) except -1
cdef int check_region_flags(uint64_t flags, uint64_t addr) except -1
cdef Request request_of(Method method, uint64_t va, uint64_t size, uint64_t flags) noexcept
cdef Request handle_request(Method method, uint64_t handle, uint32_t flags) noexcept

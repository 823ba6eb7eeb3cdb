"""What a caller may pass: every argument of the endpoint is checked here and nowhere else.

Below, numbers are page multiples that do not overflow, and flags are known.
"""

cdef extern from "Python.h":
    bint PyLong_Check(object)
    bint PyBool_Check(object)
    long long PyLong_AsLongLongAndOverflow(object, int *)
    unsigned long long PyLong_AsUnsignedLongLong(object) except? 0xFFFFFFFFFFFFFFFF

cdef enum:
    REGION_FLAGS = (
        FLAG_RWX_MASK | FLAG_RESERVE | FLAG_COMMIT | FLAG_LOCKED | FLAG_LOW_GUARD
        | FLAG_HIGH_GUARD | FLAG_GROW_DOWN | FLAG_CACHE_MASK | FLAG_FIXED | FLAG_HUGE
        | FLAG_SHAREABLE)
    MAP_FLAGS = FLAG_RWX_MASK | FLAG_LOCKED | FLAG_LOW_GUARD | FLAG_HIGH_GUARD | FLAG_FIXED
    UNCHOOSABLE = FLAG_WRITE_THROUGH | FLAG_WRITE_COMBINE | FLAG_CACHE_DISABLE


cdef inline bint is_plain_number(object value, uint64_t *number) noexcept:
    """Whether this is an int from 0 to 2**63 - 1, and no bool: ``number`` then."""
    cdef long long result
    cdef int overflow
    if PyLong_Check(value) and not PyBool_Check(value):
        result = PyLong_AsLongLongAndOverflow(value, &overflow)
        if result >= 0:
            number[0] = result
            return True
    return False


cdef inline uint64_t number(int method, int place, object value) except? 0xFFFFFFFFFFFFFFFF:
    """The 64-bit number of an argument: an int or what has ``__index__``, but no bool."""
    cdef uint64_t result
    if is_plain_number(value, &result):
        return result
    if kinds[method][place] == ARGUMENT_HANDLE and isinstance(value, Exporter):
        value = handle_of(method, place, value)
    return other_number(name_of(method), <str>argument_names[method][place], value)


cdef object handle_of(int method, int place, object value):
    """The handle that an ``Mdl`` stands for."""
    try:
        return value._as_handle()
    except MemoryError:
        raise
    except Exception as problem:    # it was made without its class
        raise InvalidArgument(
            name_of(method), f"{argument_names[method][place]} is {describe(value)}, which has no "
            "handle") from problem


cdef inline uint64_t number_of_range(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF:
    """The same of one of the two values of a range."""
    cdef uint64_t result
    if is_plain_number(value, &result):
        return result
    return other_number(method, name, value)


cdef inline tuple pair(str method, object item):
    """The two values of a range."""
    if type(item) is tuple and len(<tuple>item) == 2:
        return item
    return other_pair(method, item)


cdef inline int check_bytes(int method, uint64_t va, uint64_t size) except -1:
    """Bytes of memory at any address: one at least, which end below 2**64."""
    if size != 0 and va + size >= va:
        return 0
    return refuse_bytes(method, "va", va, size, "size")


cdef inline int check_pages(int method, str name, uint64_t va, uint64_t size,
                            str size_name) except -1:
    """Whole pages; ``name`` and ``size_name`` are what the caller calls the two numbers."""
    if size != 0 and is_multiple(va | size, PAGE_SIZE) and va + size >= va:
        return 0
    return refuse_pages(method, name, va, size, size_name)


cdef inline int check_protection(int method, uint64_t protection) except -1:
    """None, R, RW, RX or RWX."""
    if is_legal_protection(protection):
        return 0
    return refuse_protection(method, protection)


cdef inline int check_region_flags(uint64_t flags, uint64_t addr) except -1:
    """The flags of a new region, whose address is ``addr``."""
    if (flags & ~<uint64_t>(REGION_FLAGS & ~UNCHOOSABLE) == 0 and flags & FLAG_RESERVE
            and is_legal_protection(flags & FLAG_RWX_MASK)
            and (addr != 0 or not flags & FLAG_FIXED)):
        return 0
    return refuse_region_flags(flags, addr)


cdef uint64_t other_number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF:
    """``number`` of what is no plain int below 2**63, or no number."""
    value = index(method, name, value)
    try:
        return PyLong_AsUnsignedLongLong(value)
    except OverflowError:
        raise InvalidArgument(
            method, f"{name} {written(value, '#x')} is not in 0 ... 2**64 - 1") from None


cdef object iterate(str method, object ranges):
    """What the caller gave as ranges, to go through: none of the caller's code runs in that."""
    if type(ranges) is list or type(ranges) is tuple:
        return ranges
    try:
        return list(ranges)
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            method, f"ranges is {describe(ranges)}, not pairs (va, size)") from problem


cdef tuple other_pair(str method, object item):
    """``pair`` of what is no plain tuple of two."""
    try:
        va, size = item
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            method, f"a range is {describe(item)}, not a pair (va, size)") from problem
    return va, size


cdef object plain_limits(str method, object value):
    """A plain ``Limits``: a subclass could compute its bounds again later."""
    if not is_a(value, Limits):
        raise InvalidArgument(method, f"limits is {describe(value)}, not Limits(...)")
    try:
        bounds = {limit: getattr(value, limit) for limit in LIMIT_NAMES}
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            method, f"limits is {describe(value)}, which does not tell its bounds") from problem
    return Limits(**bounds)


cdef int tristate(int method, int place, object value) except -2:
    """1 for True, 0 for False, -1 for None."""
    if value is None:
        return -1
    if value is True or value is False:
        return value is True
    raise InvalidArgument(
        name_of(method),
        f"{argument_names[method][place]} is {describe(value)}, not True, False or None")


cdef int switch(int method, int place, object value) except -1:
    """1 for what Python takes for true, else 0."""
    try:
        return 1 if value else 0
    except Exception as problem:
        raise InvalidArgument(
            name_of(method),
            f"{argument_names[method][place]} is {describe(value)}, not True or False") from problem


cdef int check_multiple(int method, str name, uint64_t value) except -1:
    """A page multiple."""
    if not is_multiple(value, PAGE_SIZE):
        raise InvalidArgument(
            name_of(method),
            f"{name} 0x{value:x} is not a multiple of the page size, {PAGE_SIZE} bytes")
    return 0


cdef int refuse_bytes(int method, str name, uint64_t va, uint64_t size, str size_name) except -1:
    """Say why these are no bytes of memory."""
    if size == 0:
        raise InvalidArgument(name_of(method), f"{size_name} 0: at least one byte is needed")
    raise InvalidArgument(name_of(method), f"{name} 0x{va:x} + size {size} is beyond 64 bits")


cdef int refuse_pages(int method, str name, uint64_t va, uint64_t size, str size_name) except -1:
    """Say why these are no whole pages of memory."""
    if size != 0:
        check_multiple(method, name, va)
        check_multiple(method, size_name, size)
    return refuse_bytes(method, name, va, size, size_name)


cdef int refuse_protection(int method, uint64_t protection) except -1:
    """Say that this is no protection."""
    raise InvalidArgument(
        name_of(method), f"protection {protection:#x} is not one of none, READ, READ|WRITE, "
        "READ|EXECUTE, READ|WRITE|EXECUTE")


cdef int check_some_access(int method, uint64_t flags) except -1:
    """A protection that gives some access."""
    if flags & FLAG_RWX_MASK == 0:
        raise InvalidArgument(name_of(method), "no protection: a buffer allows READ at least")
    return check_protection(method, flags & FLAG_RWX_MASK)


cdef int check_bits(int method, str name, uint64_t value, uint64_t known) except -1:
    """No bits but the known ones."""
    if value & ~known:
        raise InvalidArgument(
            name_of(method), f"{name} {value:#x}: unknown bits {value & ~known:#x}")
    return 0


cdef int check_fixed(int method, str name, uint64_t flags, uint64_t addr) except -1:
    """An address where FIXED needs one."""
    if flags & FLAG_FIXED and addr == 0:
        raise InvalidArgument(name_of(method), f"FIXED needs an address, and {name} is 0")
    return 0


cdef int refuse_region_flags(uint64_t flags, uint64_t addr) except -1:
    """Say what is wrong with the flags of a new region, whose address is ``addr``."""
    check_bits(ALLOCATE, "flags", flags, REGION_FLAGS)
    if not flags & FLAG_RESERVE:
        raise InvalidArgument("allocate", f"flags {flags:#x}: RESERVE is required")
    check_protection(ALLOCATE, flags & FLAG_RWX_MASK)
    check_fixed(ALLOCATE, "addr", flags, addr)
    raise Unimplemented(
        "allocate", f"flags {flags:#x}: a Linux process cannot choose "
        f"{VmmFlags(flags & UNCHOOSABLE).name}; WRITE_BACK is what it gets")

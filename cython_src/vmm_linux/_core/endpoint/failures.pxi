"""Failures in words: the exception for a call that failed, and its return code."""

REASONS = {
    CLOSED: (Retcode.INVALID_OPERATION, "this VMM is closed; make another one"),
    NOT_IN_REGION: (
        Retcode.RESOURCE_NOT_FOUND,
        "[0x{va:x}, 0x{va:x} + {size}) is not wholly inside one region of this VMM; "
        "query(0x{va:x}) tells what is there"),
    TAKEN: (
        Retcode.ALREADY_EXISTS,
        "FIXED, and something is mapped in the {size} bytes (and guards) at 0x{va:x}; "
        "leave FIXED out to take another address"),
    OUTSIDE: (
        Retcode.INVALID_ARGUMENT,
        "FIXED, and [0x{va:x}, 0x{va:x} + {size}) with its guards is not inside what a process may "
        "map, 0x{lowest:x} (vm.mmap_min_addr) to 0x{highest:x}"),
    TOO_LARGE: (
        Retcode.OUT_OF_MEMORY,
        "{size} bytes (and guards) are more than the address space, which ends at 0x{highest:x}"),
    NOT_COMMITTED: (
        Retcode.INVALID_OPERATION,
        "the page at 0x{subject:x} is reserved, not committed; commit it first"),
    NO_ACCESS: (
        Retcode.INVALID_OPERATION,
        "the protection of the page at 0x{subject:x} does not allow it; protect() changes that"),
    IS_MDL: (
        Retcode.INVALID_OPERATION,
        "the page at 0x{subject:x} belongs to an MDL buffer, which stays committed; free it "
        "instead"),
    INHERITED: (
        Retcode.INVALID_OPERATION,
        "the SHAREABLE page at 0x{subject:x} came from the parent process, which would lose its "
        "contents; free it instead"),
    ABOVE_CEILING: (
        Retcode.NO_CAPABILITY,
        "the page at 0x{subject:x} belongs to a buffer, and may not have this protection here; map "
        "the buffer again with it"),
    PINNED: (
        Retcode.BUSY,
        "a view holds the page at 0x{subject:x}; let go of the view and of all that was made of "
        "it"),
    NO_HUGE_PAGES: (
        Retcode.UNIMPLEMENTED,
        "HUGE: this kernel has no transparent huge pages; leave the flag out"),
    NO_LEDGER_MEMORY: (
        Retcode.OUT_OF_MEMORY,
        "the process has no memory left for the package's own records"),
    NO_BACKING_MEMORY: (
        Retcode.OUT_OF_MEMORY,
        "no memory could be had for a page of the shared memory between 0x{subject:x} and "
        "0x{va:x} + {size}; LOCKED takes it when it is committed"),
    UNKNOWN_HANDLE: (Retcode.INVALID_ARGUMENT, "0x{handle:x} is not a handle of this VMM"),
    CLOSED_HANDLE: (Retcode.RESOURCE_NOT_FOUND, "handle 0x{handle:x} was closed"),
    REVOKED: (Retcode.HANDLE_REVOKED, "handle 0x{handle:x} was revoked; close it"),
    LACKS_RIGHTS: (Retcode.NO_CAPABILITY, "handle 0x{handle:x} does not give {rights}"),
    BEYOND_BUFFER: (
        Retcode.INVALID_ARGUMENT,
        "{size} bytes at offset {offset} are not inside the buffer of {subject} bytes"),
    ALREADY_MDL: (
        Retcode.INVALID_OPERATION,
        "the page at 0x{subject:x} belongs to an MDL buffer already; clone that"),
    SEALED: (Retcode.NO_CAPABILITY, "the buffer is sealed: nobody can map it writable any more"),
    STILL_WRITABLE: (
        Retcode.BUSY,
        "somebody can still write to the buffer; FREEZE needs every writable mapping of it, in "
        "every process, to be freed first"),
    OVERLAP: (
        Retcode.INVALID_ARGUMENT,
        "[0x{va:x}, 0x{va:x} + {size}) overlaps another of the ranges"),
    NO_SINGLE_DESCRIPTOR: (
        Retcode.INVALID_OPERATION,
        "the buffer is a clone or in segments, and no one descriptor is just its memory; "
        "send_handle sends it"),
    FORBIDDEN_OF_MDL: (
        Retcode.SECURITY_DISALLOW,
        "the policy does not allow it (rule: no executable MDL): the page at 0x{subject:x} is "
        "executable; protect() changes that"),
    UNSEALABLE: (Retcode.NO_CAPABILITY, "the memory takes no more seals"),
    TOO_MANY_SEGMENTS: (
        Retcode.INVALID_OPERATION,
        "the buffer's {subject} segments and its identity are more than the 253 descriptors of a "
        "message; clone a smaller part, or make the buffer of larger segments"),
}
"""Why a call can fail without the kernel's word: return code and message."""

OVER_PAGES = frozenset((
    COMMIT, DECOMMIT, PROTECT, FREE, MDL_CREATE_FROM_VM, COMMIT_RANGES, DECOMMIT_RANGES))
"""The methods whose range is pages of a region."""


RESOURCE_LIMITS = ((LIMIT_AS, "RLIMIT_AS"), (LIMIT_DATA, "RLIMIT_DATA"))


cdef int check_result(int result, str method, str message) except -1:
    """Raise what a -errno of the kernel means for a method."""
    if result < 0:
        raise error(RETCODES.get(-result, Retcode.FAIL), method, message, -result)
    return 0


cdef object explain(Request *request, Answer *answer):
    """The exception for a call that failed, with the values that were wrong and what to do."""
    cdef size_t guards = guard_below(request.flags) + guard_above(request.flags)
    method = name_of(request.method)
    if answer.reason == BEYOND_LIMIT:
        limit = LIMIT_NAMES[answer.limit]
        rc, message = Retcode.QUOTA_EXCEEDED, (
            f"{answer.requested} more {limit} than the {answer.used} in use would pass this VMM's "
            f"limit, {answer.bound}; give some back, or raise it: "
            f"vmm.limits = vmm.limits.replace({limit}=...)")
    elif answer.reason != KERNEL_REFUSED:
        rc, template = REASONS[answer.reason]
        message = template.format(
            va=request.va, size=request.size, subject=answer.subject, handle=request.handle,
            offset=request.offset, rights=Rights(answer.subject & RIGHT_ALL).name,
            lowest=kernel.mmap_min_addr(), highest=kernel.user_space_end())
    elif answer.error == -ENOMEM:
        rc, message = shortage.explain(
            request.va if request.method in OVER_PAGES else None,
            request.size + guards * (answer.resource_limits & LIMIT_AS != 0),
            [name for bit, name in RESOURCE_LIMITS if answer.resource_limits & bit],
            answer.mappings)
    elif answer.error == -EDQUOT:        # our word for a full memory cgroup, not the kernel's
        answer.error = 0
        rc, message = Retcode.OUT_OF_MEMORY, shortage.explain_group(request.size)
    else:
        rc = RETCODES.get(-answer.error, Retcode.FAIL)
        message = shortage.NAMES.get(-answer.error) or (
            f"the kernel refused {request.size} bytes at 0x{request.va:x}")
    if request.method == MDL_SEAL and answer.completed != 0:
        message += f"; the first {answer.completed} bytes of it are sealed"
    return error(rc, method, message, -answer.error or None, completed=answer.completed)


cdef object OK = Retcode.OK
cdef object OUT_OF_MEMORY = Retcode.OUT_OF_MEMORY


def outcome(method, value, *arguments):
    """What a method of ``VMM`` returns and OK; ``value`` and the return code if it fails.

    The pair is made before the call: a result is not lost because memory is short for a pair.
    """
    cdef tuple pair = PyTuple_New(2)
    put(pair, 0, None)
    put(pair, 1, None)
    rc = OK
    try:
        value = method(*arguments)
    except VmmError as problem:
        rc = problem.rc
    except MemoryError:
        rc = OUT_OF_MEMORY
    put(pair, 0, value)
    put(pair, 1, rc)
    Py_DECREF(None)
    Py_DECREF(None)
    return pair


cdef void put(tuple pair, Py_ssize_t place, object value) noexcept:
    """Put an object into an empty place, or over one that the caller releases."""
    Py_INCREF(value)
    PyTuple_SET_ITEM(pair, place, value)

"""A call is carried out: a request to the address space, its answer to Python, and undoing it."""


cdef inline int perform_or_raise(AddressSpace space, Request *request, Answer *answer) except -1:
    """Carry out a call; raise what went wrong."""
    answer[0] = perform(space, request)
    if answer.reason != DONE:
        raise explain(request, answer)
    return 0


cdef object make(AddressSpace space, Request *request):
    """Carry out a call that makes a region or a handle: its address, its ``Handle``.

    If no memory is left for that object, what was made is given back: nothing else names it.
    """
    cdef Answer answer
    cdef bint is_region = request.method == ALLOCATE or request.method == MDL_MAP
    cdef bint is_made = False
    cdef object result
    perform_or_raise(space, request, &answer)
    try:
        result = answer.result if is_region else Handle(answer.result)
        is_made = True
        return result
    finally:
        if not is_made:
            if is_region:
                free_again(space, request, &answer)
            else:
                close_again(space, answer.result)


# What follows takes no memory of the interpreter's.

cdef void free_again(AddressSpace space, const Request *request, const Answer *answer) noexcept:
    """Undo a call that made a region."""
    cdef Request back = new_request(FREE)
    back.va = answer.result
    back.size = request.size
    perform(space, &back)
    if request.method == MDL_MAP:
        undescribe(space, request.handle, answer.descriptions)


cdef void close_again(AddressSpace space, uint64_t handle) noexcept:
    """Undo a call that made a handle."""
    cdef Request back = new_request(HANDLE_CLOSE)
    back.handle = handle
    perform(space, &back)


cdef void undescribe(AddressSpace space, uint64_t handle, uint64_t before) noexcept:
    """Close the read-only descriptions that a failed call opened; there were so many before."""
    cdef Request back = new_request(UNDESCRIBE)
    back.handle = handle
    back.descriptions = before
    perform(space, &back)

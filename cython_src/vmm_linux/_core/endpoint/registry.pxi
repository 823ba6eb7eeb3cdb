"""Every VMM of this process: their intents for inspection, and the warning at exit.

Weak references by address: a WeakSet takes as long to walk through as a whole question to the
kernel.
"""

cdef dict registered = {}


cdef int register(VMM vmm) except -1:
    """Note a new VMM."""
    registered[<uintptr_t><PyObject *>vmm] = weakref.ref(vmm)
    return 0


cdef int unregister(VMM vmm) except -1:
    """Forget a VMM that ends."""
    registered.pop(<uintptr_t><PyObject *>vmm, None)
    return 0


cdef list every_vmm():
    """Every VMM there is, closed ones too."""
    cdef list found = []
    for reference in list(registered.values()):
        vmm = reference()
        if vmm is not None:
            found.append(vmm)
    return found


cdef bint intent_of_any(uintptr_t va, Intent *intent) except -1:
    """What a VMM of this process made of the pages around ``va``.

    False where none made any: then only ``start`` and ``end`` of that are known.
    """
    cdef VMM vmm
    cdef bint found
    cdef uintptr_t start = 0, end = <uintptr_t>-1
    for vmm in every_vmm() if registered else ():
        lock_space(vmm.space)
        found = False
        if not vmm.space.closed:
            found = intent_at(vmm.space.ledger, va, intent)
            start = max(start, intent.start)
            end = min(end, intent.end)
        unlock_space(vmm.space)
        if found:
            return True
    intent.start = start
    intent.end = end
    return False


cdef int add_intents_of_all(vector[Intent] *intents) except -1:
    """Add what every VMM of this process made, each read at one moment."""
    cdef VMM vmm
    for vmm in every_vmm():
        lock_space(vmm.space)
        try:
            if not vmm.space.closed:
                add_intents(vmm.space.ledger, intents)
        finally:
            unlock_space(vmm.space)
    return 0


@atexit.register
def _warn_of_open_vmms():
    """Warn of every VMM that is still open when the interpreter exits."""
    cdef VMM vmm
    for vmm in every_vmm():
        vmm.warn_if_open()

"""``VMM`` as users get it: the endpoint, and the comfort that is built upon it."""

from vmm_linux import _vmm

__all__ = ["VMM"]


class VMM(_vmm.VMM):
    """One client of the endpoint: it sees, changes and frees only what it made itself.

    A context manager: leaving it closes it. A VMM that is dropped, or still open when the
    interpreter exits, warns (``ResourceWarning``) and says where it was made.

    Every method raises a subclass of ``VmmError``, with the return code in ``.rc``, and then has
    changed nothing. On a closed VMM every method but ``close`` is ``INVALID_OPERATION``. Integers
    are ``int`` and whatever has ``__index__``, bools excepted; others are ``INVALID_ARGUMENT``.
    Methods may be called from any thread.
    """

    __slots__ = ()

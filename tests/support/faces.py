"""Both faces of the package behind one call, so that a test can hold them equal."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from vmm_linux import INVALID_HANDLE, VMM, Retcode, VmmError


class Face(Enum):
    """Through which face a call goes."""

    METHODS = "methods"
    ENDPOINT = "endpoint"


class Outcome(NamedTuple):
    """How a call ended: its return code, its out value, and the exception if one was raised."""

    rc: Retcode
    value: Any = None
    error: VmmError | None = None


#: The methods that the reference face has too, with how many parameters each has.
ARITY = {
    "allocate": 3,
    "commit": 3,
    "decommit": 2,
    "protect": 3,
    "free": 2,
    "query": 1,
    "mdl_create": 2,
    "mdl_create_from_vm": 3,
    "mdl_get_size": 1,
    "mdl_map": 5,
    "mdl_clone": 3,
}
REFERENCE_METHODS = tuple(ARITY)

#: What a failed call of the reference face gives in place of its out parameter.
NOTHING = {
    "allocate": 0,
    "query": None,
    "mdl_create": INVALID_HANDLE,
    "mdl_create_from_vm": INVALID_HANDLE,
    "mdl_get_size": 0,
    "mdl_map": 0,
    "mdl_clone": INVALID_HANDLE,
}


def reference_name(method: str) -> str:
    """The reference's name of a method: ``MdlGetSize`` for ``mdl_get_size``."""
    return method.title().replace("_", "")


def call(vmm: VMM, face: Face, method: str, *arguments: object) -> Outcome:
    """Call ``method`` (its Python name) and hold what is promised of every outcome.

    Anything but a VmmError that comes out is left to fail the test. Methods that the
    reference face does not have go through the other one.
    """
    if face is Face.ENDPOINT and method in REFERENCE_METHODS:
        if method == "commit" and len(arguments) == 2:
            arguments = (*arguments, 0)
        assert len(arguments) == ARITY[method], f"the reference's {method} takes {ARITY[method]}"
        answer = getattr(vmm.endpoint, reference_name(method))(*arguments)
        value, rc = answer if method in NOTHING else (None, answer)
        assert isinstance(rc, Retcode), rc
        if rc is not Retcode.OK and method in NOTHING:
            assert value == NOTHING[method], f"a failed {method} gave {value!r}"
        return Outcome(rc, value)
    try:
        return Outcome(Retcode.OK, getattr(vmm, method)(*arguments))
    except VmmError as raised:
        error = raised
    assert error.method == method, error.method
    assert error.rc is not Retcode.OK
    return Outcome(error.rc, error=error)

"""Both faces of the package behind one call, so that a test can hold them equal."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from vmm_linux import VMM, Retcode, VmmError


class Face(Enum):
    """Through which face a call goes."""

    METHODS = "methods"
    ENDPOINT = "endpoint"


class Outcome(NamedTuple):
    """How a call ended: its return code, its out value, and the exception if one was raised."""

    rc: Retcode
    value: Any = None
    error: VmmError | None = None


#: What a failed call of the reference face gives in place of its out parameter.
NOTHING = {"allocate": 0, "query": None}

#: The methods that the reference face has too.
REFERENCE_METHODS = ("allocate", "commit", "decommit", "protect", "free", "query")


def call(vmm: VMM, face: Face, method: str, *arguments: object) -> Outcome:
    """Call ``method`` (its Python name) and hold what is promised of every outcome.

    Anything but a VmmError that comes out is left to fail the test. Methods that the
    reference face does not have go through the other one.
    """
    if face is Face.ENDPOINT and method in REFERENCE_METHODS:
        arity = {"commit": 3, "allocate": 3, "protect": 3, "query": 1}.get(method, 2)
        if method == "commit" and len(arguments) == 2:
            arguments = (*arguments, 0)
        assert len(arguments) == arity, f"the reference's {method} takes {arity} arguments"
        answer = getattr(vmm.endpoint, method.title())(*arguments)
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

"""What a refused call says: the exception that it is, and the out values."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from constants import FIXED, RESERVE, RW
from faces import NOTHING, REFERENCE_METHODS, Face, call, reference_name
from kernel_oracle import PAGE
from vmm_linux import INVALID_HANDLE, Retcode, VmmError, VmmFlags

if TYPE_CHECKING:
    from refusals import Ground


def test_every_out_value_of_a_failed_call_is_nothing(ground: Ground) -> None:
    endpoint = ground.vmm.endpoint
    invalid = Retcode.INVALID_ARGUMENT
    assert endpoint.MdlCreate(0, 1) == (INVALID_HANDLE, invalid)
    assert endpoint.MdlCreateFromVm(0, 0, 1) == (INVALID_HANDLE, invalid)
    assert endpoint.MdlGetSize(0) == (0, invalid)
    assert endpoint.MdlMap(0, 0, PAGE, 0, 1) == (0, invalid)
    assert endpoint.MdlClone(0, 0, PAGE) == (INVALID_HANDLE, invalid)
    assert endpoint.Allocate(0, 0, 0) == (0, invalid)
    assert endpoint.Query(-1) == (None, invalid)
    names = {reference_name(method) for method in REFERENCE_METHODS}
    assert names == {name for name in dir(endpoint) if name[0].isupper()}
    assert set(NOTHING) < set(REFERENCE_METHODS)


PYTHON_EXCEPTIONS: dict[Retcode, type[Exception]] = {
    Retcode.INVALID_ARGUMENT: ValueError,
    Retcode.RESOURCE_NOT_FOUND: LookupError,
    Retcode.INVALID_OPERATION: RuntimeError,
    Retcode.ALREADY_EXISTS: FileExistsError,
    Retcode.OUT_OF_MEMORY: MemoryError,
    Retcode.BUSY: BufferError,
    Retcode.UNIMPLEMENTED: NotImplementedError,
    Retcode.NO_CAPABILITY: PermissionError,
    Retcode.HANDLE_REVOKED: LookupError,
}


def provoked(ground: Ground, rc: Retcode) -> VmmError:
    """The error that a call on real memory ends with."""
    calls: dict[Retcode, tuple[Any, ...]] = {
        Retcode.INVALID_ARGUMENT: ("commit", ground.committed + 1, PAGE),
        Retcode.RESOURCE_NOT_FOUND: ("commit", ground.hole, PAGE),
        Retcode.INVALID_OPERATION: ("read", ground.reserved, 1),
        Retcode.ALREADY_EXISTS: ("allocate", ground.foreign, PAGE, RESERVE | FIXED),
        Retcode.OUT_OF_MEMORY: ("allocate", 0, 1 << 62, RESERVE),
        Retcode.BUSY: ("free", ground.committed, PAGE),
        Retcode.UNIMPLEMENTED: ("allocate", 0, PAGE, RESERVE | VmmFlags.CACHE_DISABLE),
        Retcode.NO_CAPABILITY: ("mdl_map", ground.reader, 0, PAGE, 0, RW),
        Retcode.HANDLE_REVOKED: ("mdl_get_size", ground.revoked),
    }
    view = ground.vmm.view(ground.committed, 1)
    error = call(ground.vmm, Face.METHODS, *calls[rc]).error
    view.release()
    assert error is not None
    return error


@pytest.mark.parametrize("rc", PYTHON_EXCEPTIONS, ids=lambda rc: rc.name)
def test_errors_are_the_exceptions_that_a_python_user_would_catch(
    ground: Ground, rc: Retcode
) -> None:
    error = provoked(ground, rc)
    assert error.rc is rc
    assert isinstance(error, PYTHON_EXCEPTIONS[rc])
    assert error.completed == 0
    assert len(str(error)) > len(error.method) + 10, "the message must say what was wrong"


@pytest.mark.parametrize("rc", PYTHON_EXCEPTIONS, ids=lambda rc: rc.name)
def test_errors_pickle_and_copy_whole(ground: Ground, rc: Retcode) -> None:
    error = provoked(ground, rc)
    error.completed = 77
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    twins = [pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols]  # noqa: S301
    for twin in [*twins, copy.copy(error), copy.deepcopy(error)]:
        assert type(twin) is type(error)
        assert (twin.rc, twin.method, twin.errno) == (error.rc, error.method, error.errno)
        assert (twin.completed, str(twin)) == (77, str(error))


def test_an_error_of_the_kernel_has_its_errno_and_one_of_ours_has_none(ground: Ground) -> None:
    assert provoked(ground, Retcode.INVALID_ARGUMENT).errno is None
    assert provoked(ground, Retcode.BUSY).errno is None
    commit = ground.vmm.allocate(0, 1 << 45, RESERVE | RW)
    error = call(ground.vmm, Face.METHODS, "commit", commit, 1 << 45).error
    assert error is not None
    assert error.errno == 12

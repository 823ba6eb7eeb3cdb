"""The public numbers: frozen, and the same in Python and in the Cython core."""

import errno
import pickle
import re

import pytest

import vmm_linux
from children import ROOT
from vmm_linux import PageKind, PageState, Retcode, VmmError, VmmFlags
from vmm_linux.errors import EXCEPTIONS, RETCODES

FLAGS = {
    "READ": 0x1,
    "WRITE": 0x2,
    "EXECUTE": 0x4,
    "RWX_MASK": 0x7,
    "RESERVE": 0x10,
    "COMMIT": 0x20,
    "LOCKED": 0x40,
    "LOW_GUARD": 0x100,
    "HIGH_GUARD": 0x200,
    "GROW_DOWN": 0x400,
    "WRITE_BACK": 0x1000,
    "WRITE_THROUGH": 0x2000,
    "WRITE_COMBINE": 0x4000,
    "CACHE_DISABLE": 0x8000,
    "CACHE_MASK": 0xF000,
    "FIXED": 0x10000,
    "HUGE": 0x20000,
    "SHAREABLE": 0x40000,
}
STATES = {"FREE": 0, "RESERVED": 1, "COMMITTED": 2}
KINDS = {"FREE": 0, "PRIVATE": 1, "MDL": 2, "GUARD": 3, "FOREIGN": 4}
RETURN_CODES = [
    ("OK", "rcOk"),
    ("INVALID_ARGUMENT", "rcInvalidArgument"),
    ("RESOURCE_NOT_FOUND", "rcResourceNotFound"),
    ("INVALID_OPERATION", "rcInvalidOperation"),
    ("ALREADY_EXISTS", "rcAlreadyExists"),
    ("OUT_OF_MEMORY", "rcOutOfMemory"),
    ("QUOTA_EXCEEDED", "rcQuotaExceeded"),
    ("NO_CAPABILITY", "rcNoCapability"),
    ("SECURITY_DISALLOW", "rcSecurityDisallow"),
    ("HANDLE_REVOKED", "rcHandleRevoked"),
    ("BUSY", "rcBusy"),
    ("UNIMPLEMENTED", "rcUnimplemented"),
    ("FAIL", "rcFail"),
    ("INTERNAL_ERROR", "rcInternalError"),
]


def test_the_numbers_of_the_flags_are_frozen() -> None:
    """Programs store them."""
    assert {name: int(flag) for name, flag in VmmFlags.__members__.items()} == FLAGS


def test_the_numbers_of_states_and_kinds_are_frozen() -> None:
    """Programs store them."""
    assert {state.name: int(state) for state in PageState} == STATES
    assert {kind.name: int(kind) for kind in PageKind} == KINDS


def test_return_codes_are_frozen_and_print_by_their_kasperskyos_names() -> None:
    """Number, member, name."""
    assert [(int(rc), rc.name, str(rc)) for rc in Retcode] == [
        (number, *names) for number, names in enumerate(RETURN_CODES)
    ]


def test_the_cython_core_uses_the_same_numbers() -> None:
    """``vocabulary.pxd`` repeats them in C."""
    source = ROOT / "cython_src/vmm_linux/_core/vocabulary.pxd"
    text = source.read_text(encoding="utf-8")
    for prefix, expected in (("FLAG", FLAGS), ("STATE", STATES), ("KIND", KINDS)):
        found = dict(re.findall(rf"\b{prefix}_(\w+) = (\w+)", text))
        assert {name: int(number, 0) for name, number in found.items()} == expected


@pytest.mark.parametrize("rc", [rc for rc in Retcode if rc is not Retcode.OK])
def test_every_failure_has_an_exception_that_pickles_whole(rc: Retcode) -> None:
    """What a worker process raises arrives as it was."""
    raised = EXCEPTIONS[rc]("commit", "va 0x1 is bad", errno.ENOMEM, 3)
    arrived = pickle.loads(pickle.dumps(raised))  # noqa: S301 (our own)
    assert type(arrived) is type(raised)
    assert str(arrived) == str(raised) == "commit: va 0x1 is bad [ENOMEM]"
    assert (arrived.rc, arrived.method, arrived.errno, arrived.completed) == (
        rc,
        "commit",
        errno.ENOMEM,
        3,
    )


@pytest.mark.parametrize(
    ("rc", "builtin"),
    [
        (Retcode.INVALID_ARGUMENT, ValueError),
        (Retcode.RESOURCE_NOT_FOUND, LookupError),
        (Retcode.INVALID_OPERATION, RuntimeError),
        (Retcode.ALREADY_EXISTS, FileExistsError),
        (Retcode.OUT_OF_MEMORY, MemoryError),
        (Retcode.QUOTA_EXCEEDED, MemoryError),
        (Retcode.NO_CAPABILITY, PermissionError),
        (Retcode.SECURITY_DISALLOW, PermissionError),
        (Retcode.HANDLE_REVOKED, LookupError),
        (Retcode.BUSY, BufferError),
        (Retcode.UNIMPLEMENTED, NotImplementedError),
        (Retcode.FAIL, OSError),
        (Retcode.INTERNAL_ERROR, RuntimeError),
    ],
)
def test_an_error_is_also_the_exception_a_python_user_would_catch(
    rc: Retcode, builtin: type[Exception]
) -> None:
    """``except MemoryError`` works."""
    with pytest.raises(builtin) as caught:
        raise EXCEPTIONS[rc]("free", "no")
    assert isinstance(caught.value, VmmError)
    assert caught.value.errno is None


def test_one_table_says_what_an_errno_means() -> None:
    """Shortages are told apart from limits."""
    assert RETCODES[errno.ENOMEM] is Retcode.OUT_OF_MEMORY
    assert RETCODES[errno.EMFILE] is Retcode.QUOTA_EXCEEDED
    assert RETCODES.get(errno.EIO, Retcode.FAIL) is Retcode.FAIL


def test_every_public_name_exists() -> None:
    """``from vmm_linux import *`` works."""
    assert all(hasattr(vmm_linux, name) for name in vmm_linux.__all__)

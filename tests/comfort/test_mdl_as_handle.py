"""Methods of ``VMM`` take an ``Mdl`` where they take a handle, in both faces, watched or not."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kernel_oracle as kernel
from constants import READ, READ_ONLY, RW
from faces import ARITY, Face, Outcome, call
from kernel_oracle import PAGE
from vmm_linux import VMM, Mdl, Retcode, Rights, Seal
from vmm_linux._core.endpoint import METHODS, Kind
from vmm_linux.audit import Audit
from vmm_linux.errors import InvalidArgument, SecurityDisallow
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 2 * PAGE

#: The other arguments of each method that takes a handle, by name.
OTHERS: dict[str, Any] = {
    "offset": 0,
    "length": PAGE,
    "hint": 0,
    "prot": int(READ),
    "seals": int(Seal.PUBLISH),
    "rights": int(READ_ONLY),
}
WITH_HANDLE = {
    info.name: [name for name, _ in info.arguments]
    for info in METHODS
    if Kind.HANDLE in dict(info.arguments).values()
}
HANDLES = ("handle", "originHandle")
#: Each of them through each face that has it.
CALLS = [
    (face, method)
    for face in Face
    for method in WITH_HANDLE
    if face is Face.METHODS or method in ARITY
]


def test_the_methods_with_a_handle_are_these() -> None:
    assert sorted(WITH_HANDLE) == [
        "handle_close",
        "handle_copy",
        "handle_fileno",
        "handle_info",
        "handle_revoke",
        "mdl_clone",
        "mdl_get_size",
        "mdl_map",
        "mdl_seal",
        "send_handle",
    ]


VMMS: dict[str, Callable[[], VMM]] = {
    "unwatched": VMM,
    "audit": lambda: VMM(audit=Audit(ring=50)),
    "policy": lambda: VMM(policy=Policy(ask=lambda _question: True), audit=Audit(ring=50)),
}


@pytest.fixture(params=VMMS)
def watched(request: pytest.FixtureRequest) -> Iterator[VMM]:
    """A VMM of each kind."""
    with VMMS[request.param]() as endpoint:
        yield endpoint
        endpoint._check()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def arguments(method: str, handle: object, sock: socket.socket) -> list[Any]:
    """Arguments of a method with this handle."""
    given = {**OTHERS, "handle": handle, "originHandle": handle, "sock": sock}
    return [given[name] for name in WITH_HANDLE[method]]


def end(method: str, got: Outcome, sock: socket.socket, vmm: VMM) -> object:
    """What a call gave, without what is another each time; it is given back."""
    value = got.value
    if method == "mdl_map":
        vmm.free(value, PAGE)
        return "address"
    if method in ("mdl_clone", "handle_copy"):
        info = vmm.handle_info(value)
        vmm.handle_close(value)
        return info.rights, info.size
    if method == "handle_fileno":
        status = os.fstat(value)
        os.close(value)
        return status.st_ino
    if method == "send_handle":
        handle = vmm.recv_handle(sock)
        info = vmm.handle_info(handle)
        vmm.handle_close(handle)
        return info.sid
    return repr(value)


@pytest.mark.parametrize(("face", "method"), CALLS)
def test_an_mdl_is_as_good_as_its_handle(
    method: str, face: Face, watched: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    mdl = Mdl(SIZE - 5, vmm=watched)
    if method == "handle_close":
        assert call(watched, face, method, mdl).rc is Retcode.OK
        assert call(watched, face, method, mdl.handle).rc is Retcode.RESOURCE_NOT_FOUND
        return
    by_mdl = call(watched, face, method, *arguments(method, mdl, pair[0]))
    assert by_mdl.rc is Retcode.OK
    told = end(method, by_mdl, pair[1], watched)
    by_handle = call(watched, face, method, *arguments(method, mdl.handle, pair[0]))
    assert by_handle.rc is Retcode.OK
    assert told == end(method, by_handle, pair[1], watched)


def test_a_policy_and_an_audit_see_the_handle_s_number(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    asked = []

    def allow(question: Any) -> bool:  # noqa: ANN401
        asked.append((question.method, question.arguments))
        return True

    with VMM(policy=Policy(ask=allow), audit=Audit(ring=50)) as vmm:
        mdl = Mdl(10, vmm=vmm)
        for method in WITH_HANDLE:
            if method != "handle_close":
                got = call(vmm, Face.METHODS, method, *arguments(method, mdl, pair[0]))
                end(method, got, pair[1], vmm)
        written = [(record.method, record.arguments or {}) for record in vmm.history()]
        for method, names in WITH_HANDLE.items():
            if method != "handle_close":
                name = next(name for name in names if name in HANDLES)
                for calls in (asked, written):
                    numbers = [given[name] for called, given in calls if called == method]
                    assert int(mdl.handle) in numbers
                    assert {type(number) for number in numbers} == {int}


def wrong_handles(vmm: VMM) -> dict[str, tuple[object, Retcode]]:
    """What is no handle of this VMM, and how a call with it ends."""
    closed, revoked = Mdl(10, vmm=vmm), Mdl(10, vmm=vmm).read_only()
    closed.close()
    first = Mdl(10, vmm=vmm)
    revoked = first.read_only()
    vmm.handle_revoke(first)
    return {
        "closed": (closed, Retcode.RESOURCE_NOT_FOUND),
        "revoked": (revoked, Retcode.HANDLE_REVOKED),
        "memory": (bytearray(8), Retcode.INVALID_ARGUMENT),
        "array": (np.zeros(2), Retcode.INVALID_ARGUMENT),
        "None": (None, Retcode.INVALID_ARGUMENT),
        "class": (Mdl, Retcode.INVALID_ARGUMENT),
    }


@pytest.mark.parametrize(("face", "method"), CALLS)
def test_what_is_no_handle_of_this_vmm_is_refused(
    method: str, face: Face, watched: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    with VMM() as other:
        of_another = Mdl(10, vmm=other)
        cases = wrong_handles(watched)
        cases["of another VMM"] = of_another, Retcode.INVALID_ARGUMENT
        region = Mdl(10, vmm=watched).map()
        cases["a Region"] = region, Retcode.INVALID_ARGUMENT
        before = watched.usage(), kernel.descriptors()
        for name, (handle, rc) in cases.items():
            got = call(watched, face, method, *arguments(method, handle, pair[0]))
            # A revoked handle can be closed.
            if (name, method) != ("revoked", "handle_close"):
                assert got.rc is rc, name
        if method != "handle_close":
            assert (watched.usage(), kernel.descriptors()) == before
        assert of_another.nbytes == 10
        del region


def test_a_region_is_no_handle_and_says_what_it_is(vmm: VMM) -> None:
    region: Any = Mdl(10, vmm=vmm).map()
    with pytest.raises(InvalidArgument, match=r"handle is a Region, not an integer"):
        vmm.mdl_get_size(region)


#: Where an argument is no handle, by method: its name, and the arguments with the Mdl in place.
NO_HANDLES: dict[str, Callable[[VMM, Any], object]] = {
    "size": lambda vmm, mdl: vmm.mdl_create(mdl, RW),
    "prot": lambda vmm, mdl: vmm.mdl_create(PAGE, mdl),
    "segment_size": lambda vmm, mdl: vmm.mdl_create(PAGE, RW, mdl),
    "nbytes": lambda vmm, mdl: vmm.mdl_create(PAGE, RW, 0, mdl),
    "offset": lambda vmm, mdl: vmm.mdl_map(mdl, mdl, PAGE, 0, RW),
    "length": lambda vmm, mdl: vmm.mdl_map(mdl, 0, mdl, 0, RW),
    "hint": lambda vmm, mdl: vmm.mdl_map(mdl, 0, PAGE, mdl, RW),
    "addr": lambda vmm, mdl: vmm.allocate(mdl, PAGE, 16),
    "va": lambda vmm, mdl: vmm.commit(mdl, PAGE),
    "seals": lambda vmm, mdl: vmm.mdl_seal(mdl, mdl),
    "rights": lambda vmm, mdl: vmm.handle_copy(mdl, mdl),
    "fd": lambda vmm, mdl: vmm.handle_from_fd(mdl),
}


@pytest.mark.parametrize("name", NO_HANDLES)
def test_an_mdl_is_no_number(name: str, watched: VMM) -> None:
    mdl = Mdl(10, vmm=watched)
    with pytest.raises(InvalidArgument, match=f": {name} is <?a?n? ?Mdl.*not an integer"):
        NO_HANDLES[name](watched, mdl)


def test_what_was_made_without_its_class_is_no_handle(watched: VMM) -> None:
    nothing = Mdl.__new__(Mdl)
    for face in Face:
        assert call(watched, face, "mdl_get_size", nothing).rc is Retcode.INVALID_ARGUMENT
    with pytest.raises(InvalidArgument, match="handle is a Mdl, which has no handle"):
        watched.handle_close(nothing)


def test_handles_are_sent_and_received_by_tasks_too(
    vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    mdl = Mdl.from_bytes(b"hello", vmm=vmm)
    for sock in pair:
        sock.setblocking(False)

    async def exchange() -> bytes:
        await vmm.send_handle_async(pair[0], mdl)
        handle = await vmm.recv_handle_async(pair[1])
        return bytes(Mdl.from_handle(vmm, handle))

    assert asyncio.run(exchange()) == b"hello"


# ---- policy and audit see what an Mdl does -------------------------------------------------------

USES: dict[str, Callable[[Any], object]] = {
    "buf": lambda mdl: mdl.buf,
    "read": lambda mdl: mdl.read(1),
    "write": lambda mdl: mdl.write(b"x"),
    "item": lambda mdl: mdl[0],
    "readinto": lambda mdl: mdl.readinto(bytearray(3)),
    "map": lambda mdl: mdl.map(),
    "array": lambda mdl: mdl.array(1, "u1"),
    "asarray": np.asarray,
    "frombuffer": lambda mdl: np.frombuffer(mdl, "u1"),
    "ndarray": lambda mdl: np.ndarray(1, "u1", mdl),
}


@pytest.mark.parametrize("name", USES)
def test_where_a_policy_denies_mdl_map_nothing_looks_at_the_memory(name: str) -> None:
    with VMM(policy=Policy(ask=lambda question: question.method != "mdl_map")) as vmm:
        mdl = Mdl(10, vmm=vmm)
        with pytest.raises(SecurityDisallow, match="mdl_map"):
            USES[name](mdl)
        assert vmm.usage().mdl_mappings.used == 0


def test_every_use_is_calls_that_the_audit_has() -> None:
    with VMM(audit=Audit(ring=100)) as vmm:
        mdl = Mdl(1000, vmm=vmm)
        mdl[:3] = b"abc"
        assert mdl[:3] == b"abc"
        mdl.clone().close()
        mdl.read_only().close()
        mdl.publish()
        mdl.close()
        methods = [record.method for record in vmm.history()]
        created = vmm.history()[0].arguments
    assert created == {"size": PAGE, "prot": int(RW), "segment_size": 0, "nbytes": 1000}
    for method in ("mdl_map", "write", "read", "mdl_clone", "handle_copy", "mdl_seal"):
        assert method in methods
    assert methods.count("mdl_map") == 1
    assert methods.count("handle_close") == 3


def test_a_policy_that_denies_mdl_create_makes_no_mdl_and_no_array() -> None:
    from vmm_linux import share, zeros

    denies = ("mdl_create", "mdl_create_from_buf")
    with VMM(policy=Policy(ask=lambda question: question.method not in denies)) as vmm:
        makers: list[Callable[[], object]] = [
            lambda: Mdl(10, vmm=vmm),
            lambda: Mdl.from_bytes(b"x", vmm=vmm),
            lambda: Mdl.from_array([1], vmm=vmm),
            lambda: share([1], vmm=vmm),
            lambda: zeros(3, vmm=vmm),
        ]
        for make in makers:
            with pytest.raises(SecurityDisallow):
                make()
        assert vmm.usage().mdls.used == 0


def test_rights_of_an_mdl_are_those_of_its_handle(vmm: VMM) -> None:
    mdl = Mdl(10, vmm=vmm)
    few = Mdl.from_handle(vmm, vmm.handle_copy(mdl, Rights.MAP_READ))
    assert call(vmm, Face.METHODS, "mdl_clone", few, 0, PAGE).rc is Retcode.NO_CAPABILITY
    assert call(vmm, Face.ENDPOINT, "mdl_map", few, 0, PAGE, 0, 3).rc is Retcode.NO_CAPABILITY
    assert vmm.handle_info(few).rights == few.rights == Rights.MAP_READ

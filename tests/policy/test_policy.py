"""A policy is asked before every call, and what it denies is not."""

from __future__ import annotations

import array
import inspect
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from constants import COMMITTED, READ, RESERVED, RW
from kernel_oracle import PAGE
from policies import Switch
from vmm_linux import VMM, Handle, Limits, Retcode, Rights, Seal
from vmm_linux._core.endpoint import METHODS
from vmm_linux.errors import InvalidArgument, InvalidOperation, SecurityDisallow
from vmm_linux.limits import Usage, Use
from vmm_linux.policy import Policy, Question

DENY_ALL = Policy(default="deny")
#: Methods that are calls of others, and what tells about the package itself.
COMFORT = {"history", "mdl", "recv_handle_async", "region", "send_handle_async", "usage"}


# ---- every method --------------------------------------------------------------------------------


def test_the_table_has_every_public_method_with_its_arguments_in_order() -> None:
    public = {name for name, value in inspect.getmembers(VMM) if callable(value) and name[0] != "_"}
    assert public - COMFORT | {"limits"} == {method.name for method in METHODS}
    for method in METHODS:
        if method.name == "limits":  # a property
            continue
        parameters = [*inspect.signature(getattr(VMM, method.name)).parameters][1:]
        assert [name for name, _ in method.arguments] == parameters


def kernels_word(va: int) -> list[str]:
    """The mappings around an address, and every descriptor."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    around = [line for line in lines if int(line.split("-")[1].split()[0], 16) > va][:3]
    return around + sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def calls_of_every_method(
    va: int, handle: Handle, sock: socket.socket, fd: int
) -> dict[str, tuple[Any, ...]]:
    """A call of each method that would succeed."""
    return {
        "allocate": (0, PAGE, RESERVED),
        "commit": (va, PAGE, 0),
        "decommit": (va, PAGE),
        "commit_ranges": ([(va, PAGE)],),
        "decommit_ranges": ([(va, PAGE)],),
        "protect": (va, PAGE, READ),
        "free": (va, PAGE),
        "query": (va,),
        "view": (va, PAGE),
        "read": (va, PAGE),
        "write": (va, b"no"),
        "mdl_create": (PAGE, READ),
        "mdl_create_from_vm": (va, PAGE, READ),
        "mdl_create_from_buf": (b"no", READ),
        "mdl_get_size": (handle,),
        "mdl_map": (handle, 0, PAGE, 0, READ),
        "mdl_clone": (handle, 0, PAGE),
        "mdl_seal": (handle, Seal.FREEZE),
        "handle_copy": (handle, Rights.MAP_READ),
        "handle_close": (handle,),
        "handle_revoke": (handle,),
        "handle_info": (handle,),
        "send_handle": (sock, handle),
        "recv_handle": (sock,),
        "handle_fileno": (handle,),
        "handle_from_fd": (fd,),
    }


def test_every_method_can_be_denied_and_then_has_changed_nothing() -> None:
    switch = Switch()
    ours, theirs = socket.socketpair()
    with ours, theirs, VMM(policy=Policy(ask=switch)) as vmm:
        va = vmm.allocate(0, PAGE, COMMITTED)
        vmm.write(va, b"kept")
        handle = vmm.mdl_create(2 * PAGE, RW)
        copy = vmm.handle_copy(handle, Rights.MAP_READ)
        fd = vmm.handle_fileno(handle)
        vmm.send_handle(theirs, handle)
        calls = calls_of_every_method(va, handle, ours, fd)
        assert calls.keys() | {"close", "limits"} == {method.name for method in METHODS}
        before = kernels_word(va)
        switch.allows = False
        for name, arguments in calls.items():
            with pytest.raises(SecurityDisallow, match=rf"^{name}: .*Switch") as caught:
                getattr(vmm, name)(*arguments)
            assert caught.value.method == name
        limits = vmm.limits
        with pytest.raises(SecurityDisallow, match=r"^limits: "):
            vmm.limits = Limits.unlimited()
        with pytest.raises(SecurityDisallow, match=r"^limits: "):
            vmm.__init__(Limits.unlimited())  # type: ignore[misc]
        assert vmm.limits == limits
        for name, (value, rc) in {
            "Allocate": vmm.endpoint.Allocate(*calls["allocate"]),
            "Commit": (None, vmm.endpoint.Commit(*calls["commit"])),
            "Free": (None, vmm.endpoint.Free(*calls["free"])),
            "Query": vmm.endpoint.Query(va),
            "MdlMap": vmm.endpoint.MdlMap(*calls["mdl_map"]),
        }.items():
            assert (name, value or None, rc) == (name, None, Retcode.SECURITY_DISALLOW)
        assert kernels_word(va) == before
        switch.allows = True
        assert vmm.read(va, 4) == b"kept"
        info = vmm.query(va, smaps=False)
        assert (info.protection, info.size) == (RW, PAGE)
        assert (vmm.handle_info(handle).seals, vmm.mdl_get_size(copy)) == (Seal(0), 2 * PAGE)
        assert vmm.mdl_get_size(vmm.recv_handle(ours)) == 2 * PAGE
        vmm._check()
        os.close(fd)


def test_what_is_allowed_is_done_as_without_a_policy() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, VMM(policy=Policy()) as vmm:
        va = vmm.allocate(0, 4 * PAGE, RESERVED)
        vmm.commit_ranges([(va, PAGE), (va + 2 * PAGE, PAGE)])
        vmm.decommit_ranges(iter([(va, PAGE)]))
        vmm.commit(va, 4 * PAGE, object())
        assert vmm.write(va, array.array("I", [1, 2])) == 8
        assert vmm.read(va, 4) == b"\1\0\0\0"
        view = vmm.view(va, 4, writable=False)
        assert view.readonly
        del view
        assert vmm.query(va, smaps=True).smaps is not None
        buffer = vmm.mdl_create_from_vm(va, PAGE, RW)
        clone = vmm.mdl_clone(buffer, 0, PAGE)
        vmm.send_handle(ours, clone, Rights.MAP_READ)
        got = vmm.recv_handle(theirs, 0, PAGE, os.getuid())
        assert vmm.read(vmm.mdl_map(got, 0, PAGE, 0, READ), 4) == b"\1\0\0\0"
        frozen = vmm.mdl_create_from_buf(b"frozen", READ)
        fd = vmm.handle_fileno(frozen)
        assert vmm.handle_info(vmm.handle_from_fd(fd, Seal.FREEZE)).seals == Seal.FREEZE
        os.close(fd)
        vmm.handle_revoke(buffer)
        vmm.handle_close(clone)
        vmm.free(va + PAGE, 3 * PAGE)
        vmm.limits = vmm.limits.replace(regions=7)
        assert (vmm.limits.regions, vmm.usage().regions) == (7, Use(2, 7))
        vmm._check()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("allocate", (0, "1", RESERVED)),
        ("allocate", (0, True, RESERVED)),
        ("allocate", (0, PAGE + 1, RESERVED)),
        ("allocate", (0, PAGE, 1 << 63)),
        ("protect", (-1, PAGE, READ)),
        ("view", (PAGE, PAGE, 1)),
        ("write", (PAGE, 3)),
        ("write", (PAGE, memoryview(bytes(8))[::2])),
        ("mdl_create_from_buf", ([], READ)),
        ("commit_ranges", ([(1, 2, 3)],)),
        ("decommit_ranges", (None,)),
        ("send_handle", (None, 1)),
        ("recv_handle", (object(),)),
        ("handle_copy", (1, 1.5)),
        ("handle_from_fd", (0, 0, "x")),
    ],
)
def test_arguments_that_are_none_are_an_invalid_argument_as_without_a_policy(
    name: str, arguments: tuple[Any, ...]
) -> None:
    with VMM() as plain, VMM(policy=Policy()) as vmm:
        with pytest.raises(InvalidArgument) as expected:
            getattr(plain, name)(*arguments)
        with pytest.raises(InvalidArgument) as caught:
            getattr(vmm, name)(*arguments)
        assert str(caught.value) == str(expected.value)


def test_a_closed_vmm_says_so_whatever_its_policy_is() -> None:
    vmm = VMM(policy=DENY_ALL)
    vmm.close()
    vmm.close()
    with pytest.raises(InvalidOperation, match="closed"):
        vmm.allocate(0, PAGE, RESERVED)


# ---- a callable ----------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, False, 1, "no such thing", object()])
def test_only_true_allows(answer: object) -> None:
    with (
        VMM(policy=Policy.from_callable(lambda _: answer)) as vmm,
        pytest.raises(SecurityDisallow) as caught,
    ):
        vmm.allocate(0, PAGE, RESERVED)
    assert ("no such thing" in str(caught.value)) == (answer == "no such thing")


class Nameless:
    """A callable that does not say what it is called, and whose answer no text can be made of."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Nothing else."""
        raise KeyError(name)

    def __call__(self, _: Question) -> str:
        """Deny, in a text that fails when it is written."""
        return Mute("no")


class Mute(str):
    """A text that cannot be put in another one."""

    __slots__ = ()

    def __format__(self, _: str) -> str:
        """Fail."""
        raise KeyError

    __str__ = __format__  # type: ignore[assignment]


def test_a_callable_is_denied_by_whatever_it_is_called() -> None:
    with (
        VMM(policy=Policy(ask=Nameless())) as vmm,
        pytest.raises(SecurityDisallow, match=r"rule: Nameless: no\)"),
    ):
        vmm.allocate(0, PAGE, RESERVED)


def test_a_policy_that_raises_denies_and_its_exception_is_the_cause() -> None:
    def broken(question: Question) -> bool:
        raise KeyError(question.method)

    with (
        VMM(policy=Policy.from_callable(broken)) as vmm,
        pytest.raises(SecurityDisallow, match="broken raised KeyError") as caught,
    ):
        vmm.allocate(0, PAGE, RESERVED)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_question_tells_what_is_asked() -> None:
    seen: list[Question] = []
    ours, theirs = socket.socketpair()

    def ask(question: Question) -> bool:
        seen.append(question)
        return True

    with ours, theirs, VMM(policy=Policy(ask=ask)) as vmm:
        va = vmm.allocate(0, PAGE, COMMITTED)
        vmm.write(va, b"xyz")
        handle = vmm.mdl_create_from_buf(b"abc", READ)
        vmm.send_handle(ours, handle)
        vmm.recv_handle(theirs)
    allocated, written, made, sent, received = seen
    assert allocated.arguments == {"addr": 0, "size": PAGE, "flags": int(COMMITTED)}
    assert (allocated.flags, allocated.size, allocated.peer) == (COMMITTED, PAGE, None)
    assert written.arguments == {"va": va, "data": 3}
    assert (made.size, made.flags) == (3, READ)
    assert (sent.method, sent.seals, sent.rights) == ("send_handle", Seal.FREEZE, handle.rights)
    assert sent.peer == received.peer == (os.getpid(), os.geteuid(), os.getegid())
    assert received.size == 2**64 - 1


def test_a_call_from_inside_the_policy_is_denied_and_does_not_recur() -> None:
    inner: list[Retcode] = []

    def ask(_: Question) -> bool:
        inner.append(vmm.endpoint.Allocate(0, PAGE, RESERVED)[1])
        return True

    with VMM(policy=Policy.from_callable(ask)) as vmm, VMM() as other:
        other.allocate(0, PAGE, RESERVED)
        vmm.allocate(0, PAGE, RESERVED)
        assert inner == [Retcode.SECURITY_DISALLOW]
        vmm.allocate(0, PAGE, RESERVED)


def test_a_callable_can_decide_by_the_usage() -> None:
    def ask(question: Question) -> bool:
        return question.method != "allocate" or question.usage.regions.used < 1

    with VMM(policy=Policy(ask=ask)) as vmm:
        va = vmm.allocate(0, PAGE, RESERVED)
        with pytest.raises(SecurityDisallow):
            vmm.allocate(0, PAGE, RESERVED)
        vmm.free(va, PAGE)
        vmm.allocate(0, PAGE, RESERVED)


def test_a_subclass_has_no_say_in_its_usage() -> None:
    told: list[Usage] = []

    class Lying(VMM):
        """Tells what is not."""

        def usage(self) -> Usage:
            """Tell that there is nothing."""
            return super().usage()._replace(regions=Use(0, None))

    def ask(question: Question) -> bool:
        told.append(question.usage)
        return True

    with Lying(policy=Policy(ask=ask)) as vmm:
        va = vmm.allocate(0, PAGE, RESERVED)
        assert vmm.usage().regions.used == 0
        vmm.free(va, PAGE)
    assert [usage.regions.used for usage in told] == [0, 1]

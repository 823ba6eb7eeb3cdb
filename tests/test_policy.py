"""A policy is asked before every call, whatever way the call comes, and what it denies is not."""

from __future__ import annotations

import array
import asyncio
import contextlib
import inspect
import os
import pickle
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from children import NOBODY, run_child
from forked import in_child
from vmm_linux import (
    VMM,
    Handle,
    Limits,
    Mdl,
    Retcode,
    Rights,
    Seal,
    VmmError,
    VmmFlags,
    _toml_lines,
    _vmm,
)
from vmm_linux._calls import METHODS
from vmm_linux.audit import Audit
from vmm_linux.errors import (
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    SecurityDisallow,
)
from vmm_linux.limits import Usage, Use
from vmm_linux.policy import READY, Policy, PolicyError, Question, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = os.sysconf("SC_PAGE_SIZE")
READ = VmmFlags.READ
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
READ_EXECUTE = VmmFlags.READ | VmmFlags.EXECUTE
RESERVED = VmmFlags.RESERVE | READ_WRITE
COMMITTED = RESERVED | VmmFlags.COMMIT
DENY_ALL = Policy(default="deny")
#: Methods that are calls of others, and what tells about the package itself.
COMFORT = {"history", "mdl", "recv_handle_async", "region", "send_handle_async", "usage"}


def write_policy(folder: Path, text: str) -> Path:
    """A file with this policy."""
    path = folder / "policy.toml"
    path.write_text(text)
    return path


class Switch:
    """A policy's callable that allows until it is told not to."""

    def __init__(self) -> None:
        self.allows = True
        self.asked: list[str] = []

    def __call__(self, question: Question) -> bool:
        """Answer as told."""
        self.asked.append(question.method)
        return self.allows


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
        handle = vmm.mdl_create(2 * PAGE, READ_WRITE)
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
        assert (info.protection, info.size) == (READ_WRITE, PAGE)
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
        buffer = vmm.mdl_create_from_vm(va, PAGE, READ_WRITE)
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


# ---- ways around ---------------------------------------------------------------------------------


class Own(VMM):
    """A subclass with a method of its own in place of the endpoint's."""

    def allocate(self, addr: Any, size: Any, flags: Any) -> int:  # noqa: ANN401
        """As the endpoint's, past the nearest class."""
        return _vmm.VMM.allocate(self, addr, size, flags)


class Lookalike(VMM):
    """Something that a VMM can be turned into."""

    __slots__ = ()


def ways_around() -> Iterator[tuple[str, Callable[[VMM], object]]]:
    """Ways to call the endpoint that might not be looked at."""
    yield "a method", lambda vmm: vmm.allocate(0, PAGE, RESERVED)
    yield "the reference's face", lambda vmm: disallowed(vmm.endpoint.Allocate(0, PAGE, RESERVED))
    yield "an unbound method", lambda vmm: VMM.allocate(vmm, 0, PAGE, RESERVED)
    for kind in VMM.__mro__:
        if "allocate" in vars(kind):
            own = vars(kind)["allocate"]
            yield f"{kind.__name__}'s", lambda vmm, own=own: own(vmm, 0, PAGE, RESERVED)  # type: ignore[misc]
    yield "a region", lambda vmm: vmm.region(PAGE)
    yield "a buffer", lambda vmm: vmm.mdl(PAGE)
    yield "bytes", lambda vmm: Mdl.from_bytes(b"x", vmm=vmm)
    yield "a descriptor", lambda vmm: Mdl.from_fd(0, vmm=vmm)
    yield "another class", as_another_class
    yield "made again", made_again
    yield "asyncio", sent_by_asyncio


def disallowed(outcome: tuple[int, Retcode]) -> None:
    """Raise for the return code of a denial."""
    if outcome == (0, Retcode.SECURITY_DISALLOW):
        raise SecurityDisallow("allocate", "as the reference says it")


def as_another_class(vmm: VMM) -> None:
    """Turn it into something else, if that can be, and call that."""
    with contextlib.suppress(TypeError):
        vmm.__class__ = Lookalike
    vmm.allocate(0, PAGE, RESERVED)


def made_again(vmm: VMM) -> None:
    """Call its constructor once more."""
    vmm.__init__()  # type: ignore[misc]
    with pytest.raises(InvalidOperation, match="made with"):
        vmm.__init__(policy=Policy())  # type: ignore[misc]
    vmm.allocate(0, PAGE, RESERVED)


def sent_by_asyncio(vmm: VMM) -> None:
    """Send something from a task."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        asyncio.run(vmm.send_handle_async(ours, 1))


@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in ways_around()])
@pytest.mark.parametrize("kind", [VMM, Own])
def test_no_way_goes_around_a_policy(way: Callable[[VMM], object], kind: type[VMM]) -> None:
    with kind(policy=DENY_ALL) as vmm, pytest.raises(SecurityDisallow):
        way(vmm)


def test_regions_buffers_and_arrays_made_before_are_asked_about_too() -> None:
    switch = Switch()
    with VMM(policy=Policy(ask=switch)) as vmm:
        region = vmm.region(PAGE, COMMITTED)
        mdl = vmm.mdl(PAGE)
        switch.allows = False
        calls: list[Callable[[], object]] = [
            lambda: region.write(b"x"),
            lambda: memoryview(region),
            region.free,
            mdl.map,
            mdl.clone,
            mdl.freeze,
            mdl.read_only,
            mdl.fileno,
            lambda: mdl.sid,
            lambda: mdl.array(1),
        ]
        for call in calls:
            with pytest.raises(SecurityDisallow):
                call()
        switch.allows = True


def test_a_vmm_takes_no_other_policy_and_no_attribute() -> None:
    with VMM(policy=DENY_ALL) as vmm:
        for name in ("policy", "audit", "is_watched", "allocate", "_vmm"):
            with pytest.raises(AttributeError):
                setattr(vmm, name, None)
        with pytest.raises(SecurityDisallow):
            vmm.allocate(0, PAGE, RESERVED)


def test_who_is_given_limits_and_meanwhile_a_policy_asks_that_about_them() -> None:
    vmm = VMM.__new__(VMM)

    class Sly(Limits):
        """Bounds that make the VMM when somebody looks at them."""

        __slots__ = ()
        armed: ClassVar = False

        @property
        def regions(self) -> int:
            """One."""
            if Sly.armed:
                Sly.armed = False
                vmm.__init__(policy=DENY_ALL)  # type: ignore[misc]
            return 1

        @regions.setter
        def regions(self, _: object) -> None:
            """Keep to it."""

    sly = Sly()
    Sly.armed = True
    with pytest.raises(SecurityDisallow, match=r"^limits: "):
        vmm.__init__(limits=sly)  # type: ignore[misc]
    vmm.close()


def test_a_policy_does_not_change() -> None:
    policy = Policy(default="deny")
    with pytest.raises(RuntimeError):
        policy.__init__()  # type: ignore[misc]
    with VMM(policy=policy) as vmm, pytest.raises(SecurityDisallow):
        vmm.allocate(0, PAGE, RESERVED)


class Fickle:
    """Another number each time that it is asked."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)

    def __index__(self) -> int:
        return self.numbers.pop(0)


def test_a_number_that_changes_is_decided_about_as_it_is_used() -> None:
    small = Policy([Rule(deny=["allocate"], min_size=PAGE + 1)])
    with VMM(policy=small) as vmm:
        va = vmm.allocate(Fickle(0), Fickle(PAGE, 1 << 30), Fickle(int(RESERVED)))
        assert vmm.query(va, smaps=False).size == PAGE
        with pytest.raises(SecurityDisallow):
            vmm.allocate(0, Fickle(2 * PAGE, PAGE), RESERVED)


def test_ranges_that_change_are_decided_about_as_they_are_used() -> None:
    with VMM(policy=Policy([Rule(deny=["commit_ranges"], min_size=2 * PAGE)])) as vmm:
        va = vmm.allocate(0, 4 * PAGE, RESERVED)
        vmm.commit_ranges(iter([(va, Fickle(PAGE, 4 * PAGE))]))
        with pytest.raises(SecurityDisallow):
            vmm.commit_ranges((va + n * PAGE, PAGE) for n in range(2))
        assert vmm.query(va, smaps=False).run_end == va + PAGE


def test_data_cannot_grow_after_the_decision() -> None:
    grown = bytearray(PAGE)

    def grow(_: Question) -> bool:
        with pytest.raises(BufferError):
            grown.extend(bytes(PAGE))
        return True

    rest = Rule(allow=["mdl_get_size"])
    with VMM(policy=Policy([rest], ask=grow)) as vmm:
        assert vmm.mdl_get_size(vmm.mdl_create_from_buf(grown, READ)) == PAGE


class Liar(socket.socket):
    """A socket that says who is at the other end, and shows what goes through it."""

    def getsockopt(self, *_: object) -> Any:  # noqa: ANN401
        """Nobody's business."""
        raise AssertionError

    def sendmsg(self, *_: object) -> int:
        """See the descriptors."""
        raise AssertionError

    def fileno(self) -> int:
        """Another one."""
        raise AssertionError


def test_a_socket_that_lies_is_not_asked() -> None:
    ours, theirs = socket.socketpair()
    with theirs, VMM(policy=Policy(ready=["no transfer to other users"])) as vmm:
        liar = Liar(fileno=ours.detach())
        handle = vmm.mdl_create(PAGE, READ)
        vmm.send_handle(liar, handle)
        theirs.settimeout(10)
        assert vmm.mdl_get_size(vmm.recv_handle(theirs)) == PAGE
        theirs.settimeout(0.001)
        with pytest.raises(TimeoutError):
            vmm.recv_handle(theirs)
        os.close(liar.detach())


def own_vmm_of_a_child(way: str, text: str) -> None:
    """Send an Mdl to a child of multiprocessing's, whose policy comes from the environment."""
    import multiprocessing
    import os
    import sys
    import tempfile
    from pathlib import Path

    from vmm_linux import VMM

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "policy.toml")
        path.write_text(text)
        context: Any = multiprocessing.get_context(way)
        ours, theirs = context.Pipe()
        # What a child starts with: the class of exceptions tells how it went.
        sys.path.insert(0, str(Path("tests").resolve()))
        from mdl_workers import receive_and_tell

        with VMM() as vmm, vmm.mdl(1 << 16) as mdl:
            os.environ["VMM_LINUX_POLICY"] = str(path)
            worker = context.Process(target=receive_and_tell, args=(theirs,))
            worker.start()
            ours.send(mdl)
            print(ours.recv())
            worker.join()


@pytest.mark.parametrize("way", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ('default = "deny"\n', "SecurityDisallow unpickle"),
        ('default = "allow"\nready = ["no transfer to other users"]\n', "<Mdl of 65536 bytes"),
        ('default = "allow"\n[[rule]]\ndeny = ["recv_handle"]\n', "SecurityDisallow unpickle"),
    ],
)
def test_an_unpickled_buffer_comes_under_the_policy_of_the_environment(
    way: str, text: str, outcome: str
) -> None:
    child = run_child(own_vmm_of_a_child, way, text)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith(outcome)


def obey_a_policy_of_the_environment() -> None:
    """Make a VMM under the policy of a file that this process wrote, and say what is denied."""
    import difflib  # noqa: F401  before the library is out of reach
    import os
    import socket
    import tempfile
    from pathlib import Path

    from vmm_linux import VMM, _toml_lines, policy

    assert _toml_lines.parse(b"") == ("", {})
    assert policy.READY
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "policy.toml")
        path.write_text('default = "allow"\nready = ["W^X", "no transfer to other users"]\n')
        os.environ["VMM_LINUX_POLICY"] = str(path)
        ours, theirs = socket.socketpair()
        with ours, theirs, VMM() as vmm:
            handle = vmm.mdl_create(1 << 16, 1)
            vmm.send_handle(ours, handle)
            print(vmm.mdl_get_size(vmm.recv_handle(theirs)))
            print(vmm.endpoint.MdlCreate(1 << 16, 7)[1].name)


@pytest.mark.parametrize("nobody", [False, True])
def test_every_user_can_have_a_policy(nobody: bool) -> None:
    child = run_child(obey_a_policy_of_the_environment, nobody=nobody)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "65536\nSECURITY_DISALLOW\n"


def test_in_a_forked_child_the_policy_is_the_same() -> None:
    with VMM(policy=Policy([Rule(deny=["free"])])) as vmm:
        va = vmm.allocate(0, PAGE, RESERVED)

        def child() -> list[object]:
            outcome = vmm.endpoint.Free(va, PAGE)
            return [outcome.name, vmm.query(va, smaps=False).size, vmm.endpoint.Commit(va, PAGE, 0)]

        assert in_child(child) == ["SECURITY_DISALLOW", PAGE, 0]


def test_threads_are_asked_each_for_its_own_call() -> None:
    with VMM(policy=Policy([Rule(deny=["allocate"], min_size=2 * PAGE)])) as vmm:
        wrong: list[object] = []

        def work(pages: int) -> None:
            for _ in range(200):
                va, rc = vmm.endpoint.Allocate(0, pages * PAGE, RESERVED)
                if rc != (Retcode.OK if pages == 1 else Retcode.SECURITY_DISALLOW):
                    wrong.append(rc)
                if rc is Retcode.OK:
                    vmm.free(va, PAGE)

        threads = [threading.Thread(target=work, args=(n % 2 + 1,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


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


# ---- rules ---------------------------------------------------------------------------------------


def outcome_of(policy: Policy, method: str, *arguments: object) -> str:
    """The name of the return code of a call."""
    with VMM(policy=policy) as vmm:
        try:
            getattr(vmm, method)(*arguments)
        except VmmError as problem:
            return problem.rc.name
        return "OK"


@pytest.mark.parametrize(
    ("rule", "flags", "expected"),
    [
        (Rule(deny=["allocate"], all_flags=["WRITE", "COMMIT"]), COMMITTED, False),
        (Rule(deny=["allocate"], all_flags=["WRITE", "COMMIT"]), RESERVED, True),
        (Rule(deny=["allocate"], any_flags=["HUGE", "WRITE"]), RESERVED, False),
        (Rule(deny=["allocate"], any_flags=["HUGE", "EXECUTE"]), RESERVED, True),
        (Rule(deny=["allocate"], no_flags=["COMMIT"]), RESERVED, False),
        (Rule(deny=["allocate"], no_flags=["COMMIT"]), COMMITTED, True),
        (Rule(deny=["allocate"], min_size=PAGE), RESERVED, False),
        (Rule(deny=["allocate"], min_size=PAGE + 1), RESERVED, True),
        (Rule(deny=["allocate"], max_size=PAGE), RESERVED, False),
        (Rule(deny=["allocate"], max_size=PAGE - 1), RESERVED, True),
        (Rule(deny="*", any_flags=["WRITE"], max_size=PAGE), RESERVED, False),
        (Rule(deny=["commit"]), RESERVED, True),
    ],
)
def test_a_rule_matches_where_all_its_conditions_hold(
    rule: Rule, flags: VmmFlags, expected: bool
) -> None:
    rc = outcome_of(Policy([rule]), "allocate", 0, PAGE, flags)
    assert rc == ("OK" if expected else "SECURITY_DISALLOW")
    allowing = Rule(**{**vars(rule), "allow": rule.deny, "deny": None})
    rc = outcome_of(Policy([allowing], default="deny"), "allocate", 0, PAGE, flags)
    assert rc == ("SECURITY_DISALLOW" if expected else "OK")


def test_the_first_rule_that_matches_answers() -> None:
    rules = [Rule(allow=["allocate"], max_size=PAGE), Rule(deny=["allocate"], name="the second")]
    assert outcome_of(Policy(rules), "allocate", 0, PAGE, RESERVED) == "OK"
    with VMM(policy=Policy(rules)) as vmm, pytest.raises(SecurityDisallow, match="the second"):
        vmm.allocate(0, 2 * PAGE, RESERVED)


def test_rights_and_seals_of_what_leaves_are_looked_at() -> None:
    ours, theirs = socket.socketpair()
    rules = [
        Rule(deny=["send_handle"], any_rights=["MAP_WRITE"]),
        Rule(deny=["handle_copy"], all_rights=["COPY", "TRANSFER"]),
        Rule(deny=["mdl_seal"], any_seals=["FREEZE"]),
        Rule(deny=["recv_handle"], no_seals=["FREEZE"]),
    ]
    with ours, theirs, VMM(policy=Policy(rules)) as vmm:
        handle = vmm.mdl_create(PAGE, READ_WRITE)
        for denied in (
            lambda: vmm.send_handle(ours, handle),
            lambda: vmm.send_handle(ours, handle, Rights.MAP_WRITE),
            lambda: vmm.handle_copy(handle, Rights.COPY | Rights.TRANSFER),
            lambda: vmm.mdl_seal(handle, Seal.FREEZE),
            lambda: vmm.recv_handle(theirs),
            lambda: vmm.recv_handle(theirs, Seal.PUBLISH),
        ):
            with pytest.raises(SecurityDisallow, match="rule: rule"):
                denied()
        vmm.send_handle(ours, handle, Rights.MAP_READ)
        vmm.handle_copy(handle, Rights.COPY)
        vmm.mdl_seal(handle, Seal.PUBLISH)
        with pytest.raises(SecurityDisallow, match="not sealed"):
            vmm.recv_handle(theirs, Seal.FREEZE)


def test_peers_are_looked_at() -> None:
    ours, theirs = socket.socketpair()
    us = os.geteuid()
    rules = [
        Rule(allow=["send_handle"], peer_uid=[us + 1, us], peer_gid=os.getegid()),
        Rule(allow=["recv_handle"], peer_uid=us + 1),
        Rule(allow=["mdl_create"]),
    ]
    with ours, theirs, VMM(policy=Policy(rules, default="deny")) as vmm:
        vmm.send_handle(ours, vmm.mdl_create(PAGE, READ))
        with pytest.raises(SecurityDisallow, match="default"):
            vmm.recv_handle(theirs)


@contextlib.contextmanager
def sockets_that_do_not_tell() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends that were connected without the kernel noting by whom."""
    address = f"\0vmm-linux-unknown-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as theirs,
    ):
        theirs.bind(address)
        ours.connect(address)
        ours.settimeout(10)
        theirs.settimeout(10)
        yield ours, theirs


ABOUT_PEERS: list[dict[str, Any]] = [
    {"peer_uid": os.geteuid()},
    {"peer_uid": os.geteuid() + 1},
    {"peer_gid": [os.getegid(), os.getegid() + 1]},
    {"peer_uid": os.geteuid(), "peer_gid": os.getegid()},
    {"other_user": True},
]


@pytest.mark.parametrize("about", ABOUT_PEERS)
def test_somebody_unknown_is_denied_by_every_rule_that_denies_some_peer(
    about: dict[str, Any],
) -> None:
    rule = Rule(deny=["send_handle", "recv_handle"], **about, name="not to them")
    with sockets_that_do_not_tell() as (ours, theirs), VMM(policy=Policy([rule])) as vmm:
        handle = vmm.mdl_create(PAGE, READ)
        with pytest.raises(SecurityDisallow, match="not to them"):
            vmm.send_handle(ours, handle)
        with pytest.raises(SecurityDisallow, match="not to them"):
            vmm.recv_handle(theirs)


@pytest.mark.parametrize("about", ABOUT_PEERS)
def test_somebody_unknown_is_allowed_by_no_rule_that_allows_some_peer(
    about: dict[str, Any],
) -> None:
    rules = [Rule(allow="*", **about), Rule(allow=["mdl_create"])]
    with (
        sockets_that_do_not_tell() as (ours, theirs),
        VMM(policy=Policy(rules, default="deny")) as vmm,
    ):
        handle = vmm.mdl_create(PAGE, READ)
        with pytest.raises(SecurityDisallow, match="default"):
            vmm.send_handle(ours, handle)
        with pytest.raises(SecurityDisallow, match="default"):
            vmm.recv_handle(theirs)


def test_with_somebody_unknown_the_other_conditions_have_to_hold_all_the_same() -> None:
    rules = [Rule(deny=["send_handle"], other_user=True, any_rights=["MAP_WRITE"])]
    with sockets_that_do_not_tell() as (ours, theirs), VMM(policy=Policy(rules)) as vmm:
        handle = vmm.mdl_create(PAGE, READ_WRITE)
        with pytest.raises(SecurityDisallow):
            vmm.send_handle(ours, handle)
        vmm.send_handle(ours, handle, Rights.MAP_READ)
        assert vmm.recv_handle(theirs).rights == Rights.MAP_READ


@pytest.mark.parametrize("about", ABOUT_PEERS)
def test_after_a_rule_that_allows_the_same_peers_one_that_denies_answers_for_the_unknown(
    about: dict[str, Any],
) -> None:
    allow, deny = Rule(allow=["send_handle"], **about), Rule(deny=["send_handle"], **about)
    with (
        sockets_that_do_not_tell() as (ours, _),
        VMM(policy=Policy([allow, deny])) as vmm,
        pytest.raises(SecurityDisallow, match="rule 2"),
    ):
        vmm.send_handle(ours, vmm.mdl_create(PAGE, READ))
    with pytest.raises(PolicyError, match="'rule 1' says the opposite"):
        Policy([deny, allow])
    with pytest.raises(PolicyError, match="'rule 1' always answers first"):
        Policy([allow, allow])


# ---- ready rules ---------------------------------------------------------------------------------


def test_nothing_is_writable_and_executable_under_w_xor_x() -> None:
    both = VmmFlags.RWX_MASK
    with VMM(policy=Policy(ready=["W^X"])) as vmm:
        va = vmm.allocate(0, PAGE, COMMITTED)
        read = vmm.mdl_create(PAGE, READ_EXECUTE)
        for denied in (
            lambda: vmm.allocate(0, PAGE, VmmFlags.RESERVE | both),
            lambda: vmm.protect(va, PAGE, both),
            lambda: vmm.mdl_create(PAGE, both),
            lambda: vmm.mdl_create_from_vm(va, PAGE, both),
            lambda: vmm.mdl_create_from_buf(b"x", both),
            lambda: vmm.mdl_map(read, 0, PAGE, 0, both),
        ):
            with pytest.raises(SecurityDisallow, match=r"W\^X"):
                denied()
        vmm.protect(va, PAGE, READ_EXECUTE)


@pytest.mark.parametrize("flags", [COMMITTED, COMMITTED | VmmFlags.SHAREABLE])
def test_no_page_of_a_buffer_becomes_executable(flags: VmmFlags) -> None:
    with VMM(policy=Policy(ready=["no executable MDL"]), audit=Audit()) as vmm:
        calls: list[Callable[[], object]] = [
            lambda: vmm.mdl_create(PAGE, READ_EXECUTE),
            lambda: vmm.mdl_create_from_buf(b"x", READ_EXECUTE),
            lambda: vmm.mdl_map(vmm.mdl_create(PAGE, READ), 0, PAGE, 0, READ_EXECUTE),
        ]
        for denied in calls:
            with pytest.raises(SecurityDisallow, match="no executable MDL"):
                denied()
        va = vmm.allocate(0, 2 * PAGE, flags)
        vmm.protect(va, PAGE, READ_EXECUTE)
        with pytest.raises(SecurityDisallow, match="no executable MDL"):
            vmm.mdl_create_from_vm(va, 2 * PAGE, READ)
        denial = vmm.history()[-1]
        assert (denial.decision, denial.rule) == ("deny", "no executable MDL")
        vmm.protect(va, PAGE, READ_WRITE)
        vmm.mdl_create_from_vm(va, 2 * PAGE, READ)
        with pytest.raises(NoCapability):
            vmm.protect(va, PAGE, READ_EXECUTE)
        vmm.protect(va, PAGE, READ)
        vmm._check()


def test_only_sealed_buffers_leave() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, VMM(policy=Policy(ready=["only frozen or published buffers leave"])) as vmm:
        handle = vmm.mdl_create(PAGE, READ_WRITE)
        for denied in (
            lambda: vmm.send_handle(ours, handle),
            lambda: vmm.handle_fileno(handle),
            lambda: vmm.send_handle(ours, handle + 1),
        ):
            with pytest.raises(SecurityDisallow, match="only frozen or published"):
                denied()
        vmm.mdl_seal(handle, Seal.PUBLISH)
        vmm.send_handle(ours, handle)
        frozen = vmm.mdl_create_from_buf(b"x", READ)
        os.close(vmm.handle_fileno(frozen))


def test_nothing_goes_to_somebody_unknown() -> None:
    policy = Policy(ready=["no transfer to other users"])
    with VMM(policy=policy) as vmm, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        handle = vmm.mdl_create(PAGE, READ)
        with pytest.raises(SecurityDisallow, match="no transfer"):
            vmm.send_handle(ours, handle)
        with pytest.raises(SecurityDisallow, match="no transfer"):
            vmm.handle_fileno(handle)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_nothing_goes_to_another_user() -> None:
    address = f"\0vmm-linux-policy-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        VMM(policy=Policy(ready=["no transfer to other users"])) as vmm,
    ):
        listener.bind(address)
        listener.listen()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(NOBODY)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(address)
                    status = len(sock.recv(1))
            finally:
                os._exit(status)
        connection, _ = listener.accept()
        with connection:
            handle = vmm.mdl_create(PAGE, READ)
            with pytest.raises(SecurityDisallow, match="no transfer"):
                vmm.send_handle(connection, handle)
        # It saw the end of the connection, and not a byte.
        assert os.waitpid(child, 0)[1] == 0


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_says_all_that_rules_can(tmp_path: Path) -> None:
    path = write_policy(
        tmp_path,
        """
        default = "deny"
        audit_failure = "continue"
        ready = ["W^X", "no executable MDL"]
        [[rule]]
        name = "small"
        allow = ["allocate"]
        max_size = 0x10_0000
        [[rule]]
        allow = "*"
        peer_uid = 0
        """,
    )
    policy = Policy.from_toml(path)
    assert policy.audit_failure == "continue"
    assert outcome_of(policy, "allocate", 0, PAGE, RESERVED) == "OK"
    assert outcome_of(policy, "allocate", 0, 2 << 20, RESERVED) == "SECURITY_DISALLOW"
    assert outcome_of(policy, "query", 0) == "SECURITY_DISALLOW"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('default = "deny\n', 1, "Illegal character"),
        ("a = 1\nb = = 2", 2, "Invalid value"),
        ("[[rule]]\nallow = [", 2, "at end of document"),
        ("x = " + "[" * 5000, 1, ""),
        ('\ndefault = "denied"', 2, "default is 'denied', not 'allow' or 'deny'; did you mean"),
        ("default = true", 1, "default is True"),
        ('\n\ndefalt = "deny"', 3, "unknown key 'defalt'; did you mean 'default'?"),
        ('audit_failure = "stop"', 1, "audit_failure"),
        ('ready = ["w^x"]', 1, "unknown ready rule 'w^x'; did you mean 'W^X'?"),
        ('ready = ["W^X", "W^X"]', 1, "twice"),
        ('ready = "W^X"', 1, "not a list"),
        ("rule = 1", 1, r"[[rule]]"),
        ('[[rule]]\nallow = ["alocate"]', 2, "unknown method 'alocate'; did you mean 'allocate'?"),
        ('[[rule]]\nallow = "allocate"', 2, "not a list of names"),
        ('[[rule]]\ndeny = ["close"]', 2, "close cannot be decided about"),
        ("[[rule]]\ndeny = []", 2, "names no method"),
        ('[[rule]]\nname = "x"', 1, "one of allow and deny"),
        ('[[rule]]\nallow = "*"\ndeny = "*"', 1, "one of allow and deny"),
        ('[[rule]]\nallow = "*"\nsise = 3', 3, "unknown key 'sise'"),
        ('[[rule]]\ndeny = ["protect"]\nany_flags = ["WRIT"]', 3, "unknown flags 'WRIT'"),
        ('[[rule]]\ndeny = ["protect"]\nany_flags = ["HUGE"]', 3, "protect does not take these"),
        ('[[rule]]\ndeny = ["free"]\nany_flags = ["WRITE"]', 3, "free has no flags"),
        ('[[rule]]\ndeny = ["free"]\npeer_uid = 1', 3, "free has no peer"),
        ('[[rule]]\ndeny = ["handle_copy"]\nall_rights = ["MAP"]', 3, "unknown rights 'MAP'"),
        ('[[rule]]\ndeny = ["mdl_seal"]\nall_seals = ["frozen"]', 3, "did you mean 'FREEZE'?"),
        (
            '[[rule]]\ndeny = ["free"]\nmin_size = 2\nmax_size = 1',
            3,
            "min_size 2 is above max_size",
        ),
        ('[[rule]]\ndeny = ["free"]\nmin_size = -1', 3, "min_size is -1"),
        ('[[rule]]\ndeny = ["free"]\nmax_size = 1.5', 3, "max_size is 1.5"),
        ('[[rule]]\ndeny = ["free"]\nmax_size = true', 3, "max_size is True"),
        ('[[rule]]\ndeny = ["send_handle"]\npeer_uid = []', 3, "matches nobody"),
        ('[[rule]]\ndeny = ["send_handle"]\npeer_uid = ["root"]', 3, "'root' is no number"),
        ('[[rule]]\ndeny = ["send_handle"]\nother_user = false', 3, "true, or leave it out"),
        ('[[rule]]\ndeny = "*"\nname = "a\\u0007"', 3, "no printable text"),
        (
            '[[rule]]\ndeny = ["protect"]\nall_flags = ["READ"]\nno_flags = ["READ"]',
            4,
            "READ in all_flags and in no_flags",
        ),
        (
            '[[rule]]\ndeny = ["protect"]\nany_flags = ["READ"]\nno_flags = ["READ"]',
            3,
            "can never match",
        ),
        (
            '[[rule]]\nallow = ["free"]\n\n# the same\n[[rule]]\ndeny = ["free"]',
            5,
            "'rule 1' says the opposite",
        ),
        ('[[rule]]\nallow = "*"\n[[rule]]\ndeny = ["free"]\nmin_size = 9', 3, "always answers"),
        (
            'ready = ["no transfer to other users"]\n[[rule]]\nallow = ["handle_fileno"]',
            2,
            "'no transfer to other users' says the opposite",
        ),
        ("", None, "default is missing"),
        ('ready = ["W^X"]', None, "default is missing"),
        ("[[rule]]\ndeny = '*'\nany_flags=['READ']\nany_seals=['FREEZE']", 1, "no method has all"),
    ],
)
def test_a_file_that_is_no_policy_is_refused_with_line_and_reason(
    tmp_path: Path, text: str, line: int | None, words: str
) -> None:
    path = write_policy(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        Policy.from_toml(path)
    problem = caught.value
    assert (problem.file, problem.line) == (str(path), line), problem
    assert words in problem.reason
    where = f"{path}:{line}" if line else str(path)
    assert str(problem) == f"Policy: {where}: {problem.reason}"
    copy = pickle.loads(pickle.dumps(problem))  # noqa: S301
    assert (type(copy), str(copy), copy.line) == (PolicyError, str(problem), line)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        pytest.param("\nx = " + "9" * 5000, 2, "too many digits", id="digits"),
        pytest.param(
            '[[rule]]\ndeny = ["free"]\nmax_size = 0x' + "f" * 9999, 3, "is a int, not", id="bits"
        ),
        pytest.param(
            "[[rule]]\nallow" + ".a" * 2000 + " = 1", 2, "is a dict, not a list", id="depth"
        ),
        pytest.param("ready = [\n" + '"x",\n' * 9999 + "]", None, "ready rule 'x'", id="lines"),
    ],
)
def test_values_out_of_all_proportion_are_refused_soon(
    tmp_path: Path, text: str, line: int | None, words: str
) -> None:
    with pytest.raises(PolicyError, match=words) as caught:
        Policy.from_toml(write_policy(tmp_path, text))
    assert caught.value.line == line


def test_files_of_bytes_and_files_too_long_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(PolicyError, match=":2: not UTF-8"):
        Policy.from_toml(path)
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(PolicyError, match="longer than"):
        Policy.from_toml(path)
    with pytest.raises(FileNotFoundError):
        Policy.from_toml(tmp_path / "none.toml")
    with pytest.raises(PolicyError, match="null byte"):
        Policy.from_toml("a\0b")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for odd in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(PolicyError, match="no ordinary file"):
            Policy.from_toml(odd)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rules": [3]}, "rule 1: 3 is no Rule"),
        ({"rules": [Rule(deny=["free"]), Rule(deny=["fre"])]}, "rule 2: unknown method"),
        ({"default": "no"}, "default is 'no'"),
        ({"ready": ["x"]}, "unknown ready rule"),
        ({"ask": 3}, "cannot be called"),
        ({"audit_failure": 1}, "audit_failure"),
    ],
)
def test_a_policy_in_python_is_checked_alike(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        Policy(**arguments)


def test_rules_that_differ_somewhere_are_no_contradiction() -> None:
    Policy(
        [
            Rule(allow=["allocate"], max_size=PAGE),
            Rule(deny=["allocate"], max_size=2 * PAGE),
            Rule(allow=["allocate", "free"], any_flags=[], all_flags=[]),
            Rule(deny=["protect"], all_flags=["READ", "EXECUTE"]),
            Rule(deny=["protect"], any_flags=["READ", "EXECUTE"]),
            Rule(allow=["send_handle"], peer_uid=[1, 2]),
            Rule(deny=["send_handle"], peer_uid=[2, 3]),
            Rule(deny=["send_handle"]),
            Rule(allow="*"),
        ],
        ready=list(READY),
    )


@pytest.mark.parametrize("methods", ["*", ["allocate", "free"]])
def test_the_interpreters_work_grows_with_the_rules_and_not_with_their_pairs(
    methods: list[str],
) -> None:
    def work(count: int) -> int:
        rules = [Rule(allow=methods, max_size=number) for number in range(count)]
        calls: list[str] = []
        sys.setprofile(lambda _frame, event, _argument: calls.append(event))
        try:
            Policy(rules)
        finally:
            sys.setprofile(None)
        return len(calls)

    few, twice, thrice = (work(count) for count in (50, 100, 150))
    assert thrice - twice == twice - few > 0


def test_among_many_rules_the_one_that_never_answers_is_named_with_the_one_that_does() -> None:
    rules = [Rule(allow=["allocate", "free"], max_size=number) for number in range(1000)]
    hidden = Rule(deny=["free", "allocate"], max_size=700)
    with pytest.raises(PolicyError, match=r"^Policy: rule 1001: .*'rule 701' says the opposite"):
        Policy([*rules, hidden])
    apart = [Rule(allow=["allocate"]), Rule(allow=["commit", "free"], min_size=1)]
    with pytest.raises(PolicyError, match=r"^Policy: rule 3: .*'rule 2' always answers first"):
        Policy([*apart, Rule(deny=["free", "allocate"], min_size=2)])


@pytest.mark.parametrize("value", [3, "deny", Policy, object()])
def test_what_is_no_policy_is_refused(value: Any) -> None:  # noqa: ANN401
    with pytest.raises(InvalidArgument, match="not a Policy"):
        VMM(policy=value)


def test_a_policy_that_was_never_made_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="not a Policy"):
        VMM(policy=Policy.__new__(Policy))


TEXT = '''# [[rule]]
title = """
[[rule]]
allow = 1
"""

[[rule]]   # the first
allow = [
    "free",   # one
    # a comment

    "query",
]
[[rule]]
inner = {a = 1, b = [2, 3]}
other.key = 3
'''


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), None),
        (("missing",), None),
        (("title",), 2),
        (("rule",), 7),
        (("rule", 0), 7),
        (("rule", 0, "allow"), 8),
        (("rule", 0, "deny"), 7),
        (("rule", 1), 14),
        (("rule", 1, "inner"), 15),
        (("rule", 1, "inner", "b", 1), 15),
        (("rule", 1, "other"), 16),
        (("rule", 2), 7),
    ],
)
def test_a_thing_is_found_in_the_line_in_which_it_begins(
    path: tuple[str | int, ...], line: int | None, newline: str
) -> None:
    text = TEXT.replace("\n", newline)
    assert _toml_lines.line_of(text, path) == line


# ---- the environment -----------------------------------------------------------------------------


def test_a_vmm_that_names_no_policy_has_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMM_LINUX_POLICY", str(write_policy(tmp_path, 'default = "deny"')))
    bare = VMM.__new__(VMM)
    with VMM() as vmm, VMM(policy=Policy()) as own:
        for each in (vmm, bare):
            with pytest.raises(SecurityDisallow, match="default"):
                each.allocate(0, PAGE, RESERVED)
        own.allocate(0, PAGE, RESERVED)
        with pytest.raises(SecurityDisallow):
            Mdl.from_bytes(b"x").close()
    bare.close()
    from vmm_linux._own_vmm import OWN

    OWN.pop("vmm").close()


def test_a_file_of_the_environment_that_is_no_policy_leaves_no_vmm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_policy(tmp_path, "x = 1")
    monkeypatch.setenv("VMM_LINUX_POLICY", str(path))
    with pytest.raises(PolicyError, match=":1: unknown key 'x'"):
        VMM()
    bare = VMM.__new__(VMM)
    with pytest.raises(PolicyError):
        bare.allocate(0, PAGE, RESERVED)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        VMM()
    monkeypatch.setenv("VMM_LINUX_POLICY", "")
    bare.allocate(0, PAGE, RESERVED)
    bare.close()

"""No way goes around a policy, whatever way a call comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from children import run_child
from constants import COMMITTED, READ, RESERVED, RW
from forked import in_child
from kernel_oracle import PAGE
from policies import Switch
from vmm_linux import VMM, Limits, Mdl, Retcode
from vmm_linux._core import endpoint
from vmm_linux.audit import Audit
from vmm_linux.errors import InvalidOperation, SecurityDisallow
from vmm_linux.policy import Policy, Question, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


DENY_ALL = Policy(default="deny")


class Own(VMM):
    """A subclass with a method of its own in place of the endpoint's."""

    def allocate(self, addr: Any, size: Any, flags: Any) -> int:  # noqa: ANN401
        """As the endpoint's, past the nearest class."""
        return endpoint.VMM.allocate(self, addr, size, flags)


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
        sys.path.insert(0, str(Path("tests/support").resolve()))
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

    from vmm_linux import VMM, policy
    from vmm_linux.policy import toml_lines

    assert toml_lines.parse(b"") == ("", {})
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


# ---- a VMM that is called while it is made ------------------------------------------------------


class CalledEarly(VMM):
    """A subclass that uses the VMM before it is made."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        self.allocate(0, PAGE, RESERVED)
        try:
            super().__init__(**options)
        except InvalidOperation:
            self.close()
            raise


@pytest.mark.parametrize("option", ["policy", "audit"])
def test_a_policy_that_comes_after_the_first_call_is_refused(option: str) -> None:
    given = {"policy": DENY_ALL, "audit": Audit()}[option]
    with pytest.raises(InvalidOperation, match="keeps the policy and the audit"):
        CalledEarly(**{option: given})
    CalledEarly().close()


@pytest.mark.parametrize("option", ["policy", "audit"])
def test_a_policy_is_refused_when_a_call_comes_while_files_of_the_environment_are_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    log, rules = tmp_path / "calls", tmp_path / "rules"
    rules.write_text('default = "allow"')
    other = {"policy": ("VMM_LINUX_AUDIT", log), "audit": ("VMM_LINUX_POLICY", rules)}[option]
    monkeypatch.setenv(other[0], str(other[1]))
    given: Any = {"policy": DENY_ALL, "audit": Audit()}[option]
    vmm = VMM.__new__(VMM)
    opened: list[object] = []
    real_open = os.open

    def open_and_call(path: Any, *arguments: Any, **options: Any) -> int:  # noqa: ANN401
        opened.append(path)
        if len(opened) == 1:
            vmm.allocate(0, PAGE, RESERVED)
        return real_open(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_and_call)
        with pytest.raises(InvalidOperation, match="keeps the policy and the audit"):
            VMM.__init__(vmm, **{option: given})
    assert len(opened) == 2, "the call opened the file too"
    assert vmm.usage().regions.used == 1
    vmm.allocate(0, PAGE, RESERVED)  # as the environment says, which allows it
    vmm.close()


def test_a_policy_is_never_dropped_whatever_thread_is_quicker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VMM_LINUX_AUDIT", str(tmp_path / "calls"))
    interval = sys.getswitchinterval()
    outcomes: list[str] = []

    def call(vmm: VMM, start: threading.Barrier) -> None:
        start.wait()
        with contextlib.suppress(SecurityDisallow):
            vmm.allocate(0, PAGE, RESERVED)

    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            vmm = VMM.__new__(VMM)
            start = threading.Barrier(2)
            thread = threading.Thread(target=call, args=(vmm, start))
            thread.start()
            start.wait()
            try:
                VMM.__init__(vmm, policy=DENY_ALL)
            except InvalidOperation:
                outcomes.append("refused")
            else:
                with pytest.raises(SecurityDisallow):
                    vmm.allocate(0, PAGE, RESERVED)
                outcomes.append("held")
            thread.join()
            vmm.close()
    finally:
        sys.setswitchinterval(interval)
    assert len(outcomes) == 300


def test_a_call_whose_vmm_the_policy_closes_takes_no_message_and_sets_no_limit() -> None:
    open_ones: list[VMM] = []

    def close(_: Question) -> bool:
        open_ones[-1].close()
        return True

    def closed(call: Callable[[VMM], object]) -> None:
        with VMM(policy=Policy(ask=close)) as vmm:
            open_ones.append(vmm)
            with pytest.raises(InvalidOperation, match="this VMM is closed"):
                call(vmm)

    ours, theirs = socket.socketpair()
    with ours, theirs, VMM() as sender:
        theirs.settimeout(10)
        sender.send_handle(ours, sender.mdl_create(PAGE, RW))
        closed(lambda vmm: vmm.recv_handle(theirs))
        assert sender.mdl_get_size(sender.recv_handle(theirs)) == PAGE
        closed(lambda vmm: vmm.handle_from_fd(ours.fileno()))
    closed(lambda vmm: setattr(vmm, "limits", Limits()))
    closed(lambda vmm: vmm.query(2**63))

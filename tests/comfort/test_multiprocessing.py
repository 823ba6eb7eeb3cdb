"""Buffers go through multiprocessing by descriptor, with their rights, and leave nothing."""

from __future__ import annotations

import os
import pickle
import resource
import socket
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import pytest

from children import TESTS_IMPORTABLE, run_child
from kernel_oracle import PAGE
from leaks import read_descriptors
from vmm_linux import VMM, Mdl, Rights, VmmError, _sharer
from vmm_linux._default_vmm import default_vmm
from vmm_linux._pickling import unpack
from vmm_linux.errors import (
    HandleRevoked,
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    QuotaExceeded,
    ResourceNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 4 * PAGE
ALL = "TRANSFER|COPY|GET_SID|MAP_READ|MAP_WRITE"
READ_ONLY = "TRANSFER|COPY|GET_SID|MAP_READ"
#: What multiprocessing imports when it is needed, and an ordinary user may not be able to read.
LATE = "hmac, " + ", ".join(
    f"multiprocessing.{module}" for module in ("pool", "popen_fork", "queues", "synchronize")
)
METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture
def sharing() -> Iterator[None]:
    """What a pickle needs to be loaded in the process that made it: it stops again."""
    yield
    _sharer.stop()
    default_vmm().close()


def drive(name: str, method: str, *arguments: int, nobody: bool = False) -> list[str]:
    """What a driver printed, in a process that ends well and says nothing else."""
    child = run_child(
        f"import mdl_workers, {LATE}\nmdl_workers.{name}{(method, *arguments)!r}",
        nobody=nobody,
        environment=TESTS_IMPORTABLE,
        timeout=60,
    )
    assert (child.returncode, child.stderr) == (0, ""), child.stdout
    return child.stdout.splitlines()


@pytest.mark.parametrize("method", METHODS)
def test_an_argument_of_a_process_is_the_same_memory_with_the_same_rights(method: str) -> None:
    whole, reader, window = drive("by_argument", method)
    assert whole == f"{ALL} b'paren' None b'child' b'windo'"
    assert reader.startswith(f"{READ_ONLY} b'paren' write: the protection of the page at")
    assert reader.endswith("b'paren' b'windo'")
    assert window == f"{ALL} b'windo' None b'paren' b'child'"


@pytest.mark.parametrize("method", METHODS)
def test_queues_carry_buffers_there_and_back(method: str) -> None:
    *answers, steady, made = drive("by_queue", method)
    assert answers == [f"True {number}" for number in range(5)]
    assert (steady, made) == ("True", "b'made' True")


@pytest.mark.parametrize("method", METHODS)
def test_pipes_carry_buffers_and_know_one_that_comes_twice(method: str) -> None:
    assert drive("by_pipe", method) == ["(True, True)", "True 7 True"]


@pytest.mark.parametrize("method", METHODS)
def test_pools_carry_buffers_and_errors(method: str) -> None:
    assert drive("by_pool", method) == [
        str(sum(range(100))),
        str([True] * 5),
        "6 {True}",
        "rcResourceNotFound mdl_get_size",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_executors_carry_buffers_and_errors(method: str) -> None:
    assert drive("by_executor", method) == [
        str([True] * 3),
        "True 1",
        "rcResourceNotFound mdl_get_size",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_registered_with_the_resource_tracker(method: str) -> None:
    assert drive("without_the_tracker", method)[-1] == "registered []"


@pytest.mark.parametrize("name", ["by_argument", "by_queue", "by_pool"])
def test_an_ordinary_user_can_do_all_that(name: str) -> None:
    assert drive(name, "fork", nobody=True)


def test_ten_thousand_buffers_leave_no_descriptor_on_either_side() -> None:
    assert drive("many", "fork", 10_000) == ["0 0 True"]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_starting_processes_leaves_no_descriptor(method: str) -> None:
    assert drive("starting", method) == ["True", "True"]


@pytest.mark.parametrize("method", METHODS)
def test_a_buffer_whose_sender_died_first_is_a_clear_error(method: str) -> None:
    assert drive("end_early", method) == ["rcResourceNotFound unpickle True", "0"]


# ---- pickles ---------------------------------------------------------------------------------


def test_other_picklers_are_refused_and_told_what_does_it(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    before = read_descriptors()
    with pytest.raises(InvalidOperation, match=r"multiprocessing alone .* mdl\.send"):
        pickle.dumps(mdl)
    with pytest.raises(InvalidOperation, match="pickle"):
        pickle.dumps({"in": [mdl]}, protocol=2)
    assert read_descriptors() == before


@pytest.mark.usefixtures("sharing")
def test_a_pickle_is_loaded_once(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.map().write(b"pickled")
    text = bytes(ForkingPickler.dumps(mdl))
    loaded = pickle.loads(text)  # noqa: S301
    assert (loaded.sid, loaded.rights, loaded.vmm) == (mdl.sid, mdl.rights, default_vmm())
    assert loaded.map().read(7) == b"pickled"
    loaded.close()
    before = read_descriptors()
    for _ in range(3):
        with pytest.raises(ResourceNotFound, match=r"unpickle: .* loaded once"):
            pickle.loads(text)  # noqa: S301
    assert read_descriptors().keys() <= before.keys()


def test_closed_revoked_and_untransferable_buffers_do_not_pickle(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    kept = Mdl.from_handle(vmm, vmm.handle_copy(mdl.handle, Rights.MAP_READ))
    child = mdl.read_only()
    vmm.handle_revoke(mdl.handle)
    kept_again = Mdl.from_handle(vmm, vmm.handle_copy(mdl.handle, Rights.MAP_READ))
    mdl.close()
    before = read_descriptors()
    with VMM() as other:
        gone = other.mdl(SIZE)
    cases: list[tuple[Mdl, type[VmmError]]] = [
        (mdl, ResourceNotFound),
        (kept, HandleRevoked),
        (child, HandleRevoked),
        (kept_again, NoCapability),
        (gone, InvalidOperation),
    ]
    for bad, kind in cases:
        with pytest.raises(kind, match=r"^pickle: "):
            ForkingPickler.dumps(bad)
    assert read_descriptors() == before


def test_at_the_limit_of_descriptors_pickling_names_it(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [os.dup(0)]
    while used[-1] < max(read_descriptors()):
        used.append(os.dup(0))
    before = read_descriptors()
    # One or two are left: not enough for two sockets, or for the message between them.
    for more in (1, 2):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 1 + more, limits[1]))
        try:
            with pytest.raises(QuotaExceeded, match=r"^pickle: .*RLIMIT_NOFILE"):
                ForkingPickler.dumps(mdl)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert read_descriptors() == before
    for fd in used:
        os.close(fd)


class Arrived:
    """A descriptor that is in this process already, as one that was inherited."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        """What multiprocessing brought."""
        return self.fd


def test_a_descriptor_that_is_another_by_now_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    ours.send(b"somebody else's")
    inode = os.fstat(theirs.fileno()).st_ino
    file = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    closed = os.dup(file)
    os.close(closed)
    for fd, number in ((theirs.fileno(), inode + 1), (file, inode), (closed, inode), (-1, inode)):
        with pytest.raises(ResourceNotFound, match="gone"):
            unpack(default_vmm(), Arrived(fd), number)
    assert theirs.recv(100) == b"somebody else's"
    os.close(file)
    ours.close()
    theirs.close()


def test_a_socket_with_no_message_or_a_wrong_one_is_an_error_and_closed() -> None:
    before = read_descriptors()
    for message, kind in ((b"", ResourceNotFound), (b"hello", InvalidArgument)):
        ours, theirs = socket.socketpair()
        ours.send(message)
        ours.close()
        fd = theirs.detach()
        with pytest.raises(kind, match=r"^unpickle: "):
            unpack(default_vmm(), Arrived(fd), os.fstat(fd).st_ino)
    default_vmm().close()
    assert read_descriptors() == before


PROBLEMS = [OSError(2, "x"), EOFError(), KeyError(1), TypeError("x"), RuntimeError("x")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_whatever_keeps_a_descriptor_from_coming_is_told(problem: Exception) -> None:
    class Lost:
        def detach(self) -> int:
            raise problem

    with pytest.raises(ResourceNotFound, match="gone") as caught:
        unpack(default_vmm(), Lost(), 1)
    assert caught.value.__cause__ is problem


def test_errors_pickle_whole(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.close()
    with pytest.raises(ResourceNotFound) as caught:
        mdl.map()
    problem: Any = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(problem), problem.rc, problem.method) == (
        str(caught.value),
        caught.value.rc,
        "mdl_get_size",
    )

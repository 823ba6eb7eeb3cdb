"""A queue brings what was put into it, or an error that says why not: nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import pytest

from children import NOBODY, TESTS_IMPORTABLE, in_own_process, run_child
from constants import PATIENCE
from kernel_oracle import PAGE
from leaks import read_descriptors
from vmm_linux import VMM, Event, Mdl, Rights, VmmError, _sharer
from vmm_linux._default_vmm import default_vmm
from vmm_linux.errors import (
    HandleRevoked,
    InvalidOperation,
    NoCapability,
    QuotaExceeded,
    ResourceNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FORK = multiprocessing.get_context("fork")
CLOSED = r"the (Mdl|Event) was closed before its sender's queue could pickle it"


class Gate:
    """What a thread can pickle only after it was opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        self.opened.wait(PATIENCE)
        return str, ()


@pytest.fixture
def ended() -> Iterator[None]:
    """What was sent and loaded in this very process is closed."""
    yield
    _sharer.stop()
    default_vmm().close()


def put_behind_a_gate(queue: Any, things: list[Any], spoil: Callable[[], None]) -> list[Any]:  # noqa: ANN401
    """What comes of things that are spoiled after they were put, and before they are pickled."""
    gate = Gate()
    queue.put(gate)
    for thing in things:
        queue.put(thing)
    queue.put("behind")
    spoil()
    gate.opened.set()
    assert queue.get(timeout=PATIENCE) == ""
    answers: list[Any] = []
    for _ in things:
        try:
            answers.append(queue.get(timeout=PATIENCE))
        except VmmError as problem:
            answers.append(problem)
    assert queue.get(timeout=PATIENCE) == "behind"
    queue.close()
    queue.join_thread()
    return answers


# ---- in the thread of a queue ----------------------------------------------------------------


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("make", [FORK.Queue, FORK.JoinableQueue])
def test_what_was_closed_before_it_was_pickled_arrives_as_an_error(
    make: Callable[[], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    vmm = VMM()
    mdl, event, kept = vmm.mdl(PAGE), Event(), Mdl.from_bytes(b"kept")
    things = [mdl, event, {"deep": [mdl]}, kept]

    def close() -> None:
        mdl.close()
        event.close()
        vmm.close()

    *closed, loaded = put_behind_a_gate(make(), things, close)
    for problem in closed:
        assert isinstance(problem, ResourceNotFound)
        assert problem.method == "pickle"
        with pytest.raises(ResourceNotFound, match=CLOSED + r": .* said that it has it"):
            raise problem
    assert loaded.map().read(4) == b"kept"
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("ended")
def test_whatever_else_keeps_the_thread_from_pickling_arrives_as_an_error(vmm: VMM) -> None:
    origin = vmm.mdl(PAGE)
    revoked = origin.clone()
    untransferable = Mdl.from_handle(vmm, vmm.handle_copy(origin.handle, Rights.MAP_READ))
    one, other = put_behind_a_gate(
        FORK.Queue(), [revoked, untransferable], lambda: vmm.handle_revoke(origin.handle)
    )
    assert isinstance(one, HandleRevoked)
    assert isinstance(other, HandleRevoked)
    kept = Mdl.from_handle(vmm, vmm.handle_copy(origin.handle, Rights.MAP_READ))
    (problem,) = put_behind_a_gate(FORK.Queue(), [kept], lambda: None)
    assert isinstance(problem, NoCapability)
    assert problem.message.startswith("in the sender's queue: ")


@pytest.mark.usefixtures("ended")
def test_without_descriptors_the_thread_sends_an_error_that_names_the_limit(vmm: VMM) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    mdl, event = vmm.mdl(PAGE), Event()

    def spoil() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))

    try:
        problems = put_behind_a_gate(FORK.Queue(), [mdl, event], spoil)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for problem in problems:
        assert isinstance(problem, QuotaExceeded)
        assert "RLIMIT_NOFILE" in problem.message
    event.close()


class Careful(Queue):  # type: ignore[type-arg]
    """A queue that does something about what its thread raises."""

    problems: list[Exception]

    def _on_queue_feeder_error(self, e: Exception, obj: object) -> None:  # noqa: ARG002
        self.problems.append(e)


def test_a_queue_that_takes_its_threads_errors_gets_them(vmm: VMM) -> None:
    queue = Careful(ctx=FORK)
    queue.problems = []
    mdl = vmm.mdl(PAGE)
    mdl.close()
    queue.put(mdl)
    queue.put("behind")
    assert queue.get(timeout=PATIENCE) == "behind"
    assert [type(problem) for problem in queue.problems] == [ResourceNotFound]
    queue.close()
    queue.join_thread()


# ---- elsewhere the sender is told ------------------------------------------------------------


def test_who_pickles_himself_is_told_himself(vmm: VMM) -> None:
    mdl, event = vmm.mdl(PAGE), Event()
    mdl.close()
    event.close()
    ours, theirs = FORK.Pipe()
    simple = FORK.SimpleQueue()
    for send in (ours.send, simple.put):
        with pytest.raises(ResourceNotFound, match=r"^pickle: "):
            send(mdl)
        with pytest.raises(InvalidOperation, match="closed"):
            send(event)
    assert not theirs.poll()
    assert simple.empty()
    ours.close()
    theirs.close()
    simple.close()


def closed_here(_number: int) -> Mdl:
    """In a worker: a result that is closed."""
    mdl = Mdl.from_bytes(b"closed")
    mdl.close()
    return mdl


def use_pools() -> None:
    """A closed buffer as a task, and as a result: the caller is told, and the pool goes on."""
    with VMM() as vmm, ProcessPoolExecutor(1, FORK) as executor, FORK.Pool(1) as pool:
        mdl = vmm.mdl(PAGE)
        mdl.close()
        for wait in (executor.submit(len, mdl).result, pool.apply_async(len, (mdl,)).get):
            with pytest.raises(ResourceNotFound, match="pickle"):
                wait(PATIENCE)
        with pytest.raises(ResourceNotFound, match="pickle"):
            executor.submit(closed_here, 0).result(PATIENCE)
        with pytest.raises(Exception, match="pickle") as caught:
            pool.apply_async(closed_here, (0,)).get(PATIENCE)
        assert type(caught.value).__name__ == "MaybeEncodingError"
        assert executor.submit(abs, -1).result(PATIENCE) == pool.apply(abs, (-1,)) == 1


def test_pools_hand_the_error_to_who_asked_and_go_on() -> None:
    in_own_process(use_pools)


def without_descriptors() -> None:
    """In a worker, before its first task: let it have no descriptor more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def size_of(mdl: Any) -> int:  # noqa: ANN401  it may not have arrived
    """In a worker: use what came."""
    return len(mdl)


def wait_for_an_event(event: Any) -> bool:  # noqa: ANN401  as above
    """In a worker: use what came."""
    return bool(event.is_set())


def enter(things: Any) -> None:  # noqa: ANN401  as above
    """In a worker: use what came within something else."""
    with things["deep"][0]:
        pass


def hand_on(thing: Any) -> Any:  # noqa: ANN401  as above
    """In a worker: give it back."""
    return thing


QUEUE = FORK.SimpleQueue()


def fetch_from_the_queue(_number: int) -> None:
    """In a worker: what the task itself loads is told to the task at once."""
    with pytest.raises(QuotaExceeded, match="RLIMIT_NOFILE"):
        QUEUE.get()


def use_pools_without_descriptors() -> None:
    """What cannot be loaded in a worker, and by the pool itself, is an error for who asked."""
    _sharer.AT_EXIT = 0.2  # type: ignore[misc]
    mdl, event = Mdl.from_bytes(b"x"), Event()
    QUEUE.put(mdl)
    with FORK.Pool(1, without_descriptors) as pool:
        for work, thing in (
            (size_of, mdl),
            (wait_for_an_event, event),
            (enter, {"deep": [mdl]}),
        ):
            with pytest.raises(QuotaExceeded, match="RLIMIT_NOFILE"):
                pool.apply_async(work, (thing,)).get(PATIENCE)
        back = pool.apply_async(hand_on, (mdl,)).get(PATIENCE)
        assert "did not arrive: unpickle: no descriptor is left" in repr(back)
        with pytest.raises(QuotaExceeded, match="RLIMIT_NOFILE"):
            back.map()
        pool.apply_async(fetch_from_the_queue, (0,)).get(PATIENCE)
        assert pool.apply_async(abs, (-1,)).get(PATIENCE) == 1
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with FORK.Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            lost = pool.apply_async(answer, (7,)).get(PATIENCE)
            with pytest.raises(QuotaExceeded, match="RLIMIT_NOFILE"):
                lost.map()
            assert pool.apply_async(abs, (-1,)).get(PATIENCE) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert pool.apply_async(answer, (7,)).get(PATIENCE).map().read(1) == b"\7"


def test_what_does_not_arrive_in_a_pool_is_an_error_for_who_uses_it_and_the_pool_goes_on() -> None:
    in_own_process(use_pools_without_descriptors)


# ---- a sender that ends ----------------------------------------------------------------------


def put_and_end(queue: Any) -> None:  # noqa: ANN401
    """In another process: put what is open, and end at once."""
    queue.put([Mdl.from_bytes(b"in time"), Event()])


def fetch_late(method: str) -> None:
    """Fetch what a process sent that is ending already."""
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    sender = context.Process(target=put_and_end, args=(queue,))
    sender.start()
    while queue.empty():
        time.sleep(0.01)
    assert sender.exitcode is None
    mdl, event = queue.get(timeout=PATIENCE)
    assert mdl.map().read(7) == b"in time"
    event.close()
    sender.join(PATIENCE)
    assert sender.exitcode == 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_was_put_open_arrives_though_its_sender_ends_right_after(method: str) -> None:
    assert in_own_process(fetch_late, method) == ""


class WhenItEnds:
    """What is pickled only when the process has begun to end."""

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        from multiprocessing import util

        while not util.is_exiting():
            time.sleep(0.01)
        return str, ()


def send_from_a_thread_at_the_end(pipe: Any) -> None:  # noqa: ANN401
    """In another process: end, but for a thread that sends then."""

    def send() -> None:
        pipe.send(WhenItEnds())
        pipe.send([Mdl.from_bytes(b"late"), Event()])
        pipe.send(Mdl.from_bytes(b"later"))

    threading.Thread(target=send).start()


def fetch_from_a_thread(method: str) -> None:
    """Fetch what a thread sent whose process has come to its end otherwise."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    sender = context.Process(target=send_from_a_thread_at_the_end, args=(theirs,))
    sender.start()
    theirs.close()
    assert ours.recv() == ""
    sender.join(0.3)
    assert sender.exitcode is None  # it waits for who fetches
    mdl, event = ours.recv()
    assert mdl.map().read(4) == b"late"
    event.close()
    assert ours.recv().map().read(5) == b"later"
    sender.join(PATIENCE)
    assert sender.exitcode == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_a_thread_sends_when_its_process_ends_otherwise_arrives(method: str) -> None:
    assert in_own_process(fetch_from_a_thread, method) == ""


#: What the main program does last, so that only its very end can pickle it.
LAST = {
    "multiprocessing first": "import multiprocessing.queues, vmm_linux",
    "vmm_linux first": "import vmm_linux, multiprocessing.queues",
    "the buffer first": "import vmm_linux\nmdl = vmm_linux.Mdl.from_bytes(b'at last')\n"
    "import multiprocessing.queues",
}
MAIN = """
import os, signal, time
{imports}
class AtTheEnd:
    def __reduce__(self):
        while not multiprocessing.util.is_exiting():
            time.sleep(0.01)
        time.sleep(0.1)
        return str, ()
queue = multiprocessing.get_context("fork").Queue()
if os.fork() == 0:
    signal.alarm(20)
    assert queue.get() == ""
    mdl = queue.get()
    print(mdl.map().read(7), flush=True)
    os._exit(0)
if "mdl" not in globals():
    mdl = vmm_linux.Mdl.from_bytes(b"at last")
queue.put(AtTheEnd())
queue.put(mdl)
"""


ALONE = """
import resource
os.setresuid({nobody}, {nobody}, {nobody})
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="threads of root are not limited")
def test_it_arrives_though_the_end_can_start_no_thread() -> None:
    code = MAIN.format(imports=LAST["multiprocessing first"])
    # The child is of the same user; the thread of the queue runs already.
    code = code.replace("if os.fork() == 0:", f"if os.fork() == 0:\n    os.setuid({NOBODY})")
    code = code.replace("queue.put(mdl)", f"queue.put(mdl){ALONE.format(nobody=NOBODY)}")
    child = run_child(code, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout, child.stderr) == (0, "b'at last'\n", "")


@pytest.mark.parametrize("order", LAST)
def test_what_is_pickled_at_the_main_programs_end_arrives(order: str) -> None:
    child = run_child(MAIN.format(imports=LAST[order]), environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout, child.stderr) == (0, "b'at last'\n", "")


def answer(number: int) -> Mdl:
    """In a worker that lives for one task: a buffer."""
    return Mdl.from_bytes(bytes([number]))


def use_renewed_workers() -> None:
    """Pools whose workers end with each result."""
    with FORK.Pool(2, maxtasksperchild=1) as pool:
        mdls = pool.map(answer, range(6), chunksize=1)
        pool.close()
        pool.join()
    assert [mdl.map().read(1)[0] for mdl in mdls] == [*range(6)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as executor:
        mdls = list(executor.map(answer, range(2)))
    assert [mdl.map().read(1)[0] for mdl in mdls] == [0, 1]


def test_results_of_workers_that_end_with_them_arrive() -> None:
    assert in_own_process(use_renewed_workers) == ""


def give_up() -> None:
    """A process that ends, and waits in vain."""
    _sharer.AT_EXIT = 0.2  # type: ignore[misc]
    queue = FORK.Queue()
    sender = FORK.Process(target=put_and_end, args=(queue,))
    sender.start()
    sender.join(PATIENCE)
    assert sender.exitcode == 0
    before = read_descriptors()
    with pytest.raises(ResourceNotFound, match="gone"):
        queue.get(timeout=PATIENCE)
    assert read_descriptors() == before


def test_an_ending_process_gives_up_and_says_so() -> None:
    error = in_own_process(give_up)
    assert "closes 2 descriptors" in error
    assert "nobody fetched within 0.2 seconds" in error
    assert error.count("\n") == 1


WITHOUT = """
Mdl.from_bytes(b"x").close()
Event().close()
assert "multiprocessing" not in sys.modules
assert vmm_linux._sharer.HERE["sharer"].thread is None
"""


def test_a_process_that_sent_nothing_does_not_wait() -> None:
    code = f"import vmm_linux, sys\nfrom vmm_linux import Event, Mdl\n{WITHOUT}"
    child = run_child(code)
    assert (child.returncode, child.stderr) == (0, "")


# ---- the bound -------------------------------------------------------------------------------


@pytest.mark.usefixtures("ended")
def test_what_nobody_fetches_is_bounded_and_the_error_says_so(vmm: VMM) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    mdl, event = vmm.mdl(PAGE), Event()
    before = len(read_descriptors())
    ours, theirs = FORK.Pipe()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, limits[1]))
    most = (before + 40) // 2
    try:
        for number in range(most):
            ours.send(mdl if number % 2 else event)
        for thing in (mdl, event):
            with pytest.raises(QuotaExceeded, match=rf"no more than {most} may .*RLIMIT_NOFILE"):
                ours.send(thing)
        assert len(read_descriptors()) <= before + most + 3
        (problem,) = put_behind_a_gate(FORK.Queue(), [event], lambda: None)
        assert isinstance(problem, QuotaExceeded)
        assert f"no more than {most} may" in problem.message
        theirs.recv().close()
        ours.send(event)  # there is room for one again
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert _sharer.stop() == most
    event.close()
    ours.close()
    theirs.close()


def test_the_bound_is_a_number_where_there_are_descriptors_enough() -> None:
    in_own_process(send_without_end)


def send_without_end() -> None:
    """Send one buffer again and again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    mdl = Mdl.from_bytes(b"x")
    ForkingPickler.dumps(mdl)
    assert _sharer.stop() == 1
    before = len(read_descriptors())
    for _ in range(_sharer.MOST_WAITING):
        ForkingPickler.dumps(mdl)
    with pytest.raises(QuotaExceeded, match=f"no more than {_sharer.MOST_WAITING} may"):
        ForkingPickler.dumps(mdl)
    assert len(read_descriptors()) <= before + _sharer.MOST_WAITING + 3
    assert _sharer.stop() == _sharer.MOST_WAITING


def test_what_waits_for_long_gives_way_where_no_place_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_sharer, "MOST_WAITING", 3)
    monkeypatch.setattr(_sharer, "GIVES_WAY", 0.0)
    before = len(read_descriptors())
    pickles = []
    for number in range(8):
        with Mdl.from_bytes(bytes([number])) as mdl:
            pickles.append(bytes(ForkingPickler.dumps(mdl)))
    assert len(read_descriptors()) <= before + 3 + 3
    for text in pickles[:5]:
        with pytest.raises(ResourceNotFound, match="gone"):
            pickle.loads(text)  # noqa: S301
    assert [pickle.loads(text)[0] for text in pickles[5:]] == [5, 6, 7]  # noqa: S301
    _sharer.stop()
    assert len(read_descriptors()) == before

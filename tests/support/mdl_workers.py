"""What other processes do with buffers that multiprocessing brings them, and who starts those.

Modules of tests cannot be imported in a process that ``spawn`` starts from a command line; this one
can. Drivers are run by ``run_child`` and print what they found.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_oracle import PAGE
from vmm_linux import VMM, Mdl, VmmError, _sharer
from vmm_linux._default_vmm import default_vmm

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SIZE = 4 * PAGE


def descriptors() -> int:
    """How many descriptors this process has, none of them in the middle of being handed out."""
    with _sharer.HERE["sharer"].changed:
        return len(list(Path("/proc/self/fd").iterdir()))


def contexts(method: str) -> Any:  # noqa: ANN401
    """A context that starts processes so."""
    return multiprocessing.get_context(method)


# ---- in workers ------------------------------------------------------------------------------


def receive_and_tell(connection: Connection) -> None:
    """Take what comes, and tell what was raised instead."""
    try:
        outcome = repr(connection.recv())
    except VmmError as problem:
        outcome = f"{type(problem).__name__} {problem}"
    connection.send(outcome)


def answer(mdl: Mdl, connection: Connection) -> None:
    """Write what was asked for, if it is allowed, and tell of it."""
    region = mdl.map()
    text = region.read(5)
    try:
        region.write(b"child")
    except VmmError as problem:
        connection.send((mdl.rights.name, text, problem))
    else:
        connection.send((mdl.rights.name, text, None))
    connection.close()


def check(mdl: Mdl, sid: int) -> bool:
    """Whether this is that buffer, in the VMM of the package's own where it came by pickle."""
    return mdl.sid == sid and len(mdl.map()) == mdl.size


def is_own(mdl: Mdl) -> bool:
    """Whether it belongs to the VMM of the package's own in this process."""
    return mdl.vmm is default_vmm()


def first_byte(mdl: Mdl) -> int:
    """Its first byte."""
    return mdl.map().read(1)[0]


def add_one(mdl: Mdl) -> Mdl:
    """Count its first byte up, and give it back."""
    region = mdl.map()
    region.write(bytes([region.read(1)[0] + 1]))
    return mdl


def fail(mdl: Mdl) -> None:
    """Raise what the package raises."""
    mdl.close()
    mdl.map()


def use_the_first(mdl: Mdl) -> None:
    """Keep a buffer in the worker of a pool."""
    global kept  # noqa: PLW0603
    kept = mdl


def use_the_kept(number: int) -> int:
    """A byte of the buffer that is kept."""
    return kept.map().read(1, number)[0]


kept: Mdl


def relay(queue: Any, answers: Any) -> None:  # noqa: ANN401
    """Answer to what comes through a queue until None comes."""
    while (mdl := queue.get()) is not None:
        answers.put((mdl.sid, first_byte(mdl), descriptors()))


def make_one_and_die(answers: Any) -> None:  # noqa: ANN401
    """Send a buffer, and end as who was killed does."""
    answers.put(Mdl.from_bytes(b"made by a worker"))
    answers.close()
    answers.join_thread()
    os._exit(0)


def make_one(answers: Any, go_on: Any) -> None:  # noqa: ANN401
    """Make a buffer here, and send it while this process lives."""
    answers.put(Mdl.from_bytes(b"made by a worker"))
    go_on.wait()


def receive_many(connection: Connection, count: int) -> None:
    """Receive so many buffers, and tell how many descriptors they left."""
    connection.recv()
    connection.send(None)
    before = descriptors()
    for _ in range(count):
        connection.recv()
        connection.send(None)
    mappings = Path("/proc/self/maps").read_text().count("\n")
    connection.send((before, descriptors(), mappings))


# ---- who starts them -------------------------------------------------------------------------


def by_argument(method: str) -> None:
    """A buffer as an argument of a Process, whole and read-only."""
    context = contexts(method)
    with VMM() as vmm:
        mdl = vmm.mdl(SIZE)
        region = mdl.map()
        for sent in (mdl, mdl.read_only(), mdl.clone(PAGE, PAGE)):
            region.write(b"parent")
            region.write(b"window", PAGE)
            ours, theirs = context.Pipe()
            process = context.Process(target=answer, args=(sent, theirs))
            process.start()
            theirs.close()
            print(*ours.recv(), region.read(5), region.read(5, PAGE))
            process.join()
            ours.close()


def by_queue(method: str) -> None:
    """Buffers through queues, there and back."""
    context = contexts(method)
    queue, answers = context.Queue(), context.Queue()
    go_on = context.Event()
    process = context.Process(target=relay, args=(queue, answers))
    maker = context.Process(target=make_one, args=(answers, go_on))
    process.start()
    with VMM() as vmm:
        found = []
        for number in range(5):
            mdl = vmm.mdl(SIZE)
            mdl.map().write(bytes([number]))
            queue.put(mdl)
            sid, byte, count = answers.get()
            found.append(count)
            print(sid == mdl.sid, byte)
        print(found[1:] == found[:-1])
        queue.put(None)
        process.join()
        maker.start()
        made = answers.get()
        print(made.map().read(4), is_own(made))
        go_on.set()
        maker.join()


def by_pipe(method: str) -> None:
    """A buffer through a pipe, and one twice in one message."""
    context = contexts(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=relay_pipe, args=(theirs,))
    process.start()
    with VMM() as vmm:
        mdl = vmm.mdl(SIZE)
        ours.send([mdl, {"again": mdl}])
        print(ours.recv())
        mdl.map().write(b"\7")
        ours.send(mdl.read_only())
        back = ours.recv()
        print(back.rights == mdl.read_only().rights, first_byte(back), is_own(back))
        ours.send(None)
    process.join()


def relay_pipe(connection: Connection) -> None:
    """Answer to two messages."""
    first, second = connection.recv()
    connection.send((first is second["again"], is_own(first)))
    connection.send(connection.recv())
    connection.recv()


def by_pool(method: str) -> None:
    """Buffers to and from the workers of a Pool, as initial argument and as task."""
    context = contexts(method)
    with VMM() as vmm:
        mdl = vmm.mdl(SIZE)
        mdl.map().write(bytes(range(100)))
        with context.Pool(2, use_the_first, (mdl,)) as pool:
            print(sum(pool.map(use_the_kept, range(100))))
            print(pool.starmap(check, [(mdl, mdl.sid)] * 5))
            backs = [add_one(pool.apply(add_one, (mdl,))) for _ in range(3)]
            print(first_byte(mdl), {back.sid == mdl.sid for back in backs})
            try:
                pool.apply(fail, (mdl,))
            except VmmError as problem:
                print(problem.rc, problem.method)
            pool.close()
            pool.join()


def by_executor(method: str) -> None:
    """Buffers to and from the workers of a ProcessPoolExecutor."""
    with (
        VMM() as vmm,
        ProcessPoolExecutor(2, contexts(method), use_the_first, (vmm.mdl(SIZE),)) as executor,
    ):
        mdl = vmm.mdl(SIZE)
        print(list(executor.map(is_own, [mdl] * 3)))
        print(executor.submit(add_one, mdl).result().sid == mdl.sid, first_byte(mdl))
        try:
            executor.submit(fail, mdl).result()
        except VmmError as problem:
            print(problem.rc, problem.method)


def without_the_tracker(method: str) -> None:
    """Tell what is registered with the resource tracker while buffers are sent about."""
    registered: list[tuple[str, str]] = []
    register = resource_tracker.register

    def remember(name: Any, rtype: str) -> None:  # noqa: ANN401
        registered.append((name, rtype))
        register(name, rtype)

    resource_tracker.register = remember
    by_argument(method)
    by_pipe(method)
    print("registered", registered)


def many(method: str, count: int) -> None:
    """Send many buffers to one worker."""
    context = contexts(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=receive_many, args=(theirs, count))
    process.start()
    with VMM() as vmm:
        mdl = vmm.mdl(SIZE)
        ours.send(mdl)
        ours.recv()
        before = descriptors()
        for _ in range(count):
            ours.send(mdl)
            ours.recv()
        there_before, there_after, mappings = ours.recv()
        print(descriptors() - before, there_after - there_before, mappings < 1000)
    process.join()


def starting(method: str) -> None:
    """Start processes with buffers one after another, and tell what stays open here."""
    context = contexts(method)
    with VMM() as vmm:
        mdls = [vmm.mdl(SIZE) for _ in range(5)]
        counts = []
        processes = []
        for _ in range(3):
            processes.append(context.Process(target=close_all, args=(mdls,)))
            processes[-1].start()
            processes[-1].join()
            counts.append(descriptors())
        # A sentinel or two a process; the sockets of all but the last are closed.
        print(counts[2] - counts[1] <= 2)
        before = counts[0] - len(mdls) - 2
        for process in processes:
            process.close()
        del process, processes
        print(descriptors() <= before + 2)


def close_all(mdls: list[Mdl]) -> None:
    """Close buffers."""
    for mdl in mdls:
        mdl.close()


def end_early(method: str) -> None:
    """Put a buffer into a queue, and let its sender die before anybody fetches it."""
    context = contexts(method)
    answers = context.Queue()
    maker = context.Process(target=make_one_and_die, args=(answers,))
    maker.start()
    maker.join()
    before = descriptors()
    try:
        answers.get()
    except VmmError as problem:
        print(problem.rc, problem.method, "its sender still runs" in str(problem))
    print(descriptors() - before)

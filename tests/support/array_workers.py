"""Shared arrays that travel, what other processes do with them, and what the kernel says of them.

As in ``mdl_workers``, everything here can be imported in a process that ``spawn`` starts.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import resource
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kernel_oracle as kernel
import vmm_linux
from constants import PATIENCE, RW
from kernel_oracle import PAGE
from vmm_linux import SharedArray, _sharer
from vmm_linux._tools.children import die_with_parent
from vmm_linux.errors import NoCapability, QuotaExceeded, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

FORK = multiprocessing.get_context("fork")
PAIRS = np.dtype([("x", "<i2"), ("y", ">f8")])
ROWS, COLUMNS = 4, 6


def numbers() -> SharedArray[Any]:
    """A small array, none of whose bytes are all zero."""
    return vmm_linux.share(np.arange(1.0, ROWS * COLUMNS + 1).reshape(ROWS, COLUMNS))


def pairs() -> SharedArray[Any]:
    """An array of structures, the second of whose fields is not aligned."""
    return vmm_linux.full((7, 2), np.array((300, 2.5), PAIRS))


def made_read_only() -> SharedArray[Any]:
    """An array whose flag alone forbids writing."""
    array = numbers()
    array.flags.writeable = False
    return array


def across_segments() -> SharedArray[Any]:
    """A part of a buffer in segments that lies in two of three."""
    array = vmm_linux.Mdl(6 * PAGE, segment_size=2 * PAGE).array((6, PAGE), "u1")
    array[:] = 7
    part: SharedArray[Any] = array[1:3, ::-2]
    return part


#: Arrays that can be written, and how they are made.
WRITABLE: dict[str, Callable[[], Any]] = {
    "whole": numbers,
    "strided": lambda: numbers()[::2, 1::2],
    "reversed": lambda: numbers()[::-1, ::-2],
    "transposed": lambda: numbers().T,
    "diagonal": lambda: numbers().reshape(-1)[:: COLUMNS + 1],
    "with an axis more": lambda: numbers()[1, None, 2:],
    "Fortran's order": lambda: vmm_linux.share(np.asfortranarray(numbers())),
    "structures": pairs,
    "a field": lambda: pairs()["y"],
    "big-endian": lambda: vmm_linux.share(np.arange(1, 9, dtype=">i4")),
    "times": lambda: vmm_linux.share(np.arange("2001-01", "2001-05", dtype="M8[D]")),
    "text": lambda: vmm_linux.share(["some", "text"]),
    "no dimension": lambda: vmm_linux.share(3.5),
    "one element": lambda: numbers()[2, 3, ...],
    "beyond a page": lambda: vmm_linux.full(3 * PAGE, 5, "u1")[PAGE + 1 : 2 * PAGE + 3],
    "across segments": across_segments,
}
EMPTY: dict[str, Callable[[], Any]] = {
    "no rows": lambda: vmm_linux.zeros((0, 3)),
    "an empty slice": lambda: numbers()[:, 2:2],
    "an empty end": lambda: numbers()[ROWS:],
}
#: Arrays that cannot, wherever they are.
READ_ONLY: dict[str, Callable[[], Any]] = {
    "read-only": lambda: numbers().read_only(),
    "read-only, reversed": lambda: numbers()[::-1].read_only()[1:],
    "frozen": lambda: numbers().freeze(),
    "frozen, transposed": lambda: numbers().freeze().T,
}
#: Arrays that cannot where they come by pickle: one that is inherited has its memory's mapping.
FLAGGED: dict[str, Callable[[], Any]] = {
    "by its flag": made_read_only,
    "a view of the diagonal": lambda: numbers().diagonal(),
    "repeated": lambda: np.broadcast_to(numbers()[0], (5, COLUMNS), subok=True),
}


class Record(NamedTuple):
    """What an array is.

    Attributes:
        layout: its class, shape, dtype, strides and whether it can be written.
        sid: the security id of the buffer; of one that was cloned to be sent, its origin's.
        place: of its first element: the memory file, and where in it; None if it has none.
        text: its elements.
    """

    layout: tuple[object, ...]
    sid: int | None
    place: tuple[str, int, int] | None
    text: bytes


def mapping_of(array: SharedArray[Any]) -> kernel.Mapping:
    """The kernel's mapping that an array's first element is in."""
    found = kernel.mapping_at(address_of(array))
    assert found is not None
    return found


def address_of(array: SharedArray[Any]) -> int:
    """Where the first element is."""
    return int(array.__array_interface__["data"][0])


def look(array: SharedArray[Any]) -> Record:
    """What the package and the kernel say of an array."""
    info = array.mdl.vmm.handle_info(array.mdl.handle)
    kind = np.dtype(array.dtype)
    layout = (type(array), array.shape, kind.descr, kind, array.strides, array.flags.writeable)
    place = None
    if array.size:
        mapping = mapping_of(array)
        at = mapping.offset + address_of(array) - mapping.start
        place = mapping.device, mapping.inode, at
    return Record(layout, info.origin_sid or info.sid, place, array.tobytes())


def clear(array: SharedArray[Any]) -> None:
    """Overwrite each element with zeros."""
    array[...] = np.zeros((), array.dtype)


def is_clear(array: SharedArray[Any]) -> bool:
    """Whether all bytes of its elements are zero, or spaces of its text."""
    return not any(array.tobytes())


def ways_to_write(array: SharedArray[Any]) -> list[str]:
    """How a process can get to write the memory of an array that is read-only: no way."""
    mapping, mdl = mapping_of(array), array.mdl
    fd = mdl.fileno()
    permissions = mapping.permissions
    tries: dict[str, Callable[[], object]] = {
        "element": lambda: clear(array),
        "flag": lambda: setattr(array.flags, "writeable", True),
        "mprotect": lambda: kernel.protect(mapping.start, PAGE, 3),
        "protect": lambda: mdl.vmm.protect(mapping.start, PAGE, RW),
        "map": lambda: mdl.map(RW),
        "array": lambda: mdl.array(1, "u1", writable=True),
        "copy": lambda: mdl.vmm.handle_copy(mdl.handle, mdl.rights | vmm_linux.Rights.MAP_WRITE),
        "descriptor": lambda: os.pwrite(fd, b"x", 0),
    }
    found = [name for name, attempt in tries.items() if succeeds(attempt)]
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        found.append("open for writing")
    return found if permissions == "r--s" else [*found, permissions]


def succeeds(attempt: Callable[[], object]) -> bool:
    """Whether it is not refused as it has to be."""
    try:
        attempt()
    except (NoCapability, ValueError):
        return False
    except OSError as problem:
        if problem.errno not in {errno.EACCES, errno.EBADF, errno.EPERM}:
            raise
        return False
    return True


class Answer(NamedTuple):
    """What a worker found.

    Attributes:
        record: of the array as it came.
        ways: in which it could write what is read-only.
        array: as it came, on its way back.
    """

    record: Record
    ways: list[str]
    array: SharedArray[Any]


def answer(array: SharedArray[Any], inherited: bool = False) -> Answer:
    """In a worker: look at an array, and write all of it, or try to."""
    record = look(array)
    if array.flags.writeable:
        clear(array)
        return Answer(record, [], array)
    if inherited and vmm_linux.Rights.MAP_WRITE in array.mdl.rights:
        return Answer(record, [], array)
    return Answer(record, ways_to_write(array) if array.size else [], array)


# ---- channels --------------------------------------------------------------------------------


def begun(context: Any, target: Callable[..., object], *arguments: object) -> Any:  # noqa: ANN401
    """A process that has begun with this, and dies with this one."""
    process = context.Process(target=with_parent, args=(target, *arguments), daemon=True)
    process.start()
    return process


def with_parent(target: Callable[..., object], *arguments: object) -> None:
    """In a process that was started: do this, and die with the one that started it."""
    die_with_parent()
    target(*arguments)


def answer_all(arrays: list[SharedArray[Any]], connection: Any, inherited: bool) -> None:  # noqa: ANN401
    """In a process that was given them: answer for each."""
    for array in arrays:
        connection.send(answer(array, inherited))


def by_argument(context: Any, arrays: list[SharedArray[Any]]) -> Iterator[Answer]:  # noqa: ANN401
    """As arguments of a process."""
    ours, theirs = context.Pipe()
    inherited = context.get_start_method() == "fork"
    process = begun(context, answer_all, arrays, theirs, inherited)
    theirs.close()
    for _ in arrays:
        yield ours.recv()
    process.join()
    assert process.exitcode == 0


def answer_each(take: Callable[[], Any], give: Callable[[Any], None]) -> None:
    """In a process: answer until None comes."""
    while (array := take()) is not None:
        give(answer(array))


def answer_queue(queue: Any, answers: Any) -> None:  # noqa: ANN401
    """In a process, from one queue to another."""
    answer_each(queue.get, answers.put)


def answer_pipe(connection: Any) -> None:  # noqa: ANN401
    """In a process, through a pipe."""
    answer_each(connection.recv, connection.send)


def through(
    process: Any,  # noqa: ANN401
    give: Callable[[Any], None],
    take: Callable[[], Answer],
    arrays: list[SharedArray[Any]],
) -> Iterator[Answer]:
    """One after another to a process that answers each."""
    for array in arrays:
        give(array)
        yield take()
    give(None)
    process.join()
    assert process.exitcode == 0


def by_queue(context: Any, arrays: list[SharedArray[Any]]) -> Iterator[Answer]:  # noqa: ANN401
    """Through queues."""
    queue, answers = context.Queue(), context.Queue()
    process = begun(context, answer_queue, queue, answers)
    return through(process, queue.put, answers.get, arrays)


def by_simple_queue(context: Any, arrays: list[SharedArray[Any]]) -> Iterator[Answer]:  # noqa: ANN401
    """Through simple queues."""
    queue, answers = context.SimpleQueue(), context.SimpleQueue()
    process = begun(context, answer_queue, queue, answers)
    return through(process, queue.put, answers.get, arrays)


def by_pipe(context: Any, arrays: list[SharedArray[Any]]) -> Iterator[Answer]:  # noqa: ANN401
    """Through a pipe."""
    ours, theirs = context.Pipe()
    process = begun(context, answer_pipe, theirs)
    return through(process, ours.send, ours.recv, arrays)


def by_pool(context: Any, arrays: list[SharedArray[Any]]) -> Iterator[Answer]:  # noqa: ANN401
    """Through a pool, in each of its ways."""
    third = len(arrays) // 3
    with context.Pool(1, die_with_parent) as pool:
        yield from pool.map(answer, arrays[:third])
        yield from pool.imap(answer, arrays[third : 2 * third])
        for array in arrays[2 * third :]:
            yield pool.apply(answer, (array,))


def by_executor(context: Any, arrays: list[SharedArray[Any]]) -> Iterator[Answer]:  # noqa: ANN401
    """Through an executor, in both of its ways."""
    half = len(arrays) // 2
    with ProcessPoolExecutor(1, context, die_with_parent) as executor:
        yield from executor.map(answer, arrays[:half])
        for array in arrays[half:]:
            yield executor.submit(answer, array).result()


def answer_shared(shared: Any, names: list[str]) -> list[Answer]:  # noqa: ANN401
    """In a process: answer for what a manager has."""
    return [answer(shared[name]) for name in names]


def by_manager(context: Any, arrays: list[SharedArray[Any]]) -> Iterator[Answer]:  # noqa: ANN401
    """Through a dictionary in the process of a manager, which never looks at them."""
    manager = SyncManager(ctx=context)
    manager.start(die_with_parent)
    with manager, context.Pool(1, die_with_parent) as pool:
        shared: Any = manager.dict()
        for number, array in enumerate(arrays):
            shared[str(number)] = array
        yield from pool.apply(answer_shared, (shared, list(shared.keys())))
        shared.clear()


CHANNELS: dict[str, Callable[[Any, list[SharedArray[Any]]], Iterable[Answer]]] = {
    "argument": by_argument,
    "queue": by_queue,
    "simple queue": by_simple_queue,
    "pipe": by_pipe,
    "pool": by_pool,
    "executor": by_executor,
    "manager": by_manager,
}


def travel(channel: str, method: str) -> None:
    """Send one array of each kind to a worker and back, and compare all three."""
    kinds = {**WRITABLE, **EMPTY, **READ_ONLY, **FLAGGED}
    arrays = {name: make() for name, make in kinds.items()}
    records = {name: look(array) for name, array in arrays.items()}
    answers = CHANNELS[channel](multiprocessing.get_context(method), list(arrays.values()))
    for (name, array), found in zip(arrays.items(), answers, strict=True):
        assert found.record == records[name], name
        assert found.ways == [], name
        # The worker's write is here; what is read-only has not changed.
        assert is_clear(array) if name in WRITABLE else look(array) == records[name], name
        assert look(found.array) == look(array), name
        print(name)


# ---- many, and none ----------------------------------------------------------------------------


def total(row: SharedArray[Any]) -> tuple[float, bool]:
    """In a worker: the sum of a row, and whether the package shares it."""
    return float(row.sum()), row.mdl.closed


def map_rows() -> None:
    """Give far more rows to a pool than descriptors may wait."""
    array = vmm_linux.share(np.arange(30_000.0).reshape(10_000, 3))
    expected = [(float(row.sum()), False) for row in array]
    with FORK.Pool(2, die_with_parent) as pool:
        assert pool.map(total, array) == expected
        assert pool.map(total, array.read_only()) == expected
        assert list(pool.imap(total, array[:500])) == expected[:500]
        # Of a buffer in segments, the rows of the same pages come together.
        pieces = vmm_linux.Mdl(16 * PAGE, segment_size=4 * PAGE).array((2 * PAGE, 8), "u1")
        assert pool.map(total, pieces) == [(0.0, False)] * 2 * PAGE
    array.mdl.close()
    with FORK.Pool(1, die_with_parent) as pool, raises(ResourceNotFound, "^pickle: "):
        pool.map(total, array)
    print("done")


def without_descriptors() -> None:
    """In a worker, before its first task: let it have no descriptor more."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


#: What one does with an array.
USES: dict[str, Callable[[Any], object]] = {
    "sum": lambda array: array.sum(),
    "NumPy's sum": np.sum,
    "plus": lambda array: array + 1,
    "minus, the other way": lambda array: 1 - array,
    "beside an array": lambda array: np.ones(3) * array,
    "comparison": lambda array: array == 1,
    "element": lambda array: array[0],
    "assignment": lambda array: array.__setitem__(0, 1),
    "rows": list,
    "conversion": np.asarray,
    "truth": bool,
    "concatenation": lambda array: np.concatenate([array, array]),
}


def use(array: Any, name: str) -> object:  # noqa: ANN401
    """In a worker: use what came."""
    return USES[name](array)


def use_what_did_not_arrive() -> None:
    """Have a worker use an array for which it has no descriptor left."""
    array = numbers()
    with FORK.Pool(1, without_descriptors) as pool:
        for name in USES:
            with raises(QuotaExceeded, "RLIMIT_NOFILE"):
                print("!", name, pool.apply(use, (array, name)))
    assert _sharer.stop() == len(USES)  # they wait for who can fetch them
    print("done")


def put_closed() -> None:
    """Close an array's buffer before the thread of a queue pickles the array."""
    queue = FORK.Queue()
    array = numbers()
    array.mdl.close()
    queue.put(array)
    with raises(ResourceNotFound, "was closed before its sender's queue could pickle it"):
        queue.get(timeout=PATIENCE)
    print("done")


@contextmanager
def raises(kind: type[Exception], words: str) -> Iterator[None]:
    """As ``pytest.raises``, which takes long to import."""
    try:
        yield
    except kind as problem:
        assert re.search(words, str(problem)), problem  # noqa: PT017
    else:
        raise AssertionError("not raised")

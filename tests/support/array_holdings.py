"""What processes have of the buffers of arrays that are sent to and fro.

As in ``mdl_workers``, everything here can be imported in a process that ``spawn`` starts.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import vmm_linux
from array_workers import address_of, begun, mapping_of, numbers
from kernel_oracle import PAGE
from mdl_workers import descriptors
from segments import mapped_files, memory_files
from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from vmm_linux import SharedArray


class Holdings(NamedTuple):
    """What a process has of buffers.

    Attributes:
        files: the memory files that it has descriptors of, by inode.
        mappings: the inodes of mapped memory files, one for each mapping.
        descriptors: how many there are of all kinds.
    """

    files: list[int]
    mappings: list[int]
    descriptors: int


def holdings() -> Holdings:
    """What this process has."""
    mappings = sorted(mapping.inode for mapping in mapped_files())
    return Holdings(sorted(memory_files()), mappings, descriptors())


def sum_and_holdings(array: SharedArray[Any]) -> tuple[int, Holdings]:
    """In a worker: use an array, and tell what the process has for it."""
    return int(array.sum()), holdings()


def only_what_they_touch() -> None:
    """Send parts of a buffer in segments to new processes."""
    array = vmm_linux.Mdl(10 * PAGE, segment_size=4 * PAGE).array((10, PAGE), "u1")
    array[:] = np.arange(10)[:, None]
    pieces = [mapping.inode for mapping in mapped_files()]
    assert len(set(pieces)) == 3
    parts = {
        (0,): array[:2],
        (1,): array[4:8:3, ::7],
        (2,): array[9, :5],
        (0, 1): array[3:5].T,
        (1, 2): array[:6:-2],
        (0, 1, 2): array[::9],
    }
    spawn = multiprocessing.get_context("spawn")
    for touched, part in parts.items():
        with ProcessPoolExecutor(1, spawn, die_with_parent) as executor:
            total, there = executor.submit(sum_and_holdings, part).result()
            assert total == part.sum()
            expected = sorted(pieces[number] for number in touched)
            assert there.mappings == expected
            # A descriptor of a window on one file, which has no identity of its own, is not ours.
            assert there.files == expected
        print(touched)


def tell_holdings(connection: Any) -> None:  # noqa: ANN401
    """In a process: keep all that comes, send it back, and tell what the process has by then."""
    kept = []
    while (array := connection.recv()) is not None:
        kept.append(array)
        connection.send((array, holdings()))


#: So often each array is sent there and back.
ROUNDS = 100


def a_hundred_times(method: str) -> None:
    """Send an array and slices of it there and back, all of which both sides keep."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = begun(context, tell_holdings, theirs)
    theirs.close()
    whole = vmm_linux.zeros((64, PAGE // 8))
    pieces = vmm_linux.Mdl(8 * PAGE, segment_size=2 * PAGE).array((8, PAGE // 8))
    inode, files = mapping_of(whole).inode, {mapping.inode for mapping in mapped_files()}
    assert len(files) == 5
    kept: list[Any] = []

    def send(array: SharedArray[Any]) -> Holdings:
        """What the other process has when it came back from there."""
        ours.send(array)
        back, there = ours.recv()
        kept.append(back)
        return there  # type: ignore[no-any-return]

    slices = (whole, whole[::2], whole[3, 5:7], whole.T[::-1], whole[:0])
    for array in slices:
        send(array)
    here = holdings()
    for number in range(ROUNDS):
        there = send(slices[number % len(slices)])
        assert there.mappings.count(inode) == 1
        assert kept[-1].mdl is whole.mdl
    assert holdings() == here
    assert here.mappings.count(inode) == 1
    for array in (pieces, pieces[3:5], pieces[7], pieces.read_only()):
        there = send(array)
        here = holdings()
        for _ in range(ROUNDS):
            assert send(array) == there
        assert holdings() == here
    there = send(whole)
    # A mapping of a file for each window that lies in it, and one without WRITE.
    assert {there.mappings.count(each) for each in files} == {1, 2, 3}
    ours.send(None)
    process.join()
    print(process.exitcode)


def mapped_by_itself() -> None:
    """``Mdl.map`` makes a mapping each time, whatever arrays share."""
    array = numbers()
    inode = mapping_of(array).inode
    regions = [array.mdl.map() for _ in range(3)]
    same = [array.mdl.array((2, 2)) for _ in range(3)]
    assert holdings().mappings.count(inode) == 4
    assert len({region.base for region in regions}) == 3
    assert {address_of(each) for each in same} == {address_of(array)}
    print("done")

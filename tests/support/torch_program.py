"""PyTorch's DataLoader over shared arrays, for an interpreter that has PyTorch.

Run as a program: its argument is how the workers are started. It prints the versions.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

import kernel_oracle as kernel
import vmm_linux
from array_workers import FLAGGED, READ_ONLY, WRITABLE, begun, look, mapping_of, travel
from vmm_linux._tools.children import die_with_parent

ROWS, COLUMNS, WORKERS = 200, 64, 2


class Rows(Dataset):  # type: ignore[misc]  # without types
    """Rows of a shared array, and a note of who took them in another."""

    def __init__(self, array: Any, takers: Any) -> None:  # noqa: ANN401
        self.array = array
        self.takers = takers

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int, int]:
        """A row, the memory file that it is in, and the number of that file's mappings here."""
        self.takers[number] = os.getpid()
        inode = mapping_of(self.array).inode
        row = self.array[number]
        # PyTorch has no tensors that cannot be written.
        tensor = torch.from_numpy(row) if row.flags.writeable else torch.from_numpy(row.copy())
        return tensor, inode, mappings_of(inode)


def mappings_of(inode: int) -> int:
    """How many mappings of a memory file this process has."""
    return sum(mapping.inode == inode for mapping in kernel.maps())


def load(method: str, dtype: str, writable: bool) -> None:
    """Go twice through a data set by worker processes."""
    array = vmm_linux.share(np.arange(ROWS * COLUMNS, dtype=dtype).reshape(ROWS, COLUMNS))
    given = array[::-1] if writable else array.read_only()[::-1]
    inode = mapping_of(array).inode
    here = mappings_of(inode)
    takers = vmm_linux.zeros(ROWS, "i8")
    loader = DataLoader(
        Rows(given, takers),
        batch_size=32,
        num_workers=WORKERS,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    for _ in range(2):
        takers[:] = 0
        batches = list(loader)
        rows = torch.cat([batch for batch, *_ in batches])
        assert torch.equal(rows, torch.from_numpy(np.ascontiguousarray(given)))
        # The workers read that very memory, mapped once, and wrote where this process sees it.
        assert {int(each) for _, inodes, _ in batches for each in inodes} == {inode}
        inherited = here if method == "fork" else 1
        assert {int(each) for *_, counts in batches for each in counts} == {inherited}
        assert len(set(takers.tolist()) - {0, os.getpid()}) == WORKERS
        array += 1  # the next round sees it
    # A tensor over the memory is the memory.
    torch.from_numpy(array)[0, 0] = 99
    torch.from_dlpack(array)[0, 1] = 98
    assert array[0, :2].tolist() == [99, 98]


def look_at_all(connection: Any) -> None:  # noqa: ANN401
    """In a worker: tell of what comes beside tensors."""
    while (sent := connection.recv()) is not None:
        array, tensor = sent
        connection.send((look(array), float(tensor.sum())))


def beside_tensors(method: str) -> None:
    """Send arrays through PyTorch's own multiprocessing, each with a tensor."""
    ours, theirs = torch.multiprocessing.get_context(method).Pipe()
    process = begun(torch.multiprocessing.get_context(method), look_at_all, theirs)
    theirs.close()
    for make in {**WRITABLE, **READ_ONLY, **FLAGGED}.values():
        array = make()
        ours.send((array, torch.ones(7)))
        assert ours.recv() == (look(array), 7.0)
    ours.send(None)
    process.join()
    assert process.exitcode == 0


def main(method: str) -> None:
    """All of that with workers that are started so."""
    die_with_parent()
    for dtype in ("float32", "int64"):
        for writable in (True, False):
            load(method, dtype, writable)
    beside_tensors(method)
    # With the interpreter's own NumPy, which may be older than the tests'.
    for channel in ("queue", "pool", "executor"):
        travel(channel, method)
    print("NumPy", np.__version__, "PyTorch", torch.__version__)


if __name__ == "__main__":
    main(sys.argv[1])

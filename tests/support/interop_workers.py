"""What other libraries do with shared memory, in processes of their own.

They import those libraries here: pyarrow and pandas keep memory and threads for themselves, which
the process that runs the tests must not have.
"""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

import vmm_linux
from leaks import read_mappings
from vmm_linux import VMM, Mdl
from vmm_linux.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable

    from leaks import Span
    from vmm_linux import SharedArray

ROWS = 1000
NUMBERS = np.arange(ROWS * 3, dtype="f8").reshape(ROWS, 3)


def memory() -> list[Span]:
    """Where this process has buffers mapped, as the kernel says."""
    return [span for span, _, where in read_mappings() if "/memfd:vmm_linux" in where]


def is_shared(address: int, size: int) -> bool:
    """Whether bytes are in the mapping of a buffer."""
    return any(start <= address and address + size <= end for start, end in memory())


def in_another_process(work: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """What a function returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(work, *arguments).result()


# ---- as long as anything looks at it -----------------------------------------------------------


class Interface:
    """An object that exposes an array by ``__array_interface__`` alone."""

    def __init__(self, array: SharedArray[Any]) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


def looks_at_an_array() -> dict[str, Callable[[Any], Any]]:
    """What other libraries make of an array of 64 numbers."""
    import pandas as pd
    import pyarrow as pa

    return {
        "memoryview": lambda array: memoryview(array).cast("B").cast("d"),
        "frombuffer": np.frombuffer,
        "interface": lambda array: np.asarray(Interface(array)),
        "DLPack": np.from_dlpack,
        "Arrow buffer": lambda array: np.frombuffer(pa.py_buffer(array)),
        "Arrow array": lambda array: pa.array(array).to_numpy(),
        "frame": lambda array: pd.DataFrame(array, copy=False)[0].to_numpy(),
        "series": lambda array: pd.Series(array, copy=False),
    }


def looks_at_a_buffer() -> dict[str, Callable[[Any], Any]]:
    """What other libraries make of a buffer of 64 numbers."""
    import ctypes

    import pyarrow as pa

    return {
        "memoryview": lambda mdl: memoryview(mdl).cast("d"),
        "buf": lambda mdl: mdl.buf.cast("d"),
        "asarray": lambda mdl: np.asarray(mdl).view("f8"),
        "frombuffer": np.frombuffer,
        "ctypes": (ctypes.c_double * 64).from_buffer,
        "Arrow buffer": lambda mdl: np.frombuffer(pa.py_buffer(mdl)),
        "Arrow array": lambda mdl: pa.Array.from_buffers(
            pa.float64(), 64, [None, pa.py_buffer(mdl)]
        ).to_numpy(),
    }


def touch_after_everything_is_closed() -> None:
    """Close all that can be closed, and read memory by what libraries made of it."""
    looks: list[tuple[bool, str, Callable[..., Any]]] = [
        *((True, name, look) for name, look in looks_at_an_array().items()),
        *((False, name, look) for name, look in looks_at_a_buffer().items()),
    ]
    for is_array, name, look in looks:
        with VMM() as vmm:
            mdl = Mdl(64 * 8, vmm=vmm)
            array = mdl.array(64)
            array[:] = 2.5
            seen = look(array if is_array else mdl)
            mdl.close()
        del array, mdl, vmm
        gc.collect()
        assert len(memory()) == 1, name
        assert sum(seen) == 160, name
        del seen
        gc.collect()
        assert memory() == [], name


# ---- Arrow -------------------------------------------------------------------------------------


def arrow_buffers() -> None:
    """Arrow's buffers over a buffer and over arrays, which can be written or not."""
    import pyarrow as pa

    mdl = Mdl(1000)
    buffer = pa.py_buffer(mdl)
    assert (buffer.size, buffer.is_mutable) == (1000, True)
    assert buffer.address == np.asarray(mdl).ctypes.data
    array = vmm_linux.share(NUMBERS)
    buffer = pa.py_buffer(array)
    assert (buffer.size, buffer.is_mutable) == (array.nbytes, True)
    assert buffer.address == array.ctypes.data
    column = pa.array(array.reshape(-1))
    assert column.buffers()[1].address == array.ctypes.data
    for frozen in (array.read_only(), array.freeze(), Mdl.from_bytes(b"frozen")):
        assert not pa.py_buffer(frozen).is_mutable
    mdl.close()


def table_in_shared_memory() -> None:
    """Write a table into a buffer, and have another process read it where it is."""
    import pyarrow as pa

    table = pa.table(
        {
            "number": np.arange(ROWS),
            "half": np.arange(ROWS) / 2,
            "text": [f"row {row}" for row in range(ROWS)],
        }
    )
    with Mdl(1 << 20) as mdl:
        sink = pa.FixedSizeBufferWriter(pa.py_buffer(mdl))
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        assert in_another_process(read_table, mdl) == (sum(range(ROWS)), f"row {ROWS - 1}", 4)
        # Memory that Arrow could still write is not frozen; from then on, receivers can rely on it.
        try:
            mdl.freeze()
        except Busy:
            del sink, writer
            gc.collect()
            mdl.freeze()
        else:
            raise AssertionError
        assert in_another_process(read_table, mdl)[2] == 4


def read_table(mdl: Mdl) -> tuple[int, str, int]:
    """A sum and the last text of the table in a buffer, and how many memory blocks that took."""
    import pyarrow as pa

    before = pa.total_allocated_bytes()
    table = pa.ipc.open_stream(pa.py_buffer(mdl)).read_all()
    mdl.close()
    mdl.vmm.close()
    blocks = [
        block
        for column in table.columns
        for chunk in column.chunks
        for block in chunk.buffers()
        if block is not None
    ]
    assert all(is_shared(block.address, block.size) for block in blocks)
    assert pa.total_allocated_bytes() == before
    numbers = table["number"].to_numpy()
    assert is_shared(numbers.ctypes.data, numbers.nbytes)
    return int(numbers.sum()), table["text"][ROWS - 1].as_py(), len(blocks)


# ---- pandas ------------------------------------------------------------------------------------


def frame_in_two_processes() -> None:
    """A frame over an array here and there: what one writes, the other one sees."""
    import pandas as pd

    array = vmm_linux.share(NUMBERS)
    frame = pd.DataFrame(array, columns=["a", "b", "c"], copy=False)
    assert np.shares_memory(frame["b"].to_numpy(), array)
    frame.loc[7, "a"] = -1.0
    assert in_another_process(write_frame, array, 7) == -1.0
    assert frame.loc[7, "b"] == -2.0
    assert array[7].tolist() == [-1, -2, 23]
    array[:] = 0.5
    sums: pd.Series[float] = frame.sum()
    assert sums.tolist() == [ROWS / 2] * 3
    assert not np.shares_memory((frame + 1).to_numpy(), array)


def write_frame(array: SharedArray[Any], row: int) -> float:
    """Write a cell of a frame over an array; the answer is the cell beside it."""
    import pandas as pd

    frame = pd.DataFrame(array, columns=["a", "b", "c"], copy=False)
    array.mdl.close()
    array.mdl.vmm.close()
    del array
    address = frame["a"].to_numpy().ctypes.data
    assert any(start <= address < end for start, end in memory())
    frame.loc[row, "b"] = -2.0
    return float(frame.loc[row, "a"])


def columns_of_different_types() -> None:
    """A frame whose columns are arrays of one buffer, each of a type of its own."""
    import pandas as pd

    mdl = Mdl(ROWS * 9)
    columns = {"price": mdl.array(ROWS, "f8"), "sold": mdl.array(ROWS, "?", ROWS * 8)}
    frame = pd.DataFrame(columns, copy=False)
    in_another_process(sell, columns, 3)
    assert frame[frame["sold"]].index.tolist() == [3]
    assert frame.loc[3].tolist() == [9.75, True]


def sell(columns: dict[str, SharedArray[Any]], row: int) -> None:
    """Write a row of a frame over two arrays of one buffer."""
    import pandas as pd

    assert columns["price"].mdl is columns["sold"].mdl
    frame = pd.DataFrame(columns, copy=False)
    frame.loc[row, "price"] = 9.75
    frame.loc[row, "sold"] = True


def read_only_frame() -> None:
    """A frame over memory that cannot be written."""
    import pandas as pd

    array = vmm_linux.share(NUMBERS)
    for guarded in (array.read_only(), array.freeze()):
        frame = pd.DataFrame(guarded, copy=False)
        assert frame[2].sum() == NUMBERS[:, 2].sum()
        try:
            frame.loc[0, 0] = 1.0
        except ValueError as problem:
            assert "read-only" in str(problem)  # noqa: PT017  pytest is not here
        else:
            raise AssertionError
    assert array[0, 0] == 0

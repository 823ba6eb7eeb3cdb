"""Tensors over shared memory, by DLPack and by the buffer protocol: in Debian's Python."""

from __future__ import annotations

import inspect
import subprocess
import textwrap
from typing import TYPE_CHECKING

import pytest

from children import ROOT
from torch_python import TORCH_PYTHON
from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        TORCH_PYTHON is None, reason="PyTorch is missing: apt-get install python3-torch"
    ),
]


def answer(work: Callable[[], None]) -> str:
    """What a function prints there; it imports for itself what it uses."""
    assert TORCH_PYTHON
    source = textwrap.dedent(inspect.getsource(work))
    child = subprocess.run(
        [TORCH_PYTHON, "-W", "error", "-c", f"{source}\n{work.__name__}()"],
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=die_with_parent,
    )
    assert (child.returncode, child.stderr) == (0, "")
    return child.stdout


def a_tensor_over_an_array() -> None:
    """Write a tensor and its array by turns, and look at the tensor when all is closed."""
    import gc
    from pathlib import Path

    import numpy as np
    import torch

    from vmm_linux import VMM, share

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("/memfd:vmm_linux")

    with VMM() as vmm:
        array = share(np.arange(12.0).reshape(3, 4), vmm=vmm)
        tensor = torch.from_dlpack(array.T)
        assert tensor.data_ptr() == array.ctypes.data
        assert tuple(tensor.shape) == (4, 3)
        array[0, 1] = 50
        tensor[1, 1] = 25
        print(float(tensor[1, 0]), float(array[1, 1]))
        array.mdl.close()
    del array, vmm
    gc.collect()
    print(float(tensor.sum()), mapped())
    del tensor
    gc.collect()
    print(mapped())


def test_a_tensor_is_the_array_s_memory_and_keeps_it() -> None:
    assert answer(a_tensor_over_an_array) == "50.0 25.0\n135.0 1\n0\n"


def a_tensor_over_a_buffer() -> None:
    """Look at a tensor over a buffer when everything is closed."""
    import gc
    from pathlib import Path

    import torch

    from vmm_linux import VMM, Mdl

    with VMM() as vmm:
        mdl = Mdl(1000, vmm=vmm)
        tensor = torch.frombuffer(mdl, dtype=torch.uint8)
        mdl[999] = 7
        mdl.close()
    del mdl, vmm
    gc.collect()
    tensor[0] = 3
    print(int(tensor.sum()), len(tensor))
    del tensor
    gc.collect()
    print(Path("/proc/self/maps").read_text().count("/memfd:vmm_linux"))


def test_a_tensor_over_a_buffer_keeps_its_memory() -> None:
    assert answer(a_tensor_over_a_buffer) == "10 1000\n0\n"


def tensors_over_guarded_memory() -> None:
    """Ask for tensors of memory that cannot be written, which PyTorch does not know."""
    import torch

    from vmm_linux import full

    array = full(8, 2.0)
    for guarded in (array.read_only(), array.freeze()):
        try:
            torch.from_dlpack(guarded)
        except Exception as problem:  # noqa: BLE001  its kind depends on NumPy's version
            print("readonly" in str(problem).replace("-", ""))
        print(float(torch.tensor(guarded).sum()))


def test_read_only_memory_is_refused_as_a_tensor_and_can_be_copied() -> None:
    assert answer(tensors_over_guarded_memory) == "True\n16.0\n" * 2

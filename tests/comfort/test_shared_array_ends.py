"""Rights and seals of shared arrays, their ends, and NumPy that comes when it is needed."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from children import run_child
from shared_arrays import memory_of, refuses_writing
from vmm_linux import Rights, Seal, share
from vmm_linux.errors import InvalidOperation, ResourceNotFound
from vmm_linux.shared_array import SharedArray

# ---- rights and seals ----------------------------------------------------------------------------


def test_the_kernel_keeps_a_read_only_array_from_being_written() -> None:
    array = share([1.0, 2])
    reader = array.read_only()
    assert (memory_of(reader), refuses_writing(reader)) == (memory_of(array), True)
    assert not refuses_writing(array)
    with pytest.raises(ValueError, match="WRITEABLE"):
        reader.setflags(write=True)
    with pytest.raises(ValueError, match="read-only"):
        reader[0] = 3
    array[0] = 3
    assert reader.tolist() == [3, 2]
    assert Rights.MAP_WRITE not in reader.mdl.rights
    again = reader.read_only()
    assert again.mdl is reader.mdl
    part = array[1:].read_only()
    assert (part.tolist(), refuses_writing(part)) == ([2], True)


def test_a_read_only_view_is_not_writable_memory_either() -> None:
    array = share([1.0, 2])
    array.setflags(write=False)
    assert not array[:].read_only().flags.writeable


def test_freezing_copies_while_something_can_write_and_the_buffer_itself_is_sealed_alone() -> None:
    array = share([1.0, 2])
    mdl = array.mdl
    copied = array.freeze()
    array[0] = 9
    assert (copied.tolist(), array.tolist()) == ([1, 2], [9, 2])
    del array
    mdl.freeze()
    same = mdl.array(2).freeze()
    assert os.fstat(mdl.fileno()).st_ino == memory_of(same)
    assert same.mdl.seals == Seal.FREEZE
    assert same.tolist() == [9, 2]


def test_an_array_outlives_its_closed_buffer_and_says_that_it_cannot_be_sent() -> None:
    array = share([1.0, 2])
    array.mdl.close()
    array[0] = 5
    assert (array + 1).tolist() == [6, 3]
    for attempt in (array.read_only, array.freeze):
        with pytest.raises(ResourceNotFound, match="closed"):
            attempt()
    assert share(array).tolist() == [5, 2]


def test_a_deep_copy_has_a_buffer_of_its_own_and_a_copy_does_not() -> None:
    import copy

    array = share(np.array([[1.0, 2], [3, 4]]))[:, ::-1]
    other, view = copy.deepcopy(array), copy.copy(array)
    view[0, 0] = 9
    assert (array.tolist(), other.tolist()) == ([[9, 1], [4, 3]], [[2, 1], [4, 3]])
    assert memory_of(view) == memory_of(array) != memory_of(other)
    assert other.mdl.vmm is array.mdl.vmm


# ---- NumPy comes when it is needed ---------------------------------------------------------------


def import_step_by_step() -> None:
    """Tell what loads NumPy."""
    import sys

    import vmm_linux

    print("numpy" in sys.modules, "share" in dir(vmm_linux), "SharedArray" in dir(vmm_linux))
    print("numpy" in sys.modules, hasattr(vmm_linux, "nonsense"))
    from vmm_linux import share

    print("numpy" in sys.modules, share([1, 2]).sum(), vmm_linux.share is share)


def test_importing_the_package_loads_no_numpy_and_asking_for_share_does() -> None:
    child = run_child(import_step_by_step)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "False True True\nFalse False\nTrue 3 True\n"


def ask_where_numpy_cannot_be_imported() -> None:
    """Ask for each name without NumPy."""
    import sys

    class Blocker:
        def find_spec(self, name: str, *_: object) -> None:
            """Refuse NumPy."""
            if name.partition(".")[0] == "numpy":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
    import vmm_linux
    from vmm_linux.errors import Unimplemented

    mdl = vmm_linux.Mdl(10)
    asked = [(vmm_linux.__getattr__, name) for name in vmm_linux.ARRAYS]
    for ask, argument in (*asked, (vmm_linux.Mdl.from_array, [1]), (mdl.array, 1)):
        try:
            ask(argument)  # type: ignore[operator]
        except Unimplemented as problem:
            print(problem.message)
    mdl[:3] = b"abc"
    print(bytes(mdl))


def test_without_numpy_every_name_says_what_to_install() -> None:
    child = run_child(ask_where_numpy_cannot_be_imported)
    assert (child.returncode, child.stderr) == (0, "")
    needed = "NumPy is not installed: pip install 'vmm-linux[numpy]'\n"
    assert child.stdout == needed * 9 + f"{b'abc' + bytes(7)!r}\n"


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    import vmm_linux

    with pytest.raises(AttributeError, match="no attribute 'shares'"):
        vmm_linux.shares  # noqa: B018


def test_arrays_of_no_shared_memory_are_invalid_operations() -> None:
    view: Any = np.zeros(2).view(SharedArray)
    with pytest.raises(InvalidOperation):
        view.freeze()

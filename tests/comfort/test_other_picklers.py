"""Picklers other than multiprocessing's refuse buffers and arrays, and say what works."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import cloudpickle
import joblib
import numpy as np
import pytest

import vmm_linux
from array_workers import look, mapping_of, numbers
from children import in_own_process
from kernel_oracle import PAGE
from leaks import read_descriptors
from segments import mapped_files
from vmm_linux import Mdl, SharedArray
from vmm_linux._default_vmm import default_vmm
from vmm_linux.errors import InvalidOperation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
#: What an error says of how it works.
ADVICE = {
    "SharedArray": r"SharedArray objects are pickled by multiprocessing alone \(Process, Queue, "
    r"Pipe, pools; concurrent\.futures\).* send the buffer, array\.mdl\.send\(sock\).*"
    r"Mdl\.recv\(sock\)\.array\(shape, dtype\)",
    "Mdl": r"Mdl objects are pickled by multiprocessing alone .*mdl\.send\(sock\) and "
    r"Mdl\.recv\(sock\)",
}


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
    """The VMM of all these arrays is closed at the end."""
    yield
    default_vmm().close()


class Thing(NamedTuple):
    """What is to be pickled.

    Attributes:
        make: makes it.
        advice: what the error has to say.
    """

    make: Callable[[], Any]
    advice: str


THINGS = {
    "array": Thing(numbers, ADVICE["SharedArray"]),
    "slice": Thing(lambda: numbers()[::2].T, ADVICE["SharedArray"]),
    "frozen": Thing(lambda: numbers().freeze(), ADVICE["SharedArray"]),
    "deep": Thing(lambda: {"deep": [numbers()]}, ADVICE["SharedArray"]),
    "Mdl": Thing(lambda: Mdl(100), ADVICE["Mdl"]),
}


def by_a_pickler(thing: object, protocol: int) -> object:
    """As libraries use the class."""
    file = io.BytesIO()
    pickle.Pickler(file, protocol).dump(thing)
    return file.getvalue()


PICKLERS: dict[str, Callable[[Any, int], object]] = {
    "pickle": pickle.dumps,
    "pickle in Python": pickle._dumps,  # type: ignore[attr-defined]
    "Pickler": by_a_pickler,
    "cloudpickle": cloudpickle.dumps,
    "cloudpickle of a closure": lambda thing, protocol: cloudpickle.dumps(lambda: thing, protocol),
}


@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
@pytest.mark.parametrize("dump", PICKLERS.values(), ids=PICKLERS)
def test_other_picklers_of_any_protocol_refuse_and_say_what_works(
    dump: Callable[[Any, int], object], thing: Thing
) -> None:
    made = thing.make()
    before = read_descriptors()
    for protocol in PROTOCOLS:
        with pytest.raises(InvalidOperation, match=thing.advice):
            dump(made, protocol)
    assert read_descriptors() == before


def test_buffers_beside_a_pickle_are_refused_too() -> None:
    found: list[pickle.PickleBuffer] = []
    with pytest.raises(InvalidOperation, match=ADVICE["SharedArray"]):
        pickle.dumps(numbers(), 5, buffer_callback=found.append)
    assert found == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_who_asks_the_object_itself_is_refused_too(protocol: int) -> None:
    things: list[Any] = [numbers(), Mdl(100)]
    for thing in things:
        asks: list[Any] = [type(thing).__reduce_ex__, object.__reduce_ex__]
        for ask in asks:
            with pytest.raises(InvalidOperation, match="multiprocessing alone"):
                ask(thing, protocol)
        if protocol < 2:
            # Without a state of its own, a class in C cannot be taken to pieces.
            with pytest.raises((InvalidOperation, TypeError)):
                copyreg._reduce_ex(thing, protocol)  # type: ignore[attr-defined]


def test_what_numpy_computes_from_an_array_is_pickled_as_any_other() -> None:
    array = numbers()
    for protocol in PROTOCOLS:
        text = pickle.dumps([array + 1, array[[0, 2]], array.sum(axis=0)], protocol)
        more, some, sums = pickle.loads(text)  # noqa: S301  its own
        assert {type(each) for each in (more, some, sums)} == {np.ndarray}
        assert (more == array + 1).all()


# ---- joblib --------------------------------------------------------------------------------------


def test_joblib_dumps_no_array(tmp_path: Path) -> None:
    with pytest.raises(InvalidOperation, match=ADVICE["SharedArray"]):
        joblib.dump(numbers(), tmp_path / "array")


def try_joblib() -> None:
    """Have joblib's kinds of workers use an array."""
    # joblib dumps arrays of more than a megabyte into files, which workers map.
    small, large = vmm_linux.full(3, 1.0), vmm_linux.full(1 << 18, 1.0)
    for thing in (small, large, large[::2], small.mdl):
        advice = ADVICE[type(thing).__name__]
        # With loky it is "Could not pickle the task", and the reason as its cause.
        with pytest.raises(pickle.PicklingError, match="the task") as caught:
            joblib.Parallel(2, backend="loky")([joblib.delayed(len)(thing)])
        assert re.search(advice, str(caught.value.__cause__))
        with pytest.raises(InvalidOperation, match=advice):
            joblib.Parallel(2, backend="multiprocessing")([joblib.delayed(len)(thing)])
    add = joblib.delayed(vmm_linux.SharedArray.__iadd__)
    joblib.Parallel(2, backend="threading")([add(small[at : at + 1], at) for at in range(3)])
    assert small.tolist() == [1, 2, 3]


def test_joblibs_processes_refuse_with_the_reason_and_its_threads_share_the_memory() -> None:
    assert in_own_process(try_joblib) == ""


# ---- copies --------------------------------------------------------------------------------------


def test_a_copy_of_an_array_is_a_view_and_a_deep_copy_has_a_buffer_of_its_own() -> None:
    array = numbers()[:, ::-2]
    array.flags.writeable = False
    view, other = copy.copy(array), copy.deepcopy(array)
    assert type(view) is type(other) is SharedArray
    assert look(view) == look(array)
    assert view.mdl is array.mdl
    assert mapping_of(other).inode != mapping_of(array).inode
    assert other.mdl.sid != array.mdl.sid
    assert (other == array).all()
    assert other.flags.writeable
    other[0, 0] = -1
    assert array[0, 0] != -1


def test_a_copy_of_a_buffer_is_another_handle_of_it_and_a_deep_copy_another_buffer() -> None:
    mdl = Mdl.from_bytes(b"some bytes").read_only()
    handle, other = copy.copy(mdl), copy.deepcopy(mdl)
    assert handle.handle != mdl.handle
    assert (handle.sid, handle.rights) == (mdl.sid, mdl.rights)
    assert other.sid != mdl.sid
    assert bytes(handle) == bytes(other) == b"some bytes"
    other[:4] = b"more"
    assert bytes(mdl) == b"some bytes"
    # The two handles' objects share a mapping.
    assert len({mapping.inode for mapping in mapped_files()}) == len(mapped_files()) == 2


def test_deep_copies_in_one_structure_stay_one() -> None:
    array = vmm_linux.zeros(PAGE)
    one, other = copy.deepcopy([array, array])
    assert one is other
    assert one.mdl.sid != array.mdl.sid

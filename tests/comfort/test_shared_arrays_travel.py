"""Shared arrays arrive in other processes as the same memory, and there is one of each."""

from __future__ import annotations

import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING

import numpy as np
import pytest

import vmm_linux
from array_workers import CHANNELS, EMPTY, FLAGGED, READ_ONLY, WRITABLE, look
from children import TESTS_IMPORTABLE, run_child
from kernel_oracle import PAGE
from leaks import read_descriptors
from vmm_linux import VMM, Mdl, Rights, _sharer
from vmm_linux._default_vmm import default_vmm
from vmm_linux.errors import InvalidOperation, NoCapability, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

METHODS = ["fork", "forkserver", "spawn"]
#: What multiprocessing imports when it is needed, and an ordinary user may not be able to read.
LATE = "hmac, " + ", ".join(
    f"multiprocessing.{module}"
    for module in ("managers", "pool", "popen_fork", "queues", "synchronize")
)


def drive(driver: str, *arguments: object, nobody: bool = False) -> list[str]:
    """What a driver printed, in a process that ends well and says nothing else."""
    child = run_child(
        f"import array_holdings, array_strangers, array_workers, {LATE}\n{driver}{arguments!r}",
        nobody=nobody,
        environment=TESTS_IMPORTABLE,
    )
    assert (child.returncode, child.stderr) == (0, ""), child.stdout
    return child.stdout.splitlines()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channel", CHANNELS)
def test_an_array_arrives_as_the_same_memory_with_its_layout_and_rights(
    channel: str, method: str
) -> None:
    assert drive("array_workers.travel", channel, method) == [
        *WRITABLE,
        *EMPTY,
        *READ_ONLY,
        *FLAGGED,
    ]


@pytest.mark.parametrize("channel", ["queue", "pool", "manager"])
def test_an_ordinary_user_can_do_all_that(channel: str) -> None:
    assert drive("array_workers.travel", channel, "fork", nobody=True)


# ---- there is one of each ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_is_passed_a_hundred_times_is_mapped_once_and_takes_no_descriptor_more(
    method: str,
) -> None:
    assert drive("array_holdings.a_hundred_times", method) == ["0"]


def test_map_makes_a_mapping_of_its_own_each_time() -> None:
    assert drive("array_holdings.mapped_by_itself") == ["done"]


def test_a_slice_of_a_buffer_in_segments_brings_the_segments_that_it_touches() -> None:
    touched = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]
    assert drive("array_holdings.only_what_they_touch") == [str(each) for each in touched]


# ---- programs that never met -------------------------------------------------------------------


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
def test_programs_that_are_no_relatives_share_arrays_through_a_listener(nobody: bool) -> None:
    address = f"\0{uuid.uuid4()}"

    def run(name: str) -> list[str]:
        return drive(f"array_strangers.{name}", address, nobody=nobody)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, ["listen", "connect"])) == [["listener"], ["client"]]


LATE_IMPORT = """
import vmm_linux
array = vmm_linux.share([1, 2, 3])
from multiprocessing import Pipe
ours, theirs = Pipe()
ours.send(array[1:])
print(theirs.recv().mdl is array.mdl)
"""


def test_an_array_that_is_older_than_the_import_of_multiprocessing_is_sent_too() -> None:
    child = run_child(LATE_IMPORT)
    assert (child.returncode, child.stdout, child.stderr) == (0, "True\n", "")


# ---- many at once ------------------------------------------------------------------------------


@pytest.fixture
def sharing() -> Iterator[None]:
    """What a pickle needs to be loaded in the process that made it: it stops again."""
    yield
    _sharer.stop()
    default_vmm().close()


def waiting() -> int:
    """How many descriptors wait here to be fetched."""
    return len(_sharer.HERE["sharer"].waiting)


@pytest.mark.usefixtures("sharing")
def test_arrays_in_one_pickle_that_lie_in_one_buffer_take_one_descriptor() -> None:
    mdl = Mdl(5 * PAGE + 100)
    arrays = [mdl.array(50, "u1", offset) for offset in (0, 7, 3 * PAGE, 5 * PAGE + 50)]
    for number, array in enumerate(arrays):
        array[:] = number
    text = ForkingPickler.dumps([arrays, arrays[2][::-1], arrays[0].read_only()])
    assert waiting() == 2  # one of them without MAP_WRITE
    loaded, backwards, reader = pickle.loads(text)  # noqa: S301  its own
    assert waiting() == 0
    assert [look(array) for array in loaded] == [look(array) for array in arrays]
    assert {array.mdl for array in [*loaded, backwards]} == {loaded[0].mdl}
    assert not reader.flags.writeable
    assert Rights.MAP_WRITE not in reader.mdl.rights


@pytest.mark.usefixtures("sharing")
def test_the_last_page_of_a_buffer_in_segments_ends_where_the_buffer_ends() -> None:
    mdl = Mdl(5 * PAGE + 100, segment_size=2 * PAGE)
    array = mdl.array(5 * PAGE + 100, "u1")
    array[:] = np.arange(len(array)) % 251
    for part, length in ((array[-1:], 100), (array[-50::7], 100), (array[4 * PAGE :], PAGE + 100)):
        loaded = pickle.loads(ForkingPickler.dumps(part))  # noqa: S301  its own
        assert look(loaded) == look(part)
        assert loaded.mdl.nbytes == length


@pytest.mark.usefixtures("sharing")
def test_an_array_whose_buffer_cannot_be_sent_is_refused_when_it_is_pickled(vmm: VMM) -> None:
    array = vmm_linux.zeros(PAGE, vmm=vmm)
    keep = vmm.handle_copy(array.mdl.handle, Rights.GET_SID | Rights.MAP_READ)
    untransferable = Mdl.from_handle(vmm, keep).array(PAGE)
    pieces = vmm.mdl(4 * PAGE, segment_size=2 * PAGE)
    uncopied = vmm.handle_copy(pieces.handle, pieces.rights & ~Rights.COPY)
    window = Mdl.from_handle(vmm, uncopied).array(PAGE, "u1")
    many = vmm.mdl(300 * PAGE, segment_size=PAGE).array((300, PAGE), "u1")
    array.mdl.close()
    before = read_descriptors()
    for bad, kind, words in (
        (array, ResourceNotFound, "closed"),
        (untransferable, NoCapability, "TRANSFER"),
        (window, NoCapability, "COPY"),
        (many, InvalidOperation, "300 segments .* make the buffer of larger segments"),
    ):
        with pytest.raises(kind, match=f"^pickle: .*{words}"):
            ForkingPickler.dumps(bad)
    assert read_descriptors() == before
    assert pickle.loads(ForkingPickler.dumps(many[3])).shape == (PAGE,)  # noqa: S301


def test_a_pool_takes_the_rows_of_an_array_as_its_tasks() -> None:
    assert drive("array_workers.map_rows") == ["done"]


def test_an_array_that_does_not_arrive_in_a_pool_tells_why_whatever_is_done_with_it() -> None:
    assert drive("array_workers.use_what_did_not_arrive") == ["done"]


def test_an_array_that_was_closed_before_its_queue_could_pickle_it_arrives_as_an_error() -> None:
    assert drive("array_workers.put_closed") == ["done"]

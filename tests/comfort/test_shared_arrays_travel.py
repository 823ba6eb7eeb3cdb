"""Shared arrays arrive in other processes as the same memory, and there is one of each."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from array_workers import CHANNELS, EMPTY, FLAGGED, READ_ONLY, WRITABLE
from children import TESTS_IMPORTABLE, run_child

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


def test_a_pool_takes_the_rows_of_an_array_as_its_tasks() -> None:
    assert drive("array_workers.map_rows") == ["done"]


def test_an_array_that_does_not_arrive_in_a_pool_tells_why_whatever_is_done_with_it() -> None:
    assert drive("array_workers.use_what_did_not_arrive") == ["done"]


def test_an_array_that_was_closed_before_its_queue_could_pickle_it_arrives_as_an_error() -> None:
    assert drive("array_workers.put_closed") == ["done"]

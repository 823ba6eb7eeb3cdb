"""Shared arrays arrive in other processes as the same memory, and there is one of each."""

from __future__ import annotations

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
        f"import array_holdings, array_workers, {LATE}\n{driver}{arguments!r}",
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

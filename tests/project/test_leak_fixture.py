"""The check that every test goes through (``leaks``, ``conftest``) sees leaks, and only leaks."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

import kernel_oracle
import leaks
from children import ROOT, TEST_FOLDERS
from kernel_oracle import PAGE
from leaks import ARENA, STACK, Mapping, Snapshot, Span

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 << 10
#: Where nothing lies near: a page without access right below other memory looks like a stack's.
FAR_AWAY = 0x2100_0000_0000
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def leaks_of(before: Snapshot) -> list[str]:
    """What there is now and was not before."""
    return leaks.left_behind(before, Snapshot.take())


@pytest.mark.parametrize(
    "protection",
    [
        0,
        mmap.PROT_READ,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.PROT_READ | mmap.PROT_EXEC,
        mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,
    ],
    ids=["none", "r", "rw", "rx", "rwx"],
)
@pytest.mark.parametrize("size", [PAGE, SIZE, ARENA + SIZE], ids=["page", "64K", "1M+64K"])
def test_private_memory_of_any_protection_is_seen(protection: int, size: int) -> None:
    before = Snapshot.take()
    kernel_oracle.map_at(FAR_AWAY, size, protection)
    try:
        (leak,) = leaks_of(before)
    finally:
        kernel_oracle.unmap(FAR_AWAY, size)
    assert f"({size} bytes)" in leak
    assert leaks_of(before) == []


@pytest.mark.parametrize("size", [ARENA, 64 * ARENA], ids=["1M", "64M"])
def test_reserved_memory_of_whole_arenas_is_seen(size: int) -> None:
    before = Snapshot.take()
    with mmap.mmap(-1, size, ANONYMOUS, 0):
        assert len(leaks_of(before)) == 1


def test_a_leak_that_merges_with_a_neighbour_is_seen() -> None:
    kernel_oracle.map_at(FAR_AWAY, SIZE, mmap.PROT_READ)
    before = Snapshot.take()
    kernel_oracle.map_at(FAR_AWAY + SIZE, SIZE, mmap.PROT_READ)
    try:
        (leak,) = leaks_of(before)
    finally:
        kernel_oracle.unmap(FAR_AWAY, 2 * SIZE)
    assert f"({SIZE} bytes)" in leak


def test_a_memfd_is_seen_as_a_descriptor_and_its_mapping_as_a_mapping() -> None:
    before = Snapshot.take()
    descriptor = os.memfd_create("leaked")
    os.ftruncate(descriptor, SIZE)
    (leak,) = leaks_of(before)
    assert leak == f"descriptor {descriptor}: /memfd:leaked (deleted)"
    with mmap.mmap(descriptor, SIZE):
        os.close(descriptor)
        leak = leaks_of(before)[-1]
    assert f"({SIZE} bytes) rw-s" in leak
    assert leak.endswith("/memfd:leaked (deleted)")


def test_a_private_mapping_of_a_memfd_is_seen() -> None:
    descriptor = os.memfd_create("private")
    os.ftruncate(descriptor, SIZE)
    before = Snapshot.take()
    with mmap.mmap(descriptor, SIZE, mmap.MAP_PRIVATE):
        assert any(leak.startswith("mapping") for leak in leaks_of(before))
    os.close(descriptor)


def test_another_file_under_the_same_descriptor_is_seen() -> None:
    first, second = os.memfd_create("first"), os.memfd_create("second")
    before = Snapshot.take()
    os.dup2(second, first)
    (leak,) = leaks_of(before)
    os.close(first)
    os.close(second)
    assert "/memfd:second" in leak


def test_a_child_is_seen_until_somebody_has_waited_for_it() -> None:
    before = Snapshot.take()
    child = subprocess.Popen([sys.executable, "-c", ""])
    running = leaks_of(before)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    dead = leaks_of(before)
    child.wait()
    assert running == dead == [f"child {child.pid}"]
    assert leaks_of(before) == []


def test_what_python_and_libc_take_is_not_seen() -> None:
    before = Snapshot.take()
    objects = [[bytes(200) for _ in range(1000)] for _ in range(100)]
    buffers = [bytearray(size) for size in (1000, 100_000, 1_000_000, 50_000_000)]
    assert leaks_of(before) == []
    del objects, buffers
    assert leaks_of(before) == []


def test_threads_that_lived_and_worked_are_not_seen() -> None:
    before = Snapshot.take()
    threads = [
        threading.Thread(target=lambda: [bytearray(300_000) for _ in range(100)]) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 10
    while left := leaks_of(before):
        assert time.monotonic() < deadline, left


def test_a_thread_s_stack_is_told_from_the_reserved_memory_that_merged_with_its_guard() -> None:
    reserved = Mapping(Span(SIZE, 2 * SIZE + PAGE), "---p", "")
    stack = Mapping(Span(2 * SIZE + PAGE, 2 * SIZE + PAGE + STACK), "rw-p", "")
    assert leaks.new_mappings([], [reserved, stack]) == [
        reserved._replace(span=Span(SIZE, 2 * SIZE))
    ]


def test_committed_memory_above_a_guard_page_is_no_thread_s_stack() -> None:
    guard = Mapping(Span(SIZE, SIZE + PAGE), "---p", "")
    committed = Mapping(Span(SIZE + PAGE, SIZE + PAGE + SIZE), "rw-p", "")
    assert leaks.new_mappings([], [guard, committed]) == [guard, committed]


def test_the_zeroed_data_of_a_library_is_not_seen_and_memory_behind_an_older_one_is() -> None:
    library = Mapping(Span(0, SIZE), "rw-p", "fe:00 1234 /usr/lib/library.so")
    behind = Mapping(Span(SIZE, 2 * SIZE), "rw-p", "")
    assert leaks.new_mappings([], [library, behind]) == []
    assert leaks.new_mappings([library], [library, behind]) == [behind]


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (Span(0, 10), [Span(10, 20)]),
        (Span(0, 12), [Span(12, 20)]),
        (Span(10, 20), []),
        (Span(12, 15), [Span(10, 12), Span(15, 20)]),
        (Span(15, 30), [Span(10, 15)]),
        (Span(20, 30), [Span(10, 20)]),
        (Span(0, 30), []),
        (Span(0, 5), [Span(10, 20)]),
    ],
)
def test_a_span_without_another_is_what_the_other_does_not_cover(
    other: Span, parts: list[Span]
) -> None:
    assert Span(10, 20).without(other) == parts


TESTS_THAT_LEAK = """
import mmap, os, subprocess, sys
kept = []

def reserve():
    return mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)

def test_clean():
    reserve().close()

def test_garbage():
    cycle = [reserve()]
    cycle.append(cycle)

def test_leaking():
    kept.append(reserve())
    kept.append(os.memfd_create("leaked"))
    kept.append(subprocess.Popen([sys.executable, "-c", ""]))

def test_failing():
    kept.append(reserve())
    raise AssertionError
"""


def test_a_test_that_leaks_ends_in_an_error_and_one_that_fails_just_fails(tmp_path: Path) -> None:
    tests = tmp_path / "test_them.py"
    tests.write_text(TESTS_THAT_LEAK)
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-rA", "--rootdir", tmp_path, tests],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *TEST_FOLDERS])},
        capture_output=True,
        text=True,
    )
    lines = outcome.stdout.splitlines()
    (header,) = (number for number, line in enumerate(lines) if line.startswith("left behind"))
    assert [line.split()[0] for line in lines[header + 1 : header + 4]] == [
        "descriptor",
        "child",
        "mapping",
    ]
    assert [line for line in lines if "test_them.py::" in line] == [
        "PASSED test_them.py::test_clean",
        "PASSED test_them.py::test_garbage",
        "PASSED test_them.py::test_leaking",
        "ERROR test_them.py::test_leaking - Failed: left behind by this test:",
        "FAILED test_them.py::test_failing - AssertionError",
    ]


@pytest.mark.parametrize(
    ("backing", "foreign"),
    [
        ("00:00 0 [anon:vmm_linux region]", False),
        ("00:00 0 [anon: glibc: malloc]", True),
        ("00:01 7 /memfd:vmm_linux (deleted)", False),
        ("00:00 0 [heap]", True),
        ("", False),
    ],
)
def test_memory_with_the_packages_name_is_looked_at_and_others_is_not(
    backing: str, foreign: bool
) -> None:
    assert Mapping(Span(PAGE, 2 * PAGE), "rw-p", backing).is_foreign is foreign

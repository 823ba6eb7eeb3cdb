"""What /proc/self tells of mappings, and the descriptors that it takes.

The kernel is the oracle: answers are compared with a plain reading of /proc (kernel_oracle), with
every interface switched off in turn, so that each way around a missing one is taken too.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import threading
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from children import run_child
from forked import in_child
from kernel_oracle import ARENA, PAGE, USER_SPACE_END
from own_memory import EXECUTE, READ, SHARED, WRITE, islands, mapped, memory_file, own, page_way
from vmm_linux._core.kernel import Feature, without
from vmm_linux._core.procfs import OwnProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["own", "page_way"]  # the fixtures


@pytest.fixture(params=["query", "text"])
def ways_to_span(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to find a mapping: by asking for it, and by reading them all."""
    with without(*([Feature.PROCMAP_QUERY] if request.param == "text" else [])):
        yield request.param


Answer = tuple[int, int, bool, int, int, int, str]


def expected_span(mappings: list[kernel.Mapping], address: int) -> Answer:
    """The answer of ``OwnProcess.span``, from a plain reading of maps."""
    low, high = 0, USER_SPACE_END
    for mapping in mappings:
        if mapping.start <= address < mapping.end:
            bits = sum(
                bit
                for bit, letter in ((READ, "r"), (WRITE, "w"), (EXECUTE, "x"), (SHARED, "s"))
                if letter in mapping.permissions
            )
            place = (mapping.offset, mapping.inode, mapping.device)
            return (mapping.start, mapping.end, True, bits, *place)
        if mapping.end <= address:
            low = mapping.end
        else:
            high = min(high, mapping.start)
            break
    return (low, high, False, 0, 0, 0, "00:00")


def check_spans(own: OwnProcess, addresses: list[int]) -> None:
    """Compare all answers with maps. What Python maps meanwhile for itself is left out."""
    before = kernel.maps()
    answers = [own.span(address) for address in addresses]
    after = kernel.maps()
    compared = 0
    for address, answer in zip(addresses, answers, strict=True):
        expected = expected_span(before, address)
        if expected == expected_span(after, address):
            assert answer == expected, hex(address)
            compared += 1
    assert compared > len(addresses) * 0.9


def borders() -> list[int]:
    """First, middle and last address of every mapping and every hole."""
    found = {0, USER_SPACE_END // 2, USER_SPACE_END - 1}
    mappings = [mapping for mapping in kernel.maps() if mapping.end <= USER_SPACE_END]
    for mapping in mappings:
        found |= {mapping.start, mapping.end - 1, (mapping.start + mapping.end) // 2}
        found |= {mapping.start - 1, mapping.end}
    for below, above in pairwise(mappings):
        found.add((below.end + above.start) // 2)
    return sorted(address for address in found if 0 <= address < USER_SPACE_END)


# ---- one mapping ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("ways_to_span")
def test_every_mapping_and_every_hole_is_found_from_each_of_its_ends(own: OwnProcess) -> None:
    check_spans(own, borders())


@pytest.mark.usefixtures("ways_to_span")
def test_random_addresses_lie_where_maps_says(own: OwnProcess) -> None:
    rng = random.Random(2)  # noqa: S311  the same addresses in every run
    low, high = ARENA, ARENA + 400 * PAGE
    with islands(200):
        for island in range(0, 200, 3):
            with suppress(OSError):
                kernel.protect(low + 2 * island * PAGE, PAGE, rng.choice([0, READ | WRITE]))
        anywhere = [rng.randrange(USER_SPACE_END) for _ in range(100)]
        scales = [rng.randrange(1 << rng.randrange(12, 47)) for _ in range(100)]
        near = [low - PAGE + rng.randrange(high - low + 2 * PAGE) for _ in range(300)]
        check_spans(own, [*near, *scales, *anywhere])


@pytest.mark.usefixtures("ways_to_span")
def test_holes_of_every_size_are_found_below_many_mappings(own: OwnProcess) -> None:
    top = ARENA + 8000 * PAGE
    with islands(2000):
        for bits in range(30):
            with mapped(top + (1 << bits) * PAGE, PAGE):
                hole = (ARENA + 3999 * PAGE, top + (1 << bits) * PAGE)
                for address in (hole[0], hole[1] - 1, sum(hole) // 2):
                    assert own.span(address)[:3] == (*hole, False)


@pytest.mark.usefixtures("ways_to_span")
def test_a_shared_file_mapping_tells_offset_inode_and_device(own: OwnProcess) -> None:
    with memory_file(8 * PAGE) as fd, mapped(ARENA, PAGE, READ, fd, 3 * PAGE):
        inode = os.fstat(fd).st_ino
        device = os.fstat(fd).st_dev
        assert own.span(ARENA + 17) == (
            ARENA,
            ARENA + PAGE,
            True,
            READ | SHARED,
            3 * PAGE,
            inode,
            f"{os.major(device):02x}:{os.minor(device):02x}",
        )


@pytest.mark.usefixtures("ways_to_span")
def test_an_answer_is_about_now(own: OwnProcess) -> None:
    hole = own.span(ARENA)
    assert not hole[2]
    with mapped(ARENA, 3 * PAGE):
        assert own.span(ARENA)[:4] == (ARENA, ARENA + 3 * PAGE, True, READ | WRITE)
        kernel.protect(ARENA + PAGE, PAGE, 0)
        assert own.span(ARENA)[:4] == (ARENA, ARENA + PAGE, True, READ | WRITE)
        assert own.span(ARENA + PAGE)[:4] == (ARENA + PAGE, ARENA + 2 * PAGE, True, 0)
    assert own.span(ARENA) == hole


@pytest.mark.usefixtures("ways_to_span")
def test_beyond_user_space_is_no_place_to_ask_about(own: OwnProcess) -> None:
    for address in (USER_SPACE_END, USER_SPACE_END + PAGE, (1 << 64) - 1):
        for question in (own.span, own.page, own.record):
            with pytest.raises(OSError, match="Invalid argument"):
                question(address)


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_what_is_no_address_is_refused(own: OwnProcess, address: int) -> None:
    for question in (own.span, own.page, own.record):
        with pytest.raises(OverflowError):
            question(address)


# ---- descriptors ---------------------------------------------------------------------------------


def proc_files() -> dict[int, str]:
    """The descriptors of this process that lead to files of /proc, but for a listing's own."""
    return {
        fd: target
        for fd, target in kernel.descriptors().items()
        if re.fullmatch(r"/proc/\d+/task/\d+/(maps|smaps|pagemap)", target)
    }


def test_files_are_opened_when_needed_kept_and_closed() -> None:
    process = OwnProcess()
    assert proc_files() == {}
    for _ in range(3):
        process.span(ARENA)
    folder = f"/proc/{os.getpid()}/task/{threading.get_native_id()}"
    assert list(proc_files().values()) == [f"{folder}/maps"]
    for _ in range(3):
        process.page(ARENA)
        process.record(ARENA)
    assert sorted(proc_files().values()) == [
        f"{folder}/{name}" for name in ("maps", "pagemap", "smaps")
    ]
    assert not any(os.get_inheritable(fd) for fd in proc_files())
    process.close()
    process.close()
    assert proc_files() == {}
    assert not process.span(ARENA)[2]
    del process
    assert proc_files() == {}


def test_without_a_descriptor_to_spare_the_answer_is_emfile_and_later_the_truth() -> None:
    def child() -> None:
        import os
        import resource

        from vmm_linux._core.kernel import Feature, available
        from vmm_linux._core.procfs import OwnProcess

        list(map(available, Feature))
        own = OwnProcess()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        for question in (own.span, own.page, own.record):
            try:
                question(id(own))
            except OSError as error:
                print(error.strerror)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        print(own.span(id(own))[2], own.page(id(own))["present"], own.record(id(own)) is not None)

    done = run_child(child)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["Too many open files"] * 3 + ["True True True"]


@pytest.mark.usefixtures("ways_to_span")
@pytest.mark.parametrize("way", ["closed", "another file's"])
def test_a_descriptor_closed_behind_its_back_is_opened_again(way: str, page_way: str) -> None:
    process = OwnProcess()
    with mapped(ARENA, PAGE) as address:
        ctypes.memset(address, 1, 1)

        def ask() -> list[object]:
            return [process.span(address), process.page(address), process.record(address)]

        before = ask()
        numbers = list(proc_files())
        assert len(numbers) == (2 if page_way == "mincore" else 3)
        other = os.open("/dev/zero", os.O_RDONLY)
        for number in numbers:
            os.close(number)
            if way != "closed":
                os.dup2(other, number)
        assert ask() == before
        process.close()
        if way != "closed":
            # Another's file is not ours to close.
            for number in numbers:
                assert kernel.descriptors()[number] == "/dev/zero"
                os.close(number)
        os.close(other)


# ---- fork ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ways_to_span", "page_way")
def test_a_forked_childs_answers_are_about_the_child(own: OwnProcess) -> None:
    with mapped(ARENA, 3 * PAGE) as address:
        ctypes.memset(address, 1, PAGE)

        def ask() -> list[object]:
            spans = [own.span(address + page * PAGE)[2:4] for page in range(3)]
            pages = [own.page(address + page * PAGE)["present"] for page in range(3)]
            records = [own.record(address + page * PAGE) for page in range(3)]
            sizes = [record and record.size for record in records]
            return [[list(span) for span in spans], pages, sizes]

        def child() -> list[Any]:
            kernel.unmap(address, PAGE)
            kernel.protect(address + 2 * PAGE, PAGE, READ)
            ctypes.memset(address + PAGE, 1, 1)
            return [ask(), ask(), list(proc_files().values()), os.getpid()]

        parents = [[[True, 3]] * 3, [True, False, False], [3 * PAGE] * 3]
        assert ask() == parents
        held = proc_files()
        first, second, files, pid = in_child(child)
        assert (
            first
            == second
            == [
                [[False, 0], [True, 3], [True, 1]],
                [False, True, False],
                [None, PAGE, PAGE],
            ]
        )
        assert len(files) == len(held)
        assert all(name.startswith(f"/proc/{pid}/") for name in files)
        assert ask() == parents
        assert proc_files() == held


def test_a_childs_close_leaves_its_other_files_alone(own: OwnProcess) -> None:
    own.span(ARENA)
    (number,) = proc_files()

    def child() -> list[object]:
        os.close(number)
        other = os.open("/dev/zero", os.O_RDONLY)
        os.dup2(other, number)
        mapping = own.span(ARENA)[2]
        own.close()
        return [mapping, kernel.descriptors()[number]]

    assert in_child(child) == [False, "/dev/zero"]


def test_a_grandchild_asks_about_itself(own: OwnProcess) -> None:
    own.span(ARENA)

    def child() -> bool:
        own.span(ARENA)
        with mapped(ARENA, PAGE):
            return in_child(lambda: own.span(ARENA)[2])

    assert in_child(child) is True
    assert not own.span(ARENA)[2]

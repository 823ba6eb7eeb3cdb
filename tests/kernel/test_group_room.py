"""Memory is not taken where the memory cgroup has no room: files stand for the kernel's."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from children import TESTS_IMPORTABLE, run_child
from constants import COMMITTED, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, GIB, LOCKED, MIB, RW
from forked import in_child
from kernel_oracle import PAGE, descriptors, libc, present_pages
from memory_groups import cgroup, in_place
from vmm_linux import VMM, Limits, VmmFlags
from vmm_linux._core import kernel, shortage
from vmm_linux._core.kernel import find_limits, has_headroom, tightest
from vmm_linux.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VERSIONS = {"v1": "9223372036854771712", "v2": "max"}
SIZE = 8 * PAGE
#: What a group of one MiB or more keeps at most for the rest of the process.
SPARE = 2 * MIB
#: More than one look allows at once, and far more than this machine gives.
HUGE_SUM = 1 << 50


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Of cgroups."""
    return str(request.param)


@contextmanager
def group_of(root: Path, version: str, limit: object, usage: int, cache: int = 0) -> Iterator[None]:
    """A group without groups above it."""
    with in_place(cgroup(root, version, {"": (str(limit), usage, cache // 2, cache // 2)})):
        yield


def use(root: Path, version: str, usage: int) -> None:
    """From now on the group uses so many bytes, and nothing is known of it from before."""
    name = {"v1": "memory.usage_in_bytes", "v2": "memory.current"}[version]
    (root / name).write_text(f"{usage}\n")
    find_limits()


# ---- what is read -------------------------------------------------------------------------------


def test_the_room_is_what_the_limit_leaves_with_the_cache_that_it_gives_up(
    tmp_path: Path, version: str
) -> None:
    with group_of(tmp_path, version, GIB, 800 * MIB, cache=100 * MIB):
        found = tightest()
        assert found is not None
        room, limit, path = found
        assert limit == GIB
        assert os.fsdecode(path) == str(
            tmp_path / {"v1": "memory.limit_in_bytes", "v2": "memory.max"}[version]
        )
        exact = (1024 - 800 + 100) * MIB - SPARE
        assert exact * 127 // 128 <= room < exact
        assert has_headroom(room)
        assert not has_headroom(exact)
        assert has_headroom(0)


def test_of_nested_groups_the_tightest_decides(tmp_path: Path, version: str) -> None:
    none = VERSIONS[version]
    levels = {
        "": (none, 9 * GIB, 0, 0),
        "outer": (f"{100 * MIB}", 90 * MIB, 0, 0),
        "outer/middle": (none, 80 * MIB, 0, 0),
        "outer/middle/inner": (f"{95 * MIB}", 10 * MIB, 0, 0),
    }
    with in_place(cgroup(tmp_path, version, levels)):
        found = tightest()
        assert found is not None
        assert found[1] == 100 * MIB
        assert has_headroom(7 * MIB)
        assert not has_headroom(11 * MIB)
    levels["outer/middle/inner"] = (f"{95 * MIB}", 92 * MIB, 0, 0)
    with in_place(cgroup(tmp_path, version, levels)):
        assert not has_headroom(4 * MIB)


@pytest.mark.parametrize(
    "limit", ["none", "", "garbage", "-1", str(1 << 61), "18446744073709551615"]
)
def test_without_a_limit_below_the_machine_nothing_is_asked(
    tmp_path: Path, version: str, limit: str
) -> None:
    limit = VERSIONS[version] if limit == "none" else limit
    with group_of(tmp_path, version, limit, GIB):
        assert tightest() is None
        assert has_headroom(HUGE_SUM)


@pytest.mark.parametrize("kind", ["limit", "usage"])
def test_a_file_that_is_not_there_or_says_nothing_refuses_nothing(
    tmp_path: Path, version: str, kind: str
) -> None:
    group = cgroup(tmp_path, version, {"": (f"{GIB}", GIB, 0, 0)})
    file = tmp_path / (group.limit if kind == "limit" else group.usage)
    with in_place(group):
        assert not has_headroom(1)
        file.write_text("garbage")
        find_limits()
        assert has_headroom(HUGE_SUM)
        file.unlink()
        find_limits()
        assert has_headroom(HUGE_SUM)
        assert tightest() is None


@pytest.mark.parametrize("text", [None, "", "garbage\n", "inactive_file\n", "x" * 40000])
def test_statistics_that_say_nothing_count_as_no_cache(
    tmp_path: Path, version: str, text: str | None
) -> None:
    with group_of(tmp_path, version, 64 * MIB, 60 * MIB, cache=50 * MIB):
        assert has_headroom(20 * MIB)
        (tmp_path / "memory.stat").unlink()
        if text is not None:
            (tmp_path / "memory.stat").write_text(text)
        assert not has_headroom(20 * MIB)
        assert has_headroom(MIB)


def test_a_use_above_the_limit_is_no_room(tmp_path: Path, version: str) -> None:
    with group_of(tmp_path, version, MIB, GIB):
        assert not has_headroom(1)
        found = tightest()
        assert found is not None
        assert found[0] == 0


def test_a_limit_that_changes_is_noticed(tmp_path: Path, version: str) -> None:
    group = cgroup(tmp_path, version, {"": (f"{GIB}", 100 * MIB, 0, 0)})
    with in_place(group):
        assert has_headroom(500 * MIB)
        (tmp_path / group.limit).write_text(f"{200 * MIB}\n")
        assert not has_headroom(500 * MIB)
        (tmp_path / group.limit).write_text(f"{2 * GIB}\n")
        assert has_headroom(500 * MIB)
        (tmp_path / group.limit).write_text(f"{VERSIONS[version]}\n")
        assert has_headroom(HUGE_SUM)


def test_a_limit_that_comes_later_is_noticed_when_limits_are_looked_for(
    tmp_path: Path, version: str
) -> None:
    group = cgroup(tmp_path, version, {"": (VERSIONS[version], GIB, 0, 0)})
    with in_place(group):
        assert has_headroom(HUGE_SUM)
        (tmp_path / group.limit).write_text(f"{MIB}\n")
        find_limits()
        assert not has_headroom(1)


def test_one_look_allows_half_of_the_room_and_no_more(tmp_path: Path, version: str) -> None:
    group = cgroup(tmp_path, version, {"": (f"{GIB}", 900 * MIB, 0, 0)})
    with in_place(group):
        assert has_headroom(1)
        (tmp_path / group.usage).write_text(f"{GIB}\n")
        allowed = 0
        while has_headroom(MIB):
            allowed += 1
        assert allowed <= 61
        assert not has_headroom(1)


def test_what_one_look_allows_ends_by_itself(tmp_path: Path, version: str) -> None:
    group = cgroup(tmp_path, version, {"": (f"{GIB}", MIB, 0, 0)})
    with in_place(group):
        assert has_headroom(1)
        (tmp_path / group.usage).write_text(f"{GIB}\n")
        asked = 0
        while has_headroom(1):
            asked += 1
        assert asked < 60 * MIB, "as many bytes as it allows, not the time"


def test_no_descriptor_to_ask_with_refuses_nothing(tmp_path: Path, version: str) -> None:
    with group_of(tmp_path, version, MIB, MIB):
        assert not has_headroom(1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            assert has_headroom(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_limit_that_is_gone_when_the_refusal_is_told_is_told_as_gone(tmp_path: Path) -> None:
    with group_of(tmp_path, "v2", "max", 0):
        assert shortage.explain_group(7).startswith("the memory cgroup had no room for 7 bytes")


# ---- calls that are refused ---------------------------------------------------------------------


class Ground:
    """A VMM with pages and buffers, none of which was touched."""

    def __init__(self, vmm: VMM) -> None:
        self.vmm = vmm
        self.private = vmm.allocate(0, SIZE, COMMITTED)
        self.shareable = vmm.allocate(0, SIZE, COMMITTED | VmmFlags.SHAREABLE)
        self.locked = vmm.allocate(0, SIZE, RW | VmmFlags.RESERVE | LOCKED)
        self.touched = vmm.allocate(0, SIZE, COMMITTED)
        vmm.write(self.touched, b"t" * SIZE)
        self.handle = vmm.mdl_create(SIZE, RW)
        self.mapped = vmm.mdl_map(self.handle, 0, SIZE, 0, RW)

    def picture(self) -> object:
        """What a call that fails leaves as it was."""
        vmm = self.vmm
        starts = (self.private, self.shareable, self.locked, self.touched, self.mapped)
        descriptor = vmm.handle_fileno(self.handle)
        blocks = os.fstat(descriptor).st_blocks
        os.close(descriptor)
        return (
            [vmm.query(va + at, False) for va in starts for at in range(0, SIZE, PAGE)],
            [present_pages(va, SIZE // PAGE) for va in starts],
            blocks,
            descriptors(),
            vmm.usage(),
        )


CALLS: dict[str, Callable[[Ground], object]] = {
    "write to private pages": lambda on: on.vmm.write(on.private + PAGE, b"x" * (2 * PAGE)),
    "write a byte": lambda on: on.vmm.write(on.private + SIZE - 1, b"x"),
    "write to SHAREABLE pages": lambda on: on.vmm.write(on.shareable, b"x"),
    "write to a buffer": lambda on: on.vmm.write(on.mapped, b"x" * SIZE),
    "read holes": lambda on: on.vmm.read(on.mapped, 1),
    "allocate": lambda on: on.vmm.allocate(0, SIZE, COMMITTED | LOCKED),
    "allocate SHAREABLE": lambda on: on.vmm.allocate(
        0, SIZE, COMMITTED | LOCKED | VmmFlags.SHAREABLE
    ),
    "commit": lambda on: on.vmm.commit(on.locked, SIZE),
    "commit_ranges": lambda on: on.vmm.commit_ranges(
        [(on.locked, PAGE), (on.locked + 2 * PAGE, PAGE)]
    ),
    "mdl_create": lambda on: on.vmm.mdl_create(SIZE, RW | LOCKED),
    "mdl_create in segments": lambda on: on.vmm.mdl_create(SIZE, RW | LOCKED, PAGE),
    "mdl_map": lambda on: on.vmm.mdl_map(on.handle, 0, SIZE, 0, RW | LOCKED),
    "mdl_create_from_buf": lambda on: on.vmm.mdl_create_from_buf(b"x", RW),
    "mdl_create_from_vm": lambda on: on.vmm.mdl_create_from_vm(on.touched, SIZE, RW),
}


@contextmanager
def ground() -> Iterator[Ground]:
    with VMM(limits=Limits.unlimited()) as vmm:
        yield Ground(vmm)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_the_group_has_no_room_for_changes_nothing(
    tmp_path: Path, version: str, name: str
) -> None:
    with group_of(tmp_path, version, 64 * MIB, 0), ground() as on:
        use(tmp_path, version, 64 * MIB)
        before = on.picture()
        with pytest.raises(OutOfMemory, match="the memory cgroup's limit is 67108864 ") as caught:
            CALLS[name](on)
        assert on.picture() == before
        assert str(tmp_path) in str(caught.value)
        assert (caught.value.errno, caught.value.completed) == (None, 0)
        use(tmp_path, version, 0)
        CALLS[name](on)


def test_pages_with_memory_of_their_own_stay_usable_in_a_full_group(
    tmp_path: Path, version: str
) -> None:
    with group_of(tmp_path, version, 64 * MIB, 0), ground() as on:
        vmm = on.vmm
        vmm.commit(on.locked, SIZE)
        buffer = vmm.mdl_create(SIZE, RW | LOCKED)
        vmm.write(on.mapped, b"m" * SIZE)
        untouched = vmm.mdl_map(buffer, 0, SIZE, 0, RW)
        use(tmp_path, version, 64 * MIB)
        for va in (on.touched, on.locked, on.mapped, untouched):
            assert vmm.write(va + 1, b"full" * PAGE) == 4 * PAGE
            assert vmm.read(va, 3) in {b"tfu", b"mfu", b"\0fu"}
        assert vmm.read(on.private, 3) == b"\0\0\0", "private zeros are shared"
        with pytest.raises(OutOfMemory):
            vmm.write(on.private, b"x")


@pytest.mark.parametrize("segment", [0, 2 * PAGE], ids=["whole", "in segments"])
def test_it_is_the_window_of_the_mapping_whose_holes_count(tmp_path: Path, segment: int) -> None:
    with group_of(tmp_path, "v2", 64 * MIB, 0), VMM() as vmm:
        buffer = vmm.mdl_create(SIZE, RW, segment)
        vmm.write(vmm.mdl_map(buffer, 3 * PAGE, 2 * PAGE, 0, RW), b"b" * (2 * PAGE))
        clone = vmm.mdl_clone(buffer, PAGE, SIZE - PAGE)
        va = vmm.mdl_map(clone, PAGE, SIZE - 2 * PAGE, 0, RW)  # from the buffer's page 2 on
        use(tmp_path, "v2", 64 * MIB)
        assert vmm.read(va + PAGE, 2 * PAGE) == b"b" * (2 * PAGE)
        assert vmm.write(va + PAGE, b"c" * (2 * PAGE)) == 2 * PAGE
        for at, size in ((va, 1), (va + 3 * PAGE - 1, 2), (va, 2 * PAGE)):
            with pytest.raises(OutOfMemory):
                vmm.read(at, size)


def test_a_hole_that_a_peer_punches_into_locked_memory_is_refused_in_a_full_group(
    tmp_path: Path, version: str
) -> None:
    with ExitStack() as stack:
        stack.enter_context(group_of(tmp_path, version, 64 * MIB, 0))
        vmm = stack.enter_context(VMM())
        buffer = vmm.mdl_create(SIZE, RW | LOCKED)
        va = vmm.mdl_map(buffer, 0, SIZE, 0, RW)
        vmm.write(va, b"b" * SIZE)
        peer = vmm.handle_fileno(buffer)
        stack.callback(os.close, peer)
        os.lseek(peer, 3, os.SEEK_SET)
        flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        assert libc.fallocate(peer, flags, ctypes.c_long(PAGE), ctypes.c_long(PAGE)) == 0
        use(tmp_path, version, 64 * MIB)
        assert vmm.read(va, PAGE) == b"b" * PAGE
        for call in (lambda: vmm.read(va, 2 * PAGE), lambda: vmm.write(va + PAGE, b"x")):
            with pytest.raises(OutOfMemory):
                call()
        assert os.lseek(peer, 0, os.SEEK_CUR) == 3, "the offset is the user's"
        assert vmm.read(va + 2 * PAGE, SIZE - 2 * PAGE) == b"b" * (SIZE - 2 * PAGE)


def test_of_a_copy_larger_than_the_room_only_what_takes_memory_counts(
    tmp_path: Path, version: str
) -> None:
    with group_of(tmp_path, version, 64 * MIB, 0), VMM() as vmm:
        va = vmm.allocate(0, 24 * MIB, COMMITTED)
        vmm.write(va, b"x" * 16 * MIB)
        use(tmp_path, version, 50 * MIB)
        # Eight of these take memory, and twelve are to be had.
        assert vmm.write(va, b"y" * 24 * MIB) == 24 * MIB
        use(tmp_path, version, 50 * MIB)
        with pytest.raises(OutOfMemory):
            vmm.read(va, 24 * MIB)


def test_a_page_that_a_child_shares_is_counted_and_one_of_zeros_too(
    tmp_path: Path, version: str
) -> None:
    with group_of(tmp_path, version, 64 * MIB, 0), ground() as on:
        use(tmp_path, version, 64 * MIB)

        def write() -> list[str]:
            """In the child, whose pages are its parent's until it writes."""
            told = []
            for va in (on.touched, on.private):
                try:
                    on.vmm.write(va, b"x")
                    told.append("written")
                except OutOfMemory as refusal:
                    told.append(refusal.method)
            return told

        assert in_child(write) == ["write", "write"]
        assert on.vmm.read(on.private, 1) == b"\0"
        with pytest.raises(OutOfMemory):
            on.vmm.write(on.private, b"x")


SWAP = r"""
#include <sys/sysinfo.h>
#include <sys/syscall.h>
#include <unistd.h>
int sysinfo(struct sysinfo *now)
{
    int result = syscall(SYS_sysinfo, now);
    now->freeswap = (100ul << 20) / now->mem_unit;
    return result;
}
"""


def ask_with_swap(root: str, version: str, swap_limit: str, swap_usage: int) -> None:
    """On a machine with 100 MiB of free swap; tells how many MiB may be taken."""
    from pathlib import Path

    from memory_groups import cgroup, in_place
    from vmm_linux._core.kernel import CGROUP_FILES, tightest

    group = cgroup(Path(root), version, {"": (f"{64 << 20}", 60 << 20, 0, 0)})
    _, _, limit, usage, _ = CGROUP_FILES[version]
    if swap_limit == "missing":
        (Path(root) / limit).unlink()
    else:
        (Path(root) / limit).write_text(swap_limit)
        (Path(root) / usage).write_text(f"{swap_usage}\n")
    with in_place(group):
        found = tightest()
        assert found is not None
        print(round(found[0] / (1 << 20)))


@pytest.mark.parametrize(
    ("version", "swap_limit", "swap_usage", "room"),
    [
        ("v2", "max", 0, 101),
        ("v2", "missing", 0, 101),
        ("v2", "0", 0, 2),
        ("v2", f"{30 * MIB}", 10 * MIB, 22),
        ("v2", f"{30 * MIB}", 40 * MIB, 2),
        ("v1", VERSIONS["v1"], 60 * MIB, 101),
        ("v1", "missing", 0, 101),
        ("v1", f"{64 * MIB}", 60 * MIB, 2),
        ("v1", f"{104 * MIB}", 70 * MIB, 32),
    ],
)
def test_what_the_group_can_swap_out_is_room(
    tmp_path: Path, version: str, swap_limit: str, swap_usage: int, room: int
) -> None:
    source, library = tmp_path / "swap.c", tmp_path / "swap.so"
    source.write_text(SWAP)
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    child = run_child(
        ask_with_swap,
        str(tmp_path / "group"),
        version,
        swap_limit,
        swap_usage,
        environment={"LD_PRELOAD": str(library), **TESTS_IMPORTABLE},
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, f"{room}\n", "")


def fill_by_default(root: str) -> None:
    """In a process with a group that is full, as its first VMM finds it."""
    from pathlib import Path

    from constants import COMMITTED
    from memory_groups import cgroup
    from vmm_linux import VMM
    from vmm_linux._core import kernel
    from vmm_linux.errors import OutOfMemory

    group = cgroup(Path(root), "v2", {"": (f"{64 << 20}", 0, 0, 0)})
    kernel.memory_cgroup = lambda: group
    with VMM() as vmm:
        va = vmm.allocate(0, 1 << 20, COMMITTED)
        (Path(root) / "memory.current").write_text(f"{64 << 20}\n")
        try:
            while True:
                vmm.write(va, b"x" * (1 << 20))
                vmm.decommit(va, 1 << 20)
                vmm.commit(va, 1 << 20)
        except OutOfMemory as refusal:
            print(refusal.method)
    assert kernel.set_cgroup(None) is group


def test_a_vmm_finds_the_group_of_its_process(tmp_path: Path) -> None:
    child = run_child(fill_by_default, str(tmp_path), environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout, child.stderr) == (0, "write\n", "")


def test_this_processs_own_group_is_asked_without_trouble() -> None:
    with VMM():
        found = tightest()
    assert found is None or found[0] < found[1]
    assert kernel.has_headroom(0)

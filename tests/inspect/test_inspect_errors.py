"""Processes that cannot be looked at, or not well: others' ones, dying ones, and what is none."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import select
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from constants import RESERVED
from kernel_oracle import PAGE, USER_SPACE_END
from onlookers import child_without_first_thread, end, stopped_child
from vmm_linux import VMM, Retcode, VmmError, VmmFlags, inspect
from vmm_linux._core.inspect import read_mappings, read_pages
from vmm_linux._core.kernel import Feature, available, without
from vmm_linux._tools.children import die_with_parent
from vmm_linux.cli.map.model import take
from vmm_linux.inspect import Mapping, PageFlags, Snapshot, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


MAP_FIXED = 0x10


Question = "Callable[[int], object]"
QUESTIONS: dict[str, Callable[[int], object]] = {
    "snapshot": inspect.snapshot,
    "maps": inspect.maps,
    "rollup": inspect.rollup,
    "at": lambda pid: inspect.at(0x10000, pid),
    "pages": lambda pid: inspect.pages(0x10000, PAGE, pid),
}
every_question = pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())


@every_question
def test_a_process_that_is_not_there(question: Callable[[int], object]) -> None:
    with stopped_child() as child:
        pass
    with pytest.raises(inspect.NoSuchProcess, match=str(child)) as caught:
        question(child)
    assert isinstance(caught.value, ProcessLookupError)
    assert caught.value.rc is Retcode.RESOURCE_NOT_FOUND
    assert not isinstance(caught.value, inspect.ProcessExited)


@every_question
def test_a_zombie(question: Callable[[int], object]) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(inspect.ZombieProcess, match="waits for its parent"):
            question(child)
    finally:
        os.waitpid(child, 0)


@every_question
def test_a_thread_of_the_kernel(question: Callable[[int], object]) -> None:
    try:
        fields = Path("/proc/2/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        pytest.skip("this container does not show the kernel's threads")
    if not int(fields[6]) & 0x00200000:
        pytest.skip("process 2 is no thread of the kernel here")
    with pytest.raises(inspect.KernelThread, match="thread of the kernel"):
        question(2)


def look_at_another_users(pid: int) -> None:
    from vmm_linux import inspect

    for question in (
        inspect.snapshot,
        inspect.maps,
        inspect.rollup,
        lambda pid: inspect.at(0x10000, pid),
        lambda pid: inspect.pages(0x10000, 4096, pid),
    ):
        try:
            question(pid)
        except inspect.AccessDenied as reason:
            print(type(reason).__name__, isinstance(reason, PermissionError))
    va = inspect.snapshot()[0].start
    print(len(inspect.maps()) > 10, inspect.at(va) is not None, inspect.rollup().start == va)
    print(inspect.pages(va, 4096, exclusive=True)[0].start == va)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's process to show")
def test_another_users_process() -> None:
    child = run_child(look_at_another_users, os.getpid(), nobody=True)
    assert child.returncode == 0, child.stderr
    *refused, own, pages = child.stdout.splitlines()
    assert refused == ["AccessDenied True"] * 5
    assert own == "True True True"
    assert pages == "True"


@pytest.mark.parametrize("name", ["snapshot", "maps"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_process_that_ends_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    def read(fd: int, figures: bool, ours: bool) -> object:
        if moment == "before":
            end(child)
        found = read_mappings(fd, figures, ours)
        end(child)
        return found

    monkeypatch.setattr(reading, "read_mappings", read)
    with stopped_child() as child, pytest.raises(inspect.ProcessExited, match="while it was read"):
        getattr(inspect, name)(child)


def test_a_process_that_ends_while_its_pages_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> object:
        end(child)
        return read_pages(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(inspect, "read_pages", read)
    with stopped_child() as child, pytest.raises(inspect.ProcessExited):
        inspect.pages(0x10000, PAGE, child)


def test_a_process_that_starts_another_program_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go, gone = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            os.close(gone)
            os.read(go, 1)
            os.execv("/bin/sleep", ["sleep", "60"])  # noqa: S606  its own program
        finally:
            os._exit(1)
    os.close(go)
    try:

        def read(fd: int, figures: bool, ours: bool) -> object:
            found = read_mappings(fd, figures, ours)
            os.close(gone)
            while os.pread(fd, 1, 0):
                select.select([], [], [], 0.001)
            return found

        monkeypatch.setattr(reading, "read_mappings", read)
        with pytest.raises(inspect.ProcessExited, match="another program"):
            inspect.maps(child)
    finally:
        end(child)


def test_an_unreadable_line_of_the_kernels_is_an_exception_with_that_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object) -> object:
        raise ValueError("not a line of /proc/PID/maps: b'nonsense'")

    monkeypatch.setattr(reading, "read_mappings", read)
    with pytest.raises(inspect.UnreadableText, match="nonsense") as caught:
        inspect.maps()
    assert isinstance(caught.value, ValueError)
    assert caught.value.rc is Retcode.FAIL


@every_question
@pytest.mark.parametrize("pid", [0, -1, True, "one", 1.0, b"1", 1 << 31, 1 << 100, [], object()])
def test_what_is_no_process_id(question: Callable[[int], object], pid: int) -> None:
    with pytest.raises(VmmError, match="pid") as caught:
        question(pid)
    assert caught.value.rc is Retcode.INVALID_ARGUMENT


@pytest.mark.parametrize("va", [-1, True, "1", None, 1.5, USER_SPACE_END, 1 << 64, 1 << 5000])
def test_what_is_no_address(va: int) -> None:
    for question in (inspect.at, lambda va: inspect.pages(va, PAGE)):
        with pytest.raises(VmmError, match=r"va|user space") as caught:
            question(va)
        assert caught.value.rc is Retcode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("va", "size"),
    [(1, PAGE), (PAGE, 1), (PAGE, 0), (PAGE, -PAGE), (0, USER_SPACE_END + PAGE), (PAGE, "one")],
)
def test_what_is_no_range_of_pages(va: int, size: int) -> None:
    with pytest.raises(VmmError) as caught:
        inspect.pages(va, size)
    assert caught.value.rc is Retcode.INVALID_ARGUMENT


def test_every_exception_is_pickled_whole() -> None:
    for name in inspect.__all__:
        kind = getattr(inspect, name)
        if isinstance(kind, type) and issubclass(kind, VmmError):
            other = pickle.loads(pickle.dumps(kind("at", "why", 3)))  # noqa: S301  our own
            assert type(other) is kind
            assert (other.method, other.errno, str(other)) == ("at", 3, "at: why [ESRCH]")


def test_mappings_are_not_made_by_hand_and_not_changed() -> None:
    with pytest.raises(TypeError, match="snapshot"):
        Mapping()
    mapping = inspect.snapshot()[0]
    for name in ("start", "region", "whole", "rss", "new"):
        with pytest.raises(AttributeError):
            setattr(mapping, name, 1)


def test_snapshots_are_taken_while_other_threads_allocate_and_close() -> None:
    done = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not done.is_set():
                with VMM() as vmm:
                    base = vmm.allocate(0, 8 * PAGE, RESERVED | VmmFlags.LOW_GUARD)
                    vmm.commit(base + PAGE, 2 * PAGE)
                    vmm.decommit(base + PAGE, PAGE)
                    vmm.free(base + 4 * PAGE, PAGE)
        except BaseException as failure:  # noqa: BLE001  told below
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            snapshot = inspect.maps()
            assert all(a.end <= b.start for a, b in pairwise(snapshot))
            for mapping in snapshot:
                inspect.at(min(mapping.start, USER_SPACE_END - 1))
                assert mapping.whole.start <= mapping.start < mapping.end <= mapping.whole.end
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


@contextlib.contextmanager
def child_that_remaps() -> Iterator[int]:
    """A child that makes a thousand mappings of one, and one of these again, all the time."""
    pages = 2048
    base = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(base))
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            protect = kernel.libc.mprotect
            protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            while True:
                for page in range(0, pages, 2):
                    protect(start + page * PAGE, PAGE, mmap.PROT_READ)
                protect(start, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        end(child)


@pytest.mark.parametrize("question", [inspect.maps, inspect.snapshot])
def test_mappings_of_a_process_that_remaps_all_the_time_do_not_overlap(
    question: Callable[[int], Snapshot],
) -> None:
    sizes: set[int] = set()
    looks = 0
    deadline = time.monotonic() + 60
    with child_that_remaps() as child:
        # The child may get no processor during the first ones.
        while looks < 30 or (len(sizes) == 1 and time.monotonic() < deadline):
            looks += 1
            found = question(child)
            sizes.add(len(found))
            assert all(a.end <= b.start for a, b in pairwise(found))
            assert len([*found.wholes()]) == len(found)
            for mapping in found[:: len(found) // 50 + 1]:
                assert found.at(mapping.start) == found.at(mapping.end - 1) == mapping
    assert len(sizes) > 1, "it did not remap"


OVERLAPPING = {
    "grown upwards": (["1-3", "5-6", "5-8", "9-a"], ["1-3", "5-8", "9-a"]),
    "grown downwards over pieces": (["1-2", "3-4", "4-5", "2-9", "a-b"], ["1-2", "2-9", "a-b"]),
    "grown over all": (["2-3", "3-4", "4-5", "1-9"], ["1-9"]),
    "shrunk and merged": (["1-5", "3-9"], ["3-9"]),
    "twice": (["1-2", "3-4", "2-6", "1-8", "9-a"], ["1-8", "9-a"]),
    "not at all": (["1-2", "2-3", "3-4"], ["1-2", "2-3", "3-4"]),
    "many": ([f"{i:x}-{i + 1:x}" for i in range(1, 5000)] + ["1-2000"], ["1-2000"]),
}


@pytest.mark.parametrize(("told", "kept"), OVERLAPPING.values(), ids=OVERLAPPING.keys())
def test_the_kernels_later_word_about_an_address_holds(told: list[str], kept: list[str]) -> None:
    def text_of(ranges: list[str]) -> str:
        ends = (each.split("-") for each in ranges)
        return "".join(f"{a}000-{b}000 rw-p 00000000 00:00 0 [{a}]\n" for a, b in ends)

    def read(ranges: list[str]) -> list[Mapping]:
        fd = os.memfd_create("maps")
        try:
            os.write(fd, text_of(ranges).encode())
            os.lseek(fd, 0, os.SEEK_SET)
            return list(read_mappings(fd, False, False))
        finally:
            os.close(fd)

    assert read(told) == read(kept)
    assert [f"{each.start >> 12:x}-{each.end >> 12:x}" for each in read(told)] == kept


def test_a_snapshot_can_be_pickled_with_the_parts_of_regions(vmm: VMM) -> None:
    va = vmm.allocate(0, 4 * PAGE, RESERVED)
    vmm.commit(va, PAGE)
    before = inspect.snapshot()
    after = pickle.loads(pickle.dumps(before))  # noqa: S301 (of our own)
    assert list(after) == list(before)
    assert [each.whole for each in after] == [each.whole for each in before]
    assert after.pid == before.pid


def test_mappings_that_nobody_read_are_none() -> None:
    done = run_child(look_at_no_mappings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 []\n", "")


def look_at_no_mappings() -> None:
    """Make the container by hand, which has read nothing."""
    import sys
    from pathlib import Path

    from vmm_linux._core.inspect import read_mappings

    with Path("/proc/self/maps").open("rb") as file:
        kind = type(read_mappings(file.fileno(), False, False))
    empty = kind.__new__(kind)
    sys.stdout.write(f"{len(empty)} {list(empty)}\n")
    try:
        empty[0]
    except IndexError:
        return
    sys.exit(1)


@every_question
@pytest.mark.parametrize("missing", [(), (Feature.PROCMAP_QUERY, Feature.PAGEMAP_SCAN)])
def test_a_process_whose_first_thread_has_ended_is_seen(
    vmm: VMM, question: Callable[[int], object], missing: tuple[Feature, ...]
) -> None:
    va = vmm.allocate(0, 4 * PAGE, RESERVED | VmmFlags.COMMIT)
    vmm.write(va, b"x")
    with child_without_first_thread() as child, without(*missing):
        question(child)  # no exception
        folders = Path(f"/proc/{child}/task").iterdir()
        (other,) = (folder for folder in folders if folder.name != str(child))
        kernel_told = (other / "maps").read_text().splitlines()
        found = inspect.maps(child)
        assert found.pid == child
        assert [f"{each.start:08x}-{each.end:08x}" for each in found] == [
            line.split()[0] for line in kernel_told
        ]
        snapshot = inspect.snapshot(child)
        assert [each.start for each in snapshot] == [each.start for each in found]
        assert inspect.rollup(child).rss == snapshot.total("rss") > 0
        mapping = inspect.at(va, child)
        assert mapping is not None
        assert mapping.start <= va < mapping.end
        (run, *rest) = inspect.pages(va, 4 * PAGE, child)
        assert run.flags & PageFlags.PRESENT
        assert run.end == va + PAGE
        assert not any(each.flags & PageFlags.PRESENT for each in rest)


def test_the_tools_see_a_process_whose_first_thread_has_ended() -> None:
    name = f"headless {os.getpid()}"
    kept: list[mmap.mmap] = []

    def prepare() -> None:
        fd = os.memfd_create(name)
        os.ftruncate(fd, PAGE)
        kept.append(mmap.mmap(fd, PAGE))

    with child_without_first_thread(prepare) as child:
        (channel,) = (each for each in inspect.sharing(all=True).channels if each.name == name)
        assert [each.pid for each in channel.holders] == [child]
        assert [each.pid for each in channel.mappers] == [child]
        assert channel.mappers[0].resident is not None
        assert take(child).command == take(os.getpid()).command != ""


def test_a_system_v_segment_of_a_process_whose_first_thread_has_ended_is_one_channel() -> None:
    size = 16 * PAGE
    shmid = kernel.libc.shmget(0, size, 0o1600)  # IPC_PRIVATE, IPC_CREAT
    assert shmid >= 0
    try:

        def prepare() -> None:
            kernel.libc.shmat(shmid, None, 0)

        with child_without_first_thread(prepare) as child:
            found = [each for each in inspect.sharing(all=True).channels if each.inode == shmid]
            (channel,) = (each for each in found if each.kind is inspect.Kind.SYSTEM_V)
            assert [each.pid for each in channel.mappers] == [child]
            assert channel.attached == 1
    finally:
        kernel.libc.shmctl(shmid, 0, None)  # IPC_RMID


def test_a_process_all_of_whose_threads_have_ended_is_a_zombie() -> None:
    with child_without_first_thread() as child:
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        for question in QUESTIONS.values():
            with pytest.raises(inspect.ZombieProcess):
                question(child)


def test_a_process_whose_first_thread_has_ended_sees_itself() -> None:
    done = run_child(look_without_first_thread)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True True True\n", "")


def look_without_first_thread() -> None:
    """End the first thread alone, and look from another one."""
    import ctypes
    import os
    import platform
    import sys
    import threading
    from pathlib import Path

    from vmm_linux import inspect

    def look() -> None:
        while "Z" not in Path("/proc/self/stat").read_text("ascii").rpartition(")")[2]:
            pass
        found = inspect.snapshot()
        first = found[0]
        here = inspect.pages(first.start, first.end - first.start)
        fd = os.memfd_create("seen")
        names = [each.name for each in inspect.sharing(all=True).channels]
        told = (len(found) > 10, bool(inspect.rollup().rss), bool(here), "seen" in names)
        sys.stdout.write(f"{' '.join(map(str, told))}\n")
        sys.stdout.flush()
        os.close(fd)
        os._exit(0)

    threading.Thread(target=look).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)


@pytest.mark.parametrize("without", ["", "PROCMAP_QUERY", "PROCMAP_QUERY,PAGEMAP_SCAN"])
def test_a_process_whose_first_thread_has_ended_is_asked_about_addresses(without: str) -> None:
    done = run_child(ask_without_first_thread, environment={"VMM_LINUX_WITHOUT": without})
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")


def ask_without_first_thread() -> None:
    """End the first thread alone; others ask, and end too."""
    import ctypes
    import os
    import platform
    import sys
    import threading
    from pathlib import Path

    from vmm_linux import VMM, PageKind, PageState, VmmFlags, inspect
    from vmm_linux._core import kernel as core

    read_write = VmmFlags.READ | VmmFlags.WRITE
    page = os.sysconf("SC_PAGE_SIZE")

    def ask(vmm: VMM, va: int) -> None:
        found = vmm.query(va)
        assert (found.kind, found.state) == (PageKind.PRIVATE, PageState.COMMITTED)
        assert found.resident is True
        assert found.smaps is not None
        assert vmm.query(0).state is PageState.FREE
        mapping = inspect.at(va)
        assert mapping is not None
        assert mapping.region is not None
        assert inspect.at(0) is None

    def look() -> None:
        while "Z" not in Path("/proc/self/stat").read_text("ascii").rpartition(")")[2]:
            pass
        with VMM() as vmm:
            va = vmm.allocate(0, 4 * page, VmmFlags.RESERVE | VmmFlags.COMMIT | read_write)
            vmm.write(va, b"x")
            # Each is the one that opens for the next, which finds that it has ended.
            for _ in range(3):
                thread = threading.Thread(target=ask, args=(vmm, va))
                thread.start()
                thread.join()
            ask(vmm, va)
            handle = vmm.mdl_create_from_vm(va, page, read_write)
            vmm.mdl_map(handle, 0, page, 0, VmmFlags.READ)
            assert vmm.read(va, 1) == b"x"
        assert core.available(core.Feature.PAGEMAP)
        sys.stdout.write("asked\n")
        sys.stdout.flush()
        inspect.close_files()
        os._exit(0)

    def look_or_tell() -> None:
        try:
            look()
        finally:
            sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
            os._exit(1)

    threading.Thread(target=look_or_tell).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)


def test_names_with_a_newline_and_names_with_its_escape_are_told_apart(tmp_path: Path) -> None:
    names = ["a\\012b", "a\nb", "a\\012b", "a\\b", "\\012\n\xff", "a\nb"]
    size = (len(names) + 1) * PAGE
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        buffer = (ctypes.c_char * size).from_buffer(room)
        start = ctypes.addressof(buffer)
        for at, name in enumerate(names):
            path = tmp_path / name
            path.write_bytes(bytes(PAGE))
            fd = os.open(path, os.O_RDONLY)
            shown = kernel.libc.mmap(
                start + at * PAGE, PAGE, kernel.PROT_READ, MAP_FIXED | kernel.MAP_PRIVATE, fd, 0
            )
            os.close(fd)
            assert shown == start + at * PAGE
        escaped = [str(tmp_path / name).replace("\\012", "\n") for name in names]
        plain = [str(tmp_path / name) for name in names]

        def told(look: Callable[[int | None], Snapshot], pid: int | None) -> list[str | None]:
            return [look(pid)[i].pathname for i in indices(look(pid))]

        def indices(found: Snapshot) -> list[int]:
            return [i for i, each in enumerate(found) if start <= each.start < start + size - PAGE]

        with stopped_child() as child:
            for look in (inspect.snapshot, inspect.maps):
                for pid in (None, child):
                    expected = plain if available(Feature.PROCMAP_QUERY) else escaped
                    assert told(look, pid) == expected
                    with without(Feature.PROCMAP_QUERY):
                        assert told(look, pid) == escaped
        kernel.libc.mmap(
            start,
            size,
            kernel.PROT_READ | kernel.PROT_WRITE,
            MAP_FIXED | kernel.MAP_PRIVATE | kernel.MAP_ANONYMOUS,
            -1,
            0,
        )
        del buffer

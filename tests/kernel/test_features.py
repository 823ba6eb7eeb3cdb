"""Features are what this kernel really gives, each has its switch, and probes leave nothing."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from kernel_oracle import MAP_ANONYMOUS, MAP_PRIVATE, PAGE, PROT_READ, PROT_WRITE
from vmm_linux._core import kernel as core
from vmm_linux._core.kernel import Feature, available, without

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# ioctls of /proc/PID/maps and /proc/PID/pagemap: _IOWR('f', number, size of the argument).
PROCMAP_QUERY = 3 << 30 | 104 << 16 | ord("f") << 8 | 17
PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
AT_EMPTY_PATH, SYS_PROCESS_MADVISE = 0x1000, 440
MADV_HUGEPAGE, MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL = 14, 24, 102
MFD_NOEXEC_SEAL = 8
PR_SET_VMA = 0x53564D41

Bytes = ctypes.c_char * PAGE


def accepts(path: str, request: int, numbers: Sequence[int]) -> bool:
    """Whether the file takes this ioctl, whose argument is 64-bit numbers."""
    with Path(path).open("rb", buffering=0) as file:
        try:
            fcntl.ioctl(file, request, bytearray(struct.pack(f"={len(numbers)}Q", *numbers)))
        except OSError as error:
            assert error.errno == errno.ENOTTY  # noqa: PT017  any other is the test's own mistake
            return False
        return True


def takes_advice(advice: int) -> bool:
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(advice)
        except OSError:
            return False
        return True


def shows_guards() -> bool:
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(MADV_GUARD_INSTALL)
        except OSError:
            return False
        buffer = Bytes.from_buffer(memory)
        entry = kernel.pagemap(ctypes.addressof(buffer), 1)[0]
        del buffer
        return bool(entry >> 58 & 1)


def makes_memory_file(flags: int) -> bool:
    try:
        os.close(os.memfd_create("test", flags))
    except OSError:
        return False
    return True


def reads_itself() -> bool:
    source, target = ctypes.create_string_buffer(b"x"), ctypes.create_string_buffer(1)

    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    there = Piece(ctypes.addressof(source), 1)
    here = Piece(ctypes.addressof(target), 1)
    copied = kernel.libc.process_vm_readv(
        os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0
    )
    return copied == 1 and target.raw == b"x"


def guards_by_vector() -> bool:
    """``process_madvise(2)`` of this process with a guard for a spare page."""
    address = kernel.libc.mmap(
        None, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    vector = (ctypes.c_size_t * 2)(address, PAGE)
    pidfd = os.pidfd_open(os.getpid())
    try:
        done = ctypes.CDLL(None).syscall(
            SYS_PROCESS_MADVISE, pidfd, vector, ctypes.c_size_t(1), MADV_GUARD_INSTALL, 0
        )
    finally:
        os.close(pidfd)
        kernel.unmap(address, PAGE)
    return bool(done == PAGE)


def names_its_files() -> bool:
    """``name_to_handle_at(2)`` of a memory file: its handle is 12 bytes."""
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 16, 0) + bytes(16))
    fd = os.memfd_create("trial")
    try:
        done = ctypes.CDLL(None).name_to_handle_at(
            fd, b"", handle, ctypes.byref(ctypes.c_int()), AT_EMPTY_PATH
        )
    finally:
        os.close(fd)
    return bool(done == 0)


def names_memory() -> bool:
    """``prctl(2)`` with PR_SET_VMA_ANON_NAME, for a spare page."""
    address = kernel.libc.mmap(None, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    try:
        numbers = (PR_SET_VMA, 0, address, PAGE)
        done = kernel.libc.prctl(*map(ctypes.c_ulong, numbers), b"a name")
        return bool(done == 0)
    finally:
        kernel.unmap(address, PAGE)


TRIALS: dict[Feature, Callable[[], bool]] = {
    Feature.PROCMAP_QUERY: lambda: accepts(
        "/proc/self/maps", PROCMAP_QUERY, [104, 0x10, *[0] * 11]
    ),
    Feature.PAGEMAP_SCAN: lambda: accepts(
        "/proc/self/pagemap", PAGEMAP_SCAN, [96, 0, PAGE, 2 * PAGE, *[0] * 7, 8]
    ),
    Feature.PAGEMAP: lambda: bool(kernel.pagemap(id(None), 1)),
    Feature.PAGEMAP_GUARD: shows_guards,
    Feature.GUARD_REGIONS: lambda: takes_advice(MADV_GUARD_INSTALL),
    Feature.DONTNEED_LOCKED: lambda: takes_advice(MADV_DONTNEED_LOCKED),
    Feature.MEMFD_NOEXEC_SEAL: lambda: makes_memory_file(MFD_NOEXEC_SEAL),
    Feature.PROCESS_VM: reads_itself,
    Feature.TRANSPARENT_HUGE_PAGES: lambda: takes_advice(MADV_HUGEPAGE),
    Feature.FILE_HANDLES: names_its_files,
    Feature.VECTORED_GUARDS: guards_by_vector,
    Feature.ANONYMOUS_NAMES: names_memory,
}

every_feature = pytest.mark.parametrize("feature", list(Feature), ids=lambda feature: feature.name)


@every_feature
def test_a_feature_is_available_where_trying_it_succeeds(feature: Feature) -> None:
    assert available(feature) is TRIALS[feature]()


@every_feature
def test_a_feature_switched_off_is_absent_until_the_block_ends(feature: Feature) -> None:
    before = available(feature)
    with without(feature):
        assert not available(feature)
        with without(feature):
            assert not available(feature)
        assert not available(feature)
    assert available(feature) is before


@every_feature
def test_switching_one_feature_off_leaves_the_others(feature: Feature) -> None:
    others = [other for other in Feature if other is not feature]
    before = [available(other) for other in others]
    with without(feature):
        assert [available(other) for other in others] == before


def test_a_switch_is_undone_when_the_block_raises() -> None:
    before = available(Feature.PAGEMAP)
    with pytest.raises(LookupError), without(Feature.PAGEMAP):
        raise LookupError
    assert available(Feature.PAGEMAP) is before


def test_a_switch_holds_for_every_thread() -> None:
    seen: list[bool] = []
    with without(Feature.PAGEMAP, Feature.PROCESS_VM):
        thread = threading.Thread(
            target=lambda: seen.extend(map(available, (Feature.PAGEMAP, Feature.PROCESS_VM)))
        )
        thread.start()
        thread.join()
    assert seen == [False, False]


@pytest.mark.parametrize("number", [-1, len(Feature), 1 << 40])
def test_a_number_that_names_no_feature_is_refused_and_switches_nothing(number: int) -> None:
    before = [available(feature) for feature in Feature]
    with pytest.raises(ValueError, match=str(number)):
        available(number)
    with pytest.raises(ValueError, match=str(number)), without(Feature.PAGEMAP, number):
        pass
    assert [available(feature) for feature in Feature] == before


def test_the_environment_switches_features_off_for_the_whole_process() -> None:
    def child() -> None:
        from vmm_linux._core.kernel import Feature, available

        print(available(Feature.PAGEMAP), available(Feature.PROCESS_VM), end=" ")
        print(available(Feature.PAGEMAP_SCAN))

    done = run_child(child, environment={"VMM_LINUX_WITHOUT": "pagemap, PROCESS_VM,,"})
    assert done.stderr == ""
    assert done.stdout.split() == ["False", "False", str(available(Feature.PAGEMAP_SCAN))]


def test_an_unknown_name_in_the_environment_is_a_warning_that_quotes_it() -> None:
    def child() -> None:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from vmm_linux._core.kernel import Feature, available
        print(len(caught), caught[0].category.__name__, caught[0].message)
        print(available(Feature.PAGEMAP))

    done = run_child(child, environment={"VMM_LINUX_WITHOUT": "NONSENSE,PAGEMAP"})
    assert done.stderr == ""
    warning, pagemap = done.stdout.splitlines()
    assert warning.startswith("1 RuntimeWarning")
    assert "'NONSENSE'" in warning
    assert pagemap == "False"


def test_probes_leave_no_mapping_and_no_descriptor() -> None:
    def child() -> None:
        from pathlib import Path

        from vmm_linux._core import kernel as core

        def state() -> tuple[list[Path], list[str]]:
            mappings = Path("/proc/self/maps").read_text().splitlines()
            # What Python itself takes while this runs is on its heap or in whole arenas.
            return sorted(Path("/proc/self/fd").iterdir()), [
                line for line in mappings if "rw-p" not in line or "memfd" in line
            ]

        state()
        before = state()
        for feature in core.Feature:
            core.available(feature)
        core.user_space_end()
        core.user_space_end_by_mmap()
        core.mmap_min_addr()
        core.huge_page_size()
        print(state() == before)

    done = run_child(child)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_probe_without_a_descriptor_to_spare_is_made_again_later() -> None:
    def child() -> None:
        import os
        import resource

        from vmm_linux._core import kernel as core
        from vmm_linux._core.kernel import Feature, available

        def state() -> list[object]:
            return [
                *map(available, (Feature.PROCMAP_QUERY, Feature.PAGEMAP_SCAN, Feature.PAGEMAP)),
                *map(available, (Feature.MEMFD_NOEXEC_SEAL, Feature.PAGEMAP_GUARD)),
                core.mmap_min_addr(),
            ]

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        print(*state())
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        print(*state())

    done = run_child(child)
    assert done.stderr == ""
    without_descriptors, later = done.stdout.splitlines()
    assert without_descriptors == "False " * 5 + "65536"
    assert later.split() == [
        str(available(feature))
        for feature in (
            Feature.PROCMAP_QUERY,
            Feature.PAGEMAP_SCAN,
            Feature.PAGEMAP,
            Feature.MEMFD_NOEXEC_SEAL,
            Feature.PAGEMAP_GUARD,
        )
    ] + [str(max(kernel.sysctl("vm.mmap_min_addr"), PAGE))]


def test_a_probe_without_memory_to_spare_is_made_again_later() -> None:
    def child() -> None:
        import resource
        from pathlib import Path

        from vmm_linux._core.kernel import Feature, available

        chosen = [Feature.GUARD_REGIONS, Feature.DONTNEED_LOCKED, Feature.TRANSPARENT_HUGE_PAGES]
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
        first = [available(feature) for feature in chosen]
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        print(*first)
        print(*map(available, chosen))

    done = run_child(child)
    assert done.stderr == ""
    first, later = done.stdout.splitlines()
    assert first == "False False False"
    assert later.split() == [
        str(available(feature))
        for feature in (
            Feature.GUARD_REGIONS,
            Feature.DONTNEED_LOCKED,
            Feature.TRANSPARENT_HUGE_PAGES,
        )
    ]


def test_a_forked_child_asks_for_itself() -> None:
    def child() -> None:
        import ctypes
        import os

        from vmm_linux._core.kernel import Feature, available

        print(available(Feature.PAGEMAP), flush=True)
        forked = os.fork()
        if forked == 0:
            # An ordinary user's process that may not be dumped has no right to its own pagemap.
            ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
            print(available(Feature.PAGEMAP), flush=True)
            os._exit(0)
        os.waitpid(forked, 0)
        print(available(Feature.PAGEMAP))

    done = run_child(child, nobody=True)
    assert (done.stdout.split(), done.stderr) == (["True", "False", "True"], "")


def test_the_page_size_is_the_kernels() -> None:
    assert core.page_size() == os.sysconf("SC_PAGE_SIZE")


def test_the_size_of_a_huge_page_is_the_kernels() -> None:
    figure = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    assert core.huge_page_size() == (int(figure.read_text()) if figure.exists() else 0)


def test_the_lowest_address_is_the_sysctl_and_a_page_at_least() -> None:
    assert core.mmap_min_addr() == max(kernel.sysctl("vm.mmap_min_addr"), PAGE)


def test_user_space_ends_where_the_kernel_refuses_to_map() -> None:
    end = core.user_space_end()
    assert end == kernel.USER_SPACE_END
    assert end % PAGE == 0


def test_both_searches_find_the_same_end_of_user_space() -> None:
    assert core.user_space_end_by_mmap() == kernel.USER_SPACE_END
    if available(Feature.PAGEMAP):
        assert core.user_space_end_by_pagemap() == kernel.USER_SPACE_END


def test_without_pagemap_the_end_of_user_space_is_found_by_mapping() -> None:
    def child() -> None:
        from vmm_linux._core import kernel as core

        print(core.user_space_end_by_pagemap(), core.user_space_end())

    done = run_child(child, environment={"VMM_LINUX_WITHOUT": "PAGEMAP"})
    assert (done.stdout.split(), done.stderr) == (["0", str(kernel.USER_SPACE_END)], "")


def test_a_limit_on_address_space_does_not_make_user_space_look_smaller() -> None:
    def child() -> None:
        import resource
        from pathlib import Path

        from vmm_linux._core import kernel as core
        from vmm_linux._core.kernel import Feature, without

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
        with without(Feature.PAGEMAP):
            by_mmap = core.user_space_end_by_mmap()
            guess = core.user_space_end()
        by_pagemap = core.user_space_end_by_pagemap()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        with without(Feature.PAGEMAP):
            print(by_mmap, guess, by_pagemap, core.user_space_end())

    done = run_child(child)
    assert done.stderr == ""
    by_mmap, guess, by_pagemap, later = map(int, done.stdout.split())
    assert by_mmap == 0
    assert guess & (guess - 1) == 0
    assert guess >= max(m.end for m in kernel.maps() if m.end <= kernel.USER_SPACE_END)
    assert by_pagemap == (kernel.USER_SPACE_END if available(Feature.PAGEMAP) else 0)
    assert later == kernel.USER_SPACE_END


@pytest.mark.skipif(kernel.sysctl("vm.max_map_count") > 200_000, reason="the wall is too far off")
def test_at_the_map_count_wall_the_end_of_user_space_is_still_found() -> None:
    def child() -> None:
        import ctypes
        from pathlib import Path

        from vmm_linux._core import kernel as core

        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        page = core.page_size()
        wall = int(Path("/proc/sys/vm/max_map_count").read_text())
        start = libc.mmap(None, (wall + 2) * page, 0, 0x22, -1, 0)
        at = start
        while libc.mprotect(at, page, 1) == 0:
            at += 2 * page
        # One mapping more that merges with nothing, and not even mmap gets another.
        while libc.mmap(None, page, 1, 0x21, -1, 0) not in {None, ctypes.c_void_p(-1).value}:
            pass
        by_mmap, end = core.user_space_end_by_mmap(), core.user_space_end()
        libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t((wall + 2) * page))
        print(by_mmap, end)

    done = run_child(child)
    assert done.stderr == ""
    assert done.stdout.split() == ["0", str(kernel.USER_SPACE_END)]

"""Fragments are committed by guards, which nobody outside can tell from mprotect."""

from __future__ import annotations

import ctypes
import random
import signal
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from constants import CHUNK, READ, RESERVE_FIXED, RW
from forked import in_child
from guarding import RULES, rule
from kernel_oracle import ARENA, PAGE, guarded_pages
from vmm_linux import VMM, PageKind, PageState, Retcode, VmmError, VmmFlags
from vmm_linux._core.kernel import Feature, without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGES = CHUNK // PAGE


@pytest.fixture
def vmm() -> Iterator[VMM]:
    """A VMM that takes guards wherever it can."""
    with rule(0, 0), VMM() as instance:
        yield instance


def region(vmm: VMM, chunks: int = 2, flags: VmmFlags = RW) -> int:
    """A reserved region that begins with a chunk."""
    return vmm.allocate(ARENA, chunks * CHUNK, RESERVE_FIXED | flags)


def charge_of(work: Callable[[], object]) -> int:
    """By how much work changes what this process is charged, in the arena alone."""
    before = charged()
    work()
    return charged() - before


def charged() -> int:
    """Bytes of the arena that the kernel charges for."""
    return sum(
        record.figures["Size"]
        for record in kernel.smaps()
        if "ac" in record.vm_flags and ARENA <= record.mapping.start < ARENA + 64 * CHUNK
    )


def test_a_hundred_thousand_fragments_need_a_handful_of_mappings() -> None:
    with VMM() as vmm:
        pages = 100_000
        vmm.allocate(ARENA, 2 * pages * PAGE, RESERVE_FIXED | RW)
        before = kernel.mapping_count()
        for page in range(pages):
            vmm.commit(ARENA + 2 * page * PAGE, PAGE)
        assert kernel.mapping_count() <= before + 100
        assert vmm.query(ARENA + 2 * PAGE).state is PageState.COMMITTED
        assert vmm.query(ARENA + 3 * PAGE).state is PageState.RESERVED
        for page in random.Random(3).sample(range(pages), 500):  # noqa: S311
            vmm.write(ARENA + 2 * page * PAGE, b"here")
        for page in range(pages):
            vmm.decommit(ARENA + 2 * page * PAGE, PAGE)
        assert kernel.mapping_count() <= before + 1
        assert charged() == 0


def test_what_is_not_committed_in_an_open_chunk_is_behind_a_guard(vmm: VMM) -> None:
    base = region(vmm)
    vmm.commit(base + 5 * PAGE, 2 * PAGE)
    assert guarded_pages(base, 2 * PAGES) == [n for n in range(PAGES) if n not in (5, 6)]
    assert kernel.maps_between(base, base + CHUNK)[0].permissions == "rw-p"


def touch_a_neighbour() -> None:
    """A page is committed by a guard taken away; the next one is touched."""
    import ctypes

    from vmm_linux import VMM, VmmFlags
    from vmm_linux._core import memory

    memory.set_rule(0, 0)
    with VMM() as vmm:
        flags = VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE
        base = vmm.allocate(0, 1 << 22, flags)
        vmm.commit(base, 4096)
        ctypes.memset(base, 1, 4096)
        print("committed", flush=True)
        ctypes.memset(base + 4096, 1, 1)


def test_a_page_behind_a_guard_faults() -> None:
    child = run_child(touch_a_neighbour)
    assert (child.returncode, child.stdout) == (-signal.SIGSEGV, "committed\n")


def test_an_open_chunk_is_charged_until_its_last_page_goes(vmm: VMM) -> None:
    base = region(vmm)
    assert charge_of(lambda: vmm.commit(base, PAGE)) == CHUNK
    assert charge_of(lambda: vmm.commit(base + 7 * PAGE, PAGE)) == 0
    assert charge_of(lambda: vmm.decommit(base, PAGE)) == 0
    assert charge_of(lambda: vmm.decommit(base + 7 * PAGE, PAGE)) == -CHUNK
    assert guarded_pages(base, 2 * PAGES) == []


def test_the_last_page_that_is_freed_closes_its_chunk(vmm: VMM) -> None:
    base = region(vmm)
    vmm.commit(base + 3 * PAGE, PAGE)
    assert charge_of(lambda: vmm.free(base + 3 * PAGE, PAGE)) == -CHUNK
    assert guarded_pages(base, 2 * PAGES) == []
    vmm.commit(base, 3 * PAGE)
    assert vmm.read(base, 3 * PAGE) == bytes(3 * PAGE)


def test_decommitted_fragments_give_their_memory_back_and_read_zeros(vmm: VMM) -> None:
    base = region(vmm)
    vmm.commit(base, 64 * PAGE)
    vmm.write(base, b"\xff" * 64 * PAGE)
    vmm.decommit(base + 8 * PAGE, 8 * PAGE)
    present = kernel.present_pages(base, 64)
    assert present == [not 8 <= page < 16 for page in range(64)]
    vmm.commit(base + 8 * PAGE, 8 * PAGE)
    assert vmm.read(base + 8 * PAGE, 8 * PAGE) == bytes(8 * PAGE)
    assert vmm.read(base + 16 * PAGE, PAGE) == b"\xff" * PAGE


def test_fragments_of_several_protections_share_a_chunk(vmm: VMM) -> None:
    base = region(vmm)
    wanted = {1: READ, 5: RW, 9: VmmFlags(0), 13: READ | VmmFlags.EXECUTE, 17: VmmFlags.RWX_MASK}
    for page, protection in wanted.items():
        vmm.protect(base + page * PAGE, PAGE, protection)
    for page in wanted:
        vmm.commit(base + page * PAGE, PAGE)
    seen = kernel.page_permissions(base, base + 20 * PAGE)
    assert [seen[page] for page in wanted] == ["r--p", "rw-p", "---p", "r-xp", "rwxp"]
    assert {seen[page] for page in range(20) if page not in wanted} == {"---p"}
    vmm.protect(base + 5 * PAGE, PAGE, READ)
    vmm.protect(base + 6 * PAGE, PAGE, READ)
    vmm.commit(base + 6 * PAGE, PAGE)
    assert kernel.page_permissions(base + 5 * PAGE, base + 8 * PAGE) == ["r--p", "r--p", "---p"]
    vmm.decommit(base + 9 * PAGE, PAGE)
    vmm.protect(base + 9 * PAGE, PAGE, RW)
    vmm.commit(base + 9 * PAGE, PAGE)
    vmm.write(base + 9 * PAGE, b"open")


@pytest.mark.parametrize("flag", [VmmFlags.LOCKED, VmmFlags.HUGE, VmmFlags.SHAREABLE])
def test_pinned_huge_and_shared_memory_has_no_guards(vmm: VMM, flag: VmmFlags) -> None:
    base = region(vmm, flags=RW | flag)
    for page in range(0, 16, 2):
        vmm.commit(base + page * PAGE, PAGE)
    vmm.decommit(base + 2 * PAGE, PAGE)
    assert guarded_pages(base, 2 * PAGES) == []
    assert vmm.query(base + 2 * PAGE).state is PageState.RESERVED


def test_memory_pinned_behind_the_packages_back_is_decommitted_all_the_same(vmm: VMM) -> None:
    base = region(vmm)
    vmm.commit(base, 16 * PAGE)
    vmm.write(base, b"\xff" * 16 * PAGE)
    assert kernel.libc.mlock(ctypes.c_void_p(base), ctypes.c_size_t(16 * PAGE)) == 0
    vmm.decommit(base + 4 * PAGE, PAGE)
    assert kernel.page_permissions(base + 3 * PAGE, base + 6 * PAGE) == ["rw-p", "---p", "rw-p"]
    vmm.commit(base + 4 * PAGE, PAGE)
    assert vmm.read(base + 4 * PAGE, PAGE) == bytes(PAGE)


def test_a_forked_child_has_guards_of_its_own(vmm: VMM) -> None:
    base = region(vmm)
    vmm.commit(base, PAGE)
    vmm.write(base, b"parent")

    def child() -> list[object]:
        guarded = len(guarded_pages(base, PAGES))
        vmm.commit(base + 2 * PAGE, PAGE)
        vmm.write(base + 2 * PAGE, b"child")
        vmm.decommit(base, PAGE)
        return [guarded, vmm.read(base + 2 * PAGE, 5).decode(), len(guarded_pages(base, PAGES))]

    assert in_child(child) == [PAGES - 1, "child", PAGES - 1]
    assert vmm.read(base, 6) == b"parent"
    assert vmm.query(base + 2 * PAGE).state is PageState.RESERVED


def test_a_view_holds_fragments_while_their_neighbours_come_and_go(vmm: VMM) -> None:
    base = region(vmm)
    vmm.commit(base + 4 * PAGE, PAGE)
    view = vmm.view(base + 4 * PAGE, PAGE)
    view[:4] = b"held"
    vmm.commit(base + 2 * PAGE, 2 * PAGE)
    vmm.decommit(base + 2 * PAGE, 2 * PAGE)
    with pytest.raises(VmmError) as caught:
        vmm.decommit(base + 4 * PAGE, PAGE)
    assert caught.value.rc is Retcode.BUSY
    assert bytes(view[:4]) == b"held"
    del view, caught


def test_fragments_become_an_mdl_buffer_where_they_are(vmm: VMM) -> None:
    base = region(vmm)
    vmm.commit(base + 4 * PAGE, 2 * PAGE)
    vmm.write(base + 4 * PAGE, b"fragment")
    handle = vmm.mdl_create_from_vm(base + 4 * PAGE, 2 * PAGE, RW)
    assert vmm.read(base + 4 * PAGE, 8) == b"fragment"
    assert vmm.query(base + 4 * PAGE).kind is PageKind.MDL
    assert vmm.query(base + 6 * PAGE).state is PageState.RESERVED
    vmm.commit(base + 6 * PAGE, PAGE)
    assert vmm.read(base + 6 * PAGE, 4) == bytes(4)
    vmm.handle_close(handle)


def test_a_kernel_without_guards_commits_fragments_by_mprotect(vmm: VMM) -> None:
    with without(Feature.GUARD_REGIONS):
        base = region(vmm)
        for page in range(0, 16, 2):
            vmm.commit(base + page * PAGE, PAGE)
        assert guarded_pages(base, 2 * PAGES) == []
        assert len(kernel.maps_between(base, base + CHUNK)) == 16


def test_a_large_range_over_open_chunks_is_committed_and_decommitted_whole(vmm: VMM) -> None:
    base = region(vmm, chunks=4)
    for page in range(0, 4 * PAGES, 100):
        vmm.commit(base + page * PAGE, PAGE)
    vmm.commit(base, 4 * CHUNK)
    assert guarded_pages(base, 4 * PAGES) == []
    vmm.write(base, b"\xff" * 4 * CHUNK)
    vmm.decommit(base, 4 * CHUNK)
    assert charged() == 0
    assert len(kernel.maps_between(base, base + 4 * CHUNK)) == 1


def check(vmm: VMM, pages: dict[int, tuple[bool, int, int]]) -> None:
    """Kernel, contents and ledger are as the model's ``(committed, protection, byte)``."""
    vmm._check()
    seen = kernel.page_permissions(ARENA, ARENA + (max(pages) + 1) * PAGE)
    for page, (committed, protection, byte) in pages.items():
        letters = "".join("rwx"[bit] if protection >> bit & 1 else "-" for bit in range(3))
        assert (seen[page] or "")[:3] == (letters if committed else "---")
        if committed and protection:
            assert ctypes.string_at(ARENA + page * PAGE, 1)[0] == byte


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_random_changes_keep_kernel_and_ledger_in_step(name: str, seed: int) -> None:
    choose = random.Random(seed)  # noqa: S311
    size = 2 * PAGES + 37
    pages = dict.fromkeys(range(size), (False, 3, 0))
    with rule(*RULES[name]), VMM() as vmm:
        vmm.allocate(ARENA, size * PAGE, RESERVE_FIXED | RW)
        for step in range(1500):
            first = choose.randrange(size)
            count = min(choose.choice([1, 1, 1, 2, 5, 30, 600]), size - first)
            va, length = ARENA + first * PAGE, count * PAGE
            action = choose.choice(["commit", "commit", "decommit", "protect", "write"])
            span = range(first, first + count)
            if action == "commit":
                vmm.commit(va, length)
                for page in span:
                    committed, protection, byte = pages[page]
                    pages[page] = (True, protection, byte if committed else 0)
            elif action == "decommit":
                vmm.decommit(va, length)
                pages |= {page: (False, pages[page][1], 0) for page in span}
            elif action == "protect":
                protection = choose.choice([0, 1, 3, 3, 5, 7])
                vmm.protect(va, length, protection)
                pages |= {page: (pages[page][0], protection, pages[page][2]) for page in span}
            elif pages[first][0] and pages[first][1] & 2:
                byte = choose.randrange(256)
                vmm.write(va, bytes([byte]))
                pages[first] = (*pages[first][:2], byte)
            if step % 25 == 0:
                check(vmm, pages)
        check(vmm, pages)
        for page in range(size):
            vmm.decommit(ARENA + page * PAGE, PAGE)
        assert charged() == 0
        assert guarded_pages(ARENA, size) == []

"""Children that really touch pages which must fault, and really die of it.

Each child first does the same on a page beside it that allows it, so that what kills it can
only be the page in question.
"""

from __future__ import annotations

import platform
import signal
from typing import TYPE_CHECKING

import pytest

from children import run_child

if TYPE_CHECKING:
    from collections.abc import Callable

#: Machine code that does nothing but return, for ``execute``.
RETURN = {"x86_64": "c3", "aarch64": "c0035fd6"}


def touch(access: str, target: str, extra_flags: int) -> None:
    """Touch a good page, say so, then touch the bad one."""
    import ctypes
    import mmap
    import platform

    from vmm_linux import VMM, VmmFlags

    page = mmap.PAGESIZE
    code = bytes.fromhex({"x86_64": "c3", "aarch64": "c0035fd6"}.get(platform.machine(), "00"))
    flags = VmmFlags(extra_flags) | VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE
    guards = VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD
    uses: dict[str, Callable[[int], object]] = {
        "read": lambda va: ctypes.string_at(va, 1),
        "write": lambda va: ctypes.memset(va, 1, 1),
        "execute": lambda va: ctypes.CFUNCTYPE(None)(va)(),
    }
    use = uses[access]

    vmm = VMM()
    base = vmm.allocate(0, 8 * page, flags | guards)
    vmm.commit(base, 4 * page)
    bad = base + page
    vmm.write(base, code)
    vmm.write(bad, code)
    vmm.protect(base, page, flags & VmmFlags.RWX_MASK | VmmFlags.EXECUTE)
    use(base)
    place = {"reserved": base + 4 * page, "low guard": base - 1, "high guard": base + 8 * page}
    change: dict[str, list[Callable[[], object]]] = {
        "decommitted": [lambda: vmm.decommit(bad, page)],
        "decommitted a second time": [
            lambda: vmm.decommit(bad, page),
            lambda: vmm.commit(bad, page),
            lambda: ctypes.memset(bad, 1, page),
            lambda: vmm.decommit(bad, page),
        ],
        "read-only": [lambda: vmm.protect(bad, page, VmmFlags.READ)],
        "read and execute": [lambda: vmm.protect(bad, page, VmmFlags.READ | VmmFlags.EXECUTE)],
        "without access": [lambda: vmm.protect(bad, page, 0)],
        "freed": [lambda: vmm.free(bad, page)],
        "closed": [vmm.close],
    }
    for step in change.get(target, []):
        step()
    print("touching", flush=True)
    use(place.get(target, bad))
    print("nothing happened", flush=True)


CASES = [
    (access, target)
    for target in (
        "reserved",
        "decommitted",
        "decommitted a second time",
        "low guard",
        "high guard",
        "without access",
        "freed",
        "closed",
    )
    for access in ("read", "write")
] + [("write", "read-only"), ("write", "read and execute"), ("execute", "not executable")]


@pytest.mark.parametrize("backing", [0, 0x40000], ids=["private", "SHAREABLE"])
@pytest.mark.parametrize(("access", "target"), CASES)
def test_a_child_that_touches_a_forbidden_page_dies_of_sigsegv(
    access: str, target: str, backing: int
) -> None:
    if access == "execute" and platform.machine() not in RETURN:
        pytest.skip(f"no machine code for {platform.machine()} in this test")
    child = run_child(touch, access, target, backing)
    assert child.stdout == "touching\n", child.stderr
    assert child.returncode == -signal.SIGSEGV, child.stderr


def survive() -> None:
    """Touch what is allowed, in every protection."""
    import ctypes
    import mmap
    import platform

    from vmm_linux import VMM, VmmFlags

    page = mmap.PAGESIZE
    code = bytes.fromhex({"x86_64": "c3", "aarch64": "c0035fd6"}.get(platform.machine(), ""))
    for extra in (0, VmmFlags.SHAREABLE, VmmFlags.LOCKED, VmmFlags.HUGE):
        for protection in (1, 3, 5, 7):
            with VMM() as vmm:
                flags = VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.READ | VmmFlags.WRITE
                va = vmm.allocate(0, 2 * page, flags | extra)
                vmm.write(va, code or b"x")
                vmm.protect(va, 2 * page, protection)
                ctypes.string_at(va, 2 * page)
                if protection & 2:
                    ctypes.memset(va + page, 1, page)
                if protection & 4 and code:
                    ctypes.CFUNCTYPE(None)(va)()
    print("alive")


def test_a_child_that_touches_allowed_pages_lives() -> None:
    child = run_child(survive)
    assert (child.returncode, child.stdout) == (0, "alive\n"), child.stderr


def test_an_ordinary_user_dies_and_lives_alike() -> None:
    assert run_child(survive, nobody=True).stdout == "alive\n"
    child = run_child(touch, "read", "reserved", 0, nobody=True)
    assert (child.returncode, child.stdout) == (-signal.SIGSEGV, "touching\n"), child.stderr

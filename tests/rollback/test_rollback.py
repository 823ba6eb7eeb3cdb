"""A call that fails leaves everything as it was, at whichever call to the system it fails.

How this is tried is in :mod:`faults`; the calls that have to do with MDL buffers are in
``test_rollback_of_buffers``.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

import faults
from rollback_regions import SCENARIOS

if TYPE_CHECKING:
    from pathlib import Path


def try_method(method: str, error: int) -> None:
    """Try all scenarios of a method; runs in a child."""
    import faults
    import rollback_regions

    faults.try_all(rollback_regions.SCENARIOS[method], error)


@pytest.mark.parametrize("method", SCENARIOS)
def test_a_failed_call_leaves_everything_as_it_was(library: Path, method: str) -> None:
    faults.run(library, try_method, method, 0)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("allocate", errno.EPERM),
        ("interrupted commit", errno.EINTR),
        ("commit", errno.EPERM),
        ("decommit", errno.EPERM),
        ("free", errno.EINVAL),
        ("copy", errno.EPERM),
    ],
)
def test_a_refusal_for_any_other_reason_leaves_everything_as_it_was_too(
    library: Path, method: str, error: int
) -> None:
    faults.run(library, try_method, method, error)


def try_making() -> None:
    """Make a VMM while there is no memory; runs in a child."""
    import pytest

    from faults import Faults, Mode, surroundings
    from vmm_linux import VMM

    library = Faults()
    VMM().close()
    before = surroundings()
    with pytest.raises(MemoryError), library.armed(Mode.MEMORY, 1):
        VMM()
    assert library.name == "malloc"
    with VMM() as vmm:
        assert not vmm.closed
    assert surroundings() == before


def test_a_vmm_that_cannot_be_made_leaves_nothing(library: Path) -> None:
    faults.run(library, try_making)


def try_filling_in_pieces() -> None:
    """Commit more shared memory than is filled at a time; runs in a child."""
    import os
    from itertools import count

    from faults import Faults, Mode
    from kernel_oracle import PAGE, descriptors
    from vmm_linux import VMM, VmmError, VmmFlags

    flags = VmmFlags.RESERVE | VmmFlags.LOCKED | VmmFlags.READ | VmmFlags.SHAREABLE
    size = (64 << 20) + PAGE
    library = Faults()
    names = []
    with VMM() as vmm:
        base = vmm.allocate(0, size, flags)
        (file,) = [fd for fd, name in descriptors().items() if name.startswith("/memfd:")]
        for n in count(1):
            try:
                with library.armed(Mode.ALONE, n, spare="malloc"):
                    vmm.commit(base, size)
            except VmmError:
                assert os.fstat(file).st_blocks == 0, library.name
            if not library.name:
                break
            names.append(library.name)
            vmm.decommit(base, size)
    assert names.count("fallocate") == 2, names


def test_shared_memory_that_was_filled_in_part_is_given_back(library: Path) -> None:
    faults.run(library, try_filling_in_pieces)


def try_dropping_the_last_view() -> None:
    """Let go of the last view of a closed VMM, whose region then cannot go; runs in a child."""
    from faults import Faults, Mode, surroundings
    from kernel_oracle import PAGE, mapping_at
    from vmm_linux import VMM, VmmFlags

    flags = VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.READ | VmmFlags.SHAREABLE
    library = Faults()
    before = surroundings()
    vmm = VMM()
    base = vmm.allocate(0, 4 * PAGE, flags)
    view = vmm.view(base, PAGE)
    vmm.close()
    with library.armed(Mode.ALONE, 1):
        del view
    assert library.name == "munmap"
    assert mapping_at(base)
    del vmm
    assert surroundings() == before


def test_a_region_that_could_not_go_with_its_last_view_goes_with_the_vmm(library: Path) -> None:
    faults.run(library, try_dropping_the_last_view)


def try_first_calls() -> None:
    """Ask what the kernel offers while something is short; runs in a child."""
    import faults
    import rollback_regions

    faults.try_first_calls(rollback_regions.FIRST_CALLS, 5)


def test_a_shortage_while_the_kernel_is_asked_what_it_offers_does_no_harm(library: Path) -> None:
    faults.run(library, try_first_calls)

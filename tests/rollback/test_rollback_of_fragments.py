"""A call that fails leaves fragments as they were, and so does one over many ranges.

How this is tried is in :mod:`faults`. A call that cannot take the way by guards takes the one by
mprotect: it then succeeds, with the same pages in other mappings.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

import faults
from faults import Ground
from guarding import RULES, rule
from kernel_oracle import PAGE, guarded_pages
from rollback_fragments import AT, HALF, RANGES, SCENARIOS, laid

if TYPE_CHECKING:
    from pathlib import Path


def try_method(method: str, error: int) -> None:
    """Try all scenarios of a method, with guards wherever they can be; runs in a child."""
    import faults
    import rollback_fragments as here
    from guarding import RULES, rule

    with rule(*RULES["always"]):
        faults.try_all(here.SCENARIOS[method], error)


@pytest.mark.parametrize("method", SCENARIOS)
def test_a_failed_call_leaves_fragments_as_they_were(library: Path, method: str) -> None:
    faults.run(library, try_method, method, 0)


@pytest.mark.parametrize("method", ["commit", "decommit", "commit_ranges"])
def test_a_refusal_for_any_other_reason_leaves_fragments_as_they_were_too(
    library: Path, method: str
) -> None:
    faults.run(library, try_method, method, errno.EPERM)


def try_ranges(name: str) -> None:
    """Try scenarios of many ranges in another way; runs in a child."""
    import faults
    import rollback_fragments as here
    from guarding import RULES, rule

    way, scenarios = here.RANGES[name]
    with rule(*RULES[way]):
        faults.try_all(scenarios)


@pytest.mark.parametrize("name", RANGES)
def test_a_failed_call_leaves_all_ranges_as_they_were_in_every_way(
    library: Path, name: str
) -> None:
    faults.run(library, try_ranges, name)


def try_charge() -> None:
    """Open a chunk while one call fails: what is charged is what is there; runs in a child."""
    from itertools import count

    from faults import Faults, Ground, Mode
    from guarding import RULES, rule
    from kernel_oracle import PAGE, guarded_pages
    from rollback_fragments import AT, HALF, charged, laid

    library = Faults()
    with rule(*RULES["always"]):
        with Ground() as vmm:
            laid(("commit", 0, 5))(vmm)  # asks the kernel what it offers
        for mode in (Mode.ALONE, Mode.HALF):
            for n in count(1):
                with Ground() as vmm:
                    laid()(vmm)
                    with library.armed(mode, n, spare="malloc"):
                        vmm.commit(AT + 2 * PAGE, 2 * PAGE)
                    pages = HALF if guarded_pages(AT, HALF) else 2
                    assert charged() == pages * PAGE, (mode, n, library.name)
                    vmm.decommit(AT + 2 * PAGE, 2 * PAGE)
                    assert charged() == 0, (mode, n, library.name)
                if not library.name:
                    break
            assert n > 3, n


def test_a_chunk_that_could_not_be_opened_is_not_charged(library: Path) -> None:
    faults.run(library, try_charge)


def test_a_chunk_is_closed_when_its_last_page_goes_with_a_part_of_the_next_one() -> None:
    with rule(*RULES["always"]), Ground() as vmm:
        laid(("commit", 6, 4))(vmm)
        vmm.decommit(AT + 6 * PAGE, 3 * PAGE)
        assert guarded_pages(AT, HALF) == []
        assert vmm.read(AT + 9 * PAGE, 1) != bytes(1)

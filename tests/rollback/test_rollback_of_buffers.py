"""A call that fails leaves MDL buffers, their handles and their mappings as they were.

At whichever call to the system it fails (:mod:`faults`). Where the system really ends:
``test_buffers_at_walls``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import faults
from rollback_buffers import REFUSED, SCENARIOS

if TYPE_CHECKING:
    from pathlib import Path


def try_method(method: str) -> None:
    """Try all scenarios of a method; runs in a child."""
    import faults
    import rollback_buffers

    faults.try_all(rollback_buffers.SCENARIOS[method])


@pytest.mark.parametrize("method", SCENARIOS)
def test_a_failed_call_leaves_buffers_and_handles_as_they_were(library: Path, method: str) -> None:
    faults.run(library, try_method, method)


def try_refusals(method: str) -> None:
    """Try all scenarios of a method that is refused for another reason; runs in a child."""
    import faults
    import rollback_buffers

    error, scenarios = rollback_buffers.REFUSED[method]
    faults.try_all(scenarios, error)


@pytest.mark.parametrize("method", REFUSED)
def test_a_refusal_for_any_other_reason_leaves_them_as_they_were_too(
    library: Path, method: str
) -> None:
    faults.run(library, try_refusals, method)


def try_first_calls() -> None:
    """Ask what the kernel offers while something is short; runs in a child."""
    import faults
    import rollback_buffers

    faults.try_first_calls(rollback_buffers.FIRST_CALLS, 4)


def test_a_shortage_while_the_kernel_is_asked_does_no_harm_to_buffers(library: Path) -> None:
    faults.run(library, try_first_calls)


def try_first_identity() -> None:
    """Let each call fail in a process that has asked nothing yet; runs in a child."""
    from functools import partial
    from itertools import count

    import rollback_buffers as here
    from faults import Faults
    from forked import in_child

    library = Faults()
    for n in count(1):
        name, same = in_child(partial(here.first_identity, library, n))
        assert same, (n, name)
        if not name:
            break
    assert n > 3, n


def test_a_shortage_does_not_change_a_security_id(library: Path) -> None:
    faults.run(library, try_first_identity)

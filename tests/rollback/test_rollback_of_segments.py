"""Every call to the system that buffers in segments need is made to fail, and nothing has changed.

The functions that are not tests run in other processes. They import for themselves what they use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import faults
from rollback_segments import SCENARIOS

if TYPE_CHECKING:
    from pathlib import Path


def try_method(method: str) -> None:
    """Try all scenarios of a method; runs in a child."""
    import faults
    import rollback_segments

    faults.try_all(rollback_segments.SCENARIOS[method])


@pytest.mark.parametrize("method", SCENARIOS)
def test_a_failed_call_leaves_segments_as_they_were(library: Path, method: str) -> None:
    faults.run(library, try_method, method)


def try_refusals() -> None:
    """The kernel refuses for another reason; runs in a child."""
    import errno

    import faults
    import rollback_segments as here

    for method in ("mdl_create", "mdl_clone", "send_handle"):
        faults.try_all(here.SCENARIOS[method], errno.EPERM)


def test_a_refusal_for_any_other_reason_leaves_segments_as_they_were(library: Path) -> None:
    faults.run(library, try_refusals)


def try_sealing() -> None:
    """Let each call of a sealing fail; runs in a child."""
    import rollback_segments as here
    from faults import Faults
    from vmm_linux import Seal

    library = Faults()
    for n in range(1, 5):
        here.seal_with_failure(library, Seal.PUBLISH, n)
        here.seal_with_failure(library, Seal.FREEZE, n)


def test_a_failed_sealing_says_how_many_bytes_are_sealed(library: Path) -> None:
    faults.run(library, try_sealing)

"""Where the interpreter finds no memory: no call crashes, or half succeeds.

Which allocation fails, and what is compared: :mod:`shortages`. All of them, under a sanitizer too:
``scripts/soak --memory-short``.
"""

from __future__ import annotations

import pytest

from children import in_own_process

pytest.importorskip("_testcapi", reason="this Python comes without what makes allocations fail")

import shortages

#: Groups with many allocations to a call, of which one in so many fails here.
STEPS = {"inspection": 7, "ring": 3, "file": 7, "policy": 9, "arrays": 2}


def try_group(name: str, step: int) -> None:
    """Try a group; runs in a child."""
    assert not (wrong := shortages.try_group(name, step)), "\n".join(wrong)


@pytest.mark.parametrize("name", shortages.GROUPS)
def test_a_call_that_finds_no_memory_leaves_everything_as_it_was(name: str) -> None:
    environment = shortages.environment()
    in_own_process(try_group, name, STEPS.get(name, 1), environment=environment, timeout=300)

"""Sockets of gevent and eventlet: a call that waits lets the other greenlets of its thread run."""

from __future__ import annotations

import pytest

from children import TESTS_IMPORTABLE, run_child


@pytest.mark.parametrize("has_policy", [False, True])
@pytest.mark.parametrize("way", ["patched first", "patched later", "its own module"])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_other_greenlets_run_while_one_waits(library: str, way: str, has_policy: bool) -> None:
    """Both ends are in one thread: a call that blocked it would wait for ever."""
    child = run_child(
        f"import green_sockets\ngreen_sockets.run({library!r}, {way!r}, has_policy={has_policy})",
        environment=TESTS_IMPORTABLE,
    )
    expected = [library, "0", "TimeoutError", "BlockingIOError", "[Errno 9] Bad file descriptor"]
    assert (child.returncode, child.stdout.splitlines()) == (0, expected), child.stderr

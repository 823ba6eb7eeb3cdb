"""Brokers under load: everybody is served, and nothing is left or grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import name_load
from brokers import running
from vmm_linux.names import Client

if TYPE_CHECKING:
    from pathlib import Path

#: Bytes that the broker's own memory may vary by, whatever it served.
SLACK = 1 << 20


def test_memory_does_not_grow_with_what_was_served(tmp_path: Path) -> None:
    used = []
    with (
        running(tmp_path) as broker,
        Client(broker.path) as client,
        client.create("frames", 8192),
    ):
        for _ in range(3):
            for _ in range(1500):
                with client.create("mine", 4096), client.open("frames"):
                    client.unlink("mine")
            used.append(broker.memory())
    assert used[2] - used[0] < SLACK


def test_many_clients_at_once_are_all_served_and_leave_nothing() -> None:
    load = name_load.measure(200, 10_000)
    assert len(load.ours) == len(load.theirs) == 8_000
    assert name_load.is_clean(load), name_load.told(load)
    stop_tracker()


def stop_tracker() -> None:
    """End the process that keeps account of SharedMemory, which otherwise lasts as long as this."""
    from multiprocessing import resource_tracker

    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]

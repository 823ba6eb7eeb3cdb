"""Which of the processes of pytest-xdist runs which test."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    import pytest
    from xdist.remote import Producer

#: Modules whose tests need the machine's memory, its settings or its time: one runs at a time.
NEEDING_THE_MACHINE = frozenset(
    {
        "test_bench",
        "test_buffers_at_walls",
        "test_default_limits",
        "test_demo",
        "test_doctor",
        "test_experiment_command",
        "test_experiments",
        "test_experiments_and_others",
        "test_limits_of_the_system",
        "test_map_in_browser",
        "test_map_of_postgresql",
        "test_packaging",
    }
)


class OneAfterTheOther(LoadScopeScheduling):  # type: ignore[misc]  # without types
    """Whichever process is free runs the next test; one of them runs what needs the machine."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        # As collected: what takes longest would come last, for being few tests.
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        """What a process is given at once: a test, or all tests that need the machine."""
        module = PurePosixPath(nodeid.partition("::")[0]).stem
        return "the machine" if module in NEEDING_THE_MACHINE else nodeid

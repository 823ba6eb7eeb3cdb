"""Every method over regions of one VMM in every order, beside the plain model of ``model.py``.

The same machine runs as long as one likes under ``scripts/soak``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from model_machine import RegionMachine, settings_of_the_suite
from model_servant import Servant

if TYPE_CHECKING:
    from model_servant import Peer


class VirtualMemory(RegionMachine):
    """One VMM of this process and its model."""

    servant = Servant()

    @override
    def servants(self) -> list[Servant | Peer]:
        """One, here."""
        return [self.servant]


VirtualMemory.TestCase.settings = settings_of_the_suite(examples=200, steps=100)
TestVirtualMemoryInAnyOrder = VirtualMemory.TestCase

"""A few instructions of the machine's own, for what must not be measured through an interpreter."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from vmm_linux import VmmError, VmmFlags
from vmm_linux._core.kernel import page_size
from vmm_linux.experiments._framework.results import need

if TYPE_CHECKING:
    from vmm_linux import VMM, Region

__all__ = ["machine_code"]


def machine_code(vmm: VMM, codes: dict[str, str]) -> Region:
    """Memory that can be executed, with a function in it.

    Args:
        vmm: where the memory comes from.
        codes: the function as hexadecimal digits, for each machine by the name that ``uname -m``
            gives it.

    Returns:
        A ``Region``; the function begins at its base, and lasts as long as it.

    Errors:
        NotObservable: there is no code for this machine, or it must not be executed.
    """
    machine = os.uname().machine
    need(
        machine in codes and sys.maxsize > 1 << 32,
        f"it takes code of the machine's own, and there is none for {machine}",
    )
    region = vmm.region(page_size(), VmmFlags.READ | VmmFlags.WRITE | VmmFlags.COMMIT)
    region.write(bytes.fromhex(codes[machine]))
    try:
        region.protect(VmmFlags.READ | VmmFlags.EXECUTE)
    except VmmError as refusal:
        need(False, f"nothing that was written may be executed: {refusal}")
    return region

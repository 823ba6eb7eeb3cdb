"""Runs a few instructions of the processor, where the interpreter would disturb a measurement."""

import os
import sys

from vmm_linux import VMM, Region, VmmError, VmmFlags
from vmm_linux._core.kernel import page_size
from vmm_linux.experiments._framework.results import need


def machine_code(vmm: VMM, codes: dict[str, str]) -> Region:
    """Make executable memory with a function in it.

    Args:
        vmm: the VMM of the memory.
        codes: the function in hexadecimal digits, by the machine's name in ``uname -m``.

    Returns:
        A ``Region`` with the function at its base.

    Errors:
        NotObservable: there is no code for this machine, or executing is forbidden.
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

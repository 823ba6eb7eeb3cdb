"""The VMM of this package's own: of buffers that came without one, unpickled for example."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_linux.vmm import VMM

__all__ = ["MAKERS", "own_vmm"]

MAKERS: list[Callable[[], VMM]] = []
"""What makes it. The class of VMMs is of a layer above, and puts it here."""
OWN: dict[str, VMM] = {}
"""It, under ``"vmm"``, once there is one."""

# A child of fork makes one for itself: what it inherited belongs to the objects that it inherited.
os.register_at_fork(after_in_child=OWN.clear)


def own_vmm() -> VMM:
    """This process's VMM of the package's own, made when first asked for.

    It does not warn when nobody closes it. When somebody did, there is another one.
    """
    vmm = OWN.get("vmm")
    if vmm is not None and not vmm.closed:
        return vmm
    if vmm is not None:
        OWN.pop("vmm", None)
    # Of threads that come at once, all get the same.
    return OWN.setdefault("vmm", MAKERS[0]())

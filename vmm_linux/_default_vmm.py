"""The default VMM: of buffers that came without one, unpickled for example."""

from __future__ import annotations

import os

from vmm_linux._core import imports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_linux.vmm import VMM

__all__ = ["default_vmm"]

MODULE = "vmm_linux.vmm"
"""The class's module, loaded with the package. It imports ``Mdl``, which imports this module."""
DEFAULT: dict[str, VMM] = {}
"""It, under ``"vmm"``, once there is one."""

# A child of fork makes one for itself: what it inherited belongs to the objects that it inherited.
os.register_at_fork(after_in_child=DEFAULT.clear)


def default_vmm() -> VMM:
    """This process's default VMM, made when first asked for.

    It does not warn when it is never closed. When it was closed, there is another one.
    """
    vmm = DEFAULT.get("vmm")
    if vmm is not None and not vmm.closed:
        return vmm
    if vmm is not None:
        DEFAULT.pop("vmm", None)
    # Of threads that come at once, all get the same.
    return DEFAULT.setdefault("vmm", vmm_without_warning())


def vmm_without_warning() -> VMM:
    """A VMM of which nobody is warned: no user has it, who could close it."""
    vmm: VMM = imports.needed("VMM", MODULE).VMM()
    vmm._warned = True  # noqa: SLF001  the package's own
    return vmm

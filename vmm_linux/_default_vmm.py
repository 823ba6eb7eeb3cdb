"""The default VMM, for buffers that come without one, such as unpickled ones."""

from __future__ import annotations

import os

from vmm_linux._core import endpoint, imports
from vmm_linux._core.values import describe, is_a
from vmm_linux.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_linux.vmm import VMM

MODULE = "vmm_linux.vmm"
"""The class's module, loaded with the package. It imports ``Mdl``, which imports this module."""
DEFAULT: dict[str, VMM] = {}
"""The default VMM under ``"vmm"``, once there is one."""

# A forked child makes its own: the inherited one belongs to the inherited objects.
os.register_at_fork(after_in_child=DEFAULT.clear)


def default_vmm() -> VMM:
    """This process's default VMM, made at first use, and anew after it is closed.

    It does not warn if it is never closed.
    """
    vmm = DEFAULT.get("vmm")
    if vmm is not None and not vmm.closed:
        return vmm
    if vmm is not None:
        DEFAULT.pop("vmm", None)
    # Concurrent threads all get the same one.
    return DEFAULT.setdefault("vmm", vmm_without_warning())


def vmm_without_warning() -> VMM:
    """A VMM that does not warn when it is dropped: no user has it and could close it."""
    vmm: VMM = imports.needed("VMM", MODULE).VMM()
    vmm._warned = True  # noqa: SLF001
    return vmm


def given_or_default(method: str, vmm: endpoint.VMM | None) -> endpoint.VMM:
    """The caller's VMM, or the default one."""
    if vmm is None:
        return default_vmm()
    if not is_a(vmm, endpoint.VMM):
        raise InvalidArgument(method, f"vmm is {describe(vmm)}, not a VMM or None")
    return vmm

"""The KasperskyOS endpoint ``vmm.VMM`` on real Linux memory.

``VMM`` reserves, commits, protects, gives back and queries memory of this process, and makes, maps,
clones and sends MDL buffers, memory shared with other processes; see its methods.
``VMM.endpoint`` is the same by the reference's own names.
"""

from vmm_linux._core import old_names as _old_names  # noqa: F401  modules that old pickles name
from vmm_linux._core.endpoint import PageInfo
from vmm_linux.errors import Retcode, VmmError
from vmm_linux.event import Event
from vmm_linux.flags import Rights, Seal, VmmFlags
from vmm_linux.handles import INVALID_HANDLE, Handle
from vmm_linux.limits import Limits
from vmm_linux.mdl import Mdl
from vmm_linux.region import Region
from vmm_linux.states import PageKind, PageState
from vmm_linux.vmm import VMM

__all__ = [
    "INVALID_HANDLE",
    "VMM",
    "Event",
    "Handle",
    "Limits",
    "Mdl",
    "PageInfo",
    "PageKind",
    "PageState",
    "Region",
    "Retcode",
    "Rights",
    "Seal",
    "VmmError",
    "VmmFlags",
]
__version__ = "0.1.0"

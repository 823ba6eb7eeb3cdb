"""Memory that processes share, and the KasperskyOS endpoint ``vmm.VMM`` on real Linux memory.

``share(array)`` copies a NumPy array to where other processes can have it too; ``empty``, ``zeros``
and ``full`` make new ones. ``Mdl(size)`` is a buffer of bytes. ``multiprocessing`` carries both.

``VMM`` reserves, commits, protects, gives back and queries memory of this process, and makes, maps,
clones and sends MDL buffers, memory shared with other processes; see its methods.
``VMM.endpoint`` is the same by the reference's own names.
"""

from vmm_linux import mdl as _mdl
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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_linux.names import attach as attach
    from vmm_linux.shared_array import SharedArray as SharedArray
    from vmm_linux.shared_array import empty as empty
    from vmm_linux.shared_array import empty_like as empty_like
    from vmm_linux.shared_array import full as full
    from vmm_linux.shared_array import share as share
    from vmm_linux.shared_array import zeros as zeros
    from vmm_linux.shared_array import zeros_like as zeros_like

ARRAYS = ("SharedArray", "empty", "empty_like", "full", "share", "zeros", "zeros_like")
"""Names that load NumPy when they are asked for. Not in ``__all__``: it is not always there."""


def __getattr__(name: str) -> object:
    if name in ARRAYS:
        module = _mdl.arrays(name)
    elif name == "attach":  # loaded when it is asked for, as most programs do not
        module = _mdl.names(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = getattr(module, name)
    return made


def __dir__() -> list[str]:
    return [*globals(), *ARRAYS, "attach"]

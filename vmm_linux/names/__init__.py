"""Buffers by name: programs that never met share one through a broker.

``mdl.publish_as("frames")`` puts a buffer under a name, ``vmm_linux.attach("frames")`` opens it.
The broker of this user starts by itself; ``vmm-linux broker`` runs one for several users. A
``Client`` has the other operations; ``client_of()`` is the one that these two use. A ``Ticket`` is
for one process, in place of a name for many.

A name ends with the connection of the process that made it (``lifetime="connection"``), with the
family of processes that ``multiprocessing`` made of one program (``"family"``), or when it is
unlinked (``"kept"``). Memory lives as long as any process has it, whatever becomes of its name or
of the broker. A broker that was killed has forgotten all names; the next call starts another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm_linux.names.client import Client, Notice, client_of
from vmm_linux.names.protocol import Lifetime, Stat
from vmm_linux.names.tickets import Ticket

if TYPE_CHECKING:
    import os
    from typing import SupportsIndex

    from vmm_linux._core.endpoint import VMM
    from vmm_linux.mdl import Mdl

__all__ = ["Client", "Lifetime", "Notice", "Stat", "Ticket", "attach", "client_of"]

for _public in (Client, Notice, Lifetime, Stat, Ticket):
    _public.__module__ = __name__  # as tracebacks and pickles name it


def attach(
    name: str,
    writable: bool | None = None,
    *,
    rights: SupportsIndex | None = None,
    broker: str | os.PathLike[str] | None = None,
    vmm: VMM | None = None,
) -> Mdl:
    """Open the buffer that has a name.

    Args:
        name: that ``Mdl.publish_as`` or ``Client.create`` gave it.
        writable: True, False, or None for all that the name allows.
        rights: ``Rights`` that the handle has, just these; None for ``writable`` to decide.
        broker: path of a broker's socket; None for ``VMM_LINUX_BROKER``, or this user's own.
        vmm: that the handle is to belong to; None for the default one.

    Returns:
        An ``Mdl``. It stays usable whatever becomes of the name.

    Errors:
        RESOURCE_NOT_FOUND: no such name; no broker at this path.
        NO_CAPABILITY: the name allows less.
        HANDLE_REVOKED: the name was revoked.
        SECURITY_DISALLOW: the broker's policy, or this VMM's, does not allow it; the broker's
            place cannot be trusted.
        FAIL: the broker cannot be started, or does not answer.
    """
    return client_of(broker).open(name, writable, rights=rights, vmm=vmm)

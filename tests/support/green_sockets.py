"""A program of gevent's or eventlet's: what its sockets carry while other greenlets run.

It imports this package and ``socket`` only when it runs, after or before the library replaced
parts of the standard library.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

__all__ = ["run"]

TIMES = 1000
"""More messages than a socket has room for."""


def run(library: str, way: str, *, has_policy: bool) -> None:
    """Send and receive within one thread, and print how that went.

    Args:
        library: gevent or eventlet.
        way: "patched first", before this package is imported; "patched later"; "its own module".
        has_policy: whether the VMM has a policy, which works on a duplicate of each socket.
    """
    warnings.simplefilter("ignore")  # of eventlet: that it is deprecated
    green: Any = importlib.import_module(library)
    sockets = library_sockets(library, way)
    from vmm_linux import VMM, VmmFlags
    from vmm_linux.policy import Policy

    with VMM(policy=Policy(default="allow") if has_policy else None) as vmm:
        ours, theirs = sockets.socketpair()
        print(type(theirs).__module__.partition(".")[0])
        handle = vmm.mdl_create(os.sysconf("SC_PAGE_SIZE"), VmmFlags.READ)
        travel(green, vmm, ours, theirs, handle)  # what opens the library's own descriptors
        before = os.listdir("/proc/self/fd")  # noqa: PTH208
        travel(green, vmm, ours, theirs, handle)
        print(len(os.listdir("/proc/self/fd")) - len(before))  # noqa: PTH208
        end(vmm, ours, theirs, handle)


def library_sockets(library: str, way: str) -> Any:  # noqa: ANN401
    """The module that makes sockets of the library's."""
    if way == "patched first":
        patch(library)
    import socket

    use_python_sockets(socket)
    if way == "patched later":
        patch(library)
    if way == "its own module":
        name = "gevent.socket" if library == "gevent" else "eventlet.green.socket"
        return importlib.import_module(name)
    return socket


def patch(library: str) -> None:
    """Have the library replace parts of the standard library."""
    if library == "gevent":
        importlib.import_module("gevent.monkey").patch_all()
    else:
        importlib.import_module("eventlet").monkey_patch()


def use_python_sockets(socket: Any) -> None:  # noqa: ANN401
    """Send a handle as another module of the program may have done before."""
    from vmm_linux import VMM, VmmFlags

    ours, theirs = socket.socketpair()
    with ours, theirs, VMM() as vmm:
        vmm.send_handle(ours, vmm.mdl_create(os.sysconf("SC_PAGE_SIZE"), VmmFlags.READ))
        vmm.recv_handle(theirs)


def travel(green: Any, vmm: Any, ours: Any, theirs: Any, handle: Any) -> None:  # noqa: ANN401
    """Send and receive by two greenlets, each of which waits for the other."""
    from vmm_linux import Event

    def receive() -> None:
        for _ in range(TIMES):
            vmm.handle_close(vmm.recv_handle(theirs))

    def send() -> None:
        for _ in range(TIMES):
            vmm.send_handle(ours, handle)

    for first, second in ((receive, send), (send, receive)):
        job = green.spawn(first)
        green.sleep(0)
        second()
        job.get() if hasattr(job, "get") else job.wait()
    with Event() as event:
        event.send(ours)
        Event.recv(theirs).close()


def end(vmm: Any, ours: Any, theirs: Any, handle: Any) -> None:  # noqa: ANN401
    """Wait in vain, and use a closed socket."""
    for timeout in (0.01, 0):
        theirs.settimeout(timeout)
        try:
            vmm.recv_handle(theirs)
        except OSError as problem:
            print(type(problem).__name__)
    ours.close()
    theirs.close()
    try:
        vmm.send_handle(ours, handle)
    except OSError as problem:
        print(problem)

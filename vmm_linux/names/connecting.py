"""Connections to brokers; this user's own is started where it does not run."""

from __future__ import annotations

import socket
from typing import Final

from vmm_linux.errors import Fail, ResourceNotFound, VmmError
from vmm_linux.names import place, protocol, start

PATIENCE: Final = 30
"""Seconds after which a client gives up on a broker that does not answer."""
ATTEMPTS: Final = 3
"""How often a broker is started for one call."""


def to_path(method: str, path: str) -> socket.socket:
    """A connection to the broker at a path.

    Errors:
        RESOURCE_NOT_FOUND: no broker is there.
        SECURITY_DISALLOW: its place cannot be trusted.
    """
    try:
        place.check_socket(path, method)
        return connect(method, path)
    except VmmError:
        raise
    except OSError as problem:
        raise ResourceNotFound(
            method, f"no broker listens at {path!r}: start 'vmm-linux broker'", problem.errno
        ) from None


def to_own(method: str) -> socket.socket:
    """A connection to this user's own broker.

    Errors:
        SECURITY_DISALLOW: its folder cannot be trusted.
        FAIL: it cannot be started.
    """
    folder = place.own_folder()
    for attempt in range(ATTEMPTS + 1):
        try:
            place.check_private(folder, method)
            return connect(method, f"{folder}/{place.SOCKET}")
        except VmmError:
            raise
        except (FileNotFoundError, ConnectionError):
            if attempt == ATTEMPTS:
                break
        except OSError as problem:
            raise Fail(
                method,
                f"the broker of this user in {folder!r} cannot be reached: {problem}",
                problem.errno,
            ) from None
        try:
            place.make_private(folder, method)
            start.start(method, folder)
        except VmmError:
            raise
        except OSError as problem:
            raise Fail(
                method, f"the broker of this user cannot be started: {problem}", problem.errno
            ) from None
    raise Fail(method, f"the broker of this user does not stay in {folder!r}")


def connect(method: str, path: str) -> socket.socket:
    """A connection to a socket, on which nothing waits for longer than ``PATIENCE``.

    Errors:
        SECURITY_DISALLOW: neither root nor this user listens there, whatever was found before.
        OSError: nobody does.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        seconds = protocol.TIMEVAL.pack(PATIENCE, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        sock.connect(path)
        place.check_listener(sock, path, method)
    except BaseException:
        sock.close()
        raise
    return sock

"""Where a broker's socket is, and whether it can be trusted to be the one that is meant.

The broker of a user listens in a folder that only this user can enter. Elsewhere, root or this user
must own the socket and its folder, and nobody else may write to the folder: else another user could
put a socket of their own there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import Final

from vmm_linux._core.credentials import known_uid
from vmm_linux._core.values import quoted
from vmm_linux._sharer import CREDENTIALS
from vmm_linux.errors import SecurityDisallow

FOLDER: Final = "vmm-linux"
SOCKET: Final = "broker"
VARIABLE: Final = "VMM_LINUX_BROKER"
"""Names the socket of another broker than the user's own."""
PRIVATE: Final = 0o077
"""What no other user may have of a private folder."""
OTHERS_WRITE: Final = 0o022


def own_folder() -> str:
    """The private folder of this user's broker."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(base):  # noqa: PTH117  a Path takes longer to make than this
        return f"{base}/{FOLDER}"
    uid = os.geteuid()
    base = f"/run/user/{uid}"
    try:
        found = os.lstat(base)
    except OSError:
        found = None
    if found is not None and stat.S_ISDIR(found.st_mode) and found.st_uid == uid:
        return f"{base}/{FOLDER}"
    return f"/tmp/{FOLDER}-{uid}"  # noqa: S108  it is checked before it is used


def own_socket() -> str:
    """The socket of this user's broker."""
    return f"{own_folder()}/{SOCKET}"


def make_private(folder: str, method: str = "broker") -> None:
    """Make a folder that only this user can enter, or check one that is there.

    Errors:
        SECURITY_DISALLOW: it is another user's, open to others, or no folder.
        OSError: it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)  # noqa: PTH102
    check_private(folder, method)


def check_private(folder: str, method: str) -> None:
    """Whether a folder is this user's, and nobody else can enter it.

    Errors:
        SECURITY_DISALLOW: it is not.
        FileNotFoundError: there is none.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as problem:
        if problem.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise refusal(method, folder, "is no folder, or a symbolic link to one") from None
        if problem.errno == errno.EACCES:
            raise refusal(method, folder, "belongs to another user") from None
        raise
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if found.st_uid != os.geteuid():
        raise refusal(method, folder, f"belongs to user {found.st_uid}")
    if found.st_mode & PRIVATE:
        mode = stat.S_IMODE(found.st_mode)
        raise refusal(method, folder, f"is open to other users (mode {mode:04o}); chmod 700 it")


def check_socket(path: str, method: str) -> None:
    """Whether a socket, and the folder that it is in, are root's or this user's.

    Errors:
        SECURITY_DISALLOW: they are not, or it is no socket.
        FileNotFoundError: there is none.
    """
    check_folder(os.path.dirname(path) or ".", method)  # noqa: PTH120
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise refusal(method, path, "is a symbolic link")
    if not stat.S_ISSOCK(found.st_mode):
        raise refusal(method, path, "is no socket")
    if found.st_uid not in {0, os.geteuid()}:
        raise refusal(method, path, f"belongs to user {found.st_uid}")


def check_listener(sock: socket.socket, path: str, method: str) -> None:
    """Whether root or this user listens at the other end of a connection.

    A folder above the socket's, which another user owns, could be exchanged after it was checked.

    Errors:
        SECURITY_DISALLOW: another user does, or an unknown one.
    """
    _, number, _ = CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    )
    uid = known_uid(number)
    if uid is None or uid not in {0, os.geteuid()}:
        who = "an unknown user" if uid is None else f"user {uid}"
        raise refusal(method, path, f"is where {who} listens")


def check_folder(folder: str, method: str) -> None:
    """Whether nobody but root and this user can put anything into a folder.

    Errors:
        SECURITY_DISALLOW: others can.
        FileNotFoundError: there is none.
    """
    found = os.stat(folder)  # noqa: PTH116
    if found.st_uid not in {0, os.geteuid()}:
        raise refusal(method, folder, f"belongs to user {found.st_uid}")
    if found.st_mode & OTHERS_WRITE:
        mode = stat.S_IMODE(found.st_mode)
        raise refusal(method, folder, f"can be written to by other users (mode {mode:04o})")


def refusal(method: str, path: str, why: str) -> SecurityDisallow:
    """The exception for a place that cannot be trusted."""
    return SecurityDisallow(method, f"{quoted(path)} {why}: a broker is not looked for there")

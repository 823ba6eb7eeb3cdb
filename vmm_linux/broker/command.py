"""``vmm-linux broker``, and the broker of a user that its first client starts."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import os
import select
import socket
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmm_linux import VMM, Limits
from vmm_linux._tools.children import die_with_parent
from vmm_linux._tools.commands import CannotTryError
from vmm_linux._tools.text import escaped
from vmm_linux.audit import Audit
from vmm_linux.broker import hardening
from vmm_linux.broker.policy import BrokerPolicy
from vmm_linux.broker.server import Server
from vmm_linux.errors import VmmError
from vmm_linux.names import place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BACKLOG: Final = 1024
FIRST_PASSED: Final = 3
"""The first descriptor that systemd passes, sd_listen_fds(3)."""
LOCK_PATIENCE: Final = 10.0
"""Seconds that one start waits for another."""
LOCK_RETRY: Final = 0.01
VARIABLES: Final = ("VMM_LINUX_POLICY", "VMM_LINUX_AUDIT")
"""Of programs that use a VMM; a broker has a policy and an audit of its own."""


class Binding:
    """A socket in the file system, and the lock beside it that makes it the only one there.

    Args:
        path: of the socket.
        mode: permissions of the socket.

    Errors:
        CannotTryError: a broker listens there, or the place cannot be trusted.
        OSError: the socket cannot be made.
    """

    def __init__(self, path: str, mode: int = 0o600) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.lock = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self.lock = os.open(f"{path}.lock", flags, 0o600)
            wait_for_lock(self.lock, path)
            self._clear()
            mask = os.umask(0o777 & ~mode)
            try:
                self.listener.bind(path)
            finally:
                os.umask(mask)
            self.listener.listen(BACKLOG)
            self.listener.setblocking(False)
            found = os.lstat(path)
            self.identity = found.st_dev, found.st_ino
        except BaseException:
            self.listener.close()
            if self.lock >= 0:
                os.close(self.lock)
            raise

    def _clear(self) -> None:
        """Remove what a broker that was killed left; refuse anything else that is there."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise CannotTryError(f"{escaped(self.path)} is there, and no socket")
        if found.st_uid != os.geteuid():
            raise CannotTryError(f"{escaped(self.path)} belongs to user {found.st_uid}")
        if listens(self.path):
            raise ServedError(f"a broker listens at {escaped(self.path)} already")
        os.unlink(self.path)  # noqa: PTH108

    def release(self) -> None:
        """Let others look whether a broker listens."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)

    def may_end(self) -> bool:
        """Stop listening, unless a client comes just now; False then."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Out of the way first: a client that connects before that is waiting by then, and one that
        # comes later starts another broker, which waits for the lock.
        away = f"{self.path}.ending"
        there = self.is_there()
        if there:
            os.rename(self.path, away)  # noqa: PTH104
        if has_waiting(self.listener):
            if there:
                os.rename(away, self.path)  # noqa: PTH104
            self.release()
            return False
        if there:
            os.unlink(away)  # noqa: PTH108
        return True

    def is_there(self) -> bool:
        """Whether the socket is there, and still this one."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self.identity

    def remove(self) -> None:
        """Remove the socket, if it still is this one."""
        if self.is_there():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)  # noqa: PTH108


class ServedError(CannotTryError):
    """Another broker listens there."""


def wait_for_lock(fd: int, path: str) -> None:
    """Take the lock that starts go through, one after the other."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CannotTryError(
                    f"{escaped(path)}.lock is held by another start for {LOCK_PATIENCE:g} seconds"
                ) from None
            time.sleep(LOCK_RETRY)
        else:
            return


def listens(path: str) -> bool:
    """Whether anybody listens at a socket.

    Errors:
        CannotTryError: that cannot be found out, or it is a socket of another kind.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except BlockingIOError:  # it has many to accept
            return True
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as problem:
            # Such as EPROTOTYPE: another program listens there, and would lose its socket.
            raise CannotTryError(
                f"{escaped(path)} is in use, or not to be asked: {problem.strerror}"
            ) from None
        return True


def has_waiting(listener: socket.socket) -> bool:
    """Whether a connection waits to be accepted."""
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    return bool(poll.poll(0))


# ---- serving -------------------------------------------------------------------------------------


def serve(
    listener: socket.socket,
    policy: BrokerPolicy,
    *,
    audit: Audit | None = None,
    reload: Callable[[], BrokerPolicy] | None = None,
    binding: Binding | None = None,
    on_demand: bool = False,
) -> None:
    """Be a broker until it ends."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    files = hardening.raise_file_limit()
    hardening.harden()
    with VMM(limits=Limits.unlimited()) as vmm:
        server = Server(
            listener,
            vmm,
            policy,
            files=files,
            audit=audit,
            reload=reload,
            on_demand=on_demand,
            may_end=(lambda: True) if binding is None else binding.may_end,
        )
        gc.collect()
        gc.freeze()
        server.catch_signals()
        say_ready()
        try:
            server.run()
        finally:
            if binding is not None:
                binding.remove()


def say_ready() -> None:
    """Tell systemd, or whoever passed a socket for this, that clients are served.

    Source: sd_notify(3).
    """
    path = os.environ.pop("NOTIFY_SOCKET", "")
    if path:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
            contextlib.suppress(OSError),  # it is for whoever waits, and no reason not to serve
        ):
            sock.setblocking(False)
            sock.sendto(b"READY=1", path.replace("@", "\0", 1) if path[0] == "@" else path)


def on_demand(folder: str) -> int:
    """Leave a broker behind that listens in a private folder, if none does; the exit code."""
    os.closerange(FIRST_PASSED, os.sysconf("SC_OPEN_MAX"))
    try:
        place.check_private(folder, "broker")
        binding = Binding(f"{folder}/{place.SOCKET}")
    except ServedError:
        return 0
    except (CannotTryError, VmmError, OSError) as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    if os.fork():
        os._exit(0)  # the client goes on: the socket listens
    os.setsid()
    os.chdir("/")
    os.dup2(0, 2)  # the pipe to the client
    binding.release()
    serve(binding.listener, BrokerPolicy.own_user_only(), binding=binding, on_demand=True)
    return 0


def passed_listener() -> socket.socket | None:
    """The socket that systemd passes, if it does.

    Errors:
        CannotTryError: it is of another kind, or not the only one.

    Source: sd_listen_fds(3).
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.pop("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if count != "1":
        raise CannotTryError(f"systemd passes {escaped(count) or 'no'} sockets; one is expected")
    listener = socket.socket(fileno=FIRST_PASSED)
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise CannotTryError("systemd passes no AF_UNIX SOCK_SEQPACKET: ListenSequentialPacket=")
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise CannotTryError("systemd passes a socket that does not listen: Accept=no")
    os.set_inheritable(FIRST_PASSED, False)
    listener.setblocking(False)
    return listener


def parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    made = argparse.ArgumentParser(
        prog="vmm-linux broker",
        description="Keep buffers by name, and give them to whom the policy allows. Each user has "
        "a broker of their own on demand; this one is for several users, or for programs that name "
        "its socket. SIGTERM ends it, SIGHUP reads the policy again.",
    )
    made.add_argument(
        "--socket",
        metavar="PATH",
        help="where it listens; left out where systemd passes the socket, and for this user's own",
    )
    made.add_argument("--policy", metavar="FILE", help="rules and limits, in TOML")
    made.add_argument("--audit", metavar="FILE", help="gets a line of JSON for every operation")
    made.add_argument(
        "--mode",
        metavar="OCTAL",
        type=permissions,
        default=0o600,
        help="permissions of the socket; 600 lets in this user alone, 666 all (default: 600)",
    )
    made.add_argument(
        "--die-with-parent", action="store_true", help="end when the process that started it does"
    )
    return made


def permissions(text: str) -> int:
    """Permissions in octal."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{escaped(text)!r} is no mode: three octal digits")
    return mode


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 when it was ended, 2 if it could not be tried."""
    asked = parser().parse_args(arguments)
    if asked.die_with_parent:
        die_with_parent(os.getppid())
    policy = BrokerPolicy.own_user_only()
    reload = None
    if asked.policy is not None:
        # Absolute: it is read again later.
        path = Path(asked.policy).absolute()

        def reload() -> BrokerPolicy:
            return BrokerPolicy.from_toml(path)

        policy = reload()
    listener = passed_listener()
    binding = None
    if listener is None:
        binding = bound(asked.socket, asked.mode)
        binding.release()
        listener = binding.listener
    elif asked.socket is not None:
        raise CannotTryError("systemd passes the socket; leave out --socket")
    audit = None if asked.audit is None else Audit(asked.audit)
    serve(listener, policy, audit=audit, reload=reload, binding=binding)
    return 0


def bound(path: str | None, mode: int) -> Binding:
    """The socket at a path, or that of this user's own broker."""
    if path is None:
        place.make_private(place.own_folder())
        return Binding(place.own_socket())
    folder = os.path.dirname(path) or "."  # noqa: PTH120
    place.check_folder(folder, "broker")
    return Binding(os.path.abspath(path), mode)  # noqa: PTH100

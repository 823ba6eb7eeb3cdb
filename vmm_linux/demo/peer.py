"""The demonstration's other process: a program of its own at the far end of a socket.

It gets handles, maps their buffers, tries what they forbid, and reports its steps on the same
socket, a packet of JSON each. It shares nothing else with its parent process, and ends with it.
"""

import ctypes
import errno
import functools
import hashlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vmm_linux import VMM, Handle, Retcode, Rights, Seal, VmmFlags
from vmm_linux._core.credentials import known_uid
from vmm_linux._tools.children import die_with_parent, name_process
from vmm_linux._tools.text import human
from vmm_linux.demo.caller import (
    CHUNK,
    PAGE,
    RESERVATION,
    Caller,
    Footprint,
    ask,
    close,
    described,
    exit_code_of_child,
    made,
    memory_files,
    modes,
    signal_name,
)
from vmm_linux.demo.report import Step

READY = b"ready"
"""This process sends it at its start."""
GO_ON = b"go on"
"""The first process sends it after reading the cost of the buffer for both."""
LONGEST = 1 << 20
"""Bytes of the longest packet with a step."""
PROGRAM = f"import sys; from {__name__} import main; sys.exit(main(*sys.argv[1:]))"
"""This module as a program. ``-m`` would load it twice: the package loads it already."""
KINDS = {"O_RDONLY": "read-only", "O_RDWR": "writable"}
TYPES = {
    "handle": Handle,
    "flags": VmmFlags,
    "prot": VmmFlags,
    "rights": Rights,
    "require": Seal,
    "path": str,
}
"""Types of arguments other than plain numbers."""


class Other:
    """This program run as a process of its own, and the socket to it."""

    def __init__(self, at_end: ExitStack, size: int, sha256: str) -> None:
        """Start it with the socket and FILE's expected hash."""
        package = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        self.sock, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        at_end.callback(self.sock.close)
        with its:
            self.process = subprocess.Popen(  # noqa: S603 (this very interpreter)
                [sys.executable, "-P", "-c", PROGRAM, str(os.getpid()), str(size), sha256],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,  # this process handles an interrupt from the terminal
            )
        at_end.callback(self.abandon)

    def packet(self) -> bytes:
        """Receive its next packet."""
        packet = self.sock.recv(LONGEST)
        if not packet:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return packet

    def end(self) -> int:
        """Close the socket, and wait for its end: its exit code."""
        self.sock.close()
        return self.process.wait()

    def abandon(self) -> None:
        """End it, unless it has ended."""
        self.process.kill()
        self.process.wait()


def unpacked(packet: bytes) -> Step:
    """The step in a packet, with its process before the method."""
    step = Step(**json.loads(packet))
    step.method = f"peer.{step.method}"
    step.arguments = {name: TYPES.get(name, int)(value) for name, value in step.arguments.items()}
    step.rc = None if step.rc is None else Retcode(step.rc)
    return step


@dataclass
class Peer(Caller):
    """The other process."""

    sock: socket.socket
    size: int
    """Bytes of FILE."""
    sha256: str
    handles: dict[str, Handle] = field(default_factory=dict)
    """Received: ``file``, ``window`` and ``board``."""
    va: int = 0
    """The address of FILE's buffer."""
    window: int = 0
    """The address of its clone."""
    board: int = 0
    """The address of the page to write to."""

    def receive(self, name: str, require: Seal, mode: str) -> None:
        """Begin a step with a received handle, whose descriptor of memory has this mode."""
        before = memory_files()
        demands = {"require": require, "max_size": RESERVATION, "peer_uid": known_uid(os.geteuid())}
        self.handles[name] = self.call("recv_handle", sock=self.sock, **demands)
        self.step.arguments = demands
        found = {new: modes(new) for new in memory_files().keys() - before.keys()}
        names = {str(number): its for number, (its, _) in found.items()}
        info = self.vmm.handle_info(self.handles[name])
        self.step.kernel = {"descriptors": names, "size": info.size, "sid": info.sid}
        self.step.facts = [*names.values(), human(info.size)]
        self.step.checks = {
            "one descriptor of the memory came": len(names) == 1,
            "it is close-on-exec": all(closed for _, closed in found.values()),
            f"the descriptor is {KINDS[mode]}": [*names.values()] == [mode],
        }

    def map(self, name: str, prot: VmmFlags) -> int:
        """Begin a step with a mapped buffer: its address."""
        handle = self.handles[name]
        length = self.vmm.mdl_get_size(handle)
        va: int = self.call("MdlMap", handle=handle, offset=0, length=length, hint=0, prot=prot)
        kernel = ask(self, va)
        wanted = "rw-s" if VmmFlags.WRITE in prot else "r--s"
        self.step.checks["the kernel allows just that"] = kernel["permissions"] == wanted
        return va


def receive_file(peer: Peer) -> None:
    """FILE's buffer, only if its seal forbids new writers."""
    peer.receive("file", Seal.PUBLISH, "O_RDONLY")
    rights = peer.handles["file"].rights
    peer.step.checks["reading is all that it allows"] = rights == Rights.GET_SID | Rights.MAP_READ


def receive_window(peer: Peer) -> None:
    """The clone."""
    peer.receive("window", Seal.PUBLISH, "O_RDONLY")
    origin = peer.vmm.handle_info(peer.handles["window"]).origin_sid
    peer.step.kernel["origin_sid"] = origin
    peer.step.checks["it is cloned from FILE's buffer"] = (
        origin == peer.vmm.handle_info(peer.handles["file"]).sid
    )


def receive_board(peer: Peer) -> None:
    """A page to write to."""
    peer.receive("board", Seal(0), "O_RDWR")


def map_file(peer: Peer) -> None:
    """All of FILE's buffer. It takes no memory until it is touched."""
    peer.va = peer.map("file", VmmFlags.READ)
    peer.step.checks["it takes no memory yet"] = peer.step.kernel["rss"] == 0


def verify(peer: Peer) -> None:
    """The bytes are hashed in place."""
    digest = hashlib.sha256()
    with peer.call("view", va=peer.va, size=peer.size) as view:
        for start in range(0, peer.size, CHUNK):
            digest.update(view[start : start + CHUNK])
    peer.sha256, wanted = digest.hexdigest(), peer.sha256
    ask(peer, peer.va)
    peer.compare("it is FILE", peer.sha256, wanted)


def protect_refused(peer: Peer) -> None:
    """The kernel's own call: the mapping comes from a read-only descriptor."""
    prot = VmmFlags.READ | VmmFlags.WRITE
    peer.step = Step("mprotect", {"va": peer.va, "size": PAGE, "prot": prot})
    call = ctypes.CDLL(None, use_errno=True).mprotect
    va, size = ctypes.c_void_p(peer.va), ctypes.c_size_t(PAGE)
    result = call(va, size, mmap.PROT_READ | mmap.PROT_WRITE)
    error = errno.errorcode.get(ctypes.get_errno()) if result else None
    kernel = ask(peer, peer.va)
    kernel["errno"] = error
    peer.step.facts = [f"{error}", kernel["permissions"]]
    peer.step.checks = {
        "the kernel refuses": error == "EACCES",
        "the mapping is as it was": kernel["permissions"] == "r--s",
    }


def write_kills(peer: Peer) -> None:
    """A child that writes anyway is killed."""
    peer.step = Step("poke", {"va": peer.va})
    before = peer.vmm.read(peer.va, 1)
    code = exit_code_of_child(functools.partial(ctypes.memset, peer.va, 0xFF, 1))
    peer.step.kernel = {"signal": signal_name(code)}
    peer.step.facts = [f"died of {signal_name(code)}"]
    peer.step.checks = {
        "the child dies of SIGSEGV": code == -signal.SIGSEGV,
        "the byte is as it was": peer.vmm.read(peer.va, 1) == before,
    }


def reopening_is_no_use(peer: Peer) -> None:
    """The same user may reopen the memory for writing, but the seal is on the memory."""
    inode = described(peer.vmm.query(peer.va))["inode"]
    number = min(number for number, file in memory_files().items() if file.st_ino == inode)
    path = f"/proc/self/fd/{number}"
    peer.step = Step("reopen", {"path": path})
    os.fchmod(number, 0o600)
    writable = os.open(path, os.O_RDWR)
    try:
        mode, _ = modes(writable)
        refused = {
            "write": error_of(os.pwrite, writable, b"!", 0),
            "mmap": error_of(mmap.mmap, writable, PAGE),
            "ftruncate": error_of(os.ftruncate, writable, 0),
        }
    finally:
        os.close(writable)
    peer.step.kernel = {"mode": mode, **refused}
    peer.step.facts = [f"write, mmap {refused['mmap']}", f"ftruncate {refused['ftruncate']}"]
    peer.step.checks = {f"{name} is refused": error == "EPERM" for name, error in refused.items()}


def error_of(call: Callable[..., object], *arguments: object) -> str | None:
    """The name of a system call's error, None if it succeeds."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return None


def map_window(peer: Peer) -> None:
    """The clone: the same memory, from the middle on."""
    peer.window = peer.map("window", VmmFlags.READ)
    part, whole = peer.step.kernel, described(peer.vmm.query(peer.va))
    skipped = whole["size"] - part["size"]
    peer.step.checks |= {
        "it is the memory of FILE's buffer": part["inode"] == whole["inode"],
        "from the middle on": part["offset"] == skipped,
        "its bytes are FILE's": peer.vmm.read(peer.window, PAGE)
        == peer.vmm.read(peer.va + skipped, PAGE),
    }


def free_window(peer: Peer) -> None:
    """FILE's memory is mapped once here, from now on."""
    free(peer, peer.window, peer.vmm.query(peer.window).size)


def map_board(peer: Peer) -> None:
    """The page to write to."""
    peer.board = peer.map("board", VmmFlags.READ | VmmFlags.WRITE)


def answer(peer: Peer) -> None:
    """The hash goes to the page that the first process reads."""
    digest = bytes.fromhex(peer.sha256)
    written = peer.call("write", va=peer.board, data=digest)
    peer.step.arguments = {"va": peer.board, "size": len(digest)}
    ask(peer, peer.board)
    peer.step.checks["all of it is written"] = written == len(digest)


def report_cost(peer: Peer) -> None:
    """The cost of FILE's buffer for this process while the other one has it too."""
    peer.call("Query", va=peer.va)
    kernel = ask(peer, peer.va)
    peer.check_half(kernel, kernel["rss"] + kernel.get("swap", 0) == kernel["size"])


def free_file(peer: Peer) -> None:
    """After the first process has read the cost of both."""
    if peer.sock.recv(len(GO_ON)) != GO_ON:
        raise ConnectionResetError
    free(peer, peer.va, peer.vmm.query(peer.va).size)


def free(peer: Peer, va: int, size: int) -> None:
    """A whole mapping. Python's own memory may be there next."""
    inode = described(peer.vmm.query(va))["inode"]
    peer.call("Free", va=va, size=size)
    kernel = ask(peer, va)
    peer.step.checks["nothing of the buffer is left there"] = kernel.get("inode") != inode


RECEIVE = (receive_file, receive_window, receive_board)
"""One step for every handle that is sent."""
USE = (
    map_file,
    verify,
    protect_refused,
    write_kills,
    reopening_is_no_use,
    map_window,
    free_window,
    map_board,
    answer,
    report_cost,
)
LEAVE = (free_file, close)
"""After ``GO_ON``."""


def main(parent: str, size: str, sha256: str) -> int:
    """Make the steps: 0 if every check held, 1 if one did not."""
    die_with_parent(int(parent))
    name_process("vmm-demo-peer")
    ok = True
    with socket.socket(fileno=0) as sock:
        before = Footprint.take()
        sock.send(READY)
        with VMM() as vmm:
            peer = Peer(vmm, before, sock, int(size), sha256)
            for step in made(peer, (*RECEIVE, *USE, *LEAVE)):
                sock.send(json.dumps({**vars(step), "arguments": dict(step.arguments)}).encode())
                ok = step.ok
    return 0 if ok else 1

"""What the state machines have done and looked at, in this process or in a peer's.

A ``Servant`` has one VMM at a time. It only does and looks: what should be is known elsewhere.
A ``Peer`` is a servant in a process of its own, driven over a socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, NamedTuple

import kernel_oracle as kernel
from faces import Face, Outcome, call
from kernel_oracle import PAGE
from vmm_linux import VMM, PageInfo, PageKind, PageState
from vmm_linux._core import ledger, memory
from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PROGRAM = "import sys, model_servant; model_servant.main(*map(int, sys.argv[1:]))"


class Info(NamedTuple):
    """What Query answered, fit to travel. See ``PageInfo``."""

    va: int
    state: PageState
    kind: PageKind
    base: int
    size: int
    protection: int
    flags: int
    run_start: int
    run_end: int
    mdl_offset: int | None
    sid: int | None
    resident: bool | None
    smaps: tuple[int, int, str] | None

    @classmethod
    def of(cls, info: PageInfo) -> Info:
        """The facts of a ``PageInfo``."""
        record = info.smaps
        return cls(
            info.va,
            info.state,
            info.kind,
            info.base,
            info.size,
            int(info.protection),
            int(info.flags),
            info.run_start,
            info.run_end,
            info.mdl_offset,
            info.sid,
            info.resident,
            None if record is None else (record.start, record.end, record.permissions),
        )


class Around(NamedTuple):
    """What the kernel has at an address: a mapping, or the bounds of a hole."""

    mapping: kernel.Mapping | None
    hole: tuple[int, int]


class Taken(NamedTuple):
    """A view that was taken and is kept."""

    key: int
    nbytes: int
    format: str
    readonly: bool


class Look(NamedTuple):
    """What to look at in a process."""

    #: Addresses whose mappings are wanted.
    ranges: list[tuple[int, int]]
    #: Addresses of pages to read.
    pages: Sequence[int] = ()
    #: Some pages, by address and number: are they in the page table?
    present: tuple[int, int] = (0, 0)
    #: Addresses for Query.
    addresses: Sequence[int] = ()
    #: A handle for handle_info.
    handle: int | None = None


class Sight(NamedTuple):
    """What was seen."""

    mappings: list[list[kernel.Mapping]]
    contents: list[bytes]
    present: list[bool]
    #: What Query does not call the VMM's own comes with the kernel's mapping.
    answers: list[tuple[Info, kernel.Mapping | None]]
    handle: Outcome | None
    #: What ``usage`` says is used.
    usage: dict[str, int]


class Files(NamedTuple):
    """The memory files that a process has open."""

    #: Descriptors of memory, and of clones' identities.
    memories: int
    identities: int
    #: What the other descriptors name.
    others: dict[str, str]
    #: Pages that have memory, by inode number.
    held: dict[int, int]
    #: Bytes of each memory, by inode number.
    sizes: dict[int, int]


class Servant:
    """One VMM in this process, and what was taken from it."""

    def __init__(self, sockets: Iterable[socket.socket] = ()) -> None:
        self.sockets = list(sockets)
        self.views: dict[int, Any] = {}
        self.foreign: dict[int, int] = {}
        self.vmm = VMM()
        self.vmm.close()

    def start(self, foreign: dict[int, int]) -> None:
        """Begin afresh, with foreign pages of these protections at these addresses."""
        self.clear()
        for address, protection in foreign.items():
            kernel.map_at(address, PAGE, protection)
        self.foreign = foreign
        self.vmm = VMM()

    @staticmethod
    def take_guards(in_chunk: int, in_vmm: int) -> None:
        """From now on commit fragments by guards from these numbers of runs on."""
        memory.set_rule(in_chunk, in_vmm)

    @staticmethod
    def limit_leaves(entries: int) -> None:
        """From now on leaves of the ledger are full with so many entries."""
        ledger.set_leaf_limit(entries)

    def clear(self) -> None:
        """Let go of everything."""
        self.views.clear()
        self.vmm.close()
        memory.set_rule()
        ledger.set_leaf_limit()
        for address in self.foreign:
            kernel.unmap(address, PAGE)
        self.foreign = {}

    def close(self) -> dict[int, bytes]:
        """Close the VMM, twice: what the views that are left show then. They go too."""
        self.vmm.close()
        self.vmm.close()
        held = {key: bytes(holder) for key, holder in self.views.items()}
        self.views.clear()
        return held

    # ------------------------------------------------------------------------------ doing

    def call(self, face: Face, method: str, *arguments: object) -> Outcome:
        """A call of the package; Query answers an ``Info``."""
        got = call(self.vmm, face, method, *arguments)
        if isinstance(got.value, PageInfo):
            return got._replace(value=Info.of(got.value))
        return got

    def view(self, holder: str, va: int, size: int, writable: bool | None) -> Outcome:
        """Take a view and keep it, a part of it, or only the object it comes from."""
        got = call(self.vmm, Face.METHODS, "view", va, size, writable)
        view = got.value
        if view is None:
            return got
        assert isinstance(view, memoryview)
        kept: Any = view
        taken = Taken(len(self.views), view.nbytes, view.format, view.readonly)
        while taken.key in self.views:
            taken = taken._replace(key=taken.key + 1)
        if holder == "object":
            kept = view.obj
        elif holder == "slice" and size > 1:
            kept = view[1:]
        elif holder == "cast":
            kept = view.cast("b")
        if kept is not view:
            view.release()
        self.views[taken.key] = kept
        return got._replace(value=taken)

    def let_go(self, key: int, release: bool) -> None:
        """The last reference to a view, or to its object, goes."""
        holder = self.views.pop(key)
        if release and isinstance(holder, memoryview):
            holder.release()

    def poke(self, key: int, value: int) -> bool:
        """Store a byte through a view; false if it is read-only."""
        with memoryview(self.views[key]) as again, again.cast("B") as window:
            if not window.readonly:
                window[0] = value
            return not window.readonly

    def send(self, which: int, handle: int, rights: int | None) -> Outcome:
        """Send a handle through one of the sockets."""
        arguments = (handle,) if rights is None else (handle, rights)
        return self.call(Face.METHODS, "send_handle", self.sockets[which], *arguments)

    def receive(
        self, which: int, require: int, max_size: int | None, peer_uid: int | None
    ) -> Outcome:
        """Receive a handle from one of the sockets."""
        demands = (require, max_size, peer_uid)
        return self.call(Face.METHODS, "recv_handle", self.sockets[which], *demands)

    # ---------------------------------------------------------------------------- looking

    def looking(self, look: Look) -> Callable[[], Sight]:
        """Start to look: calling what this returns gives what was seen."""
        return partial(self.see, look)

    def see(self, look: Look) -> Sight:
        """Look."""
        mappings = [kernel.access_between(low, high) for low, high in look.ranges]
        contents = [ctypes.string_at(va, PAGE) for va in look.pages]
        answers = [self.query_beside(va) for va in look.addresses]
        handle = None
        if look.handle is not None:
            handle = self.call(Face.METHODS, "handle_info", look.handle)
        usage = {}
        if not self.vmm.closed:
            self.vmm._check()
            usage = {name: use.used for name, use in self.vmm.usage()._asdict().items()}
        present = kernel.present_pages(*look.present)
        return Sight(mappings, contents, present, answers, handle, usage)

    def query_beside(self, va: int) -> tuple[Info, kernel.Mapping | None]:
        """Query, and what the kernel has there if that is not ours.

        To look takes memory, for which the interpreter may map just this: then once more.
        """
        tries = 3
        while True:
            tries -= 1
            info = Info.of(self.vmm.query(va, smaps=False))
            if info.kind not in (PageKind.FREE, PageKind.FOREIGN):
                return info, None
            mapping = self.mapping_at(info.va)
            if tries == 0 or (mapping is None) == (info.kind is PageKind.FREE):
                return info, mapping

    def query_between(self, va: int, smaps: bool) -> tuple[Around, Info, Around]:
        """Query, and what the kernel has there before and after."""
        before = self.around(va)
        info = Info.of(self.vmm.query(va, smaps=smaps))
        return before, info, self.around(va)

    @staticmethod
    def around(va: int) -> Around:
        """What the kernel has at an address."""
        return Around(kernel.mapping_at(va), kernel.hole_at(va))

    @staticmethod
    def mapping_at(va: int) -> kernel.Mapping | None:
        """The mapping that holds ``va``, if any."""
        return kernel.mapping_at(va)

    @staticmethod
    def files() -> Files:
        """Look at every open descriptor."""
        memories = identities = 0
        others: dict[str, str] = {}
        held, sizes = {}, {}
        with os.scandir("/proc/self/fd") as entries:
            names = [entry.path for entry in entries]
        for name in names:
            try:
                target = os.readlink(name)  # noqa: PTH115  (pathlib takes ten times as long)
            except FileNotFoundError:
                continue  # the descriptor of the listing itself
            if target.startswith("/memfd:vmm_linux identity"):
                identities += 1
            elif target.startswith("/memfd:vmm_linux"):
                memories += 1
                status = os.stat(name)  # noqa: PTH116
                held[status.st_ino] = status.st_blocks * 512 // PAGE
                sizes[status.st_ino] = status.st_size
            else:
                others[name] = target
        return Files(memories, identities, others, held, sizes)

    @staticmethod
    def mapped_files() -> list[kernel.Mapping]:
        """What no call of the package may change: every mapping of a library on disk."""
        return [mapping for mapping in kernel.maps() if mapping.pathname.endswith((".so", ".so.6"))]


class Peer:
    """A servant in a process of its own, which dies with this one.

    Its methods are the servant's: what one raises there is an ``AssertionError`` here.
    """

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        #: Whether something was asked, and nobody has waited for the answer.
        self.unheard = False
        kinds = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in kinds]
        self.sockets = [pair[0] for pair in pairs]
        given = [theirs.fileno(), *(pair[1].fileno() for pair in pairs)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-X", "faulthandler", "-c", PROGRAM]
            + [str(number) for number in (os.getpid(), *given)],
            pass_fds=given,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        for pair in pairs:
            pair[1].close()

    def ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401  (what the servant says)
        """Have the servant do this, and wait for what it says."""
        return self.start_asking(method, *arguments)()

    def start_asking(self, method: str, *arguments: object) -> Callable[[], Any]:
        """Have the servant do this; calling what this returns waits for what it says."""
        if self.unheard:
            self.answer()
        with contextlib.suppress(ConnectionError):  # the answer then says that it has ended
            self.connection.send((method, arguments))
        self.unheard = True
        return self.answer

    def looking(self, look: Look) -> Callable[[], Sight]:
        """See ``Servant.looking``; the peer looks meanwhile."""
        return self.start_asking("see", look)

    def answer(self) -> Any:  # noqa: ANN401
        """What the servant says to what was asked."""
        self.unheard = False
        try:
            done, answer = self.connection.recv()
        except (EOFError, ConnectionError) as problem:
            raise AssertionError(f"the peer ended with {self.process.wait()}") from problem
        assert done, f"in the peer:\n{answer}"
        return answer

    def __getattr__(self, method: str) -> Any:  # noqa: ANN401  (a method of the servant)
        if not hasattr(Servant, method):
            raise AttributeError(method)
        return partial(self.ask, method)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def end(self) -> None:
        """Have it end, and wait for that."""
        self.connection.close()
        for sock in self.sockets:
            sock.close()
        self.process.wait()


def serve(connection: Connection, servant: Servant) -> None:
    """Do what comes through the connection until its other end is closed."""
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, ConnectionError):
            servant.clear()
            return
        try:
            answer = True, getattr(servant, method)(*arguments)
        except Exception:  # noqa: BLE001  (whoever asked must know)
            answer = False, traceback.format_exc()
        connection.send(answer)


def main(parent: int, connection: int, *sockets: int) -> None:
    """Be a peer."""
    die_with_parent(parent)
    servant = Servant(socket.socket(fileno=fd) for fd in sockets)
    serve(Connection(connection), servant)
    for sock in servant.sockets:
        sock.close()

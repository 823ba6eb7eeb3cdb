import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from enum import Enum
from logging import Logger
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, SupportsIndex, TypeVar, final

from _typeshed import HasFileno
from typing_extensions import Buffer, disjoint_base

from vmm_linux._core.kernel import Descriptor
from vmm_linux._core.procfs import SmapsRecord
from vmm_linux.errors import Retcode, VmmError
from vmm_linux.flags import Rights, Seal, VmmFlags
from vmm_linux.handles import Handle, HandleInfo
from vmm_linux.limits import Limits, Usage
from vmm_linux.mdl import Mdl
from vmm_linux.policy import Policy
from vmm_linux.states import PageKind, PageState

_Out = TypeVar("_Out")

def outcome(method: Callable[..., _Out], value: _Out, *arguments: object) -> tuple[_Out, Retcode]:
    """What a method of ``VMM`` returns and OK; ``value`` and the return code if it fails.

    The pair is made before the call: a result is not lost because memory is short for a pair.
    """

class Kind(Enum):
    """What an argument of a method is."""

    ADDRESS = "address"
    SIZE = "size"
    FLAGS = "flags"
    HANDLE = "handle"
    OFFSET = "offset"
    SEGMENT_SIZE = "segment_size"
    NBYTES = "nbytes"
    RIGHTS = "rights"
    SEALS = "seals"
    MAX_SIZE = "max_size"
    USER = "user"
    DESCRIPTOR = "descriptor"
    SWITCH = "switch"
    TRISTATE = "tristate"
    IGNORED = "ignored"
    DATA = "data"
    RANGES = "ranges"
    SOCKET = "socket"
    LIMITS = "limits"

class MethodInfo(NamedTuple):
    """A method: its name, its arguments in order with their kinds, and the flags that it knows."""

    name: str
    arguments: tuple[tuple[str, Kind], ...]
    flags: int = 0

METHODS: tuple[MethodInfo, ...]

@final
class Question:
    """A call that a policy's callable decides about. Immutable.

    Attributes:
        method: its Python name.
        arguments: by name, as numbers; of data and ranges how many there are.
    """
    def __init__(self) -> None:
        """Raise TypeError: a VMM makes them."""
    @property
    def method(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, int | None]: ...
    @property
    def flags(self) -> VmmFlags:
        """The flags or the protection that the caller requests."""
    @property
    def size(self) -> int:
        """Bytes that the call is about: of ranges all of them; of what is received at most."""
    @property
    def rights(self) -> Rights:
        """The rights of the copy, the receiver or the descriptor."""
    @property
    def seals(self) -> Seal:
        """The seals of a buffer that leaves; else those to put on or to require."""
    @property
    def peer(self) -> tuple[int, int | None, int | None] | None:
        """``(pid, uid, gid)`` of who made the other end of the socket, or None.

        The user, and the group, is None where it is unknown: this user namespace does not map it.
        """
    @property
    def usage(self) -> Usage:
        """What the VMM uses (``VMM.usage``), asked for when it is looked at."""

START: Final[str]

@final
class Record:
    """A call as the audit saw it. Immutable.

    Attributes:
        call: its number in its process.
        time: when it began, nanoseconds since 1970.
        duration: nanoseconds; 0 of a call that still runs.
        pid, thread: who called, by the kernel's numbers.
        method: its Python name.
        arguments: by name, as numbers; of data and ranges how many. None where they were none.
            Names of buffers, which only a broker's operations have, are text.
        decision: ``"allow"`` or ``"deny"``; None where it did not come to one.
        rule: which rule of the policy decided, None without a policy.
        rc: how it ended, a ``Retcode``; None of what raised something else, or still runs.
        error: the exception in words, or None.
        result: the address, handle, descriptor or count that was returned, or None.
        sid: the security id of the buffer that it was about, whatever rights the handle gives, or
            None.
        origin_sid: of the buffer that this one is a window on, or None.
        peer: ``(pid, uid, gid)`` of who made the other end of the socket, or None; the user, and
            the group, is None where it may be anybody (a stranger to this user namespace).
    """
    def __init__(self) -> None:
        """Raise TypeError: an ``Audit`` makes them."""
    @property
    def call(self) -> int: ...
    @property
    def time(self) -> int: ...
    @property
    def duration(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def thread(self) -> int: ...
    @property
    def method(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, int | None] | None:
        """A copy of the numbers."""
    @property
    def decision(self) -> str | None: ...
    @property
    def rule(self) -> str | None: ...
    @property
    def rc(self) -> Retcode | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def result(self) -> int | None: ...
    @property
    def sid(self) -> int | None: ...
    @property
    def origin_sid(self) -> int | None: ...
    @property
    def peer(self) -> tuple[int, int | None, int | None] | None: ...
    def as_dict(self) -> dict[str, Any]:
        """Every attribute by name, as JSON has it."""

@disjoint_base
class Audit:
    """Writes down every call of the VMMs that it is given to: ``VMM(audit=Audit(...))``."""
    def __init__(
        self,
        file: str | os.PathLike[str] | None = None,
        logger: Logger | None = None,
        ring: int = 1024,
        failure: str = "deny",
    ) -> None:
        """Make an audit, and open its file.

        Args:
            file: path of a file that gets a line of JSON for each call (with ``failure="deny"``
                two, one before it), or None. It is made if need be, readable for its owner alone,
                and appended to; threads, processes and VMMs may share it. A pipe (``/dev/stderr``
                may be one) or a terminal is written to as well, and never waited for: without a
                reader, or full, it is a file that cannot be written. No write raises a signal
                (SIGPIPE, SIGXFSZ), whatever the program does with those.
            logger: a ``logging.Logger`` in place of ``vmm_linux.audit``: calls that are denied are
                warnings, others information.
            ring: how many of the last records ``VMM.history`` keeps, 0 or more.
            failure: what happens to a call whose line cannot be written: ``"deny"`` refuses it
                before anything is done (``SECURITY_DISALLOW``), ``"continue"`` warns once
                (``RuntimeWarning``) and continues. A policy's ``audit_failure`` comes first.

        Errors:
            INVALID_ARGUMENT: an argument of another kind.
            OSError: ``failure`` is ``"deny"``, and the file cannot be opened.

        Source: open(2) O_APPEND, write(2), pipe(7).
        """
    @property
    def file(self) -> str | None: ...
    @property
    def failure(self) -> str: ...
    def _begin(
        self,
        method: str,
        arguments: dict[str, int | str],
        peer: tuple[int, int | None, int | None] | None,
    ) -> Record:
        """Begin the record of an operation of a tool's own: a ``Record`` for ``_end``.

        Args:
            method: the operation.
            arguments: numbers and texts by name.
            peer: ``(pid, uid, gid)`` of who asked for it, or None.

        Errors:
            SECURITY_DISALLOW: it cannot be written down, and ``failure`` is ``"deny"``.
        """
    def _end(
        self,
        record: Record,
        rc: Retcode | None,
        error: str | None,
        decision: str | None,
        rule: str | None,
        sid: int | None,
    ) -> None:
        """Write down how an operation ended: its ``Retcode``, its error in words, the decision."""
    def history(self) -> tuple[Record, ...]:
        """The last records, the oldest first: a tuple."""

@disjoint_base
class RuleTable:
    """What a ``Policy`` is at its core. Compiled once, and never changed."""
    # So that subclasses may take what arguments they like.
    def __new__(cls, *arguments: object, **keywords: object) -> Self: ...
    def _decide(
        self,
        call: int,
        size: int,
        rights: int,
        seals: int,
        peer: tuple[int | None, int | None],
        passed: Container[int],
    ) -> tuple[bool, str]:
        """Decide about a call of a tool's own, whose numbers are the tool's too.

        Args:
            call: its number, as in ``_compile``.
            size: bytes of the call.
            rights: that it gives.
            seals: that it puts on.
            peer: ``(uid, gid)``, each None where it is unknown.
            passed: numbers of rules that are passed over.

        Returns:
            Whether it is allowed, and the name of the rule that says so.
        """
    @property
    def ask(self) -> Callable[..., object] | None: ...
    @property
    def forbidden(self) -> int: ...
    @property
    def audit_failure(self) -> str | None: ...
    def _compile(
        self,
        rules: Iterable[tuple[Any, ...]],
        names: tuple[str, ...],
        allows_otherwise: bool,
        ask: object,
        forbidden: int,
        audit_failure: object,
    ) -> None:
        """Take the rules: tuples ``(calls, allows, number, flags, rights, seals, sizes, peers)``.

        ``flags``, ``rights`` and ``seals`` are triples (all, any, none), ``sizes`` a pair,
        ``peers`` the users, the groups, and whether it must be another user.
        """

def first_hidden(rules: Sequence[tuple[Any, ...]], start: int) -> tuple[int, int] | None:
    """The first rule that never answers, as earlier ones match all calls that it matches.

    Every two rules are compared; as numbers, that is some nanoseconds.

    Args:
        rules: as ``RuleTable`` takes them.
        start: the place of the first that is looked at.

    Returns:
        Its place, and that of the rule which answers calls of the method that it names first; or
        None.
    """

MAGIC: Final[bytes]
VERSION: Final[int]
MESSAGE_SIZE: Final[int]
MOST_FD: Final[int]

def check_socket(method: str, sock: object) -> int:
    """Whether this is a socket that descriptors can go through.

    Errors:
        INVALID_ARGUMENT: it is none.
        OSError: its descriptor is closed.
    """

NO_TRANSPORT: Final[str]

def is_of_transport(sock: object) -> bool:
    """Whether a transport of an event loop reads and writes this socket meanwhile."""

def blocks(sock: object) -> bool:
    """Whether sending and receiving can wait. What is no socket does not."""

def is_datagram(sock: object) -> bool:
    """Whether messages are datagrams, among which an empty one is no end."""

def send_descriptor(sock: HasFileno, data: bytes, held: Descriptor) -> int:
    """Send one descriptor with data in one message, without SIGPIPE: the bytes sent.

    Errors:
        OSError (EBADF): the program closed it, or put another file under its number.
        Others as of ``socket.sendmsg``.
    """

def peer_of(sock: HasFileno) -> tuple[int, int | None, int | None] | None:
    """The process, user and group that made the other end; None where that is not reported.

    The user, and the group, is None where it is unknown.
    """

def cut_off(method: str, sock: HasFileno, what: str) -> VmmError:
    """The exception for descriptors that did not fit: by what took their room, and what to do.

    Asked while those that came are open, so that a limit that is reached still is.
    """

@final
class Received:
    """The descriptors of one message, as ``read_message`` takes them. Closes those it still has."""
    def __len__(self) -> int: ...
    def take(self) -> Descriptor:
        """The last descriptor, which is the caller's: a ``Descriptor``."""

def read_message(
    sock: HasFileno, length: int, most_descriptors: int
) -> tuple[bytes, Received, int]:
    """One message: its bytes, its descriptors, and the flags that ``recvmsg`` returns.

    There is room for as many bytes and descriptors as the longest message has, for what the
    socket's options add to it, but for nothing else.
    """

@final
class PageInfo:
    """What ``VMM.query`` found out about one page. Immutable.

    Attributes:
        va: start of the page that includes the address asked for.
        state: ``PageState`` of the page.
        kind: ``PageKind``: whose it is.
        protection: ``VmmFlags`` of the access it gives, or will give once committed.
        flags: ``VmmFlags`` of its region, as allocated.
        base: start of its region; of the hole or the foreign mapping where it has none.
        size: bytes of that, guard pages not counted.
        run_start: start of the pages around it with the same state and protection.
        run_end: end of these.
        mdl_offset: bytes from the start of the MDL buffer, None for other pages.
        sid: security id of the MDL buffer, None for other pages.
        resident: whether the page has memory of its own or shared memory mapped now.
        swapped: whether its contents are in swap.
        locked: whether it is pinned in memory (mlock).
        huge: whether it is part of a huge page.
        smaps: the whole ``/proc/self/smaps`` record of the mapping that holds the page, sizes
            in bytes; None for a free address, and after ``query(va, smaps=False)``.

    The last five are None where this kernel does not report them.
    """
    def __init__(self) -> None:
        """Raise TypeError: ``VMM.query`` makes them."""
    @property
    def va(self) -> int: ...
    @property
    def state(self) -> PageState: ...
    @property
    def kind(self) -> PageKind: ...
    @property
    def protection(self) -> VmmFlags: ...
    @property
    def flags(self) -> VmmFlags: ...
    @property
    def base(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def run_start(self) -> int: ...
    @property
    def run_end(self) -> int: ...
    @property
    def mdl_offset(self) -> int | None: ...
    @property
    def sid(self) -> int | None: ...
    @property
    def resident(self) -> bool | None: ...
    @property
    def swapped(self) -> bool | None: ...
    @property
    def locked(self) -> bool | None: ...
    @property
    def huge(self) -> bool | None: ...
    @property
    def smaps(self) -> SmapsRecord | None: ...

@final
class Holder:
    """What a consumer of an exporter's buffer keeps alive: the view that pins it, and its owner.

    Everything made of the buffer names this object, whether or not it keeps the buffer itself.
    """
    def __new__(cls, owner: object, view: Buffer) -> Self: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@disjoint_base
class Exporter:
    """A base class whose ``_pinned`` says what the object's memory is.

    Each consumer gets a ``Holder`` of its own, so that pins end with their consumers. One keeps no
    buffer: ``numpy.ndarray(buffer=...)`` takes the address, and keeps this object. What it sees is
    pinned by ``_kept``, until this object is deallocated.
    """
    def _as_handle(self) -> object:
        """What stands for it where a method takes a handle."""

    _kept: memoryview | None
    def _pinned(self) -> memoryview:
        """A memoryview that pins the memory as long as its object lives."""
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

def held(owner: object, view: Buffer) -> memoryview:
    """A memoryview like ``view`` that keeps ``owner`` alive too."""

def address_of(buffer: object) -> int:
    """The address of a buffer's first item, of any strides.

    NumPy's own ways to tell it crash, or keep the array for ever, where memory is short.
    """

@disjoint_base
class VMM:
    """The endpoint: every method of it (see ``vmm_linux.VMM``)."""

    _warned: bool
    def __init__(
        self,
        limits: Limits | None = None,
        *,
        policy: Policy | None = None,
        audit: Audit | None = None,
    ) -> None:
        """Make a VMM without regions: no memory is taken yet.

        Args:
            limits: ``Limits``, or None for what keeps a runaway loop from taking the machine: at
                most 262,144 regions and as many handles, 65,536 MDL buffers, and three quarters
                of the memory that is available now, each for committed pages, locked ones and
                buffers. ``vmm.limits`` has the numbers.
            policy: a ``Policy``, which is asked before every call, or None for the one in the file
                that ``VMM_LINUX_POLICY`` of the environment names, if it names one.
            audit: an ``Audit``, which writes every call down, or None for one to the file that
                ``VMM_LINUX_AUDIT`` names, if it names one.

        Errors:
            INVALID_ARGUMENT: another kind of object; a file of the environment that is no policy.
            INVALID_OPERATION: this VMM has been made already, with others.
            OSError: a file of the environment cannot be opened.
        """
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    @property
    def limits(self) -> Limits:
        """``Limits`` of this VMM; set others any time.

        A bound below what there is takes nothing away: from then on, calls that take more are
        refused until enough was given back.

        Errors:
            INVALID_ARGUMENT: set to anything but ``Limits``.
            SECURITY_DISALLOW: the policy does not allow setting them.
            INVALID_OPERATION: the VMM is closed.
        """
    @limits.setter
    def limits(self, limits: Limits) -> None: ...
    def usage(self) -> Usage:
        """What this VMM uses of each limit, and its bound, all at one moment.

        Returns:
            A ``Usage``: ``usage().committed.used`` and ``.bound``, in bytes where ``Limits`` says
            so. A child of fork begins with its parent's usage.

        Errors:
            INVALID_OPERATION: the VMM is closed.
        """
    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
    def allocate(self, addr: SupportsIndex, size: SupportsIndex, flags: SupportsIndex) -> int:
        """Reserve a region of memory, and commit it if asked to.

        Args:
            addr: preferred base address in bytes, a page multiple, or 0; another one is chosen
                if it is taken. With ``FIXED``: this address or none.
            size: bytes, a page multiple.
            flags: ``VmmFlags``: ``RESERVE``, the protection that committed pages get, and what
                else the region is to be.

        Returns:
            The base address.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers, an illegal protection, unknown
                flags, no RESERVE, FIXED with 0 or outside what a process may map.
            ALREADY_EXISTS: FIXED, and something is mapped there.
            OUT_OF_MEMORY: address space, map count, commit charge or memory is short; LOCKED, and
                the memory cgroup has no room.
            QUOTA_EXCEEDED: ``limits``, RLIMIT_AS, RLIMIT_DATA or RLIMIT_NOFILE.
            UNIMPLEMENTED: a caching mode, or HUGE on a kernel without huge pages.

        Source: Allocate; mmap(2), mprotect(2), madvise(2), mlock(2), memfd_create(2).
        """
    def commit(self, va: SupportsIndex, size: SupportsIndex, flags: object = 0) -> None:
        """Make reserved pages usable: zeroed, with the protection remembered for them.

        Pages committed already keep their contents. In a ``LOCKED`` region every page is resident
        on return.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.
            flags: a fictitious parameter, not looked at.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            OUT_OF_MEMORY: the kernel would not charge the pages, or its map count is reached; in a
                LOCKED region, the machine or the memory cgroup has no room.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_DATA.

        Source: Commit; mprotect(2), madvise(2) MADV_POPULATE_WRITE.
        """
    def commit_ranges(self, ranges: Iterable[tuple[SupportsIndex, SupportsIndex]]) -> None:
        """Make reserved pages in many ranges usable: all of them, or none.

        Args:
            ranges: pairs ``(va, size)`` in bytes, page multiples; each inside one region, no two
                overlapping, in any order. None at all is fine.

        Errors:
            INVALID_ARGUMENT: no pairs; zero, unaligned or overflowing numbers; an overlap.
            RESOURCE_NOT_FOUND, OUT_OF_MEMORY, QUOTA_EXCEEDED: as of ``commit``, for one of them.

        Source: Commit; process_madvise(2) MADV_GUARD_REMOVE.
        """
    def decommit_ranges(self, ranges: Iterable[tuple[SupportsIndex, SupportsIndex]]) -> None:
        """Give the memory of pages in many ranges back: of all of them, or none.

        Args:
            ranges: pairs ``(va, size)`` in bytes, page multiples; each inside one region, no two
                overlapping, in any order. None at all is fine.

        Errors:
            INVALID_ARGUMENT: no pairs; zero, unaligned or overflowing numbers; an overlap.
            RESOURCE_NOT_FOUND, INVALID_OPERATION, BUSY, OUT_OF_MEMORY, QUOTA_EXCEEDED: as of
                ``decommit``, for one of them.

        Source: Decommit; process_madvise(2) MADV_GUARD_INSTALL.
        """
    def decommit(self, va: SupportsIndex, size: SupportsIndex) -> None:
        """Give the memory of pages back to the system; the addresses stay reserved.

        Reserved pages stay so. A later commit finds zeros.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: SHAREABLE pages that came from a parent process.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: the kernel's map count is reached.
            QUOTA_EXCEEDED: ``limits.mappings``, in the middle of alike pages.

        Source: Decommit; mmap(2) MAP_FIXED, fallocate(2) FALLOC_FL_PUNCH_HOLE.
        """
    def protect(self, va: SupportsIndex, size: SupportsIndex, flags: SupportsIndex) -> None:
        """Change the protection: of committed pages now, of reserved ones when they are committed.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.
            flags: ``VmmFlags``: none, READ, READ|WRITE, READ|EXECUTE or READ|WRITE|EXECUTE.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers, another protection.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            NO_CAPABILITY: pages of a buffer, and more access than ``mdl_map`` gave.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: the kernel would not charge the pages, or its map count is reached.
            QUOTA_EXCEEDED: ``limits.mappings``, or RLIMIT_DATA.

        Source: Protect; mprotect(2).
        """
    def free(self, va: SupportsIndex, size: SupportsIndex) -> None:
        """Give addresses and memory back: a whole region or any pages of one.

        Freed in the middle, a region becomes two. A guard page is freed with the page next to it.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: the kernel's map count is reached.
            QUOTA_EXCEEDED: ``limits``, in the middle of a region, which becomes two.

        Source: Free; munmap(2).
        """
    def query(self, va: SupportsIndex, smaps: bool = True) -> PageInfo:
        """Report on the page that includes an address, without touching it.

        Args:
            va: any address of user space, ours or not, aligned or not.
            smaps: read ``/proc/self/smaps`` for the whole record of the page's mapping, which takes
                longer the more mappings lie below; without it an answer takes microseconds.

        Returns:
            A ``PageInfo``. A free address is an answer.

        Errors:
            INVALID_ARGUMENT: not an address of user space.
            QUOTA_EXCEEDED: no descriptor is left for ``/proc/self/maps``.

        Source: Query; proc(5), ioctl PROCMAP_QUERY and PAGEMAP_SCAN.
        """
    def view(
        self, va: SupportsIndex, size: SupportsIndex, writable: bool | None = None
    ) -> memoryview:
        """Look at committed memory as it is: a memoryview of bytes.

        The pages are held as long as the object that ``view.obj`` names lives, whatever keeps
        it: Free, Decommit and Protect of them are BUSY until then.

        Args:
            va: address of the first byte.
            size: bytes, at least one; inside one region.
            writable: True, False, or None for writable where every page is.

        Errors:
            INVALID_ARGUMENT: zero or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or its protection does not allow it.
            QUOTA_EXCEEDED: ``limits.mappings``, as a view cuts runs of alike pages.
        """
    def read(self, va: SupportsIndex, size: SupportsIndex) -> bytes:
        """Copy bytes out, with the kernel's checks.

        Args:
            va: address of the first byte.
            size: bytes, at least one; inside one region.

        Returns:
            The bytes.

        Errors:
            INVALID_ARGUMENT: zero or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or cannot be read.
            OUT_OF_MEMORY: no memory for the copy, or none behind shared pages; the memory cgroup
                has no room for it.

        Source: process_vm_readv(2).
        """
    def write(self, va: SupportsIndex, data: Buffer) -> int:
        """Copy bytes in, with the kernel's checks.

        Args:
            va: address of the first byte.
            data: a contiguous buffer of at least one byte; its target is inside one region.

        Returns:
            The number of bytes written, all of them.

        Errors:
            INVALID_ARGUMENT: an overflowing address, no bytes, or no contiguous buffer.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or cannot be written.
            OUT_OF_MEMORY: no memory behind shared pages; ``error.completed`` bytes are written.
                The memory cgroup has no room for what it takes; none are.

        Source: process_vm_writev(2).
        """
    def mdl_create(
        self,
        size: SupportsIndex,
        prot: SupportsIndex,
        segment_size: SupportsIndex = 0,
        nbytes: SupportsIndex = 0,
    ) -> Handle:
        """Make an MDL buffer: shared memory without a name.

        In segments, a clone that begins and ends on their borders can be sent without the memory
        around it, which then is out of the receiver's reach. Each segment takes a descriptor, and
        each mapping of it is a mapping of the kernel's own; otherwise such a buffer is like any
        other. At most 253 descriptors, one or two of them its identity's, go in a message.

        Args:
            size: bytes, a page multiple.
            prot: ``VmmFlags``: the most that the handle allows, READ at least. With LOCKED the
                buffer has all its memory on return; without, pages get it when they are touched.
            segment_size: bytes of each segment, a page multiple; the last one may be shorter.
                0, like any number from ``size`` on, means one segment.
            nbytes: the length to the byte, which ends in the last page of ``size``; 0 for ``size``.
                It is the memory file's own size (``st_size``), and so the same at every receiver;
                pages are mapped whole.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: zero size, unaligned numbers, no or illegal protection, unknown flags,
                a length that does not fit the size.
            OUT_OF_MEMORY: LOCKED, and the machine or the memory cgroup has not that much memory.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: MdlCreate; memfd_create(2), fcntl(2) F_ADD_SEALS.
        """
    def mdl_create_from_vm(
        self, va: SupportsIndex, size: SupportsIndex, flags: SupportsIndex
    ) -> Handle:
        """Make an MDL buffer of committed private pages, which stay where they are.

        Addresses, contents and local protection do not change. A whole SHAREABLE region moves no
        byte; other pages are copied once. The pages are MDL pages from then on.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.
            flags: ``VmmFlags``: the most that the handle allows, READ at least.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers, no or illegal protection.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or belongs to an MDL buffer.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: no memory, or no room in the memory cgroup, for the copy; or the
                kernel's map count is reached.
            SECURITY_DISALLOW: a page is executable, and the policy has ``no executable MDL``.
            QUOTA_EXCEEDED: ``limits``, RLIMIT_NOFILE, RLIMIT_AS.

        Source: MdlCreateFromVm; memfd_create(2), mremap(2).
        """
    def mdl_create_from_buf(self, data: Buffer, prot: SupportsIndex) -> Handle:
        """Make an MDL buffer of these bytes; it is frozen unless ``prot`` has WRITE.

        Args:
            data: a contiguous buffer of at least one byte; zeros fill its last page.
            prot: ``VmmFlags``: the most that the handle allows, READ at least.

        Returns:
            A ``Handle``. The buffer has the data's length to the byte (``HandleInfo.nbytes``); its
            size is that, rounded up to pages.

        Errors:
            INVALID_ARGUMENT: no bytes, no contiguous buffer, no or illegal protection.
            OUT_OF_MEMORY: no memory, or no room in the memory cgroup, for the copy.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: memfd_create(2), fcntl(2) F_SEAL_WRITE.
        """
    def mdl_get_size(self, handle: SupportsIndex | Mdl) -> int:
        """The size of an MDL buffer in bytes: that of its pages.

        Its length to the byte is ``handle_info(handle).nbytes``.

        Args:
            handle: of the buffer.

        Errors:
            INVALID_ARGUMENT, RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle is not this VMM's, was
                closed, was revoked.

        Source: MdlGetSize.
        """
    def mdl_map(
        self,
        handle: SupportsIndex | Mdl,
        offset: SupportsIndex,
        length: SupportsIndex,
        hint: SupportsIndex,
        prot: SupportsIndex,
    ) -> int:
        """Map a part of an MDL buffer: a region of committed pages, shared with all who map it.

        The mapping outlives the handle. ``protect`` can never give it more than ``prot``.

        Args:
            handle: of the buffer.
            offset: bytes from the buffer's start, a page multiple.
            length: bytes, a page multiple.
            hint: preferred address, a page multiple, or 0.
            prot: ``VmmFlags``: a protection that the handle allows, and of LOCKED, LOW_GUARD,
                HIGH_GUARD and FIXED any.

        Returns:
            The base address of the region.

        Errors:
            INVALID_ARGUMENT: zero or unaligned numbers, not inside the buffer, an illegal
                protection, other flags, FIXED with 0; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle's rights do not cover ``prot``; WRITE of a sealed buffer.
            BUSY: another process holds a lease on the memory, which is to be opened for reading.
            ALREADY_EXISTS: FIXED, and something is mapped there.
            OUT_OF_MEMORY: address space, map count, or memory for LOCKED (the memory cgroup's too)
                is short.
            QUOTA_EXCEEDED: ``limits``, RLIMIT_AS; RLIMIT_NOFILE for a segment's first mapping
                without WRITE.

        Source: MdlMap; mmap(2).
        """
    def mdl_clone(
        self,
        originHandle: SupportsIndex | Mdl,  # noqa: N803
        offset: SupportsIndex,
        length: SupportsIndex,
    ) -> Handle:
        """Make an MDL buffer that is a window on another: the same memory, and no more of it.

        What another process gets of a clone are the segments that it touches, whole ones. Of a
        buffer with one segment (see ``mdl_create``) that is all its memory.

        Args:
            originHandle: of the other buffer; it needs COPY.
            offset: bytes from that buffer's start, a page multiple.
            length: bytes, a page multiple: the size of the clone.

        Returns:
            A ``Handle`` with the same rights. The clone has a security id of its own, and lives on
            when the origin's handles are closed.

        Errors:
            INVALID_ARGUMENT: zero or unaligned numbers, not inside the buffer; no handle of this
                VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks COPY.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: MdlClone; memfd_create(2) for the clone's identity.
        """
    def mdl_seal(self, handle: SupportsIndex | Mdl, seals: SupportsIndex) -> None:
        """Give up writing to an MDL buffer, for ever and in every process; the kernel enforces it.

        It holds for the whole memory: the origin, its clones, a SHAREABLE region around it; of a
        buffer in segments for every segment that this handle's buffer touches. These are sealed
        one after the other. If one of them refuses, those before it are sealed: ``completed`` of
        the exception says how many bytes that is.

        Args:
            handle: of the buffer; it needs MAP_WRITE.
            seals: ``Seal.PUBLISH``: writable mappings stay, and no new one is made.
                ``Seal.FREEZE``: the contents never change again.

        Errors:
            INVALID_ARGUMENT: no or unknown seals; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks MAP_WRITE, or the memory takes no more seals.
            BUSY: FREEZE while something can still write.

        Source: fcntl(2) F_SEAL_FUTURE_WRITE, F_SEAL_WRITE.
        """
    def handle_copy(self, handle: SupportsIndex | Mdl, rights: SupportsIndex) -> Handle:
        """Make another handle of the same buffer, with these rights and no others.

        Args:
            handle: to copy; it needs COPY, and every right that the copy is to have.
            rights: ``Rights`` of the copy.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: unknown rights; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks COPY or one of the rights.
            QUOTA_EXCEEDED: ``limits.handles``.
        """
    def handle_close(self, handle: SupportsIndex | Mdl) -> None:
        """End a handle. Mappings, copies and clones made with it live on.

        Args:
            handle: to close; a revoked one may be closed too.

        Errors:
            INVALID_ARGUMENT: no handle of this VMM.
            RESOURCE_NOT_FOUND: the handle was closed before.
        """
    def handle_revoke(self, handle: SupportsIndex | Mdl) -> None:
        """End every handle of this VMM that came from this one: copies and clones, and theirs.

        The handle itself stays, and so does every mapping. What was sent to another process is
        out of reach.

        Args:
            handle: whose descendants end.

        Errors:
            INVALID_ARGUMENT: no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
        """
    def handle_info(self, handle: SupportsIndex | Mdl) -> HandleInfo:
        """What a handle allows, and what it names.

        Args:
            handle: to ask about.

        Returns:
            A ``HandleInfo``: ``rights``, ``size`` of the buffer's pages, ``nbytes``, its length to
            the byte, ``segments``, ``sid``, ``origin_sid``, ``seals``. Without GET_SID the two
            security ids raise NO_CAPABILITY.

        Errors:
            INVALID_ARGUMENT: no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
        """
    def send_handle(
        self, sock: HasFileno, handle: SupportsIndex | Mdl, rights: SupportsIndex | None = None
    ) -> None:
        """Send a handle to another process. This VMM keeps its own.

        One message; a stream carries other data before and after it. Timeouts and non-blocking
        sockets behave as in ``socket.sendmsg``, whose exceptions pass through.

        Args:
            sock: a connected AF_UNIX socket: any object with ``fileno()`` that is one.
            handle: to send; it needs TRANSFER, and every right that is sent.
            rights: ``Rights`` that the receiver's handle gets, or None for all that this one has.
                Without MAP_WRITE the descriptors that leave are themselves read-only.

        Errors:
            INVALID_ARGUMENT: no AF_UNIX socket, unknown rights; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks TRANSFER or one of the rights.
            INVALID_OPERATION: more segments than a message carries descriptors, 253.
            BUSY: another process holds a lease on the memory, which is to be opened for reading.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.

        Source: sendmsg(2), unix(7) SCM_RIGHTS.
        """
    def recv_handle(
        self,
        sock: HasFileno,
        require: SupportsIndex = 0,
        max_size: SupportsIndex | None = None,
        peer_uid: SupportsIndex | None = None,
    ) -> Handle:
        """Receive a handle that another process sent, trusting nothing that it says.

        Reads one message and nothing after it. A message that is refused is used up, and its
        descriptors are closed. Timeouts and non-blocking sockets behave as in
        ``socket.recvmsg``, whose exceptions pass through.

        Args:
            sock: a connected AF_UNIX socket: any object with ``fileno()`` that is one.
            require: ``Seal`` that the memory must have. FREEZE includes PUBLISH.
            max_size: bytes that the buffer may have at most, or None.
            peer_uid: the user that must be at the other end, or None. A user that this process's
                user namespace does not map is unknown, and refused.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: no AF_UNIX socket; a message that is none of ``send_handle``'s.
            SECURITY_DISALLOW: what ``require``, ``max_size`` or ``peer_uid`` demands is not so.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.
            EOFError: the other end is closed.

        Source: recvmsg(2), unix(7) SCM_RIGHTS, SO_PEERCRED.
        """
    def handle_fileno(
        self, handle: SupportsIndex | Mdl, rights: SupportsIndex | None = None
    ) -> int:
        """A descriptor of the buffer's memory, for what takes descriptors.

        ``Popen(pass_fds=...)`` hands it to a program, whose ``handle_from_fd`` makes a handle of
        it. It gives the memory to its holder, as what ``send_handle`` sends does.

        Args:
            handle: of the buffer; it needs TRANSFER, and every right in ``rights``.
            rights: ``Rights``, or None for all that the handle has. Without MAP_WRITE the
                descriptor is itself read-only; a descriptor carries no other right.

        Returns:
            The descriptor, close-on-exec. It is the caller's to close.

        Errors:
            INVALID_ARGUMENT: unknown rights; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            INVALID_OPERATION: a clone, whose descriptor would name the whole memory; a buffer in
                segments, which has several.
            NO_CAPABILITY: the handle lacks TRANSFER or one of the rights.
            BUSY: another process holds a lease on the memory, which is to be opened for reading.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.

        Source: fcntl(2) F_DUPFD_CLOEXEC.
        """
    def handle_from_fd(
        self,
        fd: SupportsIndex,
        require: SupportsIndex = 0,
        max_size: SupportsIndex | None = None,
    ) -> Handle:
        """Make a handle of a buffer from a descriptor, trusting nothing about it.

        Args:
            fd: descriptor of a memfd of ordinary pages, sealed against shrinking, open for
                reading; it stays the caller's. The buffer is as long as the file is now, to the
                byte, also where that grows.
            require: ``Seal`` that the memory must have. FREEZE includes PUBLISH.
            max_size: bytes that the buffer may have at most, or None.

        Returns:
            A ``Handle`` with TRANSFER, COPY, GET_SID and MAP_READ, as the holder of a descriptor
            can do all that without this package; with MAP_WRITE where it is open for writing.
            MAP_EXECUTE, of which a descriptor says nothing, is not given.

        Errors:
            INVALID_ARGUMENT: any other descriptor, or no open one.
            SECURITY_DISALLOW: what ``require`` or ``max_size`` demands is not so.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: memfd_create(2), fcntl(2) F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFL.
        """
    def close(self) -> None:
        """Free everything this VMM made. A second call does nothing.

        Regions that a view holds are unmapped when the last view of them is gone. An audit that
        cannot record this reports so, and does not prevent it.

        Errors:
            OUT_OF_MEMORY: at the kernel's map count a region could not be unmapped; the VMM
                stays open, and another call tries again.
        """
    def history(self) -> tuple[Record, ...]:
        """The last calls that this VMM's audit wrote down, the oldest first.

        A closed VMM has them too. An audit that several VMMs share has the calls of all.

        Returns:
            A tuple of ``vmm_linux.audit.Record``.

        Errors:
            INVALID_OPERATION: this VMM was made without an audit.
        """
    def _check(self) -> None:
        """Raise AssertionError if an invariant of the ledger does not hold. For tests."""

"""Messages between a broker and its clients: how they are written and read. No I/O.

A client and its broker are the ends of one AF_UNIX SOCK_SEQPACKET connection, so that the kernel
keeps messages apart. The client sends a request and gets one answer, then it may send the next one.
All numbers are little-endian. A request is

=========== ====== ==================================================================
bytes       type   what
=========== ====== ==================================================================
0 to 3      text   ``VMMN``
4 to 5      uint16 version of this format: 1
6           uint8  ``Operation``
7           uint8  ``Lifetime``, 0 where the operation makes no name
8 to 11     uint32 the most ``Rights`` that the client takes, or the protection of a new buffer
12 to 15    uint32 ``Rights`` that the client needs
16 to 19    uint32 ``Seal``
20 to 21    uint16 length of the name in bytes
22 to 23    uint16 length of the other name in bytes
24 to 31    uint64 size in bytes
32 to 39    uint64 offset in bytes, or another number
40 to       bytes  the name, then the other name
=========== ====== ==================================================================

A buffer travels as a handle's message (``VMML``, see ``VMM.send_handle``), in both directions: it
follows the requests to publish and for a ticket, and it is the whole answer where one is asked for.
No other message brings a descriptor; what comes with one is never taken from the kernel. Every
other answer is

=========== ====== ==================================================================
0 to 3      text   ``VMMN``
4 to 5      uint16 version of this format: 1
6           uint8  ``Kind``: an answer, or a notice, which no request asked for
7           uint8  ``Retcode``
8 to 11     int32  errno, or 0
12 to 15    uint32 how many records follow
16 to 23    uint64 a number
24 to       bytes  the error in words, or records
=========== ====== ==================================================================

A record is what ``Stat`` has, followed by its name.
"""

from __future__ import annotations

import enum
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple

from vmm_linux._core.values import describe, is_a, quoted
from vmm_linux.errors import InvalidArgument, Retcode
from vmm_linux.flags import Rights, Seal

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC: Final = b"VMMN"
HANDLE_MAGIC: Final = b"VMML"
"""How a handle's message begins."""
VERSION: Final = 1
LONGEST_NAME: Final = 255
"""Bytes of a name in UTF-8."""
FAMILY: Final = 16
"""Bytes that tell families of processes apart."""
PID: Final = struct.Struct("<i")
MOST_ANCESTORS: Final = 8
REQUEST: Final = struct.Struct("<4sHBBIIIHHQQ")
ANSWER: Final = struct.Struct("<4sHBBiIQ")
RECORD: Final = struct.Struct("<QQqqIIIBBH")
LONGEST_REQUEST: Final = REQUEST.size + 2 * LONGEST_NAME
LONGEST_ANSWER: Final = 16384
LONGEST_TEXT: Final = 2048
"""Bytes of an error in words."""
MOST_RIGHTS: Final = 2**32 - 1
SECRET: Final = 32
"""Random bytes that a ticket is."""
NO_ID: Final = -1
TIMEVAL: Final = struct.Struct("@ll")
"""Seconds and microseconds, as SO_RCVTIMEO takes them."""


class Operation(enum.IntEnum):
    """What a client asks for."""

    HELLO = 1
    """Which family of processes the client belongs to, and its ancestors. Has no answer."""
    SYNC = 2
    """Nothing: the answer has the number of the request, and is the last of all owed ones."""
    CREATE = 3
    OPEN = 4
    PUBLISH = 5
    CLONE = 6
    SEAL = 7
    UNLINK = 8
    LIST = 9
    STAT = 10
    KEEP = 11
    REVOKE = 12
    TICKET = 13
    """Hold the buffer that comes next until it is redeemed: the name is the secret's digest, the
    other number the milliseconds."""
    REDEEM = 14
    """Give the buffer of a ticket: the name is the secret, here and below."""
    KEEP_TICKET = 15
    RELEASE_TICKET = 16


class Lifetime(enum.IntEnum):
    """How long a name lives, unless it is unlinked first."""

    CONNECTION = 1
    """As long as the connection of the process that made it."""
    FAMILY = 2
    """As long as a process of the family that made it is connected, or an ancestor of its maker
    lives: the processes that ``multiprocessing`` made of one program."""
    KEPT = 3
    """Until it is unlinked, or the broker ends."""


class Kind(enum.IntEnum):
    """What a message of the broker's is."""

    ANSWER = 1
    REVOKED = 2
    """A notice: this name, which this client has opened, can no longer be opened."""


class Request(NamedTuple):
    """A request, as it was received: its names are still bytes of any kind."""

    operation: int
    lifetime: int
    most: int
    needed: int
    seals: int
    name: bytes
    other: bytes
    size: int
    offset: int


class Answer(NamedTuple):
    """A message of the broker's that is no buffer."""

    kind: int
    rc: int
    errno: int
    records: int
    number: int
    data: bytes


class Stat(NamedTuple):
    """What a broker says of a name."""

    name: str
    nbytes: int
    """The length of the buffer."""
    sid: int
    """The security id of the buffer, the kernel's."""
    uid: int | None
    """The user who owns the name; None if unknown."""
    pid: int
    """The process that made the name, by the broker's PID namespace; 0 for one outside it."""
    rights: Rights
    """The most that opening it gives."""
    seals: Seal
    holders: int
    """Connections that made or opened it, and still are."""
    lifetime: Lifetime
    revoked: bool


class BadMessageError(Exception):
    """A message that no client, or no broker, of this version sends."""


# ---- names ---------------------------------------------------------------------------------------


def encoded(method: str, name: object) -> bytes:
    """A name as it is sent.

    Errors:
        INVALID_ARGUMENT: no text, or none that can be a name.
    """
    if not is_a(name, str):
        raise InvalidArgument(method, f"name is {describe(name)}, not text")
    text = str.__str__(name)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(method, f"name {quoted(text)} cannot be written in UTF-8") from None
    check(method, text, data)
    return data


def decoded(method: str, data: bytes) -> str:
    """A name that was received.

    Errors:
        INVALID_ARGUMENT: it cannot be a name.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InvalidArgument(method, f"the name {data!r} is not UTF-8") from None
    check(method, text, data)
    return text


def check(method: str, text: str, data: bytes) -> None:
    """Whether a text can be a name."""
    if not 1 <= len(data) <= LONGEST_NAME:
        raise InvalidArgument(
            method, f"a name of {len(data)} bytes; it has 1 to {LONGEST_NAME} in UTF-8"
        )
    if "\0" in text or "/" in text:
        raise InvalidArgument(method, f"name {quoted(text)} has a NUL or a '/'; names have neither")


def digest_of(secret: bytes) -> bytes:
    """By what a broker knows a ticket, which says nothing about its secret.

    Looking a digest up takes a time that depends on no secret's bytes.
    """
    return blake2b(secret, digest_size=SECRET, person=b"vmm_linux ticket").digest()


# ---- requests ------------------------------------------------------------------------------------


def request(
    operation: Operation,
    name: bytes = b"",
    *,
    other: bytes = b"",
    lifetime: int = 0,
    most: int = MOST_RIGHTS,
    needed: int = 0,
    seals: int = 0,
    size: int = 0,
    offset: int = 0,
) -> bytes:
    """A request as it is sent."""
    head = REQUEST.pack(
        MAGIC,
        VERSION,
        operation,
        lifetime,
        most,
        needed,
        seals,
        len(name),
        len(other),
        size,
        offset,
    )
    return head + name + other


def read_request(message: bytes) -> Request:
    """A received request.

    Errors:
        BadMessageError: it is none.
    """
    if not REQUEST.size <= len(message) <= LONGEST_REQUEST:
        raise BadMessageError(
            f"{len(message)} bytes; a request has {REQUEST.size} to {LONGEST_REQUEST}"
        )
    magic, version, operation, lifetime, most, needed, seals, length, rest, size, offset = (
        REQUEST.unpack_from(message)
    )
    if magic != MAGIC:
        raise BadMessageError("not a request")
    if version != VERSION:
        raise BadMessageError(f"version {version} of the format; this broker knows {VERSION}")
    middle = REQUEST.size + length
    if middle + rest != len(message):
        raise BadMessageError("its names are not as long as it says")
    return Request(
        operation,
        lifetime,
        most,
        needed,
        seals,
        message[REQUEST.size : middle],
        message[middle:],
        size,
        offset,
    )


# ---- answers -------------------------------------------------------------------------------------


def answer(
    rc: int = Retcode.OK,
    data: bytes = b"",
    *,
    kind: Kind = Kind.ANSWER,
    errno: int = 0,
    count: int = 0,
    number: int = 0,
) -> bytes:
    """An answer as it is sent."""
    return ANSWER.pack(MAGIC, VERSION, kind, rc, errno, count, number) + data


def error_answer(rc: int, message: str, errno: int | None) -> bytes:
    """An error as it is sent; a very long text is cut."""
    return answer(rc, message.encode(errors="replace")[:LONGEST_TEXT], errno=errno or 0)


def read_answer(message: bytes) -> Answer:
    """A received answer.

    Errors:
        BadMessageError: it is none.
    """
    if len(message) < ANSWER.size or message[:4] != MAGIC:
        raise BadMessageError("not an answer")
    _, version, kind, rc, errno, count, number = ANSWER.unpack_from(message)
    if version != VERSION:
        raise BadMessageError(f"version {version} of the format; this package knows {VERSION}")
    return Answer(kind, rc, errno, count, number, message[ANSWER.size :])


def record(stat: Stat) -> bytes:
    """A name's properties as they are sent."""
    name = stat.name.encode()
    return (
        RECORD.pack(
            stat.nbytes,
            stat.sid,
            NO_ID if stat.uid is None else stat.uid,
            stat.pid,
            stat.rights,
            stat.seals,
            stat.holders,
            stat.lifetime,
            stat.revoked,
            len(name),
        )
        + name
    )


def read_records(found: Answer) -> Iterator[Stat]:
    """The properties of names in an answer.

    Errors:
        BadMessageError: they are cut off.
    """
    at = 0
    for _ in range(found.records):
        if len(found.data) - at < RECORD.size:
            raise BadMessageError("a record is cut off")
        nbytes, sid, uid, pid, rights, seals, holders, lifetime, revoked, length = (
            RECORD.unpack_from(found.data, at)
        )
        at += RECORD.size
        name = found.data[at : at + length].decode(errors="replace")
        at += length
        yield Stat(
            name,
            nbytes,
            sid,
            None if uid == NO_ID else uid,
            pid,
            Rights(rights),
            Seal(seals),
            holders,
            Lifetime(lifetime),
            bool(revoked),
        )

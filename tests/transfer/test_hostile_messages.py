"""A receiver believes only what the kernel says."""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from constants import ALL_BUT_EXECUTE, READ, READ_ONLY
from descriptors import reopened
from forged_messages import (
    MESSAGE,
    SEALED,
    SIZED,
    UNWRITABLE,
    forged,
    identity,
    memory,
    open_files,
    read_only,
    send_raw,
)
from kernel_oracle import PAGE
from transfers import (
    KINDS,
    Pair,
    connected,
    contents,
    filled,
    nothing_opened,
    packets,
    pair,
    receiver,
    refused,
    stream,
    text_of,
)
from vmm_linux import VMM, Limits, Rights, Seal
from vmm_linux.errors import InvalidArgument, OutOfMemory, SecurityDisallow

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["packets", "pair", "receiver", "stream"]  # the fixtures


def test_a_message_made_by_hand_is_as_good_as_one_of_the_package_s(
    receiver: VMM, pair: Pair
) -> None:
    for rights, fd in ((ALL_BUT_EXECUTE, memory(4 * PAGE)), (READ_ONLY, read_only(4 * PAGE))):
        own = identity(fd, offset=2 * PAGE, size=2 * PAGE)
        with open_files(own, identity(fd, offset=PAGE, size=3 * PAGE), fd) as fds:
            for count in range(3):
                size = 4 * PAGE if count == 0 else 2 * PAGE
                offset = 4 * PAGE - size
                window: dict[str, Any] = {"offset": offset, "size": size, "memory_size": 4 * PAGE}
                message = forged(identities=count, rights=rights, **window)
                send_raw(pair.sender, message, [*fds[:count], fd])
                info = receiver.handle_info(receiver.recv_handle(pair.receiver))
                assert (info.rights, info.size, info.seals) == (rights, size, Seal(0))


@pytest.mark.parametrize("with_descriptors", [False, True], ids=["bytes alone", "descriptors"])
def test_a_message_cut_at_any_byte_is_refused(
    with_descriptors: bool, receiver: VMM, packets: Pair
) -> None:
    message = forged(identities=1)
    with open_files(identity(), read_only()) as fds:
        for length in range(0 if with_descriptors else 1, len(message)):
            send_raw(packets.sender, message[:length], fds if with_descriptors else [])
            with refused(f"bad message: {length} bytes, not the 48"):
                receiver.recv_handle(packets.receiver)


def test_a_stream_that_ends_at_any_byte_of_a_message_is_refused(receiver: VMM) -> None:
    message = forged()
    with open_files(read_only()) as fds:
        for length in range(1, len(message)):
            with connected(socket.SOCK_STREAM) as stream:
                send_raw(stream.sender, message[:length], fds)
                stream.sender.close()
                with refused(f"bad message: {length} bytes, not the 48"):
                    receiver.recv_handle(stream.receiver)
                with nothing_opened(), pytest.raises(EOFError):
                    receiver.recv_handle(stream.receiver)


def test_a_message_in_two_parts_is_refused_and_what_follows_the_first_stays_unread(
    receiver: VMM, stream: Pair
) -> None:
    message = forged()
    with open_files(read_only()) as fds:
        for length in range(1, len(message)):
            send_raw(stream.sender, message[:length], fds)
            send_raw(stream.sender, message[length:], fds)
            with refused("bad message"):
                receiver.recv_handle(stream.receiver)
            assert stream.receiver.recv(100) == message[length:]


def test_a_message_with_more_bytes_is_refused_where_messages_are_kept_apart(
    receiver: VMM,
) -> None:
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with connected(kind) as pair, open_files(read_only()) as fds:
            for surplus in (1, 32, 1000):
                send_raw(pair.sender, forged() + bytes(surplus), fds)
                with refused("not the 48"):
                    receiver.recv_handle(pair.receiver)


@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
@pytest.mark.parametrize("identities", [0, 1])
def test_whatever_byte_is_flipped_no_handle_says_more_than_the_kernel(
    identities: int, rights: Rights, receiver: VMM, packets: Pair
) -> None:
    pages = 8
    fd = memory(pages * PAGE)
    for page in range(pages):
        os.pwrite(fd, text_of(page), page * PAGE)
    if Rights.MAP_WRITE not in rights:
        fd = reopened(fd, os.O_RDONLY)
    offset, size = (2 * PAGE, 3 * PAGE) if identities else (0, pages * PAGE)
    message = forged(
        identities=identities,
        rights=int(rights),
        offset=offset,
        size=size,
        memory_size=pages * PAGE,
    )
    with open_files(identity(fd, offset=offset, size=size), fd) as fds:
        for place in range(len(message)):
            for change in range(1, 256):
                flipped = bytearray(message)
                flipped[place] ^= change
                send_raw(packets.sender, bytes(flipped), fds[1 - identities :])
                is_legal = says_no_more(bytes(flipped), message)
                assert receive_the_truth(receiver, packets.receiver, bytes(flipped)) == is_legal


def says_no_more(flipped: bytes, message: bytes) -> bool:
    """Whether a flipped message is what a sender may say of these descriptors.

    Rights that the kernel does not hold may be put in or left out.
    """
    changed = MESSAGE.unpack(flipped)[5] ^ MESSAGE.unpack(message)[5]
    return (flipped[:12], flipped[16:]) == (message[:12], message[16:]) and not changed & ~int(
        ~Rights(0) & ~Rights.MAP_WRITE
    )


def open_descriptors() -> list[str]:
    """The numbers of the open descriptors, quickly."""
    with os.scandir("/proc/self/fd") as entries:
        return [entry.name for entry in entries]


def receive_the_truth(receiver: VMM, sock: socket.socket, message: bytes) -> bool:
    """Receive, and hold the handle against the message and the kernel; False: it was refused."""
    before = open_descriptors()
    try:
        handle = receiver.recv_handle(sock)
    except InvalidArgument:
        assert open_descriptors() == before
        return False
    info = receiver.handle_info(handle)
    rights, offset, size = MESSAGE.unpack(message)[5:8]
    assert (info.rights, info.size) == (rights, size)
    if Rights.MAP_READ in info.rights:
        first = offset // PAGE
        assert contents(receiver, handle) == [
            text_of(page) for page in range(first, first + size // PAGE)
        ]
    receiver.handle_close(handle)
    assert open_descriptors() == before
    return True


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
@pytest.mark.parametrize("announced", [0, 1, 2, 3, 4, 100, 253, 254, 2**16 - 1])
@pytest.mark.parametrize("came", [0, 1, 2, 3, 4, 100, 253])
def test_as_many_descriptors_come_as_are_announced_or_all_are_closed(
    announced: int, came: int, kind: str, receiver: VMM
) -> None:
    every_split = {(max(announced - identities, 0), identities) for identities in (0, 1, 2, 3)}
    with connected(KINDS[kind]) as pair, open_files(read_only(), identity()) as fds:
        for segments, identities in every_split:
            every = [*[fds[1]] * identities, *[fds[0]] * 253][:came]
            total = segments + identities
            if total == came and segments == 1 and identities < 3:
                continue
            head: dict[str, Any] = {"segments": max(segments, 1), "identities": identities}
            message = bytearray(forged(**head, memory_size=max(segments, 1) * PAGE))
            message[6:8] = segments.to_bytes(2, "little")
            send_raw(pair.sender, bytes(message), every)
            announced_count = "1 descriptor is" if total == 1 else f"{total} descriptors are"
            why = f"{announced_count} announced, and {came}"
            if total == came:
                why = f"{segments} segments with {identities} identities|the same memory twice"
            with refused(why):
                receiver.recv_handle(pair.receiver)


def first_of(fds: tuple[int, int]) -> int:
    """The first of two descriptors; the other one is closed."""
    os.close(fds[1])
    return fds[0]


def regular_file(folder: str) -> int:
    """A file without a name in a folder."""
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def path_of(fd: int) -> int:
    """An O_PATH descriptor of the file, in place of this one."""
    return reopened(fd, os.O_PATH)


def epoll() -> int:
    """An epoll descriptor."""
    with select.epoll() as poll:
        return os.dup(poll.fileno())


SHARED_MEMORY = "/dev/shm"  # noqa: S108  (that very folder)
HUGE = 1 << 30
NO_MEMFD = "a descriptor that is no memfd$"

#: What is no buffer's memory, and why not.
NO_MEMORY: dict[str, tuple[Callable[[], int], str]] = {
    "pipe": (lambda: first_of(os.pipe()), NO_MEMFD),
    "terminal": (lambda: first_of(os.openpty()), NO_MEMFD),
    "null device": (lambda: os.open("/dev/null", os.O_RDWR), NO_MEMFD),
    "zero device": (lambda: os.open("/dev/zero", os.O_RDONLY), NO_MEMFD),
    "file": (lambda: regular_file(tempfile.gettempdir()), "no memfd|seals"),
    "program": (lambda: os.open("/proc/self/exe", os.O_RDONLY), NO_MEMFD),
    "file in /dev/shm": (
        lambda: regular_file(SHARED_MEMORY),
        "seals 0x1(, not sealed against shrinking|; 0xf are needed)",
    ),
    "folder": (lambda: os.open("/", os.O_RDONLY), NO_MEMFD),
    "folder /dev/shm": (lambda: os.open(SHARED_MEMORY, os.O_RDONLY), NO_MEMFD),
    "file of /proc": (lambda: os.open("/proc/self/mem", os.O_RDONLY), NO_MEMFD),
    "path of memory": (lambda: path_of(memory()), NO_MEMFD),
    "path of a folder": (lambda: os.open("/", os.O_PATH), NO_MEMFD),
    "eventfd": (lambda: os.eventfd(0), NO_MEMFD),
    "epoll": (epoll, NO_MEMFD),
    "pidfd": (lambda: os.pidfd_open(os.getpid()), NO_MEMFD),
    "socket": (lambda: socket.socket(socket.AF_UNIX).detach(), NO_MEMFD),
    "internet socket": (lambda: socket.socket(socket.AF_INET).detach(), NO_MEMFD),
    "unsealed memfd": (lambda: reopened(memory(seals=0), os.O_RDONLY), "seals 0x0, not"),
    "memfd that takes no seals": (lambda: os.memfd_create("hostile"), "seals 0x1, not"),
    "memfd that can shrink": (lambda: read_only(seals=4), "seals 0x4, not"),
    "memfd of huge pages": (
        lambda: reopened(memory(HUGE, flags=os.MFD_HUGETLB), os.O_RDONLY),
        "no memfd of ordinary pages",
    ),
    "empty memfd of huge pages": (
        lambda: reopened(memory(0, flags=os.MFD_HUGETLB), os.O_RDONLY),
        "no memfd of ordinary pages",
    ),
    "writable memory": (memory, "access mode 2, the rights need 0"),
    "memory that can only be written": (
        lambda: reopened(memory(), os.O_WRONLY),
        "access mode 1, the rights need 0",
    ),
    "no bytes": (lambda: read_only(0), "memory of 0 bytes"),
    "an identity": (lambda: reopened(identity(), os.O_RDONLY), "a segment of 40 bytes"),
    "less than a page": (lambda: read_only(PAGE - 1), f"a segment of {PAGE - 1} bytes"),
    "more than a page": (lambda: read_only(PAGE + 1), f"a segment of {PAGE + 1} bytes"),
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_what_is_no_memory_of_a_buffer_is_refused(name: str, receiver: VMM, pair: Pair) -> None:
    make, why = NO_MEMORY[name]
    with open_files(identity(), identity(), make()) as fds:
        for count in range(3):
            send_raw(pair.sender, forged(identities=count), fds[2 - count :])
            with refused(f"bad message: .*({why})"):
                receiver.recv_handle(pair.receiver)


#: What can be no clone's identity, and why not.
OTHER_MEMORY = "an identity of other memory"
NO_IDENTITY = {
    **{name: case for name, case in NO_MEMORY.items() if case[1] == NO_MEMFD},
    "file in /dev/shm": NO_MEMORY["file in /dev/shm"],
    "memfd without seals": (lambda: memory(0, seals=0), "seals 0x0; 0xf are needed"),
    "memfd that can grow": (lambda: memory(0, 0xB), "seals 0xb; 0xf are needed"),
    "memfd that takes more seals": (lambda: memory(0, 0xE), "seals 0xe; 0xf are needed"),
    "memfd that can be written": (lambda: memory(0, 0x7), "seals 0x7; 0xf are needed"),
    "empty memfd": (lambda: memory(0, 0xF), OTHER_MEMORY),
    "memfd of a page": (lambda: memory(PAGE, 0xF), OTHER_MEMORY),
    "memfd of a byte": (lambda: memory(1, 0xF), OTHER_MEMORY),
    "memfd of all bytes": (lambda: memory(2**63 - PAGE, 0xF), OTHER_MEMORY),
    "identity of no file": (identity, OTHER_MEMORY),
    "identity with another head": (lambda: identity(magic=b"VMMLINK2"), OTHER_MEMORY),
    "identity that announces more": (lambda: identity(count=2**64 - 1), OTHER_MEMORY),
    "memfd of huge pages": (
        lambda: memory(0, 0xF, os.MFD_HUGETLB),
        "no memfd of ordinary pages",
    ),
}


@pytest.mark.parametrize("name", NO_IDENTITY)
def test_what_is_no_identity_of_a_clone_is_refused(name: str, receiver: VMM, pair: Pair) -> None:
    make, why = NO_IDENTITY[name]
    memory_file = read_only()
    with open_files(memory_file, make(), identity(memory_file)) as (fd, wrong, right):
        for fds in ([wrong, fd], [wrong, right, fd], [right, wrong, fd]):
            send_raw(pair.sender, forged(identities=len(fds) - 1), fds)
            with refused(f"bad message: .*({why})"):
                receiver.recv_handle(pair.receiver)


def test_rights_and_access_mode_that_do_not_agree_are_refused(receiver: VMM, pair: Pair) -> None:
    with open_files(memory(), read_only()) as (writable, not_writable):
        for rights in (READ_ONLY, Rights(0), Rights.MAP_READ | Rights.MAP_EXECUTE):
            send_raw(pair.sender, forged(rights=int(rights)), [writable])
            with refused("access mode 2, the rights need 0"):
                receiver.recv_handle(pair.receiver)
        for rights in (ALL_BUT_EXECUTE, Rights.MAP_WRITE, ~Rights(0)):
            send_raw(pair.sender, forged(rights=int(rights)), [not_writable])
            with refused("access mode 0, the rights need 2"):
                receiver.recv_handle(pair.receiver)


HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "no magic": ({"magic": bytes(4)}, "not a handle's message"),
    "other magic": ({"magic": b"LMMV"}, "not a handle's message"),
    "version 0": ({"version": 0}, "version 0 of the format; this package knows 3"),
    "version 1": ({"version": 1}, "version 1 of the format; this package knows 3"),
    "version 2": ({"version": 2}, "version 2 of the format; this package knows 3"),
    "version 4": ({"version": 4}, "version 4 of the format; this package knows 3"),
    "version 256": ({"version": 256}, "version 256 of the format"),
    "unknown rights": ({"rights": 0x4F}, "unknown rights 0x4f"),
    "all rights": ({"rights": 2**32 - 1}, "unknown rights 0xffffffff"),
    "not zero": ({"zero": 1}, "not a handle's message"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_none_of_this_format_s_is_refused(
    name: str, receiver: VMM, pair: Pair
) -> None:
    values, why = HEADS[name]
    with open_files(read_only()) as fds:
        send_raw(pair.sender, forged(**values), fds)
        with refused(why):
            receiver.recv_handle(pair.receiver)


TOP = 2**64 - PAGE
#: Buffers that do not lie in a memory of four pages: whether a clone, offset, size.
LIES = [
    *((clone, 0, size) for clone in (False, True) for size in (0, 1, PAGE + 1, 5 * PAGE, TOP)),
    *((clone, PAGE, size) for clone in (False, True) for size in (4 * PAGE, TOP)),
    *((False, 0, PAGE), (False, PAGE, PAGE), (False, PAGE, 3 * PAGE), (False, 4 * PAGE, 4 * PAGE)),
    *((True, offset, PAGE) for offset in (1, PAGE - 1, 4 * PAGE, 5 * PAGE, 2**63, TOP)),
    *((True, TOP, size) for size in (2 * PAGE, 4 * PAGE, TOP)),
    (True, 2**64 - 1, 2**64 - 1),
    (True, 4 * PAGE, 0),
]


@pytest.mark.parametrize(("clone", "offset", "size"), LIES)
def test_a_buffer_that_is_not_inside_its_memory_is_refused(
    clone: bool, offset: int, size: int, receiver: VMM, packets: Pair
) -> None:
    window: dict[str, Any] = {"offset": offset, "size": size, "memory_size": 4 * PAGE}
    with open_files(identity(), identity(), read_only(4 * PAGE)) as fds:
        for count in (1, 2) if clone else (0,):
            send_raw(packets.sender, forged(identities=count, **window), fds[2 - count :])
            with refused("not whole pages|of a memory of"):
                receiver.recv_handle(packets.receiver)


def test_a_memory_larger_than_all_addresses_is_a_buffer_of_that_size(
    receiver: VMM, packets: Pair
) -> None:
    size = 2**63 - PAGE
    receiver.limits = Limits.unlimited()
    with open_files(read_only(size)) as fds:
        send_raw(packets.sender, forged(size=size, memory_size=size), fds)
        with refused("max_size", SecurityDisallow):
            receiver.recv_handle(packets.receiver, max_size=1 << 30)
        send_raw(packets.sender, forged(size=size, memory_size=size), fds)
        handle = receiver.recv_handle(packets.receiver)
    assert receiver.mdl_get_size(handle) == size
    with pytest.raises(OutOfMemory):
        receiver.mdl_map(handle, 0, size, 0, READ)
    va = receiver.mdl_map(handle, size - PAGE, PAGE, 0, READ)
    assert receiver.read(va, PAGE) == bytes(PAGE)


def test_the_same_descriptor_as_memory_and_identity_is_refused(
    receiver: VMM, packets: Pair
) -> None:
    with open_files(read_only(), read_only(seals=SIZED | UNWRITABLE | SEALED)) as fds:
        for fd, why in zip(fds, ("seals", "other memory"), strict=True):
            send_raw(packets.sender, forged(identities=1), [fd, fd])
            with refused(why):
                receiver.recv_handle(packets.receiver)


def test_control_data_without_descriptors_is_refused(receiver: VMM, packets: Pair) -> None:
    credentials = struct.pack("iII", os.getpid(), os.getuid(), os.getgid())
    control = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)
    packets.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    packets.sender.sendmsg([forged()], [control])
    with refused("1 descriptor is announced, and 0"):
        receiver.recv_handle(packets.receiver)


def test_a_receiver_goes_on_after_messages_that_it_refused(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = filled(vmm, 1)
    with open_files(*(make() for make, _ in NO_MEMORY.values())) as fds, nothing_opened():
        for fd in fds:
            send_raw(packets.sender, forged(), [fd])
            vmm.send_handle(packets.sender, handle)
            with refused("bad message"):
                receiver.recv_handle(packets.receiver)
            received = receiver.recv_handle(packets.receiver)
            assert contents(receiver, received) == [text_of(0)]
            receiver.handle_close(received)

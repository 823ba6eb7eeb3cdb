"""Lengths to the byte arrive as they are, and nobody believes a length that is not the kernel's."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from buffers import memory_files
from constants import ALL_BUT_EXECUTE, LOCKED, READ, READ_ONLY, RW
from descriptors import reopened
from forged_messages import (
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
    Pair,
    contents,
    filled,
    in_process,
    nothing_opened,
    packets,
    pair,
    receive_and_tell,
    receiver,
    refused,
    text_of,
)
from vmm_linux import VMM, Limits, Mdl, Rights, Seal
from vmm_linux.errors import InvalidArgument, NoCapability, QuotaExceeded, SecurityDisallow

if TYPE_CHECKING:
    from vmm_linux import Handle

__all__ = ["packets", "pair", "receiver"]  # the fixtures

SHRINKING = 2
TOP = 2**64


def facts(vmm: VMM, handle: Handle) -> tuple[Any, ...]:
    """What a handle tells that must be the same at both ends."""
    info = vmm.handle_info(handle)
    return info.nbytes, info.size, info.sid, info.seals, info.segments


def last_byte(vmm: VMM, handle: Handle) -> tuple[bytes, bytes]:
    """The last byte of a buffer and the one before its page ends, by a mapping of all of it."""
    info = vmm.handle_info(handle)
    va = vmm.mdl_map(handle, 0, info.size, 0, READ)
    try:
        return vmm.read(va + info.nbytes - 1, 1), vmm.read(va + info.size - 1, 1)
    finally:
        vmm.free(va, info.size)


def made(vmm: VMM, nbytes: int, segment: int = 0, fill: bytes = b"e") -> Handle:
    """A buffer of so many bytes, with a text at its end."""
    pages = -(-nbytes // PAGE)
    handle = vmm.mdl_create(pages * PAGE, RW, segment * PAGE, nbytes)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW)
    vmm.write(va + nbytes - 1, fill)
    vmm.free(va, pages * PAGE)
    return handle


# ---- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("rights", [None, READ_ONLY], ids=["all", "read-only"])
@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 7, 4 * PAGE])
def test_a_buffer_arrives_with_its_length_over_every_socket(  # noqa: PLR0917  fixtures
    nbytes: int, segment: int, rights: Rights | None, vmm: VMM, receiver: VMM, pair: Pair
) -> None:
    handle = made(vmm, nbytes, segment)
    vmm.send_handle(pair.sender, handle, rights)
    received = receiver.recv_handle(pair.receiver)
    assert facts(receiver, received) == facts(vmm, handle)
    assert last_byte(receiver, received) == last_byte(vmm, handle)
    assert receiver.usage().mdl_bytes.used == -(-nbytes // PAGE) * PAGE
    receiver.send_handle(pair.receiver, received)
    back = vmm.recv_handle(pair.sender)
    assert facts(vmm, back) == facts(vmm, handle)


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_clones_and_their_clones_arrive_with_theirs(
    segment: int, vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = made(vmm, 4 * PAGE - 9, segment)
    for first in range(4):
        for count in range(1, 5 - first):
            clone = vmm.mdl_clone(handle, first * PAGE, count * PAGE)
            inner = vmm.mdl_clone(clone, (count - 1) * PAGE, PAGE)
            for sent in (clone, inner):
                vmm.send_handle(packets.sender, sent)
                received = receiver.recv_handle(packets.receiver)
                ours, theirs = facts(vmm, sent), facts(receiver, received)
                assert theirs[:4] == ours[:4]
                assert last_byte(receiver, received) == last_byte(vmm, sent)
                receiver.send_handle(packets.receiver, received)
                back = vmm.recv_handle(packets.sender)
                assert facts(vmm, back)[:4] == ours[:4]
                origin = receiver.handle_info(received).origin_sid
                assert origin == vmm.handle_info(sent).origin_sid
                receiver.handle_close(received)
                vmm.handle_close(back)
            vmm.handle_close(inner)
            vmm.handle_close(clone)


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1])
def test_a_descriptor_has_it_too(nbytes: int, vmm: VMM, receiver: VMM) -> None:
    handle = made(vmm, nbytes)
    fd = vmm.handle_fileno(handle)
    received = receiver.handle_from_fd(fd)
    os.close(fd)
    assert facts(receiver, received) == facts(vmm, handle)
    assert last_byte(receiver, received)[0] == b"e"
    assert {os.fstat(number).st_size for number in memory_files()} == {nbytes}


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1])
def test_the_most_that_a_receiver_takes_is_in_exact_bytes(
    nbytes: int, vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = made(vmm, nbytes)
    for most in (nbytes - 1, 0):
        vmm.send_handle(packets.sender, handle)
        with refused(f"a buffer of {nbytes} bytes; max_size is {most}", SecurityDisallow):
            receiver.recv_handle(packets.receiver, max_size=most)
    vmm.send_handle(packets.sender, handle)
    assert (
        receiver.mdl_get_size(receiver.recv_handle(packets.receiver, max_size=nbytes)) % PAGE == 0
    )


def test_limits_of_the_receiver_count_whole_pages(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    handle = made(vmm, PAGE + 1)
    receiver.limits = Limits(mdl_bytes=2 * PAGE - 1)
    vmm.send_handle(packets.sender, handle)
    with nothing_opened(), pytest.raises(QuotaExceeded, match="mdl_bytes"):
        receiver.recv_handle(packets.receiver)
    assert receiver.usage().mdl_bytes.used == receiver.usage().mdls.used == 0
    receiver.limits = Limits(mdl_bytes=2 * PAGE)
    vmm.send_handle(packets.sender, handle)
    receiver.recv_handle(packets.receiver)
    assert receiver.usage().mdl_bytes.used == 2 * PAGE


# ---- messages that lie ---------------------------------------------------------------------------

#: Lies about a memory file of PAGE + 10 bytes: what the message says, and the words.
LENGTH = PAGE + 10
LIES: dict[str, dict[str, int]] = {
    "memory one less": {"size": LENGTH - 1, "memory_size": LENGTH - 1},
    "memory one more": {"size": LENGTH + 1, "memory_size": LENGTH + 1},
    "memory in whole pages": {"size": 2 * PAGE, "memory_size": 2 * PAGE},
    "memory of one page": {"size": PAGE, "memory_size": PAGE},
    "size one less": {"size": LENGTH - 1, "memory_size": LENGTH},
    "size one more": {"size": LENGTH + 1, "memory_size": LENGTH},
    "size in whole pages": {"size": 2 * PAGE, "memory_size": LENGTH},
    "segment to the byte": {"size": LENGTH, "memory_size": LENGTH, "segment_size": LENGTH},
    "segment of one page": {"size": LENGTH, "memory_size": LENGTH, "segment_size": PAGE},
    "segment of more": {"size": LENGTH, "memory_size": LENGTH, "segment_size": 3 * PAGE},
    "segment of all": {"size": LENGTH, "memory_size": LENGTH, "segment_size": TOP - PAGE},
    "memory of all": {"size": TOP - 1, "memory_size": TOP - 1, "segment_size": TOP - PAGE},
    "memory beyond half": {"size": 2**63, "memory_size": 2**63, "segment_size": 2**63},
    "size of all": {"size": TOP - 1, "memory_size": LENGTH, "segment_size": 2 * PAGE},
    "no memory": {"size": LENGTH, "memory_size": 0, "segment_size": 2 * PAGE},
    "no size": {"size": 0, "memory_size": LENGTH, "segment_size": 2 * PAGE},
}


def truth(**values: int) -> bytes:
    """A message about a memory of ``LENGTH`` bytes, but for these values."""
    whole: dict[str, Any] = {"size": LENGTH, "memory_size": LENGTH, "segment_size": 2 * PAGE}
    return forged(**{**whole, **values})


def test_the_truth_is_taken(receiver: VMM, packets: Pair) -> None:
    with open_files(read_only(LENGTH)) as fds:
        send_raw(packets.sender, truth(), fds)
        handle = receiver.recv_handle(packets.receiver)
    assert facts(receiver, handle)[:2] == (LENGTH, 2 * PAGE)


@pytest.mark.parametrize("name", LIES)
def test_a_length_that_is_not_the_kernel_s_is_refused(
    name: str, receiver: VMM, packets: Pair
) -> None:
    with open_files(read_only(LENGTH)) as fds:
        send_raw(packets.sender, truth(**LIES[name]), fds)
        with refused("bad message: .*(bytes|segment)"):
            receiver.recv_handle(packets.receiver)
    assert receiver.usage().mdls.used == 0


#: Windows of a clone on that memory, of which the last page has ten bytes.
WINDOWS = [
    (0, PAGE, True),
    (PAGE, 10, True),
    (0, LENGTH, True),
    (PAGE, 9, False),
    (PAGE, 11, False),
    (PAGE, PAGE, False),
    (0, 10, False),
    (0, PAGE - 1, False),
    (0, 2 * PAGE, False),
    (10, PAGE, False),
    (PAGE + 10, PAGE, False),
    (PAGE + 10, 0, False),
    (2 * PAGE, 10, False),
    (TOP - PAGE, PAGE + 10, False),
]


@pytest.mark.parametrize(("offset", "size", "is_fine"), WINDOWS)
def test_a_clone_ends_at_a_page_or_with_its_memory(
    offset: int, size: int, is_fine: bool, receiver: VMM, packets: Pair
) -> None:
    file = read_only(LENGTH)
    pages = min(-(-size // PAGE) * PAGE, 2**63)
    named = identity(file, offset=offset, size=pages, segment_size=2 * PAGE)
    with open_files(named, file) as fds:
        send_raw(packets.sender, truth(identities=1, offset=offset, size=size), fds)
        if is_fine:
            handle = receiver.recv_handle(packets.receiver)
            assert facts(receiver, handle)[:2] == (size, pages)
        else:
            with refused("bad message: "):
                receiver.recv_handle(packets.receiver)


def test_a_clone_s_identity_names_whole_pages_and_no_others(receiver: VMM, packets: Pair) -> None:
    file = read_only(LENGTH)
    for pages, is_fine in ((LENGTH, False), (2 * PAGE, True), (PAGE, False), (3 * PAGE, False)):
        with open_files(identity(file, size=pages, segment_size=2 * PAGE)) as fds:
            send_raw(packets.sender, truth(identities=1), [*fds, file])
            if is_fine:
                assert facts(receiver, receiver.recv_handle(packets.receiver))[0] == LENGTH
            else:
                with refused("an identity of other memory"):
                    receiver.recv_handle(packets.receiver)
    os.close(file)


#: The sizes of two files, in segments of two pages: what the message says, and whether it is so.
PARTS: list[tuple[tuple[int, int], dict[str, int], bool]] = [
    ((2 * PAGE, 10), {}, True),
    ((2 * PAGE, 2 * PAGE), {}, True),
    ((2 * PAGE - 1, 10), {}, False),
    ((2 * PAGE + 1, 10), {}, False),
    ((PAGE, 10), {}, False),
    ((2 * PAGE, 2 * PAGE + 1), {}, False),
    ((2 * PAGE, 10), {"memory_size": 2 * PAGE + 9, "size": 2 * PAGE + 9}, False),
    ((2 * PAGE, 10), {"memory_size": 2 * PAGE + 11, "size": 2 * PAGE + 11}, False),
    ((2 * PAGE, 10), {"memory_size": 3 * PAGE, "size": 3 * PAGE}, False),
    ((2 * PAGE, 10), {"segment_size": 2 * PAGE - 1}, False),
    ((2 * PAGE, 10), {"segment_size": 2 * PAGE + 10}, False),
    ((2 * PAGE, 10), {"segment_size": PAGE}, False),
    ((2 * PAGE, 10), {"size": 2 * PAGE}, False),
    ((10, 10), {"segment_size": 10}, False),
]


@pytest.mark.parametrize(("sizes", "values", "is_fine"), PARTS)
def test_of_segments_the_last_alone_ends_early(
    sizes: tuple[int, int], values: dict[str, int], is_fine: bool, receiver: VMM, packets: Pair
) -> None:
    files = [read_only(size) for size in sizes]
    whole: dict[str, Any] = {
        "size": sum(sizes),
        "memory_size": sum(sizes),
        "segment_size": 2 * PAGE,
        **values,
    }
    pages = -(-whole["size"] // PAGE) * PAGE
    named = identity(*files, size=pages, segment_size=whole["segment_size"])
    with open_files(named, *files) as fds:
        send_raw(packets.sender, forged(segments=2, identities=1, **whole), fds)
        if is_fine:
            handle = receiver.recv_handle(packets.receiver)
            assert facts(receiver, handle)[:2] == (sum(sizes), pages)
            last_byte(receiver, handle)
        else:
            with refused("bad message: "):
                receiver.recv_handle(packets.receiver)


# ---- memory of other programs --------------------------------------------------------------------


def foreign(size: int, seals: int = SHRINKING) -> int:
    """Another program's memory, which can grow."""
    return memory(size, seals)


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
@pytest.mark.parametrize("seals", [SHRINKING, SHRINKING | SEALED, SIZED, SIZED | SEALED])
def test_memory_that_cannot_shrink_is_taken_with_its_seals(
    size: int, seals: int, vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    with open_files(foreign(size, seals)) as (fd,):
        os.pwrite(fd, b"e", size - 1)
        handle = vmm.handle_from_fd(fd)
        assert facts(vmm, handle)[:2] == (size, -(-size // PAGE) * PAGE)
        vmm.send_handle(packets.sender, handle)
        received = receiver.recv_handle(packets.receiver)
        assert facts(receiver, received) == facts(vmm, handle)
        assert last_byte(receiver, received)[0] == b"e"
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 7 == seals


@pytest.mark.parametrize("seals", [0, 1, 4, 8 | 4])
def test_memory_that_can_shrink_is_refused_and_a_copy_offered(seals: int, vmm: VMM) -> None:
    with open_files(foreign(PAGE + 1, 0)) as (fd,):
        os.pwrite(fd, b"hello", 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(InvalidArgument, match=r"SIGBUS; Mdl\.from_fd\(fd, copy=True\)"):
            vmm.handle_from_fd(fd)
        copied = Mdl.from_fd(fd, copy=True, vmm=vmm)
        assert (len(copied), copied[:6]) == (PAGE + 1, b"hello\0")
        os.ftruncate(fd, 0)
        assert copied[:5] == b"hello"


def test_memory_that_takes_no_seals_says_so_when_it_is_to_be_sealed(vmm: VMM) -> None:
    with open_files(foreign(10, SHRINKING | SEALED)) as (fd,):
        mdl = Mdl.from_fd(fd, vmm=vmm)
        for seal in (mdl.publish, mdl.freeze):
            with pytest.raises(NoCapability, match="seal"):
                seal()
        assert (mdl.seals, fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 0x1F) == (Seal(0), 3)
        mdl[0] = 7
        assert os.pread(fd, 1, 0) == b"\7"


def test_foreign_memory_can_be_sealed_where_it_takes_seals(vmm: VMM) -> None:
    with open_files(foreign(10)) as (fd,):
        mdl = Mdl.from_fd(fd, vmm=vmm)
        mdl.freeze()
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & UNWRITABLE
        assert mdl.seals == Seal.FREEZE
        with (
            pytest.raises(SecurityDisallow, match="not sealed with"),
            open_files(foreign(10)) as fds,
        ):
            Mdl.from_fd(fds[0], Seal.FREEZE, vmm=vmm)


@pytest.mark.parametrize("grown", [11, PAGE, PAGE + 1, 5 * PAGE])
def test_memory_that_has_grown_is_what_it_was_at_every_receiver(
    grown: int, vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    with open_files(foreign(10)) as (fd,):
        handle = vmm.handle_from_fd(fd)
        os.ftruncate(fd, grown)
        os.pwrite(fd, b"x" * grown, 0)
        assert facts(vmm, handle)[:2] == (10, PAGE)
        clone = vmm.mdl_clone(handle, 0, PAGE)
        for sent in (handle, clone, vmm.mdl_clone(clone, 0, PAGE)):
            vmm.send_handle(packets.sender, sent)
            received = receiver.recv_handle(packets.receiver)
            assert facts(receiver, received) == facts(vmm, sent)
            receiver.send_handle(packets.receiver, received)
            assert facts(vmm, vmm.recv_handle(packets.sender)) == facts(vmm, sent)
        again = vmm.handle_from_fd(fd)
        assert facts(vmm, again)[0] == grown
        assert vmm.handle_info(again).sid == vmm.handle_info(handle).sid
        va = vmm.mdl_map(handle, 0, PAGE, 0, RW | LOCKED)
        assert vmm.read(va, 10) == b"x" * 10


def test_memory_that_is_announced_larger_than_it_is_is_refused(
    receiver: VMM, packets: Pair
) -> None:
    with open_files(reopened(foreign(PAGE + 10), os.O_RDONLY)) as fds:
        for size, is_fine in ((LENGTH + 1, False), (2 * PAGE, False), (LENGTH, True), (5, True)):
            pages = -(-size // PAGE) * PAGE
            message = forged(size=size, memory_size=size, segment_size=pages)
            send_raw(packets.sender, message, fds)
            if is_fine:
                assert facts(receiver, receiver.recv_handle(packets.receiver))[0] == size
            else:
                with refused("not the size that is announced|announced that did not come"):
                    receiver.recv_handle(packets.receiver)


@pytest.mark.parametrize("which", [0, 1])
def test_of_several_segments_none_may_have_grown(which: int, receiver: VMM, packets: Pair) -> None:
    writable = [foreign(size) for size in (2 * PAGE, 10)]
    files = [reopened(os.dup(fd), os.O_RDONLY) for fd in writable]
    nbytes = 2 * PAGE + 10
    named = identity(*files, size=3 * PAGE, segment_size=2 * PAGE)
    message = forged(
        segments=2, identities=1, size=nbytes, segment_size=2 * PAGE, memory_size=nbytes
    )
    with open_files(named, *files, *writable) as fds:
        send_raw(packets.sender, message, fds[:3])
        handle = receiver.recv_handle(packets.receiver)
        assert facts(receiver, handle)[0] == nbytes
        os.ftruncate(writable[which], 3 * PAGE)
        send_raw(packets.sender, message, fds[:3])
        with refused("a segment of"):
            receiver.recv_handle(packets.receiver)
        assert last_byte(receiver, handle) == (b"\0", b"\0")


# ---- forged identities ---------------------------------------------------------------------------


def test_an_identity_passed_on_as_memory_has_another_security_id(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    clone = vmm.mdl_clone(filled(vmm, 2), 0, PAGE)
    sid = vmm.handle_info(clone).sid
    ours, theirs = socket.socketpair()
    with ours, theirs:
        vmm.send_handle(ours, clone)
        fds = socket.recv_fds(theirs, 100, 5)[1]
    size = os.fstat(fds[0]).st_size
    with open_files(reopened(fds[0], os.O_RDONLY), *fds[1:]) as (named, *_):
        adopted = receiver.handle_from_fd(named)
        message = forged(size=size, memory_size=size, segment_size=PAGE)
        send_raw(packets.sender, message, [named])
        received = receiver.recv_handle(packets.receiver)
        for handle in (adopted, received):
            info = receiver.handle_info(handle)
            assert (info.nbytes, info.seals) == (size, Seal.FREEZE)
            assert info.sid != sid
            assert info.sid == ~sid & TOP - 1
        receiver.handle_close(adopted)
        receiver.handle_close(received)
    vmm.send_handle(packets.sender, clone)
    assert receiver.handle_info(receiver.recv_handle(packets.receiver)).sid == sid


def test_no_security_id_of_a_buffer_is_another_kind_of_buffer_s(vmm: VMM) -> None:
    whole = [vmm.mdl_create(PAGE, RW, 0, 10) for _ in range(20)]
    parts = [vmm.mdl_clone(handle, 0, PAGE) for handle in whole]
    many = [vmm.mdl_create(2 * PAGE, RW, PAGE, PAGE + 1) for _ in range(5)]
    sids = [vmm.handle_info(handle).sid for handle in (*whole, *parts, *many)]
    assert len(set(sids)) == len(sids)
    assert all(0 < sid < TOP for sid in sids)
    for handle, sid in zip(parts, sids[20:], strict=False):
        assert vmm.handle_info(handle).sid == sid


def test_an_identity_as_memory_cannot_be_written(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    with open_files(identity()) as fds:
        send_raw(
            packets.sender,
            forged(size=40, memory_size=40, segment_size=PAGE, rights=int(ALL_BUT_EXECUTE)),
            fds,
        )
        received = receiver.recv_handle(packets.receiver)
        with pytest.raises(NoCapability):
            receiver.mdl_map(received, 0, PAGE, 0, RW)
        assert vmm.usage().mdls.used == 0


def test_contents_and_lengths_are_one_in_an_unrelated_process(vmm: VMM) -> None:
    handle = made(vmm, PAGE + 7)
    with in_process(receive_and_tell) as peer:
        vmm.send_handle(peer.sock, handle)
    (told,) = peer.answer
    assert told["facts"][1:3] == [2 * PAGE, vmm.handle_info(handle).sid]
    assert contents(vmm, handle)[0] == b"from the receiver"[: len(text_of(0))]

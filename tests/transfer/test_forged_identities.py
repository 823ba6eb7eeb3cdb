"""A security id names the memory that it was made for, whoever passes it on.

A receiver of a clone, or of a buffer in segments, has its identity descriptor. Here it is sent on
with other memory, with another part of the same memory, and with other identities.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from buffers import file_at, identities
from constants import READ, READ_ONLY, RW
from descriptors import reopened
from forged_messages import (
    SEALED,
    SIZED,
    UNWRITABLE,
    forged,
    identity,
    memory,
    open_files,
    send_raw,
)
from kernel_oracle import PAGE
from segments import SEGMENT
from transfers import Pair, packets, receiver, refused
from vmm_linux import VMM, Limits, Rights
from vmm_linux._core.kernel import Feature, without
from vmm_linux.audit import Audit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm_linux import Handle

__all__ = ["packets", "receiver"]  # the fixtures

OTHER_MEMORY = "bad message: an identity of other memory"


@contextlib.contextmanager
def stolen(number: int) -> Iterator[int]:
    """A descriptor of the same file, as a receiver without the package has it."""
    fd = os.dup(number)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(params=["file handles", "inode numbers"])
def _names(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the kernel's names of files, and without."""
    with contextlib.ExitStack() as stack:
        if request.param == "inode numbers":
            stack.enter_context(without(Feature.FILE_HANDLES))
        yield


def own_memory(pages: int = 1) -> int:
    """Memory of the attacker's own, as a reader's handle has it."""
    fd = memory(pages * PAGE)
    os.pwrite(fd, b"forged", 0)
    return reopened(fd, os.O_RDONLY)


@pytest.mark.usefixtures("_names")
def test_the_identity_of_a_clone_comes_with_no_other_memory(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    clone = vmm.mdl_clone(vmm.mdl_create(PAGE, RW), 0, PAGE)
    (number,) = identities()
    with stolen(number) as fd, open_files(own_memory()) as (mine,):
        for sent in ([fd, mine], [fd, fd, mine]):
            send_raw(packets.sender, forged(identities=len(sent) - 1), sent)
            with refused(OTHER_MEMORY):
                receiver.recv_handle(packets.receiver)
    vmm.send_handle(packets.sender, clone)
    came = receiver.recv_handle(packets.receiver)
    assert receiver.handle_info(came).sid == vmm.handle_info(clone).sid


@pytest.mark.usefixtures("_names")
def test_the_identity_of_a_clone_comes_with_no_other_part_of_the_same_memory(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    buffer = vmm.mdl_create(4 * PAGE, RW)
    vmm.mdl_clone(buffer, PAGE, 2 * PAGE)
    (number,) = identities()
    file = reopened(os.dup(file_at(vmm.mdl_map(buffer, 0, PAGE, 0, RW))), os.O_RDONLY)
    windows = [(start, pages) for start in range(4) for pages in range(1, 5 - start)]
    with stolen(number) as fd, open_files(file):
        for start, pages in windows:
            message = forged(
                identities=1, offset=start * PAGE, size=pages * PAGE, memory_size=4 * PAGE
            )
            send_raw(packets.sender, message, [fd, file])
            if (start, pages) == (1, 2):
                receiver.recv_handle(packets.receiver)
            else:
                with refused(OTHER_MEMORY):
                    receiver.recv_handle(packets.receiver)


@pytest.mark.usefixtures("_names")
def test_the_identity_of_a_buffer_in_segments_comes_with_its_own_segments_alone(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = vmm.mdl_create(3 * SEGMENT * PAGE, RW, SEGMENT * PAGE)
    vmm.send_handle(packets.sender, handle, Rights.MAP_READ)
    _, (own, *segments) = received(packets)
    other = own_memory(SEGMENT)
    first, second, third = segments
    lots: list[list[int]] = [
        [first, second, other],
        [other, second, third],
        [first, other, third],
        [second, first, third],
        [third, second, first],
        [first, second],
        [second, third],
        [first],
        [third, other],
    ]
    with open_files(own, other, *segments):
        for lot in lots:
            whole = len(lot) * SEGMENT * PAGE
            message = forged(segments=len(lot), identities=1, size=whole, memory_size=whole)
            send_raw(packets.sender, message, [own, *lot])
            with refused(OTHER_MEMORY):
                receiver.recv_handle(packets.receiver)
        whole = 3 * SEGMENT * PAGE
        message = forged(segments=3, identities=1, size=whole, memory_size=whole)
        send_raw(packets.sender, message, [own, *segments])
        came = receiver.recv_handle(packets.receiver)
    assert receiver.handle_info(came).sid == vmm.handle_info(handle).sid


def received(packets: Pair) -> tuple[bytes, list[int]]:
    """A message as it comes, and its descriptors."""
    message, control, _, _ = packets.receiver.recvmsg(100, socket.CMSG_LEN(253 * 4))
    descriptors = array.array("i")
    descriptors.frombytes(control[0][2])
    return message, list(descriptors)


@pytest.mark.usefixtures("_names")
def test_an_origin_is_one_that_the_memory_is_a_part_of(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    """A holder of a clone in one segment has its origin's identity, and not its memory."""
    handle = vmm.mdl_create(3 * SEGMENT * PAGE, RW, SEGMENT * PAGE)
    origin = vmm.mdl_clone(handle, PAGE, (2 * SEGMENT - 2) * PAGE)
    clone = vmm.mdl_clone(origin, SEGMENT * PAGE, PAGE)
    vmm.send_handle(packets.sender, clone, Rights.MAP_READ | Rights.GET_SID)
    message, (own, known, segment) = received(packets)
    mine = own_memory(SEGMENT)
    size = SEGMENT * PAGE
    with open_files(own, known, segment, mine):
        with open_files(identity(mine, size=PAGE, segment_size=size)) as (forged_own,):
            send_raw(
                packets.sender,
                forged(identities=2, size=PAGE, memory_size=size),
                [forged_own, known, mine],
            )
            with refused(OTHER_MEMORY):
                receiver.recv_handle(packets.receiver)
        # A part of the right segment that is beyond the origin: its last page.
        last = (SEGMENT - 1) * PAGE
        with open_files(identity(segment, offset=last, segment_size=size)) as (beyond,):
            send_raw(
                packets.sender,
                forged(identities=2, offset=last, size=PAGE, memory_size=size),
                [beyond, known, segment],
            )
            with refused(OTHER_MEMORY):
                receiver.recv_handle(packets.receiver)
        send_raw(packets.sender, message, [own, known, segment])
        told = receiver.handle_info(receiver.recv_handle(packets.receiver))
    assert (told.sid, told.origin_sid) == (
        vmm.handle_info(clone).sid,
        vmm.handle_info(origin).sid,
    )


def test_an_identity_with_wrong_numbers_is_refused_and_reads_nothing_beyond_itself(
    receiver: VMM, packets: Pair
) -> None:
    mine = own_memory()
    heads = [
        {"count": 0},
        {"count": 2},
        {"count": 2**64 - 1},
        {"count": (2**64 - 40) // 16},
        {"count": (1 << 20) + 1},
        {"offset": PAGE},
        {"offset": 2**64 - PAGE},
        {"size": 0},
        {"size": 2**64 - 1},
        {"magic": b"VMMLINK0"},
    ]
    with open_files(mine, identity(mine)) as (_, right):
        for head in heads:
            with open_files(identity(mine, **head)) as (wrong,):  # type: ignore[arg-type]
                for lot in ([wrong], [wrong, right]):
                    send_raw(packets.sender, forged(identities=len(lot)), [*lot, mine])
                    with refused(OTHER_MEMORY):
                        receiver.recv_handle(packets.receiver)
        # As an origin, numbers that overflow when they are multiplied.
        for segment_size in (2**63, 2**64 - 1, 2**64 - PAGE):
            with open_files(
                identity(right, right, mine, size=2**64 - 1, segment_size=segment_size)
            ) as (origin,):
                send_raw(packets.sender, forged(identities=2), [right, origin, mine])
                with refused(OTHER_MEMORY):
                    receiver.recv_handle(packets.receiver)


def test_an_identity_that_is_not_sealed_for_good_is_refused_whatever_it_names(
    receiver: VMM, packets: Pair
) -> None:
    mine = own_memory()
    every = SEALED | SIZED | UNWRITABLE
    with open_files(mine):
        for seals in (every & ~1, every & ~2, every & ~4, every & ~8):
            with open_files(identity(mine, seals=seals)) as (fd,):
                send_raw(packets.sender, forged(identities=1), [fd, mine])
                with refused("f are needed"):
                    receiver.recv_handle(packets.receiver)


def test_a_clone_keeps_its_security_id_through_any_number_of_hands(packets: Pair) -> None:
    with contextlib.ExitStack() as stack:
        hands = [stack.enter_context(VMM(limits=Limits.unlimited())) for _ in range(4)]
        handle = hands[0].mdl_create(3 * SEGMENT * PAGE, RW, SEGMENT * PAGE)
        handle = hands[0].mdl_clone(handle, PAGE, 2 * SEGMENT * PAGE)
        for sender, receiver in pairwise(hands):
            handle, told = passed_on(sender, receiver, packets, handle)
            handle = receiver.mdl_clone(handle, PAGE, receiver.mdl_get_size(handle) - PAGE)
            assert receiver.handle_info(handle).origin_sid == told


def passed_on(sender: VMM, receiver: VMM, packets: Pair, handle: Handle) -> tuple[Handle, int]:
    """The handle over there, and the security id, which is the same."""
    sender.send_handle(packets.sender, handle, sender.handle_info(handle).rights)
    came = receiver.recv_handle(packets.receiver)
    ours, theirs = sender.handle_info(handle), receiver.handle_info(came)
    assert (ours.sid, ours.origin_sid) == (theirs.sid, theirs.origin_sid)
    return came, theirs.sid


def test_the_audit_names_no_buffer_but_the_one_that_came(vmm: VMM, packets: Pair) -> None:
    vmm.mdl_clone(vmm.mdl_create(PAGE, RW), 0, PAGE)
    (number,) = identities()
    with VMM(audit=Audit()) as receiver, stolen(number) as fd, open_files(own_memory()) as fds:
        send_raw(packets.sender, forged(identities=1), [fd, *fds])
        with refused(OTHER_MEMORY):
            receiver.recv_handle(packets.receiver)
        (record,) = receiver.history()
        assert (record.sid, record.origin_sid) == (None, None)
        send_raw(packets.sender, forged(rights=int(READ_ONLY)), fds)
        handle = receiver.recv_handle(packets.receiver)
        assert receiver.read(receiver.mdl_map(handle, 0, PAGE, 0, READ), 6) == b"forged"

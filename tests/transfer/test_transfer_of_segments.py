"""Clones of a buffer in segments leave the rest of it behind, and lies about segments are refused.

The functions that are not tests run in other processes. They import for themselves what they use.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from children import TESTS_IMPORTABLE, run_child
from constants import ALL_BUT_EXECUTE, READ_ONLY, RW
from descriptors import reopened
from forged_messages import SIZED, forged, identity, memory, open_files, read_only, send_raw
from kernel_oracle import PAGE
from segments import BYTES, PAGES, SEGMENT, in_segments, memory_files
from transfers import Pair, contents, in_process, packets, receive_and_tell, receiver, text_of
from transfers import facts as told_of
from transfers import refused as refused_by
from vmm_linux import VMM, Rights, Seal
from vmm_linux.errors import InvalidArgument, InvalidOperation, SecurityDisallow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmm_linux import Handle


__all__ = ["packets", "receiver"]  # the fixtures


# ---- what leaves the process ---------------------------------------------------------------------


def receive_without_the_package(path: str, kind: int) -> None:
    """Receive one message by the kernel's own calls, and tell all that can be reached with it."""
    import array
    import contextlib
    import json
    import os
    import socket
    from pathlib import Path

    page = os.sysconf("SC_PAGE_SIZE")
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(path)
        room = socket.CMSG_SPACE(253 * 4)
        message, ancillary, flags, _ = sock.recvmsg(1000, room)
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    files = []
    for fd in descriptors:
        size = os.fstat(fd).st_size
        assert os.pread(fd, 1, size) == b""
        texts = [os.pread(fd, 8, at).decode() for at in range(0, size, page)]
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size + page)
        assert os.fstat(fd).st_size == size
        files.append([size, os.fstat(fd).st_ino, texts])
    open_memory = 0
    for link in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            open_memory += str(link.readlink()).startswith("/memfd:")
    print(json.dumps([len(message), flags, files, open_memory]))


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize(
    ("cloned", "reached"),
    [
        (range(4, 8), range(4, 8)),
        (range(4), range(4)),
        (range(8, 10), range(8, 10)),
        (range(8), range(8)),
        (range(4, 10), range(4, 10)),
        (range(5, 6), range(4, 8)),
        (range(3, 5), range(8)),
        (range(9, 10), range(8, 10)),
    ],
)
@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
def test_a_clone_takes_along_the_segments_that_it_touches_and_no_others(
    vmm: VMM, cloned: range, reached: range, rights: Rights, nobody: bool
) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, cloned[0] * PAGE, len(cloned) * PAGE)
    with in_process(receive_without_the_package, nobody=nobody) as peer:
        vmm.send_handle(peer.sock, clone, rights)
    length, flags, files, open_memory = peer.answer
    assert (length, flags & ~socket.MSG_CMSG_CLOEXEC) == (48, 0)
    told = vmm.handle_info(clone)
    own, origin, *segments = files
    assert [own[0], origin[0]] == [40 + 16 * len(segments), 40 + 16 * 3], "what they name"
    texts = [text for segment in segments for text in segment[2]]
    assert texts == [text_of(page).decode() for page in reached]
    assert len(segments) == -(-len(reached) // SEGMENT)
    assert open_memory == len(files)
    inodes = {segment[1] for segment in segments}
    assert inodes <= set(memory_files())
    assert len(inodes) == len(segments)
    assert told.sid != told.origin_sid


def test_a_clone_of_a_clone_takes_along_no_more(vmm: VMM) -> None:
    clone = vmm.mdl_clone(in_segments(vmm), 2 * PAGE, 8 * PAGE)
    inner = vmm.mdl_clone(clone, 3 * PAGE, PAGE)
    with in_process(receive_without_the_package) as peer:
        vmm.send_handle(peer.sock, inner)
    _, _, files, open_memory = peer.answer
    assert open_memory == 3
    assert [file[0] // PAGE for file in files] == [0, 0, 4]
    assert files[2][2] == [text_of(page).decode() for page in range(4, 8)]


KINDS: Mapping[str, Callable[[VMM], Handle]] = {
    "segments": in_segments,
    "one": lambda vmm: in_segments(vmm, segment=PAGES),
}


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_both_kinds_and_their_clones_arrive_whole(
    vmm: VMM, kind: str, rights: Rights, nobody: bool
) -> None:
    handle = KINDS[kind](vmm)
    clone = vmm.mdl_clone(handle, 3 * PAGE, 6 * PAGE)
    windows = {
        handle: range(PAGES),
        clone: range(3, 9),
        vmm.mdl_clone(clone, PAGE, 5 * PAGE): range(4, 9),
        vmm.mdl_clone(clone, PAGE, 2 * PAGE): range(4, 6),
        vmm.mdl_clone(handle, 8 * PAGE, 2 * PAGE): range(8, 10),
    }
    with in_process(receive_and_tell, len(windows), nobody=nobody) as peer:
        for sent in windows:
            vmm.send_handle(peer.sock, sent, rights)
    for told, (sent, pages) in zip(peer.answer, windows.items(), strict=True):
        assert told["facts"] == [int(rights), *told_of(vmm, sent)[1:]]
        assert [text.encode() for text in told["texts"][1:]] == [text_of(p) for p in pages[1:]]
        assert all(told["closed by exec"])
        assert told["modes"].count(os.O_RDONLY) == (
            0
            if Rights.MAP_WRITE in rights
            else len({p // SEGMENT for p in pages})
            if kind == "segments"
            else 1
        )


def test_what_was_received_can_be_cloned_and_sent_on(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, 3 * PAGE, 6 * PAGE)
    for sent, pages in ((handle, range(PAGES)), (clone, range(3, 9))):
        for rights in (ALL_BUT_EXECUTE, READ_ONLY):
            vmm.send_handle(packets.sender, sent, rights)
            there = receiver.recv_handle(packets.receiver)
            assert told_of(receiver, there)[1:] == told_of(vmm, sent)[1:]
            for _ in range(2):
                receiver.send_handle(packets.sender, there)
                there = receiver.recv_handle(packets.receiver)
                assert told_of(receiver, there) == [int(rights), *told_of(vmm, sent)[1:]]
            inner = receiver.mdl_clone(there, PAGE, 4 * PAGE)
            receiver.send_handle(packets.sender, inner)
            back = vmm.recv_handle(packets.receiver)
            assert told_of(vmm, back) == told_of(receiver, inner)
            assert vmm.handle_info(back).origin_sid == vmm.handle_info(sent).sid
            assert contents(vmm, back) == [text_of(page) for page in pages[1:5]]


def test_a_message_carries_253_descriptors_and_no_more(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = vmm.mdl_create(300 * PAGE, RW, PAGE)
    clones = {pages: vmm.mdl_clone(handle, PAGE, pages * PAGE) for pages in (1, 251, 252, 253, 299)}
    before = kernel.descriptors()
    for pages, clone in clones.items():
        if pages <= 251:
            vmm.send_handle(packets.sender, clone)
            there = receiver.recv_handle(packets.receiver)
            assert len(kernel.descriptors()) - len(before) == pages + 2
            assert told_of(receiver, there) == told_of(vmm, clone)
            receiver.handle_close(there)
        else:
            with refused_by(f"{pages} segments .* clone a smaller part", InvalidOperation):
                vmm.send_handle(packets.sender, clone)
            with refused_by("larger segments", InvalidOperation):
                vmm.send_handle(packets.sender, clone, READ_ONLY)
    with refused_by("300 segments", InvalidOperation):
        vmm.send_handle(packets.sender, handle)
    assert kernel.descriptors() == before
    whole = vmm.mdl_create(252 * PAGE, RW, PAGE)
    vmm.send_handle(packets.sender, whole)
    there = receiver.recv_handle(packets.receiver)
    assert told_of(receiver, there) == told_of(vmm, whole)


def at_the_limit_of_descriptors() -> None:
    """Send and receive with room for fewer descriptors than go; runs in a child."""
    import socket

    import segments as here
    import transfers as t
    from constants import READ, READ_ONLY
    from kernel_oracle import PAGE
    from vmm_linux import VMM

    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with VMM() as vmm, VMM() as receiver, t.connected(kind) as pair:
            handle = here.in_segments(vmm)
            clone = vmm.mdl_clone(handle, PAGE, 5 * PAGE)
            for sent, needed in ((handle, 4), (clone, 4)):
                for room in range(needed):
                    with t.nothing_opened(), t.room_for(0):  # what the socket takes at once
                        vmm.send_handle(pair.sender, sent)
                    with t.refused_for_want_of(room):
                        receiver.recv_handle(pair.receiver)
                vmm.send_handle(pair.sender, sent)
                with t.room_for(needed):
                    received = receiver.recv_handle(pair.receiver)
                assert t.contents(receiver, received) == t.contents(vmm, sent)
            other = here.in_segments(vmm)
            # The read-only descriptions, which stay.
            for room in range(3):
                with t.refused_for_want_of(room):
                    vmm.send_handle(pair.sender, other, READ_ONLY)
                with t.refused_for_want_of(room):
                    vmm.mdl_map(other, 0, here.BYTES, 0, READ)
            with t.room_for(3):
                vmm.send_handle(pair.sender, other, READ_ONLY)


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
def test_at_the_limit_of_descriptors_segments_leave_nothing(nobody: bool) -> None:
    child = run_child(at_the_limit_of_descriptors, nobody=nobody, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


def test_seals_are_demanded_of_every_segment(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    handle = in_segments(vmm)
    for page in (0, 9, 5):
        for require in (Seal.PUBLISH, Seal.FREEZE):
            vmm.send_handle(packets.sender, handle)
            with refused_by("not sealed", SecurityDisallow):
                receiver.recv_handle(packets.receiver, require=require)
        vmm.mdl_seal(vmm.mdl_clone(handle, page * PAGE, PAGE), Seal.FREEZE)
    vmm.send_handle(packets.sender, handle)
    received = receiver.recv_handle(packets.receiver, require=Seal.FREEZE | Seal.PUBLISH)
    assert receiver.handle_info(received).seals == Seal.FREEZE


def test_a_frozen_segment_is_a_published_one_for_who_demands_that(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = in_segments(vmm)
    vmm.mdl_seal(vmm.mdl_clone(handle, 0, 8 * PAGE), Seal.FREEZE)
    vmm.mdl_seal(vmm.mdl_clone(handle, 8 * PAGE, 2 * PAGE), Seal.PUBLISH)
    vmm.send_handle(packets.sender, handle)
    assert receiver.recv_handle(packets.receiver, require=Seal.PUBLISH)
    vmm.send_handle(packets.sender, handle)
    with refused_by("not sealed", SecurityDisallow):
        receiver.recv_handle(packets.receiver, require=Seal.FREEZE)


# ---- hostile messages ----------------------------------------------------------------------------


def three(sizes: tuple[int, ...] = (4, 4, 2), seals: int = SIZED) -> list[int]:
    """The segments of a read-only buffer, by the kernel's own calls."""
    return [read_only(size * PAGE, seals) for size in sizes]


def whole_of(files: list[int]) -> int:
    """The identity of all of these segments."""
    return identity(*files, size=BYTES, segment_size=SEGMENT * PAGE)


def part_of(files: list[int]) -> int:
    """The identity of the part of these segments that ``PART`` is about."""
    return identity(*files, offset=3 * PAGE, size=6 * PAGE, segment_size=SEGMENT * PAGE)


WHOLE: dict[str, Any] = {"size": BYTES, "segment_size": SEGMENT * PAGE, "memory_size": BYTES}
PART: dict[str, Any] = {**WHOLE, "offset": 3 * PAGE, "size": 6 * PAGE}


def test_segments_sent_by_hand_are_as_good_as_the_package_s(receiver: VMM, packets: Pair) -> None:
    files = three()
    with open_files(part_of(files), whole_of(files), *files) as (part, whole, *_):
        for identities, values in (
            ([whole], WHOLE),
            ([whole, whole], WHOLE),
            ([part, whole], PART),
        ):
            message = forged(segments=3, identities=len(identities), **values)
            send_raw(packets.sender, message, [*identities, *files])
            handle = receiver.recv_handle(packets.receiver)
            told = receiver.handle_info(handle)
            assert told.size == values["size"]
            assert (told.sid == told.origin_sid) == (identities == [whole, whole])
            assert (told.origin_sid is None) == (len(identities) == 1)
            assert contents(receiver, handle) == [bytes(8)] * (told.size // PAGE)


LIES: dict[str, dict[str, Any]] = {
    "one segment fewer": {"segments": 2},
    "one segment more": {"segments": 4},
    "an identity fewer": {"identities": 0, "segments": 3},
    "no identity": {"identities": 0, "segments": 4},
    "three identities": {"identities": 3, "segments": 1},
    "larger segments": {"segment_size": 5 * PAGE},
    "smaller segments": {"segment_size": 3 * PAGE},
    "segments of no bytes": {"segment_size": -(2**64)},
    "segments of half a page": {"segment_size": 4 * PAGE + 1},
    "segments of all bytes": {"segment_size": BYTES},
    "segments beyond all": {"segment_size": 2**64 - PAGE},
    "more memory": {"memory_size": BYTES + PAGE},
    "much more memory": {"memory_size": 2**64 - PAGE},
    "less memory": {"memory_size": BYTES - PAGE},
    "a segment less memory": {"memory_size": 8 * PAGE},
    "no memory": {"memory_size": 0},
    "a size beyond": {"size": BYTES + PAGE},
    "a part that is no clone": {"size": BYTES - PAGE},
    "an offset and no clone": {"offset": PAGE, "size": BYTES - PAGE},
}


def lie(values: dict[str, Any]) -> bytes:
    """A message about three segments with some wrong numbers."""
    head: dict[str, Any] = {"segments": 3, "identities": 1, **WHOLE, **values}
    segment_size = head.pop("segment_size")
    message = bytearray(forged(**head, segment_size=PAGE))
    message[32:40] = max(segment_size, 0).to_bytes(8, "little")
    return bytes(message)


@pytest.mark.parametrize("name", LIES)
def test_numbers_that_are_not_the_kernel_s_are_refused(
    name: str, receiver: VMM, packets: Pair
) -> None:
    files = three()
    with open_files(whole_of(files), *files) as fds:
        send_raw(packets.sender, lie(LIES[name]), fds)
        with refused_by("bad message"):
            receiver.recv_handle(packets.receiver)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(4, 6), (4, 2), (8, 2), (0, 8), (0, 4), (3, 5), (3, 1), (10, 1), (0, 0)],
)
def test_segments_that_a_window_does_not_need_are_refused(
    offset: int, size: int, receiver: VMM, packets: Pair
) -> None:
    values: dict[str, Any] = {**WHOLE, "offset": offset * PAGE, "size": size * PAGE}
    with open_files(identity(), identity(), *three()) as fds:
        send_raw(packets.sender, forged(segments=3, identities=2, **values), fds)
        with refused_by("bad message: .*(do not touch every segment|of a memory of|whole pages)"):
            receiver.recv_handle(packets.receiver)


WRONG_SEGMENTS: dict[str, tuple[Callable[[], list[int]], str]] = {
    "a short one in the middle": (lambda: three((4, 3, 3)), "not the size that is announced"),
    "a short first one": (lambda: three((2, 4, 4)), "not the size that is announced"),
    "a long last one": (lambda: three((4, 4, 4)), "not the size that is announced"),
    "an empty one": (lambda: three((4, 4, 0)), "memory of 0 bytes"),
    "an identity among them": (
        lambda: [*three((4, 4)), reopened(identity(), os.O_RDONLY)],
        "a segment of 40 bytes",
    ),
    "one writable": (lambda: [*three((4, 4)), memory(2 * PAGE)], "access mode 2"),
    "the first writable": (lambda: [memory(4 * PAGE), *three((4, 2))], "access mode 2"),
    "one that can shrink": (
        lambda: [*three((4,)), read_only(4 * PAGE, 4), *three((2,))],
        "seals 0x4",
    ),
    "no memfd": (
        lambda: [*three((4,)), os.open("/dev/null", os.O_RDONLY), *three((2,))],
        "no memfd",
    ),
    "huge pages": (
        lambda: [
            *three((4, 4)),
            reopened(memory(1 << 30, flags=os.MFD_HUGETLB), os.O_RDONLY),
        ],
        "no memfd of ordinary pages",
    ),
    "half a page": (
        lambda: [*three((4, 4)), read_only(2 * PAGE - 1)],
        "not the size that is announced",
    ),
}


@pytest.mark.parametrize("name", WRONG_SEGMENTS)
def test_each_segment_is_looked_at(name: str, receiver: VMM, packets: Pair) -> None:
    make, why = WRONG_SEGMENTS[name]
    with open_files(identity(), identity(), *make()) as fds:
        for identities, values in ((1, WHOLE), (2, PART)):
            message = forged(segments=3, identities=identities, **values)
            send_raw(packets.sender, message, fds[2 - identities :])
            with refused_by(f"bad message: .*({why})"):
                receiver.recv_handle(packets.receiver)


def test_the_same_memory_twice_is_refused(receiver: VMM, packets: Pair) -> None:
    first_one, last = three((4, 2))
    again = os.open(f"/proc/self/fd/{first_one}", os.O_RDONLY)
    with open_files(identity(), first_one, again, last) as fds:
        for middle in (first_one, again):
            message = forged(segments=3, identities=1, **WHOLE)
            send_raw(packets.sender, message, [fds[0], first_one, middle, last])
            with refused_by("the same memory twice"):
                receiver.recv_handle(packets.receiver)


def test_whatever_byte_of_it_is_flipped_the_kernel_is_believed(
    receiver: VMM, packets: Pair
) -> None:
    message = forged(segments=3, identities=2, **PART)
    free_to_say = 0
    files = three()
    with open_files(part_of(files), whole_of(files), *files) as fds:
        for place in range(len(message)):
            for change in range(1, 256):
                flipped = bytearray(message)
                flipped[place] ^= change
                send_raw(packets.sender, bytes(flipped), fds)
                try:
                    handle = receiver.recv_handle(packets.receiver)
                except InvalidArgument:
                    continue
                free_to_say += 1
                assert place == 12
                assert flipped[12] & 0x10 == 0
                size = receiver.mdl_get_size(handle)
                assert size == PART["size"]
                if Rights.MAP_READ in receiver.handle_info(handle).rights:
                    assert contents(receiver, handle) == [bytes(8)] * (size // PAGE)
                receiver.handle_close(handle)
    assert free_to_say == 31, "other sets of rights"


def test_every_descriptor_of_a_refused_message_is_closed(receiver: VMM, packets: Pair) -> None:
    with open_files(identity(), *(read_only() for _ in range(200))) as fds:
        for came in (2, 3, 50, 201):
            many: dict[str, Any] = {"memory_size": (came - 1) * PAGE, "size": (came - 1) * PAGE}
            good = forged(segments=came - 1, identities=came > 2, **many)
            for bad_message in (b"", good[:-1], bytes([*good[:12], 0xFF, *good[13:]])):
                send_raw(packets.sender, bad_message or b"x", fds[:came])
                with refused_by("bad message"):
                    receiver.recv_handle(packets.receiver)

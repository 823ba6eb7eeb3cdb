"""Handles travel between processes.

The functions that are not tests run in other processes. They import for themselves what they use.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from children import NOBODY, TESTS_IMPORTABLE, run_child
from constants import ALL_BUT_EXECUTE, READ, READ_ONLY, RW
from forged_messages import MESSAGE
from forked import in_child
from kernel_oracle import PAGE
from transfers import (
    KINDS,
    Pair,
    connected,
    contents,
    facts,
    filled,
    in_process,
    nothing_opened,
    packets,
    page_frames,
    pair,
    receive_and_tell,
    receiver,
    refused,
    stream,
    tell_of_one,
    text_of,
)
from vmm_linux import INVALID_HANDLE, VMM, Retcode, Rights, Seal, VmmError
from vmm_linux.errors import NoCapability, ResourceNotFound, SecurityDisallow

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["packets", "pair", "receiver", "stream"]  # the fixtures


# ---- the same buffer in another process ----------------------------------------------------------


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_handle_names_the_same_memory_in_an_unrelated_process(
    kind: int, nobody: bool, vmm: VMM
) -> None:
    handle = filled(vmm, 4)
    va = vmm.mdl_map(handle, 0, 4 * PAGE, 0, RW)
    assert vmm.read(va, 4 * PAGE)
    with in_process(receive_and_tell, kind=kind, nobody=nobody) as peer:
        vmm.send_handle(peer.sock, handle)
    (told,) = peer.answer
    assert told["facts"] == facts(vmm, handle)
    assert told["texts"] == [text_of(page).decode() for page in range(4)]
    assert told["modes"] == [os.O_RDWR]
    assert told["closed by exec"] == [True]
    assert vmm.read(va, 17) == b"from the receiver"
    if os.geteuid() == 0 and not nobody:
        assert all(told["frames"])
        assert told["frames"] == page_frames(va, 4)


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
def test_without_map_write_the_descriptor_that_arrives_is_read_only(nobody: bool, vmm: VMM) -> None:
    handle = filled(vmm, 2)
    with in_process(receive_and_tell, 2, nobody=nobody) as peer:
        vmm.send_handle(peer.sock, handle, READ_ONLY)
        vmm.send_handle(peer.sock, vmm.handle_copy(handle, READ_ONLY))
    for told in peer.answer:
        assert told["facts"] == [int(READ_ONLY), *facts(vmm, handle)[1:]]
        assert told["modes"] == [os.O_RDONLY]
        assert told["cannot be mapped writable"]
    assert contents(vmm, handle) == [text_of(0), text_of(1)]


@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
def test_a_clone_and_a_clone_s_clone_keep_their_identities_and_windows(
    rights: Rights, vmm: VMM
) -> None:
    handle = filled(vmm, 8)
    clone = vmm.mdl_clone(handle, PAGE, 6 * PAGE)
    inner = vmm.mdl_clone(clone, 2 * PAGE, 3 * PAGE)
    innermost = vmm.mdl_clone(inner, PAGE, PAGE)
    windows = {clone: range(1, 7), inner: range(3, 6), innermost: range(4, 5)}
    with in_process(receive_and_tell, len(windows)) as peer:
        for sent in windows:
            vmm.send_handle(peer.sock, sent, rights)
    for told, (sent, pages) in zip(peer.answer, windows.items(), strict=True):
        assert told["facts"] == [int(rights), *facts(vmm, sent)[1:]]
        texts = [text.encode() for text in told["texts"]]
        assert texts[1:] == [text_of(page) for page in pages[1:]]
        assert all(told["closed by exec"])
    first = b"from the" if Rights.MAP_WRITE in rights else text_of(4)
    assert contents(vmm, innermost) == [first]
    assert len({facts(vmm, sent)[2] for sent in (handle, *windows)}) == 4


def test_what_was_received_can_be_sent_on(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    inner = vmm.mdl_clone(vmm.mdl_clone(filled(vmm, 4), PAGE, 3 * PAGE), PAGE, PAGE)
    for rights in (ALL_BUT_EXECUTE, READ_ONLY, Rights.TRANSFER | Rights.GET_SID):
        handle = inner
        for _ in range(3):
            vmm.send_handle(packets.sender, handle, rights)
            handle = receiver.recv_handle(packets.receiver)
            assert facts(receiver, handle) == [int(rights), *facts(vmm, inner)[1:]]
            receiver.send_handle(packets.sender, handle)
            handle = vmm.recv_handle(packets.receiver)
    assert contents(vmm, inner) == [text_of(2)]


def test_the_buffer_lives_on_when_its_maker_is_closed(packets: Pair, receiver: VMM) -> None:
    with VMM() as maker:
        maker.send_handle(packets.sender, filled(maker, 2))
    assert contents(receiver, receiver.recv_handle(packets.receiver)) == [text_of(0), text_of(1)]


def tell_over(sock: socket.socket) -> None:
    """Receive a handle, and send what can be told of it back."""
    with sock, VMM() as vmm:
        told = tell_of_one(vmm, sock)
        sock.sendall(json.dumps([told["facts"], told["texts"]]).encode())


def send_to_a_spawned_process() -> None:
    """Send a handle to a process that multiprocessing starts afresh."""
    import json
    import multiprocessing
    import socket

    from test_transfer import tell_over
    from transfers import facts, filled, text_of
    from vmm_linux import VMM

    ours, theirs = socket.socketpair()
    with ours, theirs, VMM() as vmm:
        process = multiprocessing.get_context("spawn").Process(target=tell_over, args=(theirs,))
        process.start()
        handle = filled(vmm, 2)
        vmm.send_handle(ours, handle)
        told = json.loads(ours.recv(1 << 16))
        process.join()
        assert process.exitcode == 0
        assert told == [facts(vmm, handle), [text_of(page).decode() for page in range(2)]]


def test_a_spawned_process_receives() -> None:
    child = run_child(send_to_a_spawned_process, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


def test_a_forked_process_receives(vmm: VMM, stream: Pair) -> None:
    handle = filled(vmm, 2)
    vmm.send_handle(stream.sender, handle, READ_ONLY)

    def told_by_child() -> dict[str, Any]:
        with VMM() as other:
            return tell_of_one(other, stream.receiver)

    told = in_child(told_by_child)
    assert told["facts"] == [int(READ_ONLY), *facts(vmm, handle)[1:]]
    assert told["texts"] == [text_of(page).decode() for page in range(2)]


def test_a_forked_process_sends(receiver: VMM, stream: Pair) -> None:
    def send() -> list[Any]:
        with VMM() as other:
            handle = filled(other, 2)
            other.send_handle(stream.sender, handle)
            return facts(other, handle)

    told = in_child(send)
    handle = receiver.recv_handle(stream.receiver)
    assert facts(receiver, handle) == told
    assert contents(receiver, handle) == [text_of(0), text_of(1)]


def test_what_is_received_is_closed_by_exec(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    inner = vmm.mdl_clone(vmm.mdl_clone(vmm.mdl_create(PAGE, RW), 0, PAGE), 0, PAGE)
    vmm.send_handle(pair.sender, inner)
    before = kernel.descriptors()
    receiver.recv_handle(pair.receiver)
    new = kernel.descriptors().keys() - before.keys()
    assert len(new) == 3
    assert not any(os.get_inheritable(fd) for fd in new)


# ---- what a sender may send ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rights", "asked"),
    [
        (ALL_BUT_EXECUTE & ~Rights.TRANSFER, None),
        (ALL_BUT_EXECUTE & ~Rights.TRANSFER, Rights.MAP_READ),
        (READ_ONLY, ALL_BUT_EXECUTE),
        (ALL_BUT_EXECUTE, Rights.MAP_EXECUTE),
        (Rights.TRANSFER, Rights.GET_SID),
    ],
)
def test_rights_that_a_handle_lacks_are_not_sent(
    rights: Rights, asked: Rights | None, vmm: VMM, pair: Pair
) -> None:
    handle = vmm.handle_copy(vmm.mdl_create(PAGE, RW), rights)
    with refused("does not give", NoCapability):
        vmm.send_handle(pair.sender, handle, asked)
    pair.receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        pair.receiver.recv(1)


def test_rights_that_nobody_knows_are_not_sent(vmm: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    for rights in (0x40, 1 << 32, -1, "TRANSFER", True, 1.0):
        with refused("rights"):
            vmm.send_handle(pair.sender, handle, rights)  # type: ignore[arg-type]


def test_a_handle_that_is_none_is_not_sent(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    foreign = receiver.mdl_create(PAGE, RW)
    for value in (0, INVALID_HANDLE, handle ^ 1 << 37, foreign):
        with refused("not a handle of this VMM"):
            vmm.send_handle(pair.sender, value)
    copy = vmm.handle_copy(handle, ALL_BUT_EXECUTE)
    vmm.handle_revoke(handle)
    with nothing_opened(), pytest.raises(VmmError) as caught:
        vmm.send_handle(pair.sender, copy)
    assert caught.value.rc is Retcode.HANDLE_REVOKED
    vmm.handle_close(handle)
    with refused("was closed", ResourceNotFound):
        vmm.send_handle(pair.sender, handle)


def test_no_rights_at_all_can_be_sent(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    vmm.send_handle(pair.sender, vmm.mdl_create(PAGE, RW), 0)
    handle = receiver.recv_handle(pair.receiver)
    assert handle.rights == 0
    with pytest.raises(NoCapability):
        receiver.mdl_map(handle, 0, PAGE, 0, READ)
    with refused("TRANSFER", NoCapability):
        receiver.send_handle(pair.sender, handle)


# ---- peers that die ------------------------------------------------------------------------------


def send_and_die(path: str, kind: int, cut: int) -> None:
    """Send the beginning of a handle's message, and be killed."""
    import os
    import signal

    from transfers import connect, filled
    from vmm_linux import VMM

    with connect(path, kind) as sock, VMM() as vmm:

        class Cutting(type(sock)):  # type: ignore[misc]
            """A socket that sends no more than the beginning."""

            def sendmsg(self, messages: list[bytes], *ancillary: object) -> int:
                cut_off = [messages[0][:cut]]
                return int(super().sendmsg(cut_off, *ancillary)) if cut else 0

        handle = filled(vmm, 2)
        half = Cutting(fileno=sock.fileno())
        try:
            vmm.send_handle(half, handle)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
@pytest.mark.parametrize("cut", [0, 1, 10, MESSAGE.size - 1])
def test_a_peer_that_is_killed_half_way_leaves_nothing(kind: str, cut: int, receiver: VMM) -> None:
    arguments = {"kind": KINDS[kind], "ending": -signal.SIGKILL}
    with in_process(send_and_die, cut, **arguments) as peer:  # type: ignore[arg-type]
        if cut:
            with refused(f"{cut} bytes"):
                receiver.recv_handle(peer.sock)
        with nothing_opened(), pytest.raises(EOFError):
            receiver.recv_handle(peer.sock)


def test_what_a_peer_sent_before_it_was_killed_is_whole(receiver: VMM) -> None:
    with in_process(send_and_die, MESSAGE.size, ending=-signal.SIGKILL) as peer:
        select.select([peer.sock], [], [])
        handle = receiver.recv_handle(peer.sock)
        with nothing_opened(), pytest.raises(EOFError):
            receiver.recv_handle(peer.sock)
    assert contents(receiver, handle) == [text_of(0), text_of(1)]


def receive_write_and_die(path: str, kind: int) -> None:
    """Receive a handle, write to the buffer, and be killed with it mapped."""
    import os
    import signal

    from constants import RW
    from transfers import connect
    from vmm_linux import VMM

    with connect(path, kind) as sock, VMM() as vmm:
        handle = vmm.recv_handle(sock)
        vmm.write(vmm.mdl_map(handle, 0, vmm.mdl_get_size(handle), 0, RW), b"last words")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_receiver_that_is_killed_takes_nothing_with_it(vmm: VMM) -> None:
    handle = filled(vmm, 2)
    with in_process(receive_write_and_die, ending=-signal.SIGKILL) as peer:
        vmm.send_handle(peer.sock, handle)
        assert peer.sock.recv(1) == b""
        with nothing_opened(), pytest.raises(BrokenPipeError):
            vmm.send_handle(peer.sock, handle)
    assert contents(vmm, handle) == [b"last wor", text_of(1)]
    vmm.mdl_seal(handle, Seal.FREEZE)


# ---- what a receiver demands ---------------------------------------------------------------------

EVERY_SEAL = [Seal(0), Seal.PUBLISH, Seal.FREEZE, Seal.PUBLISH | Seal.FREEZE]


@pytest.mark.parametrize("require", EVERY_SEAL)
@pytest.mark.parametrize("seals", EVERY_SEAL)
def test_seals_are_demanded(
    require: Seal, seals: Seal, vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    if seals:
        vmm.mdl_seal(handle, seals)
    for rights in (ALL_BUT_EXECUTE, READ_ONLY):
        vmm.send_handle(packets.sender, handle, rights)
        strongest = Seal.PUBLISH | Seal.FREEZE if Seal.FREEZE in seals else seals
        if require in strongest:
            received = receiver.recv_handle(packets.receiver, require=require)
            assert receiver.handle_info(received).seals == seals
        else:
            with refused("not sealed", SecurityDisallow):
                receiver.recv_handle(packets.receiver, require=require)


def test_the_largest_size_is_demanded(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    handle = vmm.mdl_create(4 * PAGE, RW)
    sizes = {handle: 4 * PAGE, vmm.mdl_clone(handle, PAGE, 2 * PAGE): 2 * PAGE}
    for sent, size in sizes.items():
        for most in (0, size - 1):
            vmm.send_handle(packets.sender, sent)
            with refused(f"max_size is {most}", SecurityDisallow):
                receiver.recv_handle(packets.receiver, max_size=most)
        for most in (size, 2**64 - 1):
            vmm.send_handle(packets.sender, sent)
            received = receiver.recv_handle(packets.receiver, max_size=most)
            assert receiver.mdl_get_size(received) == size


def send_two(path: str, kind: int) -> None:
    """Send two handles, and tell who does."""
    import os

    from constants import RW
    from kernel_oracle import PAGE
    from transfers import connect
    from vmm_linux import VMM

    with connect(path, kind) as sock, VMM() as vmm:
        for _ in range(2):
            vmm.send_handle(sock, vmm.mdl_create(PAGE, RW))
        # The other end goes first, so that it always finds these messages.
        sock.recv(1)
        print(os.getuid())


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_the_user_at_the_other_end_is_demanded(kind: str, nobody: bool, receiver: VMM) -> None:
    user = NOBODY if nobody and os.geteuid() == 0 else os.geteuid()
    with in_process(send_two, kind=KINDS[kind], nobody=nobody) as peer:
        with refused(f"user {user} is at the other end", SecurityDisallow):
            receiver.recv_handle(peer.sock, peer_uid=user + 1)
        assert receiver.recv_handle(peer.sock, peer_uid=user)
    assert peer.answer == user


def test_users_of_large_numbers_are_told_apart(receiver: VMM) -> None:
    user = 0xFFFF_FFF0 if os.geteuid() == 0 else os.geteuid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()

        def connect_and_send() -> None:
            os.setuid(user)
            with socket.socket(socket.AF_UNIX) as sock, VMM() as vmm:
                sock.connect(listener.getsockname())
                vmm.send_handle(sock, vmm.mdl_create(PAGE, RW))

        in_child(connect_and_send)
        sock, _ = listener.accept()
    with sock:
        assert receiver.recv_handle(sock, peer_uid=user)


def test_a_socket_that_cannot_tell_who_sends_meets_no_user(vmm: VMM, receiver: VMM) -> None:
    with connected(socket.SOCK_DGRAM) as pair:
        vmm.send_handle(pair.sender, vmm.mdl_create(PAGE, RW))
        assert receiver.recv_handle(pair.receiver, peer_uid=os.geteuid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anybody_s:
        anybody_s.bind("")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(anybody_s.getsockname())
            for user in (os.geteuid(), 2**32 - 1):
                vmm.send_handle(sock, vmm.mdl_create(PAGE, RW))
                with refused("does not tell", SecurityDisallow):
                    receiver.recv_handle(anybody_s, peer_uid=user)


def test_demands_that_mean_nothing_are_refused_before_anything_is_read(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    vmm.send_handle(packets.sender, vmm.mdl_create(PAGE, RW))
    wrong: list[dict[str, Any]] = [
        *({"require": value} for value in (4, -1, None, "FREEZE", True)),
        *({name: value} for name in ("max_size", "peer_uid") for value in (-1, 2**64, 1.0, "1")),
    ]
    for demand in wrong:
        with refused("|".join(demand)):
            receiver.recv_handle(packets.receiver, **demand)
    assert receiver.recv_handle(packets.receiver)


# ---- descriptors are scarce ----------------------------------------------------------------------


def receive_at_the_limit() -> None:
    """Receive where there is room for fewer descriptors than come, and for just as many."""
    import transfers as t
    from vmm_linux import VMM

    for kind in t.KINDS.values():
        with VMM() as vmm, VMM() as receiver, t.connected(kind) as pair:
            for needed, handle in t.handles_of_three_sizes(vmm).items():
                for room in range(needed):
                    vmm.send_handle(pair.sender, handle)
                    with t.refused_for_want_of(room):
                        receiver.recv_handle(pair.receiver)
                vmm.send_handle(pair.sender, handle)
                with t.room_for(needed):
                    received = receiver.recv_handle(pair.receiver)
                assert t.contents(receiver, received) == [t.text_of(0)]


def send_at_the_limit() -> None:
    """Send where there is room for fewer descriptors than go, and for just as many."""
    import contextlib
    import socket

    import transfers as t
    from constants import READ_ONLY, RW
    from kernel_oracle import PAGE
    from vmm_linux import VMM

    with VMM() as vmm, t.connected(socket.SOCK_STREAM) as pair:
        handles = t.handles_of_three_sizes(vmm)
        for handle in handles.values():
            # What the socket takes at once needs no duplicate.
            with t.nothing_opened(), t.room_for(0):
                vmm.send_handle(pair.sender, handle)
        handle = vmm.mdl_create(PAGE, RW)
        with t.refused_for_want_of(0):
            vmm.send_handle(pair.sender, handle, READ_ONLY)
        # One for the read-only description, which stays.
        with t.room_for(1):
            vmm.send_handle(pair.sender, handle, READ_ONLY)
        pair.sender.setblocking(False)
        for size in (1 << 16, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    pair.sender.send(bytes(size))
        for needed, handle in handles.items():
            # What has to wait does: whoever waits may find others' files under the numbers.
            for room in range(needed):
                with t.refused_for_want_of(room):
                    vmm.send_handle(pair.sender, handle)
            with t.nothing_opened(), t.room_for(needed), contextlib.suppress(BlockingIOError):
                vmm.send_handle(pair.sender, handle)
                raise AssertionError("the socket is full")


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("work", [receive_at_the_limit, send_at_the_limit])
def test_at_the_limit_of_descriptors_nothing_is_left(
    work: Callable[[], None], nobody: bool
) -> None:
    child = run_child(work, nobody=nobody, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")

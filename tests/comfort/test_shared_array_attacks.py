"""Shared arrays and buffers in hostile hands: pickles, rights, threads."""

from __future__ import annotations

import fcntl
import os
import pickle
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import vmm_linux
from kernel_oracle import PAGE
from vmm_linux import VMM, Mdl, Rights, _parts, _sharer, shared_array
from vmm_linux.errors import (
    InvalidArgument,
    NoCapability,
    ResourceNotFound,
    SecurityDisallow,
    VmmError,
)
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm_linux import SharedArray
    from vmm_linux.policy import Question

F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2
SECONDS = 1.0
"""How long threads try to meet."""


def round_trip(thing: Any) -> Any:  # noqa: ANN401
    """What another process would get."""
    return pickle.loads(ForkingPickler.dumps(thing))  # noqa: S301  our own


@pytest.fixture(autouse=True)
def _no_sharer_is_left() -> Iterator[None]:
    """The thread that hands descriptors out ends with the test."""
    yield
    _sharer.stop()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads that take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(act: Callable[[], object]) -> list[VmmError]:
    """The errors of four threads that do the same over and over."""
    errors = []
    end = time.monotonic() + SECONDS

    def work() -> None:
        while time.monotonic() < end:
            try:
                act()
            except VmmError as problem:
                errors.append(problem)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize(
    ("shape", "kind", "offset", "strides"),
    [
        ((-1,), "u1", 100, (8,)),
        ((-1,), "u1", 100, ()),
        ((-1, 2), "u1", 100, (8, 1)),
        ((3,), "O", 0, (8,)),
        ((3,), [("a", "O")], 0, (8,)),
        ((3,), "V0", 0, (1,)),
        ((3,), "u1", 0, (1, 1)),
        ((3,), "u1", 0, (1.0,)),
        ((3.0,), "u1", 0, (1,)),
        ((3,), "u1", "0", (1,)),
        ((3,), "u1", -1, (1,)),
        ((3,), "u1", PAGE - 2, (1,)),
        ((3,), "u1", 1, (-1,)),
        ((2**63, 2), "u1", 0, (2, 2)),
        ("abc", "u1", 0, (1,)),
        ((3,), "no dtype", 0, (1,)),
    ],
)
def test_a_pickle_with_a_layout_that_leaves_the_buffer_is_refused(
    monkeypatch: pytest.MonkeyPatch, shape: object, kind: object, offset: object, strides: object
) -> None:
    array = vmm_linux.zeros(PAGE, "u1")
    honest = shared_array.packed

    def forged(array: SharedArray[Any], shared: _parts.SharedMdl) -> tuple[object, ...]:
        load, (part, _, _, _, _, window) = honest(array, shared)
        return load, (part, shape, kind, offset, strides, window)

    monkeypatch.setattr(shared_array, "packed", forged)
    with pytest.raises(InvalidArgument, match=r"^unpickle: "):
        round_trip(array)


def test_no_handle_gets_more_than_its_rights_from_another_ones_mapping() -> None:
    array = vmm_linux.share(np.arange(PAGE, dtype="u1"))
    mdl = array.mdl
    reading = mdl.array(PAGE, "u1", writable=False)
    with pytest.raises(NoCapability):
        mdl.read_only().array(PAGE, "u1", writable=True)
    blind = Mdl.from_handle(
        mdl.vmm, mdl.vmm.handle_copy(mdl.handle, Rights.GET_SID | Rights.COPY | Rights.TRANSFER)
    )
    uses: list[Callable[[], object]] = [
        lambda: blind.array(PAGE, "u1"),
        lambda: blind.array(PAGE, "u1", writable=True),
        lambda: blind.array(PAGE, "u1", writable=False),
        lambda: memoryview(blind),
        lambda: blind.read(1),
    ]
    for use in uses:
        with pytest.raises(NoCapability):
            use()
    assert reading[3] == array[3]


@pytest.mark.parametrize("seal", ["all of it", "a segment"])
def test_a_writable_mapping_from_before_a_seal_is_not_given_out_after_it(seal: str) -> None:
    mdl = Mdl(4 * PAGE, segment_size=PAGE)
    if seal == "all of it":
        first = mdl.array(4 * PAGE, "u1")
        assert first.flags.writeable
        mdl.publish()
    else:
        mdl.clone(0, PAGE).freeze()
        first = mdl.array(4 * PAGE, "u1")
        assert not first.flags.writeable
    with pytest.raises(NoCapability):
        mdl.array(4 * PAGE, "u1", writable=True)
    assert not mdl.array(4 * PAGE, "u1").flags.writeable


@pytest.mark.usefixtures("quick_switches")
def test_a_mapping_is_not_given_to_a_thread_while_another_one_frees_it() -> None:
    mdl = Mdl(4 * PAGE)
    before = mdl.vmm.usage().mdl_mappings

    def act() -> None:
        array = mdl.array(16, "u1")
        array[0] = 1

    assert in_threads(act) == []
    assert mdl.vmm.usage().mdl_mappings == before


@pytest.mark.usefixtures("quick_switches")
def test_a_handle_is_not_given_to_a_thread_while_another_one_closes_it() -> None:
    mdl = vmm_linux.zeros(16, "u1").mdl.read_only()

    def act() -> None:
        other = _parts.SharedMdl(mdl.read_only())
        _parts.known(other).mdl.array(16, "u1")

    assert in_threads(act) == []


def test_arrays_of_memory_that_grew_arrive_with_the_length_that_each_was_made_of() -> None:
    fd = os.memfd_create("grows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 5)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
        short = Mdl.from_fd(fd).array(5, "u1")
        os.ftruncate(fd, 2 * PAGE)
        long = Mdl.from_fd(fd).array(2 * PAGE, "u1")
    finally:
        os.close(fd)
    assert short.mdl.sid == long.mdl.sid
    arrived = [round_trip(short), round_trip(long)]
    assert [len(each) for each in arrived] == [5, 2 * PAGE]
    assert [each.mdl.nbytes for each in arrived] == [5, 2 * PAGE]


def test_numpy_says_why_a_closed_mdl_is_no_buffer() -> None:
    with Mdl(10) as mdl:
        assert np.asarray(mdl).shape == (10,)
    for make in (np.asarray, np.array):
        with pytest.raises(ResourceNotFound, match="this Mdl is closed"):
            make(mdl)


def test_an_mdl_that_the_policy_keeps_open_can_be_closed_later() -> None:
    denied = True

    def ask(question: Question) -> bool:
        return not (denied and question.method == "handle_close")

    with VMM(policy=Policy.from_callable(ask)) as vmm:
        mdl = Mdl(10, vmm=vmm)
        with pytest.raises(SecurityDisallow):
            mdl.close()
        assert not mdl.closed
        assert mdl.read() == bytes(10)
        denied = False
        mdl.close()
        assert (mdl.closed, vmm.usage().handles.used) == (True, 0)

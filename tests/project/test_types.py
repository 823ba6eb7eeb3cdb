"""What a type checker infers of the public API. mypy reads these assertions; here they run too."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, assert_type

import numpy as np
import pytest

from kernel_oracle import PAGE
from vmm_linux import (
    VMM,
    Event,
    Handle,
    Limits,
    Mdl,
    PageInfo,
    PageKind,
    PageState,
    Region,
    Retcode,
    Rights,
    Seal,
    SharedArray,
    VmmError,
    VmmFlags,
    inspect,
)
from vmm_linux._core.procfs import SmapsRecord
from vmm_linux.audit import Audit, Record
from vmm_linux.endpoint import Endpoint
from vmm_linux.errors import InvalidArgument
from vmm_linux.handles import HandleInfo
from vmm_linux.limits import Usage, Use
from vmm_linux.policy import Policy, PolicyError, Question, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
COMMITTED = VmmFlags.RESERVE | VmmFlags.COMMIT | READ_WRITE
SIZE = 4 * PAGE


@pytest.fixture
def vmm() -> Iterator[VMM]:
    with VMM() as made:
        yield made


# ---- VMM ----------------------------------------------------------------------------------------


def test_a_vmm_and_its_life() -> None:
    with VMM(Limits(), policy=Policy(), audit=Audit()) as vmm:
        assert_type(vmm, VMM)
        assert_type(vmm.limits, Limits)
        assert_type(vmm.usage(), Usage)
        assert_type(vmm.usage().committed, Use)
        assert_type(vmm.usage().committed.used, int)
        assert_type(vmm.usage().committed.bound, int | None)
        assert_type(vmm.closed, bool)
        assert_type(vmm.endpoint, Endpoint)
        assert_type(vmm.history(), tuple[Record, ...])


def test_memory_of_a_vmm(vmm: VMM) -> None:
    va = assert_type(vmm.allocate(0, SIZE, COMMITTED), int)
    vmm.commit(va, SIZE)
    vmm.commit(va, SIZE, 0)
    vmm.commit_ranges([(va, PAGE), (va + PAGE, PAGE)])
    vmm.decommit_ranges([(va + PAGE, PAGE)])
    vmm.decommit(va + PAGE, PAGE)
    vmm.protect(va, PAGE, READ_WRITE)
    assert_type(vmm.view(va, PAGE, writable=True), memoryview)
    assert_type(vmm.read(va, 1), bytes)
    assert_type(vmm.write(va, bytearray(1)), int)
    vmm.free(va, SIZE)


def test_what_is_known_of_a_page(vmm: VMM) -> None:
    info = assert_type(vmm.query(vmm.allocate(0, SIZE, COMMITTED)), PageInfo)
    assert_type(info.va, int)
    assert_type(info.state, PageState)
    assert_type(info.kind, PageKind)
    assert_type(info.protection, VmmFlags)
    assert_type(info.flags, VmmFlags)
    assert_type((info.base, info.size, info.run_start, info.run_end), tuple[int, int, int, int])
    assert_type(info.mdl_offset, int | None)
    assert_type(info.sid, int | None)
    assert_type(info.resident, bool | None)
    smaps = assert_type(info.smaps, SmapsRecord | None)
    assert smaps is not None
    assert_type(smaps.rss, int | None)
    assert_type(smaps.pathname, str | None)
    assert_type(smaps.vm_flags, frozenset[str] | None)


def test_handles_of_a_vmm(vmm: VMM) -> None:
    handle = assert_type(vmm.mdl_create(SIZE, READ_WRITE), Handle)
    assert_type(handle.rights, Rights)
    assert_type(vmm.mdl_get_size(handle), int)
    assert_type(vmm.mdl_map(handle, 0, SIZE, 0, VmmFlags.READ), int)
    assert_type(vmm.mdl_clone(handle, 0, PAGE), Handle)
    assert_type(vmm.mdl_create_from_buf(b"data", VmmFlags.READ), Handle)
    va = vmm.allocate(0, SIZE, COMMITTED)
    assert_type(vmm.mdl_create_from_vm(va, SIZE, VmmFlags.READ), Handle)
    copy = assert_type(vmm.handle_copy(handle, handle.rights), Handle)
    info = assert_type(vmm.handle_info(copy), HandleInfo)
    assert_type(info.rights, Rights)
    assert_type(info.seals, Seal)
    assert_type(info.sid, int)
    assert_type(info.origin_sid, int | None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        vmm.send_handle(ours, handle)
        assert_type(vmm.recv_handle(theirs, max_size=SIZE), Handle)
        ours.setblocking(False)
        theirs.setblocking(False)

        async def travel() -> None:
            await vmm.send_handle_async(ours, handle, None)
            assert_type(await vmm.recv_handle_async(theirs), Handle)

        asyncio.run(travel())
    vmm.mdl_seal(handle, Seal.PUBLISH)
    vmm.handle_revoke(handle)
    vmm.handle_close(handle)


def test_the_reference_s_own_face(vmm: VMM) -> None:
    endpoint = vmm.endpoint
    va, rc = endpoint.Allocate(0, SIZE, COMMITTED)
    assert_type((va, rc), tuple[int, Retcode])
    assert_type(endpoint.Commit(va, SIZE, 0), Retcode)
    assert_type(endpoint.Protect(va, SIZE, READ_WRITE), Retcode)
    assert_type(endpoint.Decommit(va, SIZE), Retcode)
    assert_type(endpoint.Query(va), tuple[PageInfo | None, Retcode])
    assert_type(endpoint.Free(va, SIZE), Retcode)
    handle, _ = assert_type(endpoint.MdlCreate(SIZE, READ_WRITE), tuple[int, Retcode])
    assert_type(endpoint.MdlCreateFromVm(0, 0, 0), tuple[int, Retcode])
    assert_type(endpoint.MdlGetSize(handle), tuple[int, Retcode])
    assert_type(endpoint.MdlMap(handle, 0, SIZE, 0, READ_WRITE), tuple[int, Retcode])
    assert_type(endpoint.MdlClone(handle, 0, PAGE), tuple[int, Retcode])


# ---- objects ------------------------------------------------------------------------------------


def test_a_region(vmm: VMM) -> None:
    with vmm.region(SIZE, READ_WRITE | VmmFlags.COMMIT) as region:
        assert_type(region, Region)
        assert_type((region.base, region.size, region.freed), tuple[int, int, bool])
        region.commit(0, PAGE)
        region.protect(READ_WRITE)
        assert_type(region.query(PAGE), PageInfo)
        assert_type(region.view(0, PAGE), memoryview)
        assert_type(region.read(1), bytes)
        assert_type(region.write(b"data", offset=1), int)
        assert_type(region[5], int)
        assert_type(region[-5:], bytes)
        region[5], region[6:8] = 7, b"ab"
        assert_type(region.readinto(bytearray(5), 3), int)
        assert_type(memoryview(region), memoryview)
        region.decommit(PAGE)
        region.free(PAGE)


def test_an_array_of_a_region(vmm: VMM) -> None:
    region = vmm.region(SIZE, READ_WRITE | VmmFlags.COMMIT)
    assert_type(region.__array__(), np.ndarray[Any, np.dtype[np.uint8]])
    assert assert_type(np.asarray(region).dtype, np.dtype[np.uint8]) == np.uint8
    assert_type(region.__array__(np.int16), np.ndarray[Any, np.dtype[np.int16]])


def test_a_buffer(vmm: VMM) -> None:
    with vmm.mdl(SIZE) as mdl:
        assert_type(mdl, Mdl)
        assert_type((mdl.handle, mdl.size, mdl.rights), tuple[Handle, int, Rights])
        assert_type((mdl.seals, mdl.sid, mdl.closed), tuple[Seal, int, bool])
        assert_type(mdl.map(VmmFlags.READ), Region)
        assert_type(mdl.clone(0, PAGE), Mdl)
        assert_type(mdl.read_only(), Mdl)
        assert_type(mdl.fileno(), int)
        assert_type(Mdl.from_fd(mdl.fileno(), vmm=vmm), Mdl)
        mdl.publish()
    assert_type(Mdl.from_bytes(b"data", vmm=vmm), Mdl)


def test_arrays_of_a_buffer(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    numbers = mdl.array((8, 16), np.int32)
    assert_type(numbers, SharedArray[np.dtype[np.int32]])
    assert_type(numbers[0, 0], Any)
    assert_type(mdl.array(8, np.dtype(np.uint8), 4), SharedArray[np.dtype[np.uint8]])
    assert_type(mdl.array(8, numbers.dtype), SharedArray[np.dtype[np.int32]])
    assert_type(mdl.array(8, dtype=bool), SharedArray[np.dtype[Any]])
    default = mdl.array([2, 3], writable=False)
    assert_type(default, SharedArray[np.dtype[np.float64]])
    assert default.dtype == np.float64
    assert_type(mdl.array(3, None), SharedArray[np.dtype[np.float64]])
    assert_type(mdl.array(3, "float64"), SharedArray[np.dtype[np.float64]])
    # As of NumPy's own functions: what another string names is not known.
    assert_type(mdl.array(3, "i4"), SharedArray[np.dtype[Any]])
    assert_type(mdl.array(3, [("a", "u1"), ("b", "f8")], 8), SharedArray[np.dtype[Any]])


def test_an_event() -> None:
    with Event() as event:
        assert_type(event, Event)
        event.set()
        assert_type(event.is_set(), bool)
        assert_type(event.wait(0.5), bool)
        assert_type(event.clear(), int)
        assert_type(event.fileno(), int)
        assert_type(event.closed, bool)
        with Event.from_fd(event.fileno()) as same:
            assert_type(same, Event)
        event.set()

        async def wait() -> None:
            assert_type(await event.wait_async(), bool)

        asyncio.run(wait())
        ours, theirs = socket.socketpair()
        with ours, theirs:
            event.send(ours)
            with Event.recv(theirs) as received:
                assert_type(received, Event)


# ---- who is asked, and what is written down -----------------------------------------------------


def test_a_policy_and_its_questions() -> None:
    def answer(question: Question) -> bool | str:
        assert_type(question.method, str)
        assert_type(question.flags, VmmFlags)
        assert_type((question.size, question.rights, question.seals), tuple[int, Rights, Seal])
        assert_type(question.peer, tuple[int, int | None, int | None] | None)
        assert_type(question.usage, Usage)
        return question.method == "allocate" or "only allocate"

    with VMM(policy=Policy.from_callable(answer)) as vmm:
        vmm.allocate(0, SIZE, COMMITTED)
    policy = Policy([Rule(deny=["free"])], default="allow", ready=["W^X"])
    assert_type(policy, Policy)
    assert_type(policy.audit_failure, str | None)


def test_an_audit_and_its_records() -> None:
    audit = Audit(ring=8, failure="continue")
    assert_type(audit.file, str | None)
    assert_type(audit.failure, str)
    with VMM(audit=audit) as vmm:
        vmm.allocate(0, SIZE, COMMITTED)
        record = vmm.history()[-1]
    assert_type(record, Record)
    assert_type((record.call, record.time, record.duration), tuple[int, int, int])
    assert_type(record.rc, Retcode | None)
    assert_type(record.error, str | None)
    assert_type(record.as_dict(), dict[str, Any])
    assert_type(audit.history(), tuple[Record, ...])


def test_limits() -> None:
    limits = Limits.unlimited().replace(committed=SIZE)
    assert_type(limits, Limits)
    assert_type(limits.committed, int | None)


def test_errors(vmm: VMM) -> None:
    with pytest.raises(VmmError) as caught:
        vmm.allocate(0, 0, COMMITTED)
    error = assert_type(caught.value, VmmError)
    assert_type(error.rc, Retcode)
    assert_type(error.method, str)
    assert_type(error.errno, int | None)
    with pytest.raises(InvalidArgument):
        Policy(default="perhaps")
    assert issubclass(PolicyError, InvalidArgument)


# ---- other processes ----------------------------------------------------------------------------


def test_looking_at_processes() -> None:
    snapshot = assert_type(inspect.snapshot(), inspect.Snapshot)
    mapping = assert_type(snapshot[0], inspect.Mapping)
    assert_type(mapping.region, inspect.RegionRun | None)
    assert_type(mapping.whole, inspect.Mapping)
    assert_type(mapping.rss, int | None)
    assert_type(snapshot.total("rss"), int)
    assert_type(inspect.maps(), inspect.Snapshot)
    assert_type(inspect.at(mapping.start), inspect.Mapping | None)
    runs = assert_type(inspect.pages(mapping.start, PAGE), list[inspect.PageRun])
    assert_type(runs[0].flags, inspect.PageFlags)
    difference = assert_type(inspect.diff(snapshot, snapshot), inspect.Difference)
    assert_type(difference.changed, tuple[inspect.Change, ...])
    sharing = assert_type(inspect.sharing(), inspect.Sharing)
    assert_type(sharing.channels, tuple[inspect.Channel, ...])

"""An Mdl is a handle as an object."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest

from children import run_child
from constants import ALL_BUT_EXECUTE, READ, READ_ONLY, RW
from descriptors import memory_files
from forked import in_child
from kernel_oracle import PAGE
from leaks import read_descriptors
from vmm_linux import VMM, Mdl, Rights, Seal, VmmFlags
from vmm_linux._default_vmm import default_vmm
from vmm_linux.errors import (
    Busy,
    HandleRevoked,
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    ResourceNotFound,
)

SIZE = 4 * PAGE


# ---- the object ----------------------------------------------------------------------------------


def test_an_mdl_is_its_handle(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    info = vmm.handle_info(mdl.handle)
    assert (mdl.vmm, mdl.size, len(mdl), mdl.closed) == (vmm, SIZE, SIZE, False)
    assert (mdl.rights, mdl.sid, mdl.seals) == (info.rights, info.sid, Seal(0))
    assert mdl.rights == ALL_BUT_EXECUTE
    assert vmm.mdl(SIZE, READ | VmmFlags.EXECUTE).rights == READ_ONLY | Rights.MAP_EXECUTE


def test_locked_takes_the_memory_at_once(vmm: VMM) -> None:
    locked, lazy = vmm.mdl(SIZE, RW | VmmFlags.LOCKED), vmm.mdl(SIZE)
    assert os.fstat(locked.fileno()).st_blocks * 512 == SIZE
    assert os.fstat(lazy.fileno()).st_blocks == 0


def test_its_text_tells_size_rights_and_state(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    assert repr(mdl) == f"<Mdl of {SIZE} bytes: TRANSFER|COPY|GET_SID|MAP_READ|MAP_WRITE>"
    mdl.freeze()
    assert repr(mdl.read_only()).endswith("MAP_READ, sealed FREEZE>")
    child = mdl.clone()
    vmm.handle_revoke(mdl.handle)
    assert "was revoked" in repr(child)
    mdl.close()
    assert repr(mdl) == "<Mdl, closed>"
    assert bool(mdl) is True


@pytest.mark.parametrize("arguments", [(0,), (-1,), (PAGE, 0), (PAGE, "RW"), (True,), ("1",)])
def test_arguments_that_mdl_create_refuses_make_no_mdl(arguments: Any, vmm: VMM) -> None:  # noqa: ANN401
    before = memory_files()
    with pytest.raises(InvalidArgument, match="mdl_create"):
        vmm.mdl(*arguments)
    assert memory_files() == before


def test_mapping_gives_what_rights_and_seals_allow(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    writable = mdl.map()
    writable.write(b"shared")
    assert writable.query().protection == RW
    readable = mdl.read_only().map()
    assert (readable.read(6), readable.query().protection) == (b"shared", READ)
    assert mdl.map(READ).query().protection == READ
    mdl.publish()
    assert mdl.map().query().protection == READ
    writable.write(b"go on!")
    assert readable.read(6) == b"go on!"
    with pytest.raises(NoCapability, match="sealed"):
        mdl.map(RW)


def test_where_some_segments_alone_are_sealed_mapping_gives_what_all_allow(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE, segment_size=PAGE)
    mdl.clone(0, PAGE).freeze()
    assert mdl.seals == Seal(0)
    assert mdl.map().query().protection == READ
    assert not mdl.array(SIZE, "u1").flags.writeable
    assert mdl.map(offset=PAGE).query().protection == RW
    with pytest.raises(NoCapability, match="sealed"):
        mdl.map(RW)


def test_nothing_is_executable_unless_asked_for(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE, RW | VmmFlags.EXECUTE)
    assert mdl.map().query().protection == RW
    assert mdl.map(READ | VmmFlags.EXECUTE).query().protection == READ | VmmFlags.EXECUTE


def test_a_handle_without_map_read_is_not_mapped(vmm: VMM) -> None:
    whole = vmm.mdl(SIZE)
    mdl = Mdl.from_handle(vmm, vmm.handle_copy(whole.handle, Rights.GET_SID))
    with pytest.raises(NoCapability, match="MAP_READ"):
        mdl.map()


def test_parts_are_mapped_and_cloned(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.map().write(b"window", PAGE)
    assert len(mdl.map(None, PAGE)) == SIZE - PAGE
    assert mdl.map(READ, PAGE, PAGE).read(6) == b"window"
    window = mdl.clone(PAGE, PAGE)
    assert (len(window), window.map().read(6)) == (PAGE, b"window")
    assert window.sid != mdl.sid
    assert len(mdl.clone()) == SIZE


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-PAGE, PAGE),
        (SIZE, None),
        (SIZE, PAGE),
        (0, 0),
        (0, SIZE + PAGE),
        (PAGE, SIZE),
        (0, -PAGE),
        (1, PAGE),
        (0, 1),
        (True, PAGE),
        (0, False),
        (None, PAGE),
        (2**64, PAGE),
        (0, 2**64),
        ("", None),
    ],
)
def test_what_is_not_inside_the_buffer_is_refused(
    offset: Any,  # noqa: ANN401
    length: Any,  # noqa: ANN401
    vmm: VMM,
) -> None:
    mdl = vmm.mdl(SIZE)
    before = read_descriptors()
    with pytest.raises(InvalidArgument):
        mdl.map(None, offset, length)
    with pytest.raises(InvalidArgument):
        mdl.clone(offset, length)
    assert read_descriptors() == before


def test_freezing_waits_for_every_writable_region(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    region = mdl.map()
    with pytest.raises(Busy, match="writable mapping"):
        mdl.freeze()
    del region
    mdl.freeze()
    assert mdl.seals == Seal.FREEZE
    assert memoryview(mdl.map()).readonly


def test_bytes_make_a_frozen_buffer_and_with_write_another(vmm: VMM) -> None:
    frozen = Mdl.from_bytes(b"data", vmm=vmm)
    assert (frozen.vmm, frozen.size, frozen.seals) == (vmm, PAGE, Seal.FREEZE)
    assert frozen.map().read(5) == b"data\0"
    writable = Mdl.from_bytes(bytearray(b"data"), RW, vmm=vmm)
    assert writable.map().write(b"more") == 4
    for data in (b"", "text", None, memoryview(b"abcd")[::2]):
        with pytest.raises(InvalidArgument):
            Mdl.from_bytes(data, vmm=vmm)  # type: ignore[arg-type]


def test_what_is_no_vmm_is_refused(vmm: VMM) -> None:
    for wrong in (5, VMM, "vmm", vmm.endpoint):
        with pytest.raises(InvalidArgument, match="not a VMM"):
            Mdl.from_bytes(b"data", vmm=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="not a VMM"):
            Mdl.from_fd(0, vmm=wrong)  # type: ignore[arg-type]


# ---- its end -------------------------------------------------------------------------------------


def test_closing_it_closes_handle_and_descriptor(vmm: VMM) -> None:
    before = memory_files()
    mdl = vmm.mdl(SIZE)
    mdl.fileno()
    assert memory_files() == before + 2
    mdl.close()
    mdl.close()
    assert memory_files() == before
    assert mdl.closed


def test_closing_it_closes_the_handle_though_somebody_closed_the_descriptor(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    os.close(mdl.fileno())
    mdl.close()
    assert mdl.closed
    with pytest.raises(ResourceNotFound):
        vmm.mdl_get_size(mdl.handle)


def test_leaving_it_closes_it_and_dropping_it_too(vmm: VMM) -> None:
    before = memory_files()
    with vmm.mdl(SIZE) as mdl:
        assert memory_files() == before + 1
    with pytest.raises(ResourceNotFound), mdl:
        pass
    node: list[object] = [vmm.mdl(SIZE)]
    node.append(node)
    del node
    gc.collect()
    assert memory_files() == before


def test_mappings_outlive_it(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    region = mdl.map()
    mdl.close()
    assert region.write(b"still here") == 10
    view = memoryview(region)
    del region, mdl
    assert bytes(view[:5]) == b"still"


def test_every_method_of_a_closed_or_revoked_mdl_says_so(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    revoked = mdl.read_only()
    vmm.handle_revoke(mdl.handle)
    mdl.close()
    for ended, kind in ((mdl, ResourceNotFound), (revoked, HandleRevoked)):
        for name in ("map", "clone", "read_only", "publish", "freeze", "fileno", "__len__"):
            with pytest.raises(kind):
                getattr(ended, name)()
        for name in ("size", "rights", "seals", "sid"):
            with pytest.raises(kind):
                getattr(ended, name)
        with pytest.raises(kind):
            ended.array(1)
        with pytest.raises(kind), ended:
            pass
    revoked.close()


def test_it_is_closed_with_its_vmm() -> None:
    with VMM() as vmm:
        mdl = vmm.mdl(SIZE)
        mdl.fileno()
    assert mdl.closed
    with pytest.raises(InvalidOperation, match="VMM is closed"):
        mdl.map()
    mdl.close()


def test_a_forked_child_s_end_of_it_is_no_matter_to_the_parent(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    region = mdl.map()
    fd = mdl.fileno()

    def child_uses_and_closes() -> list[int]:
        region.write(b"the child's")
        size = len(mdl.map())
        mdl.close()
        return [size, int(mdl.closed)]

    assert in_child(child_uses_and_closes) == [SIZE, 1]
    assert (region.read(11), mdl.fileno(), mdl.size) == (b"the child's", fd, SIZE)


# ---- the package's own VMM -----------------------------------------------------------------------


def test_objects_without_a_vmm_share_one_that_is_made_when_needed() -> None:
    first, second = Mdl.from_bytes(b"a"), Mdl.from_bytes(b"b")
    assert first.vmm is second.vmm is default_vmm()
    assert isinstance(first.vmm, VMM)
    first.vmm.close()
    assert first.closed
    assert Mdl.from_bytes(b"c").vmm is default_vmm() is not second.vmm
    default_vmm().close()


def test_threads_that_come_at_once_get_the_same() -> None:
    default_vmm().close()
    barrier = threading.Barrier(4)
    found = []

    def come() -> None:
        barrier.wait()
        found.append(default_vmm())

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One that found a closed VMM may have put a new one in its place before another looked.
    assert not default_vmm().closed
    default_vmm().close()


def test_a_forked_child_has_one_of_its_own() -> None:
    inherited = Mdl.from_bytes(b"the parent's")

    def child_makes_another() -> list[bool]:
        made = Mdl.from_bytes(b"the child's")
        alike = made.vmm is inherited.vmm
        return [alike, inherited.map().read(12) == b"the parent's", inherited.vmm.closed]

    assert in_child(child_makes_another) == [False, True, False]
    assert inherited.map().read(12) == b"the parent's"
    inherited.vmm.close()


def use_it_and_exit() -> None:
    """Leave objects of the package's own VMM open at exit, and use one after that began."""
    import atexit

    kept: list[Any] = []
    atexit.register(lambda: print(kept[0].map().read(4)))
    from vmm_linux import Mdl

    kept.append(Mdl.from_bytes(b"late"))


def test_it_does_not_warn_and_lasts_until_the_very_end() -> None:
    child = run_child(use_it_and_exit)
    assert (child.returncode, child.stdout, child.stderr) == (0, "b'late'\n", "")


# ---- without multiprocessing ---------------------------------------------------------------------


def make_them_where_no_module_can_be_loaded() -> None:
    """Make a buffer and an event with no descriptor left for a module, then with some."""
    import resource
    import sys
    from pathlib import Path

    from vmm_linux import VMM, Event, _sharer

    used = sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with VMM() as vmm:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, limits[1]))
        with vmm.mdl(1 << 16) as mdl:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, limits[1]))
            with Event() as event:
                event.set()
                print(mdl.map().size, event.is_set(), "multiprocessing.reduction" in sys.modules)
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        with vmm.mdl(1 << 16) as mdl, Event() as event:
            from multiprocessing.reduction import ForkingPickler

            print(len(ForkingPickler.dumps((mdl, event))) > 0)
            _sharer.stop()


def test_where_multiprocessing_cannot_be_loaded_buffers_and_events_do_all_else() -> None:
    child = run_child(make_them_where_no_module_can_be_loaded)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "65536 True False\nTrue\n"

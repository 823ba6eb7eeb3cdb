"""An Mdl is a handle as an object; descriptors make handles and come of them."""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from children import run_child
from forked import in_child
from kernel_oracle import PAGE, maps_between
from leaks import read_descriptors
from vmm_linux import VMM, Mdl, Rights, Seal, VmmFlags
from vmm_linux._own_vmm import own_vmm
from vmm_linux.errors import (
    Busy,
    HandleRevoked,
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    QuotaExceeded,
    ResourceNotFound,
    SecurityDisallow,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ = VmmFlags.READ
RW = VmmFlags.READ | VmmFlags.WRITE
SIZE = 4 * PAGE
ALL_BUT_EXECUTE = ~Rights(0) & ~Rights.MAP_EXECUTE
READ_ONLY = ALL_BUT_EXECUTE & ~Rights.MAP_WRITE
SIZED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
O_PATH = 0o10000000
MFD_HUGETLB = 4


@pytest.fixture
def vmm() -> Iterator[VMM]:
    """An endpoint."""
    with VMM() as endpoint:
        yield endpoint


def memory_files() -> int:
    """How many descriptors of memory files this process has."""
    return sum("/memfd:" in target for target in read_descriptors().values())


def a_memfd(size: int = SIZE, seals: int = SIZED, flags: int = os.MFD_ALLOW_SEALING) -> int:
    """A memfd that somebody else made."""
    fd = os.memfd_create("somebody's", flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def reopened(fd: int, flags: int) -> int:
    """The same file opened otherwise; the first descriptor is closed."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    finally:
        os.close(fd)


# ---- the object ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("arguments", [(0,), (1,), (PAGE, 0), (PAGE, "RW"), (True,), ("1",)])
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
    assert (readable.read(0, 6), readable.query().protection) == (b"shared", READ)
    assert mdl.map(READ).query().protection == READ
    mdl.publish()
    assert mdl.map().query().protection == READ
    writable.write(b"go on!")
    assert readable.read(0, 6) == b"go on!"
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
    mdl = Mdl(vmm, vmm.handle_copy(whole.handle, Rights.GET_SID))
    with pytest.raises(NoCapability, match="MAP_READ"):
        mdl.map()


def test_parts_are_mapped_and_cloned(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.map().write(b"window", PAGE)
    assert len(mdl.map(None, PAGE)) == SIZE - PAGE
    assert mdl.map(READ, PAGE, PAGE).read(0, 6) == b"window"
    window = mdl.clone(PAGE, PAGE)
    assert (len(window), window.map().read(0, 6)) == (PAGE, b"window")
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
    assert frozen.map().read(0, 5) == b"data\0"
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


# ---- its end ---------------------------------------------------------------------------------


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
    assert (region.read(0, 11), mdl.fileno(), mdl.size) == (b"the child's", fd, SIZE)


# ---- the package's own VMM -------------------------------------------------------------------


def test_objects_without_a_vmm_share_one_that_is_made_when_needed() -> None:
    first, second = Mdl.from_bytes(b"a"), Mdl.from_bytes(b"b")
    assert first.vmm is second.vmm is own_vmm()
    assert isinstance(first.vmm, VMM)
    first.vmm.close()
    assert first.closed
    assert Mdl.from_bytes(b"c").vmm is own_vmm() is not second.vmm
    own_vmm().close()


def test_threads_that_come_at_once_get_the_same() -> None:
    own_vmm().close()
    barrier = threading.Barrier(4)
    found = []

    def come() -> None:
        barrier.wait()
        found.append(own_vmm())

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One that found a closed VMM may have put a new one in its place before another looked.
    assert not own_vmm().closed
    own_vmm().close()


def test_a_forked_child_has_one_of_its_own() -> None:
    inherited = Mdl.from_bytes(b"the parent's")

    def child_makes_another() -> list[bool]:
        made = Mdl.from_bytes(b"the child's")
        alike = made.vmm is inherited.vmm
        return [alike, inherited.map().read(0, 12) == b"the parent's", inherited.vmm.closed]

    assert in_child(child_makes_another) == [False, True, False]
    assert inherited.map().read(0, 12) == b"the parent's"
    inherited.vmm.close()


def use_it_and_exit() -> None:
    """Leave objects of the package's own VMM open at exit, and use one after that began."""
    import atexit

    kept: list[Any] = []
    atexit.register(lambda: print(kept[0].map().read(0, 4)))
    from vmm_linux import Mdl

    kept.append(Mdl.from_bytes(b"late"))


def test_it_does_not_warn_and_lasts_until_the_very_end() -> None:
    child = run_child(use_it_and_exit)
    assert (child.returncode, child.stdout, child.stderr) == (0, "b'late'\n", "")


# ---- without multiprocessing -----------------------------------------------------------------


def make_them_where_no_module_can_be_loaded() -> None:
    """Make a buffer and an event with no descriptor left for a module, then with some."""
    import resource
    import sys
    from pathlib import Path

    from vmm_linux import VMM, Event

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


def test_where_multiprocessing_cannot_be_loaded_buffers_and_events_do_all_else() -> None:
    child = run_child(make_them_where_no_module_can_be_loaded)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "65536 True False\nTrue\n"


# ---- descriptors out -------------------------------------------------------------------------


def test_a_descriptor_is_fresh_close_on_exec_and_open_for_what_the_rights_say(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, RW)
    for rights, mode in ((None, os.O_RDWR), (READ_ONLY, os.O_RDONLY), (0, os.O_RDONLY)):
        fds = [vmm.handle_fileno(handle, rights) for _ in range(2)]
        assert fds[0] != fds[1]
        for fd in fds:
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == mode
            assert not os.get_inheritable(fd)
            assert os.fstat(fd).st_size == SIZE
            os.close(fd)
    vmm.handle_close(handle)


def test_a_descriptor_needs_transfer_and_the_rights_asked_for(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, READ)
    before = read_descriptors()
    for refused, rights in (
        (handle, Rights.MAP_WRITE),
        (vmm.handle_copy(handle, Rights.MAP_READ), None),
    ):
        with pytest.raises(NoCapability, match="handle_fileno"):
            vmm.handle_fileno(refused, rights)
    with pytest.raises(InvalidArgument, match="unknown bits"):
        vmm.handle_fileno(handle, 0x40)
    for wrong in (True, "1", 0, 2**64 - 1, handle + 1):
        with pytest.raises(InvalidArgument, match="handle_fileno"):
            vmm.handle_fileno(wrong)  # type: ignore[arg-type]
    assert read_descriptors() == before


def test_a_clone_has_no_descriptor_and_none_is_opened_for_it(vmm: VMM) -> None:
    clone = vmm.mdl(SIZE).clone(PAGE, PAGE)
    before = read_descriptors()
    with pytest.raises(InvalidOperation, match="a clone or in segments"):
        vmm.handle_fileno(clone.handle, Rights.MAP_READ)
    with pytest.raises(InvalidOperation, match="a clone or in segments"):
        clone.fileno()
    assert read_descriptors() == before


def test_a_buffer_in_segments_has_no_one_descriptor_and_its_clone_has_just_its_own() -> None:
    with VMM() as vmm, vmm.mdl(8 * PAGE, segment_size=2 * PAGE) as whole:
        with pytest.raises(InvalidOperation, match="a clone or in segments"):
            whole.fileno()
        there = whole.map()
        there.write(b"x" * 8 * PAGE)
        files = [mapping.inode for mapping in maps_between(there.base, there.base + 8 * PAGE)]
        assert len(set(files)) == 4
        with whole.clone(2 * PAGE, 2 * PAGE) as window:
            part = window.map()
            (mapping,) = maps_between(part.base, part.base + 2 * PAGE)
            assert mapping.inode == files[1]
            assert len(window) == 2 * PAGE


def test_fileno_ends_with_the_handle(vmm: VMM) -> None:
    origin = vmm.mdl(SIZE)
    copy = origin.read_only()
    copy.fileno()
    vmm.handle_revoke(origin.handle)
    with pytest.raises(HandleRevoked):
        copy.fileno()
    with VMM() as other:
        mdl = other.mdl(SIZE)
        mdl.fileno()
    with pytest.raises(InvalidOperation, match="closed"):
        mdl.fileno()


def test_fileno_is_made_once(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    assert mdl.fileno() == mdl.fileno()
    barrier = threading.Barrier(8)
    other = vmm.mdl(SIZE)
    before = memory_files()
    found: list[int] = []

    def ask() -> None:
        barrier.wait()
        found.append(other.fileno())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found)), memory_files()) == (8, 1, before + 1)


# ---- descriptors in --------------------------------------------------------------------------


@pytest.mark.parametrize("rights", [READ_ONLY, ALL_BUT_EXECUTE], ids=["read-only", "read-write"])
def test_a_descriptor_of_a_buffer_becomes_a_handle_of_it(rights: Rights, vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.map().write(b"the same")
    fd = vmm.handle_fileno(mdl.handle, rights)
    with VMM() as other:
        came = Mdl.from_fd(fd, vmm=other)
        assert (came.rights, came.size, came.sid) == (rights, SIZE, mdl.sid)
        assert came.map().read(0, 8) == b"the same"
        os.fstat(fd)  # still the caller's
        os.close(fd)
        assert came.map().query().protection == (RW if rights & Rights.MAP_WRITE else READ)
        with pytest.raises(NoCapability, match="EXECUTE"):
            came.map(READ | VmmFlags.EXECUTE)


def test_a_memfd_of_somebody_else_s_is_fine_if_it_is_sealed(vmm: VMM) -> None:
    fd = a_memfd()
    os.pwrite(fd, b"theirs", PAGE)
    mdl = Mdl.from_fd(fd, vmm=vmm)
    os.close(fd)
    assert mdl.map().read(PAGE, 6) == b"theirs"
    assert mdl.rights == ALL_BUT_EXECUTE


def test_a_memfd_frozen_by_somebody_else_is_read(vmm: VMM) -> None:
    fd = a_memfd(seals=SIZED | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    mdl = Mdl.from_fd(fd, Seal.FREEZE, SIZE, vmm=vmm)
    os.close(fd)
    assert mdl.seals == Seal.FREEZE
    assert mdl.map().query().protection == READ
    with pytest.raises(NoCapability, match="sealed"):
        mdl.map(RW)
    with pytest.raises(NoCapability, match="no more seals"):
        mdl.publish()


def unsealed_file(folder: Path) -> int:
    """A file in /dev/shm, which knows of seals and has the one that forbids them."""
    del folder
    path = Path(f"/dev/shm/vmm_linux test {os.getpid()}")  # noqa: S108
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    path.unlink()
    os.ftruncate(fd, PAGE)
    return fd


def end_of_a_pipe(folder: Path) -> int:
    """A pipe's end for reading."""
    del folder
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


def file_on_disk(folder: Path) -> int:
    """An ordinary file of whole pages."""
    path = folder / "file"
    path.write_bytes(bytes(PAGE))
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


UNFIT: dict[str, tuple[Callable[[Path], int], str]] = {
    "a file": (file_on_disk, "no memfd"),
    "a file in /dev/shm": (unsealed_file, "seals"),
    "a folder": (lambda folder: os.open(folder, os.O_RDONLY | os.O_CLOEXEC), "no memfd"),
    "a pipe": (end_of_a_pipe, "no memfd"),
    "a socket": (lambda _: socket.socket(socket.AF_UNIX).detach(), "no memfd"),
    "/dev/null": (lambda _: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "no memfd"),
    "an eventfd": (lambda _: os.eventfd(0, os.EFD_CLOEXEC), "no memfd"),
    "an unsealed memfd": (lambda _: a_memfd(seals=0), "seals 0x0"),
    "one that can shrink": (lambda _: a_memfd(seals=fcntl.F_SEAL_GROW), "seals 0x4"),
    "one that can grow": (lambda _: a_memfd(seals=fcntl.F_SEAL_SHRINK), "seals 0x2"),
    "one without seals": (lambda _: os.memfd_create("x", os.MFD_CLOEXEC), "seals 0x1"),
    "an empty one": (lambda _: a_memfd(0), "0 bytes"),
    "half a page": (lambda _: a_memfd(PAGE // 2), "whole pages"),
    "huge pages": (lambda _: a_memfd(0, flags=os.MFD_ALLOW_SEALING | MFD_HUGETLB), "ordinary"),
    "open for writing only": (lambda _: reopened(a_memfd(), os.O_WRONLY), "access mode 1"),
    "a mere path": (lambda _: reopened(a_memfd(), O_PATH), "no memfd"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_memory_of_a_buffer_is_refused_and_left_alone(
    name: str, vmm: VMM, tmp_path: Path
) -> None:
    make, why = UNFIT[name]
    fd = make(tmp_path)
    before = read_descriptors()
    try:
        with pytest.raises(InvalidArgument, match=f"handle_from_fd: .*{why}"):
            vmm.handle_from_fd(fd)
        with pytest.raises(InvalidArgument, match=why):
            Mdl.from_fd(fd, vmm=vmm)
        assert read_descriptors() == before
    finally:
        os.close(fd)


def test_a_number_that_is_no_descriptor_is_refused(vmm: VMM) -> None:
    closed = a_memfd()
    os.close(closed)
    for wrong in (closed, -1, 2**31, 2**32 + closed, 2**64 - 1, 2**70, True, 1.0, "3", None):
        with pytest.raises(InvalidArgument, match="handle_from_fd"):
            vmm.handle_from_fd(wrong)  # type: ignore[arg-type]


def test_the_receiver_s_demands_hold_for_descriptors_too(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    fd = mdl.fileno()
    before = read_descriptors()
    for require, most in ((Seal.FREEZE, None), (Seal.PUBLISH, None), (0, SIZE - 1)):
        with pytest.raises(SecurityDisallow, match="handle_from_fd"):
            vmm.handle_from_fd(fd, require, most)
    wrong: list[tuple[Any, Any]] = [(4, None), ("x", None), (0, -1), (0, True)]
    for require, most in wrong:
        with pytest.raises(InvalidArgument, match="handle_from_fd"):
            vmm.handle_from_fd(fd, require, most)
    assert read_descriptors() == before
    mdl.publish()
    assert Mdl.from_fd(mdl.fileno(), Seal.PUBLISH, SIZE, vmm=vmm).size == SIZE


def test_where_no_descriptor_is_left_the_limit_is_named(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    fd = mdl.fileno()
    before = read_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, limits[1]))
    try:
        with pytest.raises(QuotaExceeded, match=r"handle_from_fd: .*RLIMIT_NOFILE"):
            vmm.handle_from_fd(fd)
        with pytest.raises(QuotaExceeded, match=r"handle_fileno: .*RLIMIT_NOFILE"):
            vmm.handle_fileno(mdl.handle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read_descriptors() == before


USE_A_DESCRIPTOR = """
import sys
from vmm_linux import Mdl
mdl = Mdl.from_fd(int(sys.argv[1]), max_size=1 << 20)
region = mdl.map()
print(mdl.rights.name, region.read(0, 5))
if sys.argv[2] == "write":
    region.write(b"child")
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_program_that_is_started_gets_a_buffer_by_its_descriptor(
    writable: bool, vmm: VMM
) -> None:
    mdl = vmm.mdl(SIZE)
    region = mdl.map()
    region.write(b"hello")
    sent = mdl if writable else mdl.read_only()
    child = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c", USE_A_DESCRIPTOR),
            *(str(sent.fileno()), "write" if writable else "read"),
        ],
        pass_fds=[sent.fileno()],
        check=True,
        capture_output=True,
        text=True,
    )
    rights = ALL_BUT_EXECUTE if writable else READ_ONLY
    assert (child.stdout, child.stderr) == (f"{rights.name} b'hello'\n", "")
    assert region.read(0, 5) == (b"child" if writable else b"hello")

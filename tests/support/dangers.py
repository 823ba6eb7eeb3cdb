"""What a compromised component could do, driven for real in a VMM with limits, and what holds.

Each loop never wants to end. It must meet QUOTA_EXCEEDED, with the memory of this process and of
its files within bounds, another process as it was, and with a VMM that goes on working. Runs in a
child of the tests, and with larger bounds and counts in those of ``scripts/soak --dangers``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from constants import COMMITTED, MIB, RESERVED, RW
from kernel_oracle import PAGE
from vmm_linux import VMM, Limits, Rights, VmmFlags
from vmm_linux.errors import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIB = 1 << 40
#: So much memory a victim may have.
BOUND = 32 * MIB
#: And so much of it the package's own records take, at the largest scale.
RECORDS = 40 * MIB
#: So much memory a bystander has, and this in every byte of it.
HELD, BYTE = 8 * MIB, b"\xa5"
#: Seconds, and nothing that ``signal`` or ``socket`` would name.
PATIENCE, PR_SET_THP_DISABLE = 60, 41


class Victim:
    """A VMM with limits, a region of a tebibyte and a buffer."""

    def __init__(self, scale: int) -> None:
        self.vmm = VMM(
            limits=Limits(
                regions=20_000 * scale,
                reserved=8 * TIB,
                committed=BOUND * scale,
                locked=BOUND * scale,
                mappings=40_000 * scale,
                mdls=2_000 * scale,
                mdl_bytes=BOUND * scale,
                mdl_mappings=5_000 * scale,
                handles=20_000 * scale,
            )
        )
        self.handle = self.vmm.mdl_create(PAGE, VmmFlags.RWX_MASK)
        self.region = self.vmm.allocate(0, TIB, RESERVED)


def commit_and_touch(victim: Victim, number: int) -> None:
    """Take a mebibyte of private memory."""
    va = victim.region + number * MIB
    victim.vmm.commit(va, MIB)
    victim.vmm.write(va, b"x" * MIB)


def share_and_touch(victim: Victim, _number: int) -> None:
    """Take a mebibyte of shared memory."""
    va = victim.vmm.mdl_map(victim.vmm.mdl_create(MIB, RW), 0, MIB, 0, RW)
    victim.vmm.write(va, b"x" * MIB)


def convert(victim: Victim, _number: int) -> None:
    """Take a mebibyte, and make a buffer of it."""
    va = victim.vmm.allocate(0, MIB, COMMITTED)
    victim.vmm.write(va, b"x" * MIB)
    victim.vmm.mdl_create_from_vm(va, MIB, RW)


class Danger(NamedTuple):
    """A loop: how often it goes round, and what it does each time."""

    rounds: int
    step: Callable[[Victim, int], object]


DANGERS = {
    "1,000,000 Allocates": Danger(1_000_000, lambda it, _: it.vmm.allocate(0, PAGE, RESERVED)),
    "1 TiB reserved again and again": Danger(100, lambda it, _: it.vmm.allocate(0, TIB, RESERVED)),
    "1 TiB committed and touched": Danger(TIB // MIB, commit_and_touch),
    "1 TiB locked": Danger(
        TIB // MIB, lambda it, _: it.vmm.allocate(0, MIB, COMMITTED | VmmFlags.LOCKED)
    ),
    "1,000,000 fragments": Danger(
        1_000_000, lambda it, number: it.vmm.commit(it.region + 2 * number * PAGE, PAGE)
    ),
    "1,000,000 protections": Danger(
        1_000_000,
        lambda it, number: it.vmm.protect(it.region + 2 * number * PAGE, PAGE, VmmFlags.READ),
    ),
    "100,000 MdlCreates": Danger(100_000, lambda it, _: it.vmm.mdl_create(PAGE, RW)),
    "100,000 buffers of bytes": Danger(100_000, lambda it, _: it.vmm.mdl_create_from_buf(b"x", RW)),
    "1 TiB of buffers touched": Danger(TIB // MIB, share_and_touch),
    "1 TiB turned into buffers": Danger(TIB // MIB, convert),
    "1,000,000 copies": Danger(
        1_000_000, lambda it, _: it.vmm.handle_copy(it.handle, Rights.MAP_READ)
    ),
    "100,000 clones": Danger(100_000, lambda it, _: it.vmm.mdl_clone(it.handle, 0, PAGE)),
    "100,000 maps": Danger(100_000, lambda it, _: it.vmm.mdl_map(it.handle, 0, PAGE, 0, RW)),
}


def figure(file: str, label: str) -> int:
    """A figure of a file of /proc in bytes."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(label))


def taken() -> int:
    """Bytes of memory that this process has for itself and in its memory files, mapped or not."""
    files = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  paths are five times as slow
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:"):  # noqa: PTH115
                status = os.fstat(int(name))
                files[status.st_ino] = status.st_blocks * 512
    return figure("/proc/self/status", "RssAnon:") + sum(files.values())


class Bystander(NamedTuple):
    """Another process, with memory of its own: it does nothing but answer."""

    pid: int
    sock: socket.socket
    memory: int

    def state(self) -> tuple[object, ...]:
        """What it has by the kernel's word. It changes only if somebody changes it."""
        folder = Path(f"/proc/{self.pid}")
        figures = (
            figure(f"{folder}/smaps_rollup", label) for label in ("Anonymous:", "Swap:", "Locked:")
        )
        descriptors = sorted(entry.name for entry in (folder / "fd").iterdir())
        return *figures, descriptors, (folder / "maps").read_text()

    def answers(self) -> bool:
        """Whether it lives, and its memory holds what it put there."""
        self.sock.send(b"?", socket.MSG_NOSIGNAL)
        return self.sock.recv(1) == b"+"


@contextmanager
def bystander() -> Iterator[Bystander]:
    """A process that stands by until the end of the ``with`` block."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            stand_by(theirs)
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        ours.settimeout(PATIENCE)
        address = int.from_bytes(ours.recv(8), "little")
        one = Bystander(pid, ours, address)
        try:
            # Then it has gone every way that it will go, and touched what it touches there.
            assert one.answers()
            assert one.answers()
            yield one
        finally:
            ours.close()
            os.waitpid(pid, 0)


def stand_by(sock: socket.socket) -> None:
    """Hold memory, and tell whoever asks whether it is as it was."""
    # The kernel is not to gather this process's pages by itself.
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    memory = mmap.mmap(-1, HELD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(BYTE * HELD)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    sock.send(address.to_bytes(8, "little"))
    while sock.recv(1):
        sock.send(b"+" if memory[:].count(BYTE) == HELD else b"-")


def drive(victim: Victim, danger: Danger) -> int:
    """Go round until it is refused: how often it was not."""
    for number in range(danger.rounds):
        try:
            danger.step(victim, number)
        except QuotaExceeded as refusal:
            if refusal.errno is not None:
                raise
            return number
    raise AssertionError("nothing stopped it")


def attack(name: str, scale: int = 1) -> None:
    """Drive one danger, and say how far it came."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    danger = DANGERS[name]
    with bystander() as other:
        before, state = taken(), other.state()
        victim = Victim(scale)
        done = drive(victim, danger)
        assert done > 0
        for use in victim.vmm.usage():
            assert use.bound is not None
            assert use.used <= use.bound
        # The memory of pages or of buffers, and the package's records.
        grown = taken() - before
        assert grown <= BOUND * scale + RECORDS, f"this process has {grown} bytes more"
        assert other.state() == state, "another process has not what it had"
        assert other.answers(), "another process's memory has changed"
    for _ in range(3):
        with suppress(QuotaExceeded):
            danger.step(victim, done)
    victim.vmm._check()
    works(victim)
    print(f"stood: refused after {done:,}, {grown // MIB} MiB more in this process")


def works(victim: Victim) -> None:
    """The VMM works after the refusal, once it may, and ends well; so does another one."""
    vmm = victim.vmm
    vmm.limits = Limits.unlimited()
    va = vmm.allocate(0, 4 * PAGE, COMMITTED)
    vmm.write(va, b"it works")
    assert vmm.read(va, 8) == b"it works"
    vmm.handle_close(vmm.mdl_clone(victim.handle, 0, PAGE))
    vmm.close()
    with VMM() as another:
        another.allocate(0, PAGE, COMMITTED)


#: Of these the defaults alone stop each loop, without a page touched.
BY_DEFAULT: dict[str, Callable[[VMM, int], object]] = {
    "regions": lambda vmm, _: vmm.allocate(0, PAGE, RESERVED),
    "handles": lambda vmm, handle: vmm.handle_copy(handle, 0),
    "mdl_bytes": lambda vmm, _: vmm.mdl_create(1 << 30, RW),
    "committed": lambda vmm, _: vmm.allocate(0, 1 << 30, COMMITTED),
}


def attack_by_default(name: str) -> None:
    """Run away in a VMM that was given no limits."""
    refused = None
    with VMM() as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        try:
            for _ in range(1_000_000):
                BY_DEFAULT[name](vmm, handle)
        except QuotaExceeded as refusal:
            refused = refusal
        use = getattr(vmm.usage(), name)
    assert f"more {name} than" in str(refused), refused
    assert use.used <= use.bound < use.used + (1 << 30) + 1
    print("stood")

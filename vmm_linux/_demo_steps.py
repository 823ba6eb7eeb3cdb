"""The steps of the demonstration (see ``demo.py``).

A step is a function over one ``Run``: it makes a call, asks the kernel, and says what has to hold.
To add a step, write it and name it in ``STEPS``.
"""

import contextlib
import ctypes
import hashlib
import os
import resource
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vmm_linux import VMM, PageInfo, PageState, Retcode, VmmError, VmmFlags
from vmm_linux._report import Step, Subject, human

__all__ = ["RESERVATION", "STEPS", "Footprint", "Run"]

PAGE = os.sysconf("SC_PAGE_SIZE")
RESERVATION = 64 << 30
CHUNK = 8 << 20
"""Bytes read and hashed at a time."""


# ---- what the steps share -----------------------------------------------------------------------


class Footprint(NamedTuple):
    """Mappings and descriptors of this process at one moment.

    Not among the mappings: the stack, and what looks like memory of Python's own objects, which
    come and go (private, anonymous, readable and writable).
    """

    mappings: frozenset[str]
    descriptors: frozenset[str]

    @classmethod
    def look(cls) -> "Footprint":
        """Ask the kernel."""
        descriptors = set()
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists them
                descriptors.add(f"{link.name} -> {link.readlink()}")
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        return cls(frozenset(line for line in lines if is_lasting(line)), frozenset(descriptors))


def is_lasting(line: str) -> bool:
    """Whether a line of ``/proc/self/maps`` tells of neither the stack nor Python's objects."""
    _, permissions, _, _, _, *name = line.split(maxsplit=5)
    anonymous = not name or name[0].startswith(("[heap]", "[anon"))
    return name != ["[stack]"] and not (anonymous and permissions == "rw-p")


@dataclass
class Run:
    """One demonstration. FILE lies at ``base``; both halves of it are whole pages."""

    vmm: VMM
    subject: Subject
    before: Footprint
    base: int = 0
    step: Step = field(init=False)
    """The step that is being made."""

    @property
    def need(self) -> int:
        """Bytes of the pages that FILE needs."""
        return -(-self.subject.size // PAGE) * PAGE

    @property
    def first_half(self) -> tuple[int, int]:
        """Address and size of the pages made read-only. An only page is both halves."""
        return self.base, max(self.need // PAGE // 2, 1) * PAGE

    @property
    def second_half(self) -> tuple[int, int]:
        """Address and size of the pages given back."""
        skipped = self.need // PAGE // 2 * PAGE
        return self.base + skipped, self.need - skipped

    def call(self, name: str, **arguments: object) -> Any:  # noqa: ANN401 (what the method does)
        """Begin a step with a call of a method: what the method returned."""
        self.step = Step(name, arguments)
        try:
            value = getattr(self.vmm, name.lower())(*arguments.values())
        except VmmError as error:
            self.step.rc = error.rc
            raise
        self.step.rc = Retcode.OK
        return value

    def ask(self, va: int) -> dict[str, Any]:
        """What the kernel says of a page's mapping now: kept in the step."""
        kernel = described(self.vmm.query(va))
        self.step.kernel = kernel
        self.step.facts = [kernel["state"]]
        if "permissions" in kernel:
            charge = "charged" if "ac" in kernel["vm_flags"] else "not charged"
            self.step.facts = [kernel["permissions"], f"Rss {human(kernel['rss'])}", charge]
        return kernel

    def memory(self) -> int:
        """Bytes of memory, or of swap, behind the whole region."""
        found, va = 0, self.base
        while va < self.base + RESERVATION:
            record = described(self.vmm.query(va))
            found += record["rss"] + record.get("swap", 0)
            va = record["end"]
        return found


def described(info: PageInfo) -> dict[str, Any]:
    """The state of a page, and the smaps record of its mapping, or the bounds of the hole."""
    if (record := info.smaps) is None:
        return {"state": info.state.name, "start": info.base, "end": info.base + info.size}
    return {
        "state": info.state.name,
        "start": record.start,
        "end": record.end,
        "permissions": record.permissions,
        **record.figures,
        "vm_flags": sorted(record.vm_flags or ()),
    }


# ---- the steps ----------------------------------------------------------------------------------


def reserve(run: Run) -> None:
    """Addresses alone. The guard page keeps what is mapped below them a mapping of its own."""
    flags = VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE | VmmFlags.LOW_GUARD
    run.base = run.call("Allocate", addr=0, size=RESERVATION, flags=flags)
    kernel = run.ask(run.base)
    run.step.checks = {
        "all of it is reserved": kernel["state"] == PageState.RESERVED.name
        and kernel["end"] >= run.base + RESERVATION,
        "any access faults": kernel["permissions"] == "---p",
        "it takes no memory": kernel["rss"] == 0,
        "it is not charged": "ac" not in kernel["vm_flags"],
    }


def commit(run: Run) -> None:
    """Just the pages that FILE needs. They are charged and take no memory yet."""
    run.call("Commit", va=run.base, size=run.need, flags=0)
    kernel = run.ask(run.base)
    run.step.checks = {
        "it is committed": kernel["state"] == PageState.COMMITTED.name,
        "nothing else is": (kernel["start"], kernel["size"]) == (run.base, run.need),
        "it can be read and written": kernel["permissions"] == "rw-p",
        "it takes no memory": kernel["rss"] == 0,
        "it is charged": "ac" in kernel["vm_flags"],
    }


def read_in(run: Run) -> None:
    """The kernel reads FILE straight into the pages, through a view of them."""
    done = 0
    with (
        run.call("view", va=run.base, size=run.subject.size) as view,
        Path(run.subject.file).open("rb", buffering=0) as file,
    ):
        while count := file.readinto(view[done : done + CHUNK]):
            done += count
        run.step.checks["all of FILE was read"] = done == run.subject.size and not file.read(1)
    run.ask(run.base)


def verify(run: Run) -> None:
    """The bytes are copied out again and hashed. What FILE leaves of its last page is zeros."""
    digest, left, piece = hashlib.sha256(), run.subject.size, b""
    for va in range(run.base, run.base + run.need, CHUNK):
        piece = run.call("read", va=va, size=min(CHUNK, run.base + run.need - va))
        digest.update(piece[:left])
        left -= len(piece)
    run.step.arguments = {"va": run.base, "size": run.need}
    run.step.kernel["sha256"] = digest.hexdigest()
    run.step.facts = [
        f"SHA-256 {digest.hexdigest()[:8]}...",
        f"FILE's {run.subject.sha256[:8]}...",
    ]
    run.step.checks["it is FILE"] = digest.hexdigest() == run.subject.sha256
    run.step.checks["zeros follow"] = not any(piece[left:]) if left else True


def cost(run: Run) -> None:
    """What it costs: every page that FILE needs, and no other."""
    info = run.call("Query", va=run.base)
    kernel = run.ask(run.base)
    run.step.checks = {
        "the page is resident or swapped": info.resident is not False or info.swapped,
        "FILE's pages have memory": kernel["rss"] + kernel.get("swap", 0) == run.need,
        "no other page has": run.memory() == run.need,
    }


def make_read_only(run: Run) -> None:
    """The first half; the kernel keeps to it from now on."""
    va, size = run.first_half
    run.call("Protect", va=va, size=size, flags=VmmFlags.READ)
    kernel = run.ask(va)
    run.step.checks = {
        "the kernel allows reading alone": kernel["permissions"] == "r--p",
        "just there": (kernel["start"], kernel["size"]) == (va, size),
    }


def write_refused(run: Run) -> None:
    """A write over there is an error, and changes nothing."""
    before = run.vmm.read(run.base, 1)
    with contextlib.suppress(VmmError):
        run.call("write", va=run.base, data=bytes([before[0] ^ 0xFF]))
    run.ask(run.base)
    run.step.checks = {
        "the write is refused": run.step.rc is Retcode.INVALID_OPERATION,
        "the byte is as it was": run.vmm.read(run.base, 1) == before,
    }


def give_back(run: Run) -> None:
    """The second half: its memory goes back to the system, its addresses stay."""
    va, size = run.second_half
    before = run.memory()
    run.call("Decommit", va=va, size=size)
    kernel = run.ask(va)
    returned = before - run.memory()
    kernel["returned"] = returned
    run.step.facts.insert(1, f"{human(returned)} back")
    run.step.checks = {
        "it is reserved": kernel["state"] == PageState.RESERVED.name,
        "any access faults": kernel["permissions"] == "---p",
        "it is not charged": "ac" not in kernel["vm_flags"],
        "its memory is returned": returned == size,
    }


def touch(run: Run) -> None:
    """A child that reads the last page given back dies of it."""
    va = run.base + run.need - PAGE
    run.step = Step("touch", {"va": va})
    child = os.fork()
    if child == 0:
        touch_and_die(va)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kernel = run.ask(va)
    kernel["signal"] = signal.Signals(-code).name if code < 0 else None
    run.step.facts = [f"died of {kernel['signal']}", kernel["permissions"]]
    run.step.checks["the child dies of SIGSEGV"] = code == -signal.SIGSEGV


def touch_and_die(va: int) -> NoReturn:
    """Read a byte without asking anybody: what a C pointer does. Nothing else leaves the child."""
    try:
        with contextlib.suppress(ValueError):  # lower already
            # One byte turns off core files and programs that collect them; 0 only the files.
            resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(va, 1)
    finally:
        os._exit(0)


def free(run: Run) -> None:
    """All of it."""
    run.call("Free", va=run.base, size=RESERVATION)
    kernel = run.ask(run.base)
    run.step.checks["nothing is left there"] = (
        kernel["state"] == PageState.FREE.name
        and kernel["start"] < run.base
        and kernel["end"] >= run.base + RESERVATION
    )


def close(run: Run) -> None:
    """The process's mappings and descriptors are the ones that it began with."""
    run.call("close")
    after = Footprint.look()
    for name, had, has in zip(Footprint._fields, run.before, after, strict=True):
        run.step.kernel[name] = len(has)
        run.step.kernel[f"{name}_changed"] = sorted(had ^ has)
        run.step.checks[f"{name} are as before"] = had == has
    run.step.facts = [
        f"{len(after.mappings)} maps, {len(after.descriptors)} fds",
        f"{len(run.before.mappings)} and {len(run.before.descriptors)} before",
    ]


STEPS = (
    reserve,
    commit,
    read_in,
    verify,
    cost,
    make_read_only,
    write_refused,
    give_back,
    touch,
    free,
    close,
)

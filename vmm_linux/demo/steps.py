"""The demonstration's first half: memory of one process (see ``vmm_linux.demo``).

A step is a function over one ``Run``: it makes a call, reads the kernel's data, and checks them.
To add a step, write it and name it in ``STEPS``.
"""

import contextlib
import ctypes
import functools
import hashlib
import signal
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vmm_linux import Handle, PageState, Retcode, VmmError, VmmFlags
from vmm_linux._tools.text import human
from vmm_linux.demo.caller import (
    CHUNK,
    PAGE,
    RESERVATION,
    Caller,
    ask,
    described,
    exit_code_of_child,
    signal_name,
)
from vmm_linux.demo.peer import Other
from vmm_linux.demo.report import Step, Subject


@dataclass
class Run(Caller):
    """One demonstration. FILE is at ``base``; both its halves are whole pages."""

    subject: Subject
    at_end: ExitStack
    """Ends the steps' resources in every case."""
    base: int = 0
    handles: dict[str, Handle] = field(default_factory=dict)
    """Of the MDL buffers: ``file``, ``window`` and ``board``."""
    other: Other = field(init=False)
    """The other process."""
    board: int = 0
    """The address of the buffer ``board``."""

    @property
    def need(self) -> int:
        """Bytes of the pages that FILE needs."""
        return -(-self.subject.size // PAGE) * PAGE

    @property
    def first_half(self) -> tuple[int, int]:
        """Address and size of the pages made read-only. A single page is both halves."""
        return self.base, max(self.need // PAGE // 2, 1) * PAGE

    @property
    def second_half(self) -> tuple[int, int]:
        """Address and size of the pages given back."""
        skipped = self.need // PAGE // 2 * PAGE
        return self.base + skipped, self.need - skipped

    def figures(self, size: int = RESERVATION) -> dict[str, int]:
        """Sums over the first bytes of the region: ``memory`` (or swap) behind it, rss and pss."""
        found, va = {"memory": 0, "rss": 0, "pss": 0}, self.base
        while va < self.base + size:
            record = described(self.vmm.query(va))
            found["memory"] += record["rss"] + record.get("swap", 0)
            found["rss"] += record["rss"]
            found["pss"] += record["pss"]
            va = record["end"]
        return found


def reserve(run: Run) -> None:
    """Addresses alone. The guard page keeps what is mapped below them a mapping of its own."""
    flags = VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE | VmmFlags.LOW_GUARD
    run.base = run.call("Allocate", addr=0, size=RESERVATION, flags=flags)
    kernel = ask(run, run.base)
    run.step.checks = {
        "all of it is reserved": kernel["state"] == PageState.RESERVED.name
        and kernel["end"] >= run.base + RESERVATION,
        "any access faults": kernel["permissions"] == "---p",
        "it takes no memory": kernel["rss"] == 0,
        "it is not charged": "ac" not in kernel["vm_flags"],
    }


def commit(run: Run) -> None:
    """Exactly the pages that FILE needs. They are charged, but take no memory yet."""
    run.call("Commit", va=run.base, size=run.need, flags=0)
    kernel = ask(run, run.base)
    run.step.checks = {
        "it is committed": kernel["state"] == PageState.COMMITTED.name,
        "nothing else is": (kernel["start"], kernel["size"]) == (run.base, run.need),
        "it can be read and written": kernel["permissions"] == "rw-p",
        "it takes no memory": kernel["rss"] == 0,
        "it is charged": "ac" in kernel["vm_flags"],
    }


def read_in(run: Run) -> None:
    """The kernel reads FILE straight into the pages, through a view of them."""
    read_part(run, run.base, run.subject.size)


def read_part(run: Run, va: int, size: int) -> None:
    """Read the part of FILE that lies at an address, up to FILE's end."""
    done = 0
    with (
        run.call("view", va=va, size=size) as view,
        Path(run.subject.file).open("rb", buffering=0) as file,
    ):
        file.seek(va - run.base)
        while count := file.readinto(view[done : done + CHUNK]):
            done += count
        run.step.checks["all of it was read"] = done == size and not file.read(1)
    ask(run, va)


def verify(run: Run) -> None:
    """The bytes are copied out again and hashed. The rest of FILE's last page is zeros."""
    digest, left, piece = hashlib.sha256(), run.subject.size, b""
    for va in range(run.base, run.base + run.need, CHUNK):
        piece = run.call("read", va=va, size=min(CHUNK, run.base + run.need - va))
        digest.update(piece[:left])
        left -= len(piece)
    run.step.arguments = {"va": run.base, "size": run.need}
    run.compare("it is FILE", digest.hexdigest(), run.subject.sha256)
    run.step.checks["zeros follow"] = not any(piece[left:]) if left else True


def cost(run: Run) -> None:
    """The cost: every page that FILE needs, and no other."""
    info = run.call("Query", va=run.base)
    kernel = ask(run, run.base)
    run.step.checks = {
        "the page is resident or swapped": info.resident is not False or info.swapped,
        "FILE's pages have memory": kernel["rss"] + kernel.get("swap", 0) == run.need,
        "no other page has": run.figures()["memory"] == run.need,
    }


def give_back(run: Run) -> None:
    """The second half: its memory goes back to the system, its addresses stay."""
    va, size = run.second_half
    before = run.figures()["memory"]
    run.call("Decommit", va=va, size=size)
    kernel = ask(run, va)
    returned = before - run.figures()["memory"]
    kernel["returned"] = returned
    run.step.facts.insert(1, f"{human(returned)} back")
    run.step.checks = {
        "it is reserved": kernel["state"] == PageState.RESERVED.name,
        "any access faults": kernel["permissions"] == "---p",
        "it is not charged": "ac" not in kernel["vm_flags"],
        "its memory is returned": returned == size,
    }


def touch(run: Run) -> None:
    """A child that reads the last page given back is killed."""
    va = run.base + run.need - PAGE
    run.step = Step("touch", {"va": va})
    code = exit_code_of_child(functools.partial(ctypes.string_at, va, 1))
    kernel = ask(run, va)
    kernel["signal"] = signal_name(code)
    run.step.facts = [f"died of {kernel['signal']}", kernel["permissions"]]
    run.step.checks["the child dies of SIGSEGV"] = code == -signal.SIGSEGV


def commit_again(run: Run) -> None:
    """The second half: its old contents are gone."""
    va, size = run.second_half
    run.call("Commit", va=va, size=size, flags=0)
    kernel = ask(run, va)
    run.step.checks = {
        "it is committed": kernel["state"] == PageState.COMMITTED.name,
        "it takes no memory": run.figures()["memory"] == run.need - size,
        "it is zeros": not any(run.vmm.read(run.base + run.need - PAGE, PAGE)),
    }


def read_in_again(run: Run) -> None:
    """The second half of FILE."""
    va, _ = run.second_half
    read_part(run, va, run.base + run.subject.size - va)


def make_read_only(run: Run) -> None:
    """The first half, which the kernel protects from now on."""
    va, size = run.first_half
    run.call("Protect", va=va, size=size, flags=VmmFlags.READ)
    kernel = ask(run, va)
    run.step.checks = {
        "the kernel allows reading alone": kernel["permissions"] == "r--p",
        "just there": (kernel["start"], kernel["size"]) == (va, size),
    }


def write_refused(run: Run) -> None:
    """A write there is an error, and changes nothing."""
    before = run.vmm.read(run.base, 1)
    with contextlib.suppress(VmmError):
        run.call("write", va=run.base, data=bytes([before[0] ^ 0xFF]))
    ask(run, run.base)
    run.step.checks = {
        "the write is refused": run.step.rc is Retcode.INVALID_OPERATION,
        "the byte is as it was": run.vmm.read(run.base, 1) == before,
    }


def free(run: Run) -> None:
    """All of it."""
    run.call("Free", va=run.base, size=RESERVATION)
    kernel = ask(run, run.base)
    run.step.checks["nothing is left there"] = (
        kernel["state"] == PageState.FREE.name
        and kernel["start"] < run.base
        and kernel["end"] >= run.base + RESERVATION
    )


STEPS = (
    reserve,
    commit,
    read_in,
    verify,
    cost,
    give_back,
    touch,
    commit_again,
    read_in_again,
    make_read_only,
    write_refused,
)

"""The tools of every step of the demonstration, in both of its processes."""

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vmm_linux import VMM, PageInfo, Retcode, VmmError
from vmm_linux._tools.text import human
from vmm_linux.demo.report import Step
from vmm_linux.inspect.processes import fdinfo

PAGE = os.sysconf("SC_PAGE_SIZE")
RESERVATION = 64 << 30
CHUNK = 8 << 20
"""Bytes read and hashed at a time."""
MODES = {os.O_RDONLY: "O_RDONLY", os.O_WRONLY: "O_WRONLY", os.O_RDWR: "O_RDWR"}


class Footprint(NamedTuple):
    """Mappings and descriptors of this process at one moment.

    The mappings exclude the stack, and memory that may be of Python's own objects, which come and
    go (private, anonymous, readable and writable).
    """

    mappings: frozenset[str]
    descriptors: frozenset[str]

    @classmethod
    def take(cls) -> "Footprint":
        """Read the mappings and descriptors now."""
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        return cls(
            frozenset(line for line in lines if is_lasting(line)),
            frozenset(f"{number} -> {name}" for number, name in descriptors().items()),
        )


def is_lasting(line: str) -> bool:
    """Whether a line of ``/proc/self/maps`` is neither the stack nor Python's objects."""
    _, permissions, _, _, _, *name = line.split(maxsplit=5)
    anonymous = not name or name[0].startswith(("[heap]", "[anon"))
    return name != ["[stack]"] and not (anonymous and permissions == "rw-p")


def descriptors() -> dict[int, str]:
    """The descriptors of this process, with the file of each."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found[int(link.name)] = str(link.readlink())
    return found


def memory_files() -> dict[int, os.stat_result]:
    """This process's descriptors of MDL buffers' memory, with their fstat(2) data."""
    memory = "/memfd:vmm_linux (deleted)"
    return {number: os.fstat(number) for number, name in descriptors().items() if name == memory}


def modes(descriptor: int) -> tuple[str, bool]:
    """The access of a descriptor, and whether exec(2) closes it, from the kernel."""
    bits = int(fdinfo(f"self/fdinfo/{descriptor}")["flags"], 8)
    return MODES[bits & os.O_ACCMODE], bool(bits & os.O_CLOEXEC)


@dataclass
class Caller:
    """One process of the demonstration: its VMM, and its present step."""

    vmm: VMM
    before: Footprint
    step: Step = field(init=False)
    """The present step."""

    def call(self, name: str, **arguments: object) -> Any:  # noqa: ANN401 (the method's result)
        """Begin a step with a call of a method, and return its result."""
        self.step = Step(name, arguments)
        try:
            # As MdlCreateFromVm: the VMM's method is mdl_create_from_vm.
            method = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
            value = getattr(self.vmm, method)(*arguments.values())
        except VmmError as error:
            self.step.rc = error.rc
            raise
        self.step.rc = Retcode.OK
        return value

    def compare(self, check: str, sha256: str, wanted: str) -> None:
        """Check the hash of FILE's bytes."""
        self.step.kernel["sha256"] = sha256
        self.step.facts = [f"SHA-256 {sha256[:8]}...", f"FILE's {wanted[:8]}..."]
        self.step.checks[check] = sha256 == wanted

    def check_half(self, figures: dict[str, Any], is_there: bool) -> None:
        """Check FILE's memory while two processes share it evenly, give or take a tenth.

        Pages may move meanwhile.
        """
        pss, rss = figures["pss"], figures["rss"]
        self.step.facts = [f"Pss {human(pss)}", f"Rss {human(rss)}"]
        self.step.checks = {
            "every page is there": is_there,
            "half of it counts here": rss > 0 and abs(2 * pss - rss) <= rss / 10,
        }


Player = TypeVar("Player", bound=Caller)


def made(caller: Player, steps: Iterable[Callable[[Player], None]]) -> Iterator[Step]:
    """Make the steps one by one. The first that fails is the last."""
    for make in steps:
        try:
            make(caller)
        except VmmError as error:
            caller.step.checks[str(error)] = False
        except ConnectionError as error:
            caller.step.checks[f"the other process is there ({error})"] = False
        yield caller.step
        if not caller.step.ok:
            return


def described(info: PageInfo) -> dict[str, Any]:
    """The state of a page, and the smaps record of its mapping, or the bounds of the hole."""
    if (record := info.smaps) is None:
        return {"state": info.state.name, "start": info.base, "end": info.base + info.size}
    place = ("start", "end", "permissions", "offset", "inode")
    return {
        "state": info.state.name,
        **{name: getattr(record, name) for name in place},
        **record.figures,
        "vm_flags": sorted(record.vm_flags or ()),
    }


def ask(caller: Caller, va: int) -> dict[str, Any]:
    """The kernel's present data about a page's mapping, kept in the step."""
    kernel = described(caller.vmm.query(va))
    caller.step.kernel = kernel
    caller.step.facts = [kernel["state"]]
    if "permissions" in kernel:
        charge = "charged" if "ac" in kernel["vm_flags"] else "not charged"
        shared = kernel["permissions"].endswith("s")
        last = f"Pss {human(kernel['pss'])}" if shared else charge
        caller.step.facts = [kernel["permissions"], f"Rss {human(kernel['rss'])}", last]
    return kernel


def exit_code_of_child(touch: Callable[[], object]) -> int:
    """The exit code of a child that does this without any check, like a C pointer.

    Minus the signal that killed it, or 0. The child has no other output.
    """
    child = os.fork()
    if child == 0:
        try:
            with contextlib.suppress(ValueError):  # lower already
                # One byte turns off core files and programs that collect them; 0 only the files.
                resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            touch()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def signal_name(code: int) -> str | None:
    """The name of the signal that ended a child, None if none did."""
    return signal.Signals(-code).name if code < 0 else None


def close(caller: Caller) -> None:
    """The process's mappings and descriptors are again those of its start."""
    caller.call("close")
    after = Footprint.take()
    for name, had, has in zip(Footprint._fields, caller.before, after, strict=True):
        caller.step.kernel[name] = len(has)
        caller.step.kernel[f"{name}_changed"] = sorted(had ^ has)
        caller.step.checks[f"{name} are as before"] = had == has
    caller.step.facts = [
        f"{len(after.mappings)} maps, {len(after.descriptors)} fds",
        f"{len(caller.before.mappings)} and {len(caller.before.descriptors)} before",
    ]

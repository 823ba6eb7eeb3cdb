"""The demonstration's second half: FILE's memory is shared with another process.

A step is a function over one ``Run`` (see ``steps.py``). The other process is
``peer.py``; its steps are shown as they come.
"""

import fcntl
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vmm_linux import PageKind, Retcode, Rights, Seal, VmmFlags
from vmm_linux._tools.text import human
from vmm_linux.demo import peer
from vmm_linux.demo.caller import PAGE, ask, close, described, memory_files, modes
from vmm_linux.demo.report import Step
from vmm_linux.demo.steps import Run, free, verify

F_SEAL_FUTURE_WRITE = 0x10
READ_ONLY = Rights.MAP_READ | Rights.GET_SID


def share(run: Run) -> None:
    """FILE's pages become a buffer in place, each with its protection unchanged."""
    flags = VmmFlags.READ | VmmFlags.WRITE
    run.handles["file"] = run.call("MdlCreateFromVm", va=run.base, size=run.need, flags=flags)
    kernel = ask(run, run.base)
    last = run.vmm.query(run.base + run.need - PAGE)
    wanted = "r--s" if run.need == PAGE else "rw-s"
    run.step.checks = {
        "the first half is shared and read-only": kernel["permissions"] == "r--s",
        "the rest is shared": last.smaps is not None and last.smaps.permissions == wanted,
        "the pages are the buffer's": last.kind is PageKind.MDL
        and kernel["inode"] in {file.st_ino for file in memory_files().values()},
    }


def publish(run: Run) -> None:
    """Present writers go on; a new writer is impossible, with any descriptor."""
    handle = run.handles["file"]
    run.call("mdl_seal", handle=handle, seals=Seal.PUBLISH)
    seals = fcntl.fcntl(descriptor(run, run.base, "O_RDWR"), fcntl.F_GET_SEALS)
    sealed = bool(seals & F_SEAL_FUTURE_WRITE)
    writable = VmmFlags.READ | VmmFlags.WRITE
    _, rc = run.vmm.endpoint.MdlMap(handle, 0, PAGE, 0, writable)
    run.step.kernel = {"seals": seals}
    run.step.facts = ["F_SEAL_FUTURE_WRITE" if sealed else f"seals {seals:#x}"]
    run.step.checks = {
        "the memory is sealed": sealed,
        "not even here is it mapped writable": rc is Retcode.NO_CAPABILITY,
    }


def descriptor(run: Run, va: int, mode: str) -> int:
    """The descriptor, open in this mode, of the memory mapped at an address."""
    inode = described(run.vmm.query(va))["inode"]
    files = [number for number, file in memory_files().items() if file.st_ino == inode]
    (found,) = (number for number in files if modes(number)[0] == mode)
    return found


def size_of(run: Run) -> None:
    """The kernel has the same size."""
    size = run.call("MdlGetSize", handle=run.handles["file"])
    kernel = os.fstat(descriptor(run, run.base, "O_RDWR")).st_size
    run.step.kernel = {"size": kernel}
    run.step.facts = [f"fstat {human(kernel)}"]
    run.step.checks["it is FILE's pages"] = size == kernel == run.need


def clone(run: Run) -> None:
    """A window on the second half: the same memory with an identity of its own."""
    va, length = run.second_half
    origin = run.handles["file"]
    arguments = {"originHandle": origin, "offset": va - run.base, "length": length}
    run.handles["window"] = run.call("MdlClone", **arguments)
    info, whole = (run.vmm.handle_info(run.handles[name]) for name in ("window", "file"))
    run.step.kernel = {"sid": info.sid, "origin_sid": info.origin_sid, "size": info.size}
    run.step.facts = [f"sid {info.sid:016x}"[:12] + "...", f"of {whole.sid:016x}"[:11] + "..."]
    run.step.checks = {
        "it has a security id of its own": info.sid != whole.sid,
        "it knows its origin": info.origin_sid == whole.sid,
        "it is as long as the window": info.size == length,
        "it is published too": Seal.PUBLISH in info.seals,
    }


def make_board(run: Run) -> None:
    """A buffer of one page, for an answer. It takes no memory before the first write."""
    before = memory_files()
    run.handles["board"] = run.call("MdlCreate", size=PAGE, prot=VmmFlags.READ | VmmFlags.WRITE)
    made = [file for number, file in memory_files().items() if number not in before]
    sizes = [file.st_size for file in made]
    memory = sum(file.st_blocks for file in made) * 512
    run.step.kernel = {"sizes": sizes, "memory": memory}
    run.step.facts = [f"memfd of {human(sum(sizes))}", f"{human(memory)} of memory"]
    run.step.checks = {"it is a memory file": sizes == [PAGE], "it takes no memory": memory == 0}


def map_board(run: Run) -> None:
    """Read-only here."""
    board = run.handles["board"]
    run.board = run.call("MdlMap", handle=board, offset=0, length=PAGE, hint=0, prot=VmmFlags.READ)
    kernel = ask(run, run.board)
    run.step.checks["the kernel allows reading alone"] = kernel["permissions"] == "r--s"


def start(run: Run) -> None:
    """Start the other process, which has none of this one's memory."""
    run.step = Step("start", {})
    run.other = peer.Other(run.at_end, run.subject.size, run.subject.sha256)
    run.step.checks["it is ready"] = run.other.packet() == peer.READY
    number = run.other.process.pid
    maps = Path(f"/proc/{number}/maps").read_text(errors="surrogateescape").splitlines()
    shared = [line for line in maps if "memfd:vmm_linux" in line]
    run.step.kernel = {"pid": number, "mappings": len(maps), "shared": shared}
    run.step.facts = [f"process {number}", f"{len(shared)} of {len(maps)} maps shared"]
    run.step.checks["it maps nothing of the buffer"] = not shared


def send(name: str, run: Run) -> None:
    """Send a handle, writable to the board alone. This process keeps its own."""
    rights, va = READ_ONLY, run.base
    if name == "board":
        rights, va = READ_ONLY | Rights.MAP_WRITE, run.board
    handle = run.handles[name]
    run.call("send_handle", sock=run.other.sock, handle=handle, rights=rights)
    run.step.arguments = {"handle": handle, "rights": rights}
    mode = "O_RDWR" if Rights.MAP_WRITE in rights else "O_RDONLY"
    run.step.kernel = {"descriptor": descriptor(run, va, mode), "mode": mode}
    run.step.facts = [f"{mode} leaves"]
    run.step.checks["this process keeps its handle"] = run.vmm.handle_info(handle).size > 0


def hear(run: Run) -> None:
    """Receive the next step of the other process."""
    run.step = Step("peer", {})
    run.step = peer.unpacked(run.other.packet())


def share_cost(run: Run) -> None:
    """FILE's pages while both processes map them: the kernel counts half of each here."""
    run.call("Query", va=run.base)
    figures = run.figures(run.need)
    run.step.kernel = {**described(run.vmm.query(run.base)), "file": figures}
    run.check_half(figures, figures["memory"] == run.need)


def read_answer(run: Run) -> None:
    """The other process's result is on the board."""
    digest = run.call("read", va=run.board, size=len(bytes.fromhex(run.subject.sha256))).hex()
    run.compare("it is FILE's", digest, run.subject.sha256)


def go_on(run: Run) -> None:
    """Let the other process make its first step after this one's check."""
    run.other.sock.send(peer.GO_ON)
    hear(run)


def part(run: Run) -> None:
    """The other process ends, and FILE's memory counts here alone again."""
    run.step = Step("wait", {})
    code = run.other.end()
    figures = run.figures(run.need)
    run.step.kernel = {"exit_code": code, "file": figures}
    run.step.facts = [f"Pss {human(figures['pss'])}", f"exit code {code}"]
    run.step.checks = {
        "it went well over there": code == 0,
        "every page counts here alone": figures["pss"] == figures["rss"],
    }


STEPS: tuple[Callable[[Run], None], ...] = (
    share,
    verify,
    publish,
    size_of,
    clone,
    make_board,
    map_board,
    start,
    partial(send, "file"),
    hear,
    partial(send, "window"),
    hear,
    partial(send, "board"),
    hear,
    *(hear for _ in peer.USE),
    share_cost,
    read_answer,
    go_on,
    *(hear for _ in peer.LEAVE[1:]),
    part,
    free,
    close,
)

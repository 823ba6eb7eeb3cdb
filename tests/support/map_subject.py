"""A process with memory of each kind, to look at."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, NamedTuple, cast

from children import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What a file may be called: what a terminal, a page and a table would obey, and no UTF-8.
HOSTILE = b"/a\nb\x1b]0;c\x07\r,\"'<script>alert(1)</script></script>&amp;\\x41 \xff\xe2\x80\xae"

#: A process with memory of each kind. It says so, and does what it is told, a line each.
SUBJECT = """
import ctypes, mmap, os, signal, sys, threading
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
MIB = 1 << 20
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
PRIVATE, ANONYMOUS, NORESERVE = 0x2, 0x20, 0x4000
reserved = libc.mmap(None, 4 << 40, 3, PRIVATE | ANONYMOUS | NORESERVE, -1, 0)
ctypes.memset(reserved + (1 << 40), 1, 3 * mmap.PAGESIZE)
denied = libc.mmap(None, 1 << 30, 0, PRIVATE | ANONYMOUS | NORESERVE, -1, 0)
private = mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private[: 8 * MIB] = bytes(8 * MIB)
shared = mmap.mmap(-1, 32 * MIB)
shared[: 4 * MIB] = bytes(4 * MIB)
if len(sys.argv) > 1:
    libc.prctl(15, b"\\x1b[31m<b>\\n&", 0, 0, 0)  # its own name is as bad
    file = os.open(os.fsencode(sys.argv[1]), os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, MIB)
    named = mmap.mmap(file, MIB, mmap.MAP_PRIVATE)
    named[:10000] = bytes(10000)
stop = threading.Event()
threading.Thread(target=stop.wait, daemon=True).start()
print(reserved, flush=True)
more = []
for line in sys.stdin:
    more.append(mmap.mmap(-1, int(line) * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    more[-1][:] = bytes(len(more[-1]))
    print("done", flush=True)
"""


class Subject(NamedTuple):
    """A process to look at.

    Attributes:
        process: it.
        reserved: where four TiB of it begin.
    """

    process: subprocess.Popen[str]
    reserved: int

    @property
    def pid(self) -> int:
        """Its id."""
        return self.process.pid

    def take(self, mebibytes: int) -> None:
        """Have it take more memory, and wait until it has."""
        commands, answers = (
            cast("IO[str]", self.process.stdin),
            cast("IO[str]", self.process.stdout),
        )
        commands.write(f"{mebibytes}\n")
        commands.flush()
        assert answers.readline() == "done\n"


@contextmanager
def subject(*arguments: bytes | str) -> Iterator[Subject]:
    """A process to look at, which ends when this does."""
    with subprocess.Popen(
        [sys.executable, "-c", SUBJECT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        yield Subject(process, int(cast("IO[str]", process.stdout).readline()))

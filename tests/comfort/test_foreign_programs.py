"""Memory of real programs: Chromium's, as one of its processes shares it with others."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser import CHROMIUM, chromium
from kernel_oracle import PAGE
from vmm_linux import VMM, Mdl, Rights, VmmError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install chromium"),
]


def memfds_of_the_browser() -> Iterator[int]:
    """A descriptor for reading of each memfd that the browser's processes have."""
    mine = os.getpid()
    seen = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            session = os.getsid(int(process.name))
            parent = int(Path(f"/proc/{session}/stat").read_text().rpartition(")")[2].split()[1])
            if parent != mine:
                continue
            for link in list((process / "fd").iterdir()):
                if not str(link.readlink()).startswith("/memfd:"):
                    continue
                fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                inode = os.fstat(fd).st_ino
                if inode not in seen:
                    yield fd
                seen.add(inode)
                os.close(fd)


def test_memory_that_chromium_s_processes_share_is_taken_to_the_byte(
    tmp_path: Path, vmm: VMM
) -> None:
    sizes, compared = set(), 0
    with chromium(tmp_path) as page:
        page.settle()
        for fd in memfds_of_the_browser():
            size = os.fstat(fd).st_size
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or not size:
                with pytest.raises(VmmError):
                    Mdl.from_fd(fd, vmm=vmm)
                continue
            mdl = Mdl.from_fd(fd, vmm=vmm)
            assert Rights.MAP_WRITE not in mdl.rights
            assert len(mdl) == size
            sizes.add(size)
            # The browser goes on, and may write meanwhile.
            before, ours, after = os.pread(fd, size, 0), mdl[:], os.pread(fd, size, 0)
            assert len(ours) == size
            if before == after:
                assert ours == before
                compared += 1
    assert compared
    assert any(size % PAGE for size in sizes)

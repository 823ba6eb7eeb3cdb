"""What many tests name: flags and rights together, and the system's numbers that Python has not."""

from __future__ import annotations

import fcntl
from typing import Final

from kernel_oracle import PAGE
from vmm_linux import Rights, VmmFlags

READ: Final = VmmFlags.READ
RW: Final = VmmFlags.READ | VmmFlags.WRITE
RX: Final = VmmFlags.READ | VmmFlags.EXECUTE
RWX: Final = VmmFlags.RWX_MASK
RESERVE: Final = VmmFlags.RESERVE
COMMIT: Final = VmmFlags.COMMIT
RESERVE_COMMIT: Final = RESERVE | COMMIT
#: Reserve pages that can be read and written once they are committed.
RESERVED: Final = RESERVE | RW
#: Reserve and commit pages that can be read and written.
COMMITTED: Final = RESERVE_COMMIT | RW
FIXED: Final = VmmFlags.FIXED
RESERVE_FIXED: Final = RESERVE | FIXED
HUGE: Final = VmmFlags.HUGE
#: Between guards a region is a mapping of its own, which the kernel merges with nothing.
GUARDS: Final = VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD
LOCKED: Final = VmmFlags.LOCKED
SHAREABLE: Final = VmmFlags.SHAREABLE

ALWAYS: Final = Rights.TRANSFER | Rights.COPY | Rights.GET_SID
ALL_RIGHTS: Final = ALWAYS | Rights.MAP_READ | Rights.MAP_WRITE | Rights.MAP_EXECUTE
SUBSETS_OF_RIGHTS: Final = [Rights(bits) for bits in range(int(ALL_RIGHTS) + 1)]
#: What each protection of a buffer gives its first handle.
FIRST_RIGHTS: Final = {
    1: ALWAYS | Rights.MAP_READ,
    3: ALWAYS | Rights.MAP_READ | Rights.MAP_WRITE,
    5: ALWAYS | Rights.MAP_READ | Rights.MAP_EXECUTE,
    7: ALL_RIGHTS,
}
ALL_BUT_EXECUTE: Final = ~Rights(0) & ~Rights.MAP_EXECUTE
READ_ONLY: Final = ALL_BUT_EXECUTE & ~Rights.MAP_WRITE

MIB: Final = 1 << 20
GIB: Final = 1 << 30
#: What one page of page tables covers: fragments in it are opened and closed together.
CHUNK: Final = PAGE // 8 * PAGE
#: What maps shows of a protection.
PERMISSIONS: Final = {0: "---", 1: "r--", 3: "rw-", 5: "r-x", 7: "rwx"}

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
#: The seals that keep a file's size.
RESIZING: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

#: Seconds after which what hangs has failed.
PATIENCE: Final = 30

"""The default limits of a VMM that is made without ``Limits``: a runaway loop ends with an error.

Each default stops one kind of loop while the machine and this process still have headroom. What the
kernel itself counts more exactly has no default:

* ``reserved``: addresses alone take no memory, and RLIMIT_AS limits them.
* ``mappings``, ``mdl_mappings``: ``vm.max_map_count`` limits the kernel's mappings; the ledger
  counts more, above all where guard regions keep a million fragments in one mapping.

``committed``, ``locked`` and ``mdl_bytes`` may each take three quarters of the memory that is
available when the VMM is made: of the machine without swap, or of the memory cgroup and each one
above it, whichever is less. Committed pages count before they are touched: a program that wants
more than the machine has sets its own limits. A region or a handle takes a few hundred bytes of
this process, an MDL buffer one or two kilobytes of the kernel; RLIMIT_NOFILE often ends them
earlier.

The defaults are read when a VMM is made, at most once a second: that takes 0.3 ms, a VMM one
microsecond. The core then checks the cgroup's limit, if it has one, before it takes memory.
"""

from __future__ import annotations

from vmm_linux._core import kernel, memory_group

__all__ = ["MOST_HANDLES", "MOST_MDLS", "MOST_REGIONS", "bounds", "bounds_for", "room_for_memory"]

MOST_REGIONS = 1 << 18
MOST_HANDLES = 1 << 18
MOST_MDLS = 1 << 16

GROUPS: list[memory_group.Group] = []
"""The memory cgroup of this process, once it is known."""


def bounds() -> tuple[int | None, ...]:
    """The default bounds now, in the order of ``vmm_linux.limits.FIGURES``."""
    group = GROUPS[0] if GROUPS else memory_group.memory_group()
    if group is not None and not GROUPS:
        GROUPS.append(group)
        kernel.watch(memory_group.files(group), group.version == "v1")
    kernel.look_for_limits()
    return bounds_for(room_for_memory(kernel.available_without_swap(), group))


def room_for_memory(available: int, group: memory_group.Group | None) -> int:
    """Bytes available now: the machine's, or the cgroup's headroom if that is less."""
    return available if group is None else min(available, memory_group.headroom(group))


def bounds_for(memory: int) -> tuple[int | None, ...]:
    """The bounds where so many bytes are available."""
    share = memory // 4 * 3
    return (MOST_REGIONS, None, share, share, None, MOST_MDLS, share, None, MOST_HANDLES)

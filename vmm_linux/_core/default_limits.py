"""What bounds a VMM that was given no ``Limits``: enough that a runaway loop ends with an error.

Each default stops one kind of loop while the machine, and this process, still have room. What the
kernel itself counts more exactly has none:

* ``reserved``: addresses alone take no memory, and RLIMIT_AS bounds them.
* ``mappings``, ``mdl_mappings``: ``vm.max_map_count`` bounds what there really is; the ledger's
  figure is above that, most of all where guard regions keep a million fragments in one mapping.

``committed``, ``locked`` and ``mdl_bytes`` may each take three quarters of the memory that can be
had when the VMM is made: what the machine has available, swap left out, or what the memory cgroup
(and each one above it) has left, whichever is less. A commit that nobody touches counts too: who
wants more than the machine has says so. ``regions`` and ``handles`` take a few hundred bytes of
this process each, ``mdls`` one or two kilobytes of the kernel's; RLIMIT_NOFILE often ends them
earlier.

Looked up when a VMM is made, at most once a second: it takes 0.3 ms, a VMM a microsecond. The core
then asks the cgroup, where it has a limit, before it takes memory.
"""

from __future__ import annotations

from vmm_linux._core import kernel, memory_group

__all__ = ["MOST_HANDLES", "MOST_MDLS", "MOST_REGIONS", "bounds", "bounds_for", "room_for_memory"]

MOST_REGIONS = 1 << 18
MOST_HANDLES = 1 << 18
MOST_MDLS = 1 << 16

GROUPS: list[memory_group.Group] = []
"""The memory cgroup of this process, once it was found."""


def bounds() -> tuple[int | None, ...]:
    """The default bounds now, in the order of ``vmm_linux.limits.FIGURES``."""
    group = GROUPS[0] if GROUPS else memory_group.memory_group()
    if group is not None and not GROUPS:
        GROUPS.append(group)
        kernel.watch(memory_group.files(group), group.version == "v1")
    kernel.look_for_limits()
    return bounds_for(room_for_memory(kernel.available_without_swap(), group))


def room_for_memory(available: int, group: memory_group.Group | None) -> int:
    """Bytes that can be had now: of the machine's, or what the cgroup leaves if that is less."""
    return available if group is None else min(available, memory_group.room(group))


def bounds_for(memory: int) -> tuple[int | None, ...]:
    """The bounds where so many bytes can be had."""
    share = memory // 4 * 3
    return (MOST_REGIONS, None, share, share, None, MOST_MDLS, share, None, MOST_HANDLES)

"""The memory cgroup, of either version, that counts this process."""

from __future__ import annotations

import os

from vmm_linux._core.kernel_files import lines_of, number, text_of

__all__ = ["NO_LIMIT", "Group", "files", "headroom", "levels", "memory_group"]

NO_LIMIT = 1 << 62
"""A memory cgroup of version 1 without a limit reports the kernel's largest count of pages."""
CACHE = {
    "v1": ("total_inactive_file", "total_active_file"),
    "v2": ("inactive_file", "active_file"),
}
"""In memory.stat: the cache that the kernel drops before it kills a process. Version 1 reports it
for the group alone, and by these names for the group with those below it."""

FILES = {
    "v1": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.memsw.usage_in_bytes",
        "memory.stat",
    ),
    "v2": (
        "memory.max",
        "memory.current",
        "memory.swap.max",
        "memory.swap.current",
        "memory.stat",
    ),
}
"""The files of a level: limit and use of memory, limit and use of swap, statistics. Version 1
counts memory and swap together in the second pair."""


class Group:
    """Where the memory cgroup of this process is, and the names of its files.

    Attributes:
        version: ``"v1"`` or ``"v2"``.
        mount: where its hierarchy is mounted.
        path: of the group below that.
    """

    __slots__ = ("mount", "path", "version")

    def __init__(self, version: str, mount: str, path: str) -> None:
        self.version = version
        self.mount = mount
        self.path = path

    @property
    def limit(self) -> str:
        """The file with the limit of memory."""
        return FILES[self.version][0]

    @property
    def usage(self) -> str:
        """The file with the memory in use."""
        return FILES[self.version][1]


def memory_group() -> Group | None:
    """The cgroup that counts this process's memory, or None."""
    groups = [line.split(":", 2) for line in lines_of("/proc/self/cgroup")]
    for _, controllers, path in groups:
        if "memory" in controllers.split(","):
            place = place_of("cgroup", "memory", path)
            return place and Group("v1", *place)
    for number_of, controllers, path in groups:
        if (number_of, controllers) == ("0", ""):
            place = place_of("cgroup2", "", path)
            if place and "memory" in (text_of(f"{place[0]}/cgroup.controllers") or "").split():
                return Group("v2", *place)
    return None


def place_of(filesystem: str, option: str, path: str) -> tuple[str, str] | None:
    """The mount point of such a hierarchy, and the path below it."""
    for line in lines_of("/proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        root, point = mount.split(" ")[3:5]
        kind, *_, options = source.split(" ")
        if kind == filesystem and (not option or option in options.split(",")):
            return point, os.path.relpath(path, root) if path.startswith(root) else "."
    return None


def levels(group: Group) -> list[str]:
    """The group's folder and those above it, whose limits hold too."""
    top = os.path.normpath(group.mount)
    folder = os.path.normpath(os.path.join(top, group.path))
    if not os.path.isdir(folder):  # inside a container, the container's group is the mount
        folder = top
    found = [folder]
    while found[-1] != top and found[-1].startswith(f"{top.rstrip('/')}/"):
        found.append(os.path.dirname(found[-1]))
    return found


def files(group: Group) -> list[tuple[bytes, ...]]:
    """The paths of each level's files, as the core reads them (``kernel.watch``)."""
    names = FILES[group.version]
    return [tuple(os.fsencode(f"{folder}/{name}") for name in names) for folder in levels(group)]


def headroom(group: Group) -> int:
    """Bytes that the group and each one above it can still take before the kernel kills."""
    return min(headroom_at(group, folder) for folder in levels(group))


def headroom_at(group: Group, folder: str) -> int:
    """The headroom of one level in bytes; ``NO_LIMIT`` where it has no limit."""
    limit = number(f"{folder}/{group.limit}")
    used = number(f"{folder}/{group.usage}")
    if limit is None or used is None or limit >= NO_LIMIT:
        return NO_LIMIT
    lines = [line.partition(" ") for line in lines_of(f"{folder}/memory.stat")]
    cache = sum(int(value) for name, _, value in lines if name in CACHE[group.version])
    return max(0, limit - max(0, used - cache))

"""The memory cgroup that counts this process, of either version, and files with a number in."""

from __future__ import annotations

import os

from vmm_linux._core.kernel_files import lines_of, number, text_of

__all__ = ["NO_LIMIT", "Group", "files", "levels", "memory_group", "room"]

#: A memory cgroup of the first version without a limit has more than any machine: the largest
#: count of pages that the kernel knows.
NO_LIMIT = 1 << 62
#: Of memory.stat: the cache that the kernel gives up before it kills anybody. The first version
#: tells those of the group itself and, with groups below it, these.
CACHE = {
    "v1": ("total_inactive_file", "total_active_file"),
    "v2": ("inactive_file", "active_file"),
}

#: The files of a level: limit and use of memory, limit and use of swap, statistics. The first
#: version counts memory and swap together in the second pair.
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


class Group:
    """Where the memory cgroup of this process is to be seen, and what its files are called.

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
    """The cgroup that counts this process's memory; None where none does."""
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
    """Where such a hierarchy is mounted, and the path below that."""
    for line in lines_of("/proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        root, point = mount.split(" ")[3:5]
        kind, *_, options = source.split(" ")
        if kind == filesystem and (not option or option in options.split(",")):
            return point, os.path.relpath(path, root) if path.startswith(root) else "."
    return None


def levels(group: Group) -> list[str]:
    """The group's folder and those above it, which bind it too."""
    top = os.path.normpath(group.mount)
    folder = os.path.normpath(os.path.join(top, group.path))
    if not os.path.isdir(folder):  # seen from inside of a container, whose own group is the mount
        folder = top
    found = [folder]
    while found[-1] != top and found[-1].startswith(f"{top.rstrip('/')}/"):
        found.append(os.path.dirname(found[-1]))
    return found


def files(group: Group) -> list[tuple[bytes, ...]]:
    """The paths of each level's files, as the core reads them (``kernel.watch``)."""
    names = FILES[group.version]
    return [tuple(os.fsencode(f"{folder}/{name}") for name in names) for folder in levels(group)]


def room(group: Group) -> int:
    """Bytes that the group and each one above it could still take before one is killed."""
    return min(room_at(group, folder) for folder in levels(group))


def room_at(group: Group, folder: str) -> int:
    """The same of one level; ``NO_LIMIT`` where it has no limit."""
    limit = number(f"{folder}/{group.limit}")
    used = number(f"{folder}/{group.usage}")
    if limit is None or used is None or limit >= NO_LIMIT:
        return NO_LIMIT
    lines = [line.partition(" ") for line in lines_of(f"{folder}/memory.stat")]
    cache = sum(int(value) for name, _, value in lines if name in CACHE[group.version])
    return max(0, limit - max(0, used - cache))

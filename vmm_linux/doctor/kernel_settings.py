"""The sysctls, limits and switches that affect the package, with advice."""

import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmm_linux._core.kernel import (
    NO_LIMIT,
    Feature,
    MemoryCgroup,
    available,
    memory_cgroup,
    number_in,
    text_of,
    value_of,
)

UNLIMITED = "unlimited"
USUAL_MAPPINGS = 65530
"""The default of Linux."""
FEW_DESCRIPTORS = 4096
"""Fewer descriptors than this are few for programs with many buffers."""
LITTLE = 10
"""Headroom below the commit limit divided by this is little."""
CAP_IPC_LOCK = 14
THP = "/sys/kernel/mm/transparent_hugepage"

Value = int | str | None


@dataclass(frozen=True)
class Setting:
    """One setting with its present value for this process.

    Attributes:
        name: the sysctl's, the limit's or the file's.
        value: bytes or a count; ``"unlimited"``; the word chosen; None where this kernel does not
            have it or report it.
        ceiling: of a limit, what the process itself may raise it to.
        source: the file or the call that reports it.
        advice: what this value means here and what to do; None if there is none.
    """

    name: str
    value: Value
    ceiling: Value
    source: str
    advice: str | None = None


def settings() -> tuple[Setting, ...]:
    """Every setting that matters, with its present value."""
    return (*sysctls(), *commit_charge(), *limits(), *switches(), *cgroup_memory())


# ---- sysctls ------------------------------------------------------------------------------------


def sysctls() -> Iterator[Setting]:
    """The numeric settings of /proc/sys."""
    for name, advise in SYSCTLS.items():
        path = "/proc/sys/" + name.replace(".", "/")
        value = number_in(path)
        yield Setting(name, value, None, path, advise(value))


def advice_on_mappings(value: int | None) -> str | None:
    """Each mapping counts; fragments are mappings where there are no guard regions."""
    if value is None or (value >= USUAL_MAPPINGS and available(Feature.GUARD_REGIONS)):
        return None
    return (
        f"commits of single pages end after about {value // 2} fragments; "
        "sysctl vm.max_map_count=1048576 moves that"
    )


def advice_on_ratio(value: int | None) -> str | None:
    """How much can be committed under strict counting."""
    if number_in("/proc/sys/vm/overcommit_memory") != 2 or value is None:
        return None
    return f"swap and {value} % of memory can be committed in all; see CommitLimit"


OVERCOMMIT: dict[int | None, str] = {
    0: "each commit is checked by itself: many together can exceed the machine, and the "
    "out-of-memory killer kills a process at a touch; 2 counts strictly",
    1: "no commit is refused, whatever the machine has; 0 checks each, 2 counts strictly",
}
NOEXEC: dict[int | None, str] = {
    2: "buffers with EXECUTE are refused; sysctl vm.memfd_noexec=1 allows them"
}
PTRACE: dict[int | None, str] = dict.fromkeys(
    (None, 0),
    "processes of the same user can take each other's descriptors and write to each other's "
    "memory: publish or freeze buffers; kernel.yama.ptrace_scope=1 forbids it",
)
SYSCTLS: dict[str, Callable[[int | None], str | None]] = {
    "vm.max_map_count": advice_on_mappings,
    "vm.overcommit_memory": OVERCOMMIT.get,
    "vm.overcommit_ratio": advice_on_ratio,
    "vm.memfd_noexec": NOEXEC.get,
    "kernel.yama.ptrace_scope": PTRACE.get,
}
"""For each sysctl, the advice for its value."""


def commit_charge() -> Iterator[Setting]:
    """The commit limit of this machine, and its use."""
    text = text_of("/proc/meminfo")
    limit, used = value_of(text, "CommitLimit"), value_of(text, "Committed_AS")
    strict = number_in("/proc/sys/vm/overcommit_memory") == 2
    advice = None
    if strict and limit and used is not None and (limit - used) * LITTLE < limit:
        advice = (
            f"{max(limit - used, 0)} bytes are left, counted strictly; raise vm.overcommit_ratio "
            "or add swap"
        )
    yield Setting("CommitLimit", limit, None, "/proc/meminfo", advice)
    yield Setting("Committed_AS", used, None, "/proc/meminfo")


# ---- limits -------------------------------------------------------------------------------------


def limits() -> Iterator[Setting]:
    """The resource limits of this process; the ceiling is the hard one."""
    for name, advise in LIMITS.items():
        soft, hard = map(bound, resource.getrlimit(getattr(resource, name)))
        advice = advise(soft) if isinstance(soft, int) else None
        yield Setting(name, soft, hard, "getrlimit(2)", advice)


def bound(value: int) -> int | str:
    """A limit as a number, or the word for none."""
    return UNLIMITED if value == resource.RLIM_INFINITY else value


def advice_on_locking(value: int) -> str | None:
    """What is above this limit is resident, but not pinned."""
    if may_lock_all():
        return None
    return (
        f"LOCKED memory beyond {value} bytes is resident, but may be swapped out later; raise it "
        "(ulimit -l)"
    )


def advice_on_descriptors(value: int) -> str | None:
    """Buffers are descriptors."""
    if value >= FEW_DESCRIPTORS:
        return None
    return (
        f"an MDL buffer takes one or two descriptors: about {value // 2} to {value} buffers; raise "
        "it (ulimit -n)"
    )


LIMITS: dict[str, Callable[[int], str | None]] = {
    "RLIMIT_MEMLOCK": advice_on_locking,
    "RLIMIT_NOFILE": advice_on_descriptors,
    "RLIMIT_AS": "all that is reserved counts, and ends at {} bytes; ulimit -v unlimited".format,
    "RLIMIT_DATA": "private writable memory ends at {} bytes; ulimit -d unlimited".format,
}


def may_lock_all() -> bool:
    """Whether this process may lock beyond RLIMIT_MEMLOCK (CAP_IPC_LOCK)."""
    for line in (text_of("/proc/self/status") or "").splitlines():
        label, _, value = line.partition(":")
        if label == "CapEff":
            return bool(int(value, 16) >> CAP_IPC_LOCK & 1)
    return False


# ---- huge pages ---------------------------------------------------------------------------------


def switches() -> Iterator[Setting]:
    """Whether huge pages are given, to private and to shared memory."""
    for name, advise in SWITCHES.items():
        path = f"{THP}/{name}"
        value = chosen(text_of(path))
        yield Setting(f"transparent_hugepage/{name}", value, None, path, advise.get(value or ""))


SWITCHES = {
    "enabled": {
        "never": "HUGE has no effect; 'madvise' gives huge pages where HUGE asks for them",
        "always": "one touched page can take a whole huge page; 'madvise' leaves that to HUGE",
    },
    "shmem_enabled": {
        "never": "MDL and SHAREABLE memory gets no huge pages; 'advise' gives them to HUGE",
        "deny": "MDL and SHAREABLE memory gets no huge pages; 'advise' gives them to HUGE",
    },
}
"""For each file, the advice for a word in it."""


def chosen(text: str | None) -> str | None:
    """The word in brackets."""
    return text.partition("[")[2].partition("]")[0] or None if text else None


# ---- the memory cgroup --------------------------------------------------------------------------


def cgroup_memory() -> Iterator[Setting]:
    """The tightest limit above this process, and its cgroup's usage."""
    cgroup = memory_cgroup()
    if cgroup is None:
        yield Setting("cgroup memory limit", None, None, "/proc/self/cgroup")
        yield Setting("cgroup memory in use", None, None, "/proc/self/cgroup")
    else:
        yield from settings_of(cgroup)


def settings_of(cgroup: MemoryCgroup) -> Iterator[Setting]:
    """The same for a given cgroup; the limits of those above it hold too."""
    files = [f"{folder}/{cgroup.limit}" for folder in cgroup.levels]
    found = [(value, file) for file in files if (value := number_in(file)) is not None]
    value, file = min(found, default=(NO_LIMIT, files[0]), key=lambda pair: pair[0])
    name, usage = f"cgroup {cgroup.version} memory", f"{cgroup.levels[0]}/{cgroup.usage}"
    advice = "near it calls are OUT_OF_MEMORY; beyond it the kernel kills a process of the group"
    if value < NO_LIMIT:
        yield Setting(f"{name} limit", value, None, file, advice)
    else:
        yield Setting(f"{name} limit", UNLIMITED, None, file)
    yield Setting(f"{name} in use", number_in(usage), None, usage)

"""Texts of smaps and maps as kernels of every age write them, and what they say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from vmm_linux._core.procfs import SmapsRecord


FIRST = b"55d0c8a00000-55d0c8a21000 rw-p 0001f000 08:0a 131097                     /usr/bin/cat\n"
SECOND = b"7f2b8c000000-7f2b8c003000 ---s 00000000 00:1d 7 \n"
THIRD = b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"

# Labels as each kernel writes them, with a number of its own for each figure.
LINUX_5_10 = b"""\
Size:                101 kB
KernelPageSize:        4 kB
MMUPageSize:          64 kB
Rss:                 102 kB
Pss:                 103 kB
Shared_Clean:        104 kB
Shared_Dirty:        105 kB
Private_Clean:       106 kB
Private_Dirty:       107 kB
Referenced:          108 kB
Anonymous:           109 kB
LazyFree:            110 kB
AnonHugePages:       111 kB
ShmemPmdMapped:      112 kB
FilePmdMapped:       113 kB
Shared_Hugetlb:      114 kB
Private_Hugetlb:     115 kB
Swap:                116 kB
SwapPss:             117 kB
Locked:              118 kB
THPeligible:    1
VmFlags: rd wr mr mw me ac sd
"""
FIGURES_5_10 = {
    "size": 101 << 10,
    "kernel_page_size": 4 << 10,
    "mmu_page_size": 64 << 10,
    "rss": 102 << 10,
    "pss": 103 << 10,
    "shared_clean": 104 << 10,
    "shared_dirty": 105 << 10,
    "private_clean": 106 << 10,
    "private_dirty": 107 << 10,
    "referenced": 108 << 10,
    "anonymous": 109 << 10,
    "lazy_free": 110 << 10,
    "anon_huge_pages": 111 << 10,
    "shmem_pmd_mapped": 112 << 10,
    "file_pmd_mapped": 113 << 10,
    "shared_hugetlb": 114 << 10,
    "private_hugetlb": 115 << 10,
    "swap": 116 << 10,
    "swap_pss": 117 << 10,
    "locked": 118 << 10,
    "thp_eligible": 1,
}
LINUX_6_1 = b"""\
Size:                201 kB
KernelPageSize:        4 kB
MMUPageSize:          64 kB
Rss:                 202 kB
Pss:                 203 kB
Pss_Dirty:           219 kB
Shared_Clean:        204 kB
Shared_Dirty:        205 kB
Private_Clean:       206 kB
Private_Dirty:       207 kB
Referenced:          208 kB
Anonymous:           209 kB
LazyFree:            210 kB
AnonHugePages:       211 kB
ShmemPmdMapped:      212 kB
FilePmdMapped:       213 kB
Shared_Hugetlb:      214 kB
Private_Hugetlb:     215 kB
Swap:                216 kB
SwapPss:             217 kB
Locked:              218 kB
THPeligible:           0
ProtectionKey:        15
VmFlags: rd ex mr mw me
"""
FIGURES_6_1 = {
    "size": 201 << 10,
    "kernel_page_size": 4 << 10,
    "mmu_page_size": 64 << 10,
    "rss": 202 << 10,
    "pss": 203 << 10,
    "pss_dirty": 219 << 10,
    "shared_clean": 204 << 10,
    "shared_dirty": 205 << 10,
    "private_clean": 206 << 10,
    "private_dirty": 207 << 10,
    "referenced": 208 << 10,
    "anonymous": 209 << 10,
    "lazy_free": 210 << 10,
    "anon_huge_pages": 211 << 10,
    "shmem_pmd_mapped": 212 << 10,
    "file_pmd_mapped": 213 << 10,
    "shared_hugetlb": 214 << 10,
    "private_hugetlb": 215 << 10,
    "swap": 216 << 10,
    "swap_pss": 217 << 10,
    "locked": 218 << 10,
    "thp_eligible": 0,
    "protection_key": 15,
}
LINUX_6_18 = b"""\
Size:                301 kB
KernelPageSize:        4 kB
MMUPageSize:          64 kB
Rss:                 302 kB
Pss:                 303 kB
Pss_Dirty:           319 kB
Shared_Clean:        304 kB
Shared_Dirty:        305 kB
Private_Clean:       306 kB
Private_Dirty:       307 kB
Referenced:          308 kB
Anonymous:           309 kB
KSM:                 320 kB
LazyFree:            310 kB
AnonHugePages:       311 kB
ShmemPmdMapped:      312 kB
FilePmdMapped:       313 kB
Shared_Hugetlb:      314 kB
Private_Hugetlb:     315 kB
Swap:                316 kB
SwapPss:             317 kB
Locked:              318 kB
THPeligible:           1
ProtectionKey:         3
VmFlags: rd wr mr mw me lo ac gu sd 
"""  # noqa: W291  the kernel leaves the blank at the end
FIGURES_6_18 = {
    "size": 301 << 10,
    "kernel_page_size": 4 << 10,
    "mmu_page_size": 64 << 10,
    "rss": 302 << 10,
    "pss": 303 << 10,
    "pss_dirty": 319 << 10,
    "shared_clean": 304 << 10,
    "shared_dirty": 305 << 10,
    "private_clean": 306 << 10,
    "private_dirty": 307 << 10,
    "referenced": 308 << 10,
    "anonymous": 309 << 10,
    "ksm": 320 << 10,
    "lazy_free": 310 << 10,
    "anon_huge_pages": 311 << 10,
    "shmem_pmd_mapped": 312 << 10,
    "file_pmd_mapped": 313 << 10,
    "shared_hugetlb": 314 << 10,
    "private_hugetlb": 315 << 10,
    "swap": 316 << 10,
    "swap_pss": 317 << 10,
    "locked": 318 << 10,
    "thp_eligible": 1,
    "protection_key": 3,
}


def numbered(first: int, labels: str, flags: str) -> tuple[bytes, dict[str, int]]:
    """A record whose figures are numbered from ``first`` on, and what it says.

    A label with an ``=`` has no unit.
    """
    lines, figures = [], {}
    for number, label in enumerate(labels.split(), first):
        name = SNAKE.sub("_", label.strip("=")).lower()
        plain = label.endswith("=")
        lines.append(f"{label.strip('=') + ':':16}{number:8}{'' if plain else ' kB'}\n")
        figures[name] = number if plain else number << 10
    return "".join([*lines, f"VmFlags: {flags} \n"]).encode(), figures


SNAKE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=MMU)(?=P)|(?<=THP)(?=e)")
# 5.15 is 5.10 with protection keys built in; 6.6 writes THPeligible in another column than 6.1.
LINUX_5_15, FIGURES_5_15 = numbered(
    501,
    "Size KernelPageSize MMUPageSize Rss Pss Shared_Clean Shared_Dirty Private_Clean "
    "Private_Dirty Referenced Anonymous LazyFree AnonHugePages ShmemPmdMapped FilePmdMapped "
    "Shared_Hugetlb Private_Hugetlb Swap SwapPss Locked THPeligible= ProtectionKey=",
    "rd wr",
)
LINUX_6_6, FIGURES_6_6 = numbered(
    601,
    "Size KernelPageSize MMUPageSize Rss Pss Pss_Dirty Shared_Clean Shared_Dirty Private_Clean "
    "Private_Dirty Referenced Anonymous LazyFree AnonHugePages ShmemPmdMapped FilePmdMapped "
    "Shared_Hugetlb Private_Hugetlb Swap SwapPss Locked THPeligible= ProtectionKey=",
    "rd sh",
)
# KSM came with 6.8.
LINUX_6_12, FIGURES_6_12 = numbered(
    701,
    "Size KernelPageSize MMUPageSize Rss Pss Pss_Dirty Shared_Clean Shared_Dirty Private_Clean "
    "Private_Dirty Referenced Anonymous KSM LazyFree AnonHugePages ShmemPmdMapped FilePmdMapped "
    "Shared_Hugetlb Private_Hugetlb Swap SwapPss Locked THPeligible= ProtectionKey=",
    "rd sl",
)
# A kernel to come: one figure more in the middle, one at the end, one line less.
FUTURE = LINUX_6_18.replace(b"LazyFree:            310 kB\n", b"LazyFreeHUGEPages:   330 kB\n")
FUTURE = FUTURE.replace(b"VmFlags", b"ColdScore:            99\nVmFlags")
FIGURES_FUTURE = {name: value for name, value in FIGURES_6_18.items() if name != "lazy_free"}
FIGURES_FUTURE |= {"lazy_free_huge_pages": 330 << 10, "cold_score": 99}
# The first Windows Subsystem for Linux.
WSL = b"Pss:                   5 kB\n"
# What smaps_rollup has beside smaps.
ROLLUP_LINE = b"55d0c8a00000-7ffd1c9f1000 ---p 00000000 00:00 0                          [rollup]\n"
ROLLUP = b"""\
Rss:                 401 kB
Pss:                 402 kB
Pss_Dirty:           403 kB
Pss_Anon:            404 kB
Pss_File:            405 kB
Pss_Shmem:           406 kB
Locked:              407 kB
"""
FIGURES_ROLLUP = {
    "rss": 401 << 10,
    "pss": 402 << 10,
    "pss_dirty": 403 << 10,
    "pss_anon": 404 << 10,
    "pss_file": 405 << 10,
    "pss_shmem": 406 << 10,
    "locked": 407 << 10,
}


class Form(NamedTuple):
    """The lines of one record as some kernel writes them, and what they say."""

    text: bytes
    figures: dict[str, int]
    vm_flags: frozenset[str] | None


def flags(names: str) -> frozenset[str]:
    return frozenset(names.split())


FORMS = {
    "5.10": Form(LINUX_5_10, FIGURES_5_10, flags("rd wr mr mw me ac sd")),
    "5.15": Form(LINUX_5_15, FIGURES_5_15, flags("rd wr")),
    "6.6": Form(LINUX_6_6, FIGURES_6_6, flags("rd sh")),
    "6.12": Form(LINUX_6_12, FIGURES_6_12, flags("rd sl")),
    "6.1": Form(LINUX_6_1, FIGURES_6_1, flags("rd ex mr mw me")),
    "6.18": Form(LINUX_6_18, FIGURES_6_18, flags("rd wr mr mw me lo ac gu sd")),
    "future": Form(FUTURE, FIGURES_FUTURE, flags("rd wr mr mw me lo ac gu sd")),
    "WSL": Form(WSL, {"pss": 5 << 10}, None),
    "rollup": Form(ROLLUP, FIGURES_ROLLUP, None),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def described(record: SmapsRecord) -> tuple[object, ...]:
    return (
        record.start,
        record.end,
        record.permissions,
        record.offset,
        record.device,
        record.inode,
        record.pathname,
    )


HEADS: list[tuple[bytes, tuple[object, ...]]] = [
    (
        FIRST,
        (0x55D0C8A00000, 0x55D0C8A21000, "rw-p", 0x1F000, "08:0a", 131097, "/usr/bin/cat"),
    ),
    (SECOND, (0x7F2B8C000000, 0x7F2B8C003000, "---s", 0, "00:1d", 7, None)),
    (
        THIRD,
        (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "--xp", 0, "00:00", 0, "[vsyscall]"),
    ),
]

"""Values that version 0.1.0 pickled are loaded, and are what they were."""

from __future__ import annotations

import importlib
import pickle
import pickletools
from typing import Any

import pytest

from vmm_linux import Limits, PageInfo, PageKind, PageState, Retcode, Rights, Seal, VmmFlags, errors
from vmm_linux.audit import Record
from vmm_linux.doctor import Check, FeatureReport, Machine, Setting
from vmm_linux.inspect import (
    AccessDenied,
    Channel,
    Difference,
    Holder,
    KernelThread,
    Kind,
    Mapper,
    NoSuchProcess,
    PageFlags,
    PageRun,
    ProcessExited,
    RegionRun,
    Sharing,
    Unread,
    UnreadableText,
    ZombieProcess,
)
from vmm_linux.limits import Use
from vmm_linux.policy import PolicyError, Rule

ADDRESS = 0x100000000000

#: What was pickled, and the pickle.
PICKLES: list[tuple[Any, bytes]] = [
    (
        PageFlags.PRESENT | PageFlags.HUGE,
        (
            b"\x80\x04\x950\x00\x00\x00\x00\x00\x00\x00\x8c\x18vmm_linux._inspect_types\x94\x8c"
            b"\tPageFlags\x94\x93\x94K\x11\x85\x94R\x94."
        ),
    ),
    (
        PageRun(4096, 12288, PageFlags.PRESENT),
        (
            b"\x80\x04\x95H\x00\x00\x00\x00\x00\x00\x00\x8c\x18vmm_linux._inspect_types\x94\x8c"
            b"\x07PageRun\x94\x93\x94M\x00\x10M\x000h\x00\x8c\tPageFlags\x94\x93\x94K\x01\x85"
            b"\x94R\x94\x87\x94\x81\x94."
        ),
    ),
    (
        RegionRun(
            4096,
            8192,
            PageState.COMMITTED,
            PageKind.MDL,
            VmmFlags.RESERVE | VmmFlags.READ,
            VmmFlags.READ,
            7,
        ),
        (
            b"\x80\x04\x95\xa0\x00\x00\x00\x00\x00\x00\x00\x8c\x18vmm_linux._inspect_types\x94"
            b"\x8c\tRegionRun\x94\x93\x94(M\x00\x10M\x00 \x8c\x10vmm_linux.states\x94\x8c\tPage"
            b"State\x94\x93\x94K\x02\x85\x94R\x94h\x03\x8c\x08PageKind\x94\x93\x94K\x02\x85\x94"
            b"R\x94\x8c\x0fvmm_linux.flags\x94\x8c\x08VmmFlags\x94\x93\x94K\x11\x85\x94R\x94h"
            b"\x0eK\x01\x85\x94R\x94K\x07t\x94\x81\x94."
        ),
    ),
    (
        Kind.MEMFD,
        (
            b"\x80\x04\x95+\x00\x00\x00\x00\x00\x00\x00\x8c\x12vmm_linux._sharing\x94\x8c\x04Ki"
            b"nd\x94\x93\x94\x8c\x05memfd\x94\x85\x94R\x94."
        ),
    ),
    (
        Sharing(
            (
                Channel(
                    Kind.MEMFD,
                    "00:01",
                    7,
                    "a name",
                    False,
                    8192,
                    4096,
                    ("F_SEAL_SHRINK",),
                    (Holder(1, "one", 0, "rw", (3,)),),
                    (Mapper(2, "two", None, "rw-s", True, 8192, None),),
                    None,
                ),
            ),
            (Unread(3, "three", 1000),),
            2,
        ),
        (
            b"\x80\x04\x95\x02\x01\x00\x00\x00\x00\x00\x00\x8c\x12vmm_linux._sharing\x94\x8c"
            b"\x07Sharing\x94\x93\x94)\x81\x94]\x94(h\x00\x8c\x07Channel\x94\x93\x94)\x81\x94]"
            b"\x94(h\x00\x8c\x04Kind\x94\x93\x94\x8c\x05memfd\x94\x85\x94R\x94\x8c\x0500:01\x94"
            b"K\x07\x8c\x06a name\x94\x89M\x00 M\x00\x10\x8c\rF_SEAL_SHRINK\x94\x85\x94h\x00"
            b"\x8c\x06Holder\x94\x93\x94)\x81\x94]\x94(K\x01\x8c\x03one\x94K\x00\x8c\x02rw\x94K"
            b"\x03\x85\x94eb\x85\x94h\x00\x8c\x06Mapper\x94\x93\x94)\x81\x94]\x94(K\x02\x8c\x03"
            b"two\x94N\x8c\x04rw-s\x94\x88M\x00 Neb\x85\x94Neb\x85\x94h\x00\x8c\x06Unread\x94"
            b"\x93\x94)\x81\x94]\x94(K\x03\x8c\x05three\x94M\xe8\x03eb\x85\x94K\x02eb."
        ),
    ),
    (
        NoSuchProcess("maps", "there is no process 7", 3),
        (
            b"\x80\x04\x95O\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux.inspect\x94\x8c\rNoSuc"
            b"hProcess\x94\x93\x94(\x8c\x04maps\x94\x8c\x15there is no process 7\x94K\x03K\x00t"
            b"\x94R\x94."
        ),
    ),
    (
        AccessDenied("maps", "no", 13),
        (
            b"\x80\x04\x95;\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux.inspect\x94\x8c\x0cAcc"
            b"essDenied\x94\x93\x94(\x8c\x04maps\x94\x8c\x02no\x94K\rK\x00t\x94R\x94."
        ),
    ),
    (
        ZombieProcess("maps", "it has ended"),
        (
            b"\x80\x04\x95E\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux.inspect\x94\x8c\rZombi"
            b"eProcess\x94\x93\x94(\x8c\x04maps\x94\x8c\x0cit has ended\x94NK\x00t\x94R\x94."
        ),
    ),
    (
        KernelThread("maps", "a thread"),
        (
            b"\x80\x04\x95@\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux.inspect\x94\x8c\x0cKer"
            b"nelThread\x94\x93\x94(\x8c\x04maps\x94\x8c\x08a thread\x94NK\x00t\x94R\x94."
        ),
    ),
    (
        ProcessExited("maps", "ended", 3),
        (
            b"\x80\x04\x95?\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux.inspect\x94\x8c\rProce"
            b"ssExited\x94\x93\x94(\x8c\x04maps\x94\x8c\x05ended\x94K\x03K\x00t\x94R\x94."
        ),
    ),
    (
        UnreadableText("maps", "unreadable"),
        (
            b"\x80\x04\x95D\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux.inspect\x94\x8c\x0eUnr"
            b"eadableText\x94\x93\x94(\x8c\x04maps\x94\x8c\nunreadable\x94NK\x00t\x94R\x94."
        ),
    ),
    (
        Difference((), (), ()),
        (
            b"\x80\x04\x95/\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux.inspect\x94\x8c\nDiffe"
            b"rence\x94\x93\x94)\x81\x94]\x94()))eb."
        ),
    ),
    (
        Rule(deny="allocate", name="none", all_flags=("EXECUTE",)),
        (
            b"\x80\x04\x95\x0c\x01\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.policy\x94\x8c\x04R"
            b"ule\x94\x93\x94)\x81\x94}\x94(\x8c\x05allow\x94N\x8c\x04deny\x94\x8c\x08allocate"
            b"\x94\x8c\x04name\x94\x8c\x04none\x94\x8c\tall_flags\x94\x8c\x07EXECUTE\x94\x85"
            b"\x94\x8c\tany_flags\x94)\x8c\x08no_flags\x94)\x8c\x08min_size\x94N\x8c\x08max_siz"
            b"e\x94N\x8c\nall_rights\x94)\x8c\nany_rights\x94)\x8c\tno_rights\x94)\x8c\tall_sea"
            b"ls\x94)\x8c\tany_seals\x94)\x8c\x08no_seals\x94)\x8c\x08peer_uid\x94N\x8c\x08peer"
            b"_gid\x94N\x8c\nother_user\x94Nub."
        ),
    ),
    (
        PolicyError("no rule", "rules.toml", 3),
        (
            b"\x80\x04\x95A\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.policy\x94\x8c\x0bPoli"
            b"cyError\x94\x93\x94\x8c\x07no rule\x94\x8c\nrules.toml\x94K\x03\x87\x94R\x94."
        ),
    ),
    (
        Limits(committed=4096),
        (
            b"\x80\x04\x95\xa1\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.limits\x94\x8c\x07_"
            b"remake\x94\x93\x94h\x00\x8c\x06Limits\x94\x93\x94}\x94(\x8c\x07regions\x94N\x8c"
            b"\x08reserved\x94N\x8c\tcommitted\x94M\x00\x10\x8c\x06locked\x94N\x8c\x08mappings"
            b"\x94N\x8c\x04mdls\x94N\x8c\tmdl_bytes\x94N\x8c\x0cmdl_mappings\x94N\x8c\x07handle"
            b"s\x94Nu\x86\x94R\x94."
        ),
    ),
    (
        VmmFlags.RESERVE | VmmFlags.WRITE,
        (
            b"\x80\x04\x95&\x00\x00\x00\x00\x00\x00\x00\x8c\x0fvmm_linux.flags\x94\x8c\x08VmmFl"
            b"ags\x94\x93\x94K\x12\x85\x94R\x94."
        ),
    ),
    (
        Rights.TRANSFER,
        (
            b"\x80\x04\x95$\x00\x00\x00\x00\x00\x00\x00\x8c\x0fvmm_linux.flags\x94\x8c\x06Right"
            b"s\x94\x93\x94K\x01\x85\x94R\x94."
        ),
    ),
    (
        Seal.FREEZE,
        (
            b'\x80\x04\x95"\x00\x00\x00\x00\x00\x00\x00\x8c\x0fvmm_linux.flags\x94\x8c\x04Seal'
            b"\x94\x93\x94K\x02\x85\x94R\x94."
        ),
    ),
    (
        Retcode.BUSY,
        (
            b"\x80\x04\x95&\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.errors\x94\x8c\x07Retc"
            b"ode\x94\x93\x94K\n\x85\x94R\x94."
        ),
    ),
    (
        PageState.FREE,
        (
            b"\x80\x04\x95(\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.states\x94\x8c\tPageSt"
            b"ate\x94\x93\x94K\x00\x85\x94R\x94."
        ),
    ),
    (
        PageKind.GUARD,
        (
            b"\x80\x04\x95'\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.states\x94\x8c\x08Page"
            b"Kind\x94\x93\x94K\x03\x85\x94R\x94."
        ),
    ),
    (
        Machine("6.1", "x86_64", 4096, 0, 1 << 47, 4096),
        (
            b"\x80\x04\x95\x95\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.doctor\x94\x8c\x07M"
            b"achine\x94\x93\x94)\x81\x94}\x94(\x8c\x06kernel\x94\x8c\x036.1\x94\x8c\x0carchite"
            b"cture\x94\x8c\x06x86_64\x94\x8c\x04page\x94M\x00\x10\x8c\thuge_page\x94K\x00\x8c"
            b"\x0euser_space_end\x94\x8a\x07\x00\x00\x00\x00\x00\x80\x00\x8c\x0elowest_address"
            b"\x94M\x00\x10ub."
        ),
    ),
    (
        FeatureReport("PROCMAP_QUERY", "present", "6.11", "without"),
        (
            b"\x80\x04\x95r\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.doctor\x94\x8c\rFeatur"
            b"eReport\x94\x93\x94)\x81\x94}\x94(\x8c\x04name\x94\x8c\rPROCMAP_QUERY\x94\x8c\x05"
            b"state\x94\x8c\x07present\x94\x8c\x05since\x94\x8c\x046.11\x94\x8c\x07without\x94h"
            b"\x0bub."
        ),
    ),
    (
        Setting("vm.max_map_count", 65530, None, "/proc/sys/vm/max_map_count", None),
        (
            b"\x80\x04\x95\x8b\x00\x00\x00\x00\x00\x00\x00\x8c\x13vmm_linux._settings\x94\x8c"
            b"\x07Setting\x94\x93\x94)\x81\x94}\x94(\x8c\x04name\x94\x8c\x10vm.max_map_count"
            b"\x94\x8c\x05value\x94M\xfa\xff\x8c\x07ceiling\x94N\x8c\x06source\x94\x8c\x1a/proc"
            b"/sys/vm/max_map_count\x94\x8c\x06advice\x94Nub."
        ),
    ),
    (
        Check("a check", True),
        (
            b"\x80\x04\x95S\x00\x00\x00\x00\x00\x00\x00\x8c\x11vmm_linux._trials\x94\x8c\x05Che"
            b"ck\x94\x93\x94)\x81\x94}\x94(\x8c\x04name\x94\x8c\x07a check\x94\x8c\x02ok\x94"
            b"\x88\x8c\x07problem\x94N\x8c\x06advice\x94Nub."
        ),
    ),
    (
        Use(1, 2),
        (
            b"\x80\x04\x95$\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.limits\x94\x8c\x03Use"
            b"\x94\x93\x94K\x01K\x02\x86\x94\x81\x94."
        ),
    ),
    (
        errors.Busy("free", "a view holds it"),
        (
            b"\x80\x04\x95>\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux.errors\x94\x8c\x04Busy"
            b"\x94\x93\x94(\x8c\x04free\x94\x8c\x0fa view holds it\x94NK\x00t\x94R\x94."
        ),
    ),
]


@pytest.mark.parametrize(("value", "old"), PICKLES, ids=lambda each: type(each).__name__)
def test_what_the_first_version_pickled_is_loaded(value: Any, old: bytes) -> None:  # noqa: ANN401
    loaded = pickle.loads(old)  # noqa: S301
    assert type(loaded) is type(value)
    assert repr(loaded) == repr(value)
    assert loaded == value or isinstance(value, errors.VmmError)


@pytest.mark.parametrize(("value", "old"), PICKLES, ids=lambda each: type(each).__name__)
def test_what_is_pickled_now_names_public_modules_alone(value: Any, old: bytes) -> None:  # noqa: ANN401
    assert old
    pickled = pickle.dumps(value, 0)
    modules = [
        str(given).split()[0]
        for code, given, _ in pickletools.genops(pickled)
        if code.name == "GLOBAL"
    ]
    ours = [module for module in modules if module.startswith("vmm_linux")]
    assert ours
    assert not [module for module in ours if "._" in module]


# ---- what the core makes -------------------------------------------------------------------------

#: Of one page that was read with ``smaps=False``, and of its mapping, its record of smaps and the
#: record of the audit.
INFO = (
    b"\x80\x04\x95o\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux._query\x94\x8c\x08_re"
    b"store\x94\x93\x94(\x8a\x06\x00\x00\x00\x00\x00\x10K\x02K\x01K\x03J3\x00\x01\x00"
    b"\x8a\x06\x00\x00\x00\x00\x00\x10\x8a\x06\x00\x10\x00\x00\x00\x10\x86\x94\x8a\x06"
    b"\x00\x00\x00\x00\x00\x10\x8a\x06\x00\x10\x00\x00\x00\x10\x86\x94NN(K\x01K\x00K"
    b"\x00K\x00K\x00K\x00t\x94Nt\x94R\x94."
)
PAGE = (
    b"\x80\x04\x95@\x02\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux._query\x94\x8c\x08_re"
    b"store\x94\x93\x94(\x8a\x06\x00\x00\x00\x00\x00\x10K\x02K\x01K\x03J3\x00\x01\x00"
    b"\x8a\x06\x00\x00\x00\x00\x00\x10\x8a\x06\x00\x10\x00\x00\x00\x10\x86\x94\x8a\x06"
    b"\x00\x00\x00\x00\x00\x10\x8a\x06\x00\x10\x00\x00\x00\x10\x86\x94NN(K\x01K\x00K"
    b"\x00K\x00K\x00K\x00t\x94\x8c\x17vmm_linux._smaps_record\x94\x8c\x08_restore\x94"
    b"\x93\x94(\x8a\x06\x00\x00\x00\x00\x00\x10\x8a\x06\x00\x10\x00\x00\x00\x10K\x03K"
    b"\x00K\x00K\x00K\x00N(\x8c\x02me\x94\x8c\x02rd\x94\x8c\x02ac\x94\x8c\x02mw\x94"
    b"\x8c\x02mr\x94\x8c\x02wr\x94\x91\x94}\x94(\x8c\x04size\x94M\x00\x10\x8c\x10kerne"
    b"l_page_size\x94M\x00\x10\x8c\rmmu_page_size\x94M\x00\x10\x8c\x03rss\x94M\x00\x10"
    b"\x8c\x03pss\x94M\x00\x10\x8c\tpss_dirty\x94M\x00\x10\x8c\x0cshared_clean\x94K"
    b"\x00\x8c\x0cshared_dirty\x94K\x00\x8c\rprivate_clean\x94K\x00\x8c\rprivate_dirty"
    b"\x94M\x00\x10\x8c\nreferenced\x94M\x00\x10\x8c\tanonymous\x94M\x00\x10\x8c\x03ks"
    b"m\x94K\x00\x8c\tlazy_free\x94K\x00\x8c\x0fanon_huge_pages\x94K\x00\x8c\x10shmem_"
    b"pmd_mapped\x94K\x00\x8c\x0ffile_pmd_mapped\x94K\x00\x8c\x0eshared_hugetlb\x94K"
    b"\x00\x8c\x0fprivate_hugetlb\x94K\x00\x8c\x04swap\x94K\x00\x8c\x08swap_pss\x94K"
    b"\x00\x8c\x06locked\x94K\x00\x8c\x0cthp_eligible\x94K\x00ut\x94R\x94t\x94R\x94."
)
RECORD = (
    b"\x80\x04\x95\xb3\x00\x00\x00\x00\x00\x00\x00\x8c\x10vmm_linux._audit\x94\x8c\x0f"
    b"_restore_record\x94\x93\x94(K\x01\x8a\x08\x8a\xc1U?X#\xed\x18J\xd2D\x01\x00M\xf9"
    b"+M\xf9+\x8c\x08allocate\x94}\x94(\x8c\x04addr\x94\x8a\x06\x00\x00\x00\x00\x00"
    b"\x10\x8c\x04size\x94M\x00\x10\x8c\x05flags\x94J3\x00\x01\x00u\x8c\x05allow\x94N"
    b"\x8c\x10vmm_linux.errors\x94\x8c\x07Retcode\x94\x93\x94K\x00\x85\x94R\x94N\x8a"
    b"\x06\x00\x00\x00\x00\x00\x10NNNt\x94R\x94."
)
MAPPING = (
    b"\x80\x04\x95w\x02\x00\x00\x00\x00\x00\x00\x8c\x12vmm_linux._inspect\x94\x8c\x08_"
    b"restore\x94\x93\x94(\x8a\x06\x00\x00\x00\x00\x00\x10\x8a\x06\x00\x10\x00\x00\x00"
    b"\x10K\x03K\x00K\x00K\x00K\x00N(\x8c\x02me\x94\x8c\x02rd\x94\x8c\x02ac\x94\x8c"
    b"\x02mw\x94\x8c\x02mr\x94\x8c\x02wr\x94\x91\x94}\x94(\x8c\x04size\x94M\x00\x10"
    b"\x8c\x10kernel_page_size\x94M\x00\x10\x8c\rmmu_page_size\x94M\x00\x10\x8c\x03rss"
    b"\x94M\x00\x10\x8c\x03pss\x94M\x00\x10\x8c\tpss_dirty\x94M\x00\x10\x8c\x0cshared_"
    b"clean\x94K\x00\x8c\x0cshared_dirty\x94K\x00\x8c\rprivate_clean\x94K\x00\x8c\rpri"
    b"vate_dirty\x94M\x00\x10\x8c\nreferenced\x94M\x00\x10\x8c\tanonymous\x94M\x00\x10"
    b"\x8c\x03ksm\x94K\x00\x8c\tlazy_free\x94K\x00\x8c\x0fanon_huge_pages\x94K\x00\x8c"
    b"\x10shmem_pmd_mapped\x94K\x00\x8c\x0ffile_pmd_mapped\x94K\x00\x8c\x0eshared_huge"
    b"tlb\x94K\x00\x8c\x0fprivate_hugetlb\x94K\x00\x8c\x04swap\x94K\x00\x8c\x08swap_ps"
    b"s\x94K\x00\x8c\x06locked\x94K\x00\x8c\x0cthp_eligible\x94K\x00ut\x94\x8c\x18vmm_"
    b"linux._inspect_types\x94\x8c\tRegionRun\x94\x93\x94(\x8a\x06\x00\x00\x00\x00\x00"
    b"\x10M\x00\x10\x8c\x10vmm_linux.states\x94\x8c\tPageState\x94\x93\x94K\x02\x85"
    b"\x94R\x94h&\x8c\x08PageKind\x94\x93\x94K\x01\x85\x94R\x94\x8c\x0fvmm_linux.flags"
    b"\x94\x8c\x08VmmFlags\x94\x93\x94J3\x00\x01\x00\x85\x94R\x94h1K\x03\x85\x94R\x94N"
    b"t\x94\x81\x94N\x87\x94R\x94."
)


def test_a_page_that_the_first_version_pickled_is_loaded() -> None:
    infos = [pickle.loads(INFO), pickle.loads(PAGE)]  # noqa: S301
    for info in infos:
        assert type(info) is PageInfo
        assert (info.va, info.state, info.kind) == (ADDRESS, PageState.COMMITTED, PageKind.PRIVATE)
        assert pickle.loads(pickle.dumps(info)) == info  # noqa: S301
    assert infos[0].smaps is None
    assert (infos[1].smaps.start, infos[1].smaps.rss) == (ADDRESS, 4096)


def test_a_record_that_the_first_version_pickled_is_loaded() -> None:
    record = pickle.loads(RECORD)  # noqa: S301
    assert type(record) is Record
    assert (record.method, record.rc, record.result) == ("allocate", Retcode.OK, ADDRESS)


def test_a_mapping_that_the_first_version_pickled_is_loaded() -> None:
    mapping = pickle.loads(MAPPING)  # noqa: S301
    assert (mapping.start, mapping.permissions, mapping.rss) == (ADDRESS, "rw-p", 4096)
    assert mapping.region is not None
    assert mapping.region.kind is PageKind.PRIVATE


def test_an_old_name_has_nothing_else() -> None:
    with pytest.raises(AttributeError):
        getattr(importlib.import_module("vmm_linux._query"), "no_such_name")  # noqa: B009
    with pytest.raises(AttributeError, match="__path__"):
        getattr(importlib.import_module("vmm_linux._query"), "__path__")  # noqa: B009

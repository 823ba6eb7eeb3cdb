"""Layer inspect: mappings and pages of any process, as objects, and what of them is a region.

It joins procfs with the intents of this process's VMMs, and has one part, ``mappings``. Which
process may be asked about, and what an error means, is for ``vmm_linux.inspect`` to say: here a
-errno is an ``OSError``.
"""

from cython cimport final, no_gc
from libc.errno cimport ENAMETOOLONG, ENOENT
from libc.stdint cimport uint32_t, uintptr_t
from libc.stdlib cimport free
from libcpp.algorithm cimport sort
from libcpp.vector cimport vector

from vmm_linux._core cimport kernel
from vmm_linux._core.endpoint cimport add_intents_of_all, intent_of_any
from vmm_linux._core.memory cimport *
from vmm_linux._core.procfs cimport (
    FIGURE_KERNEL_PAGE_SIZE, FIGURE_MMU_PAGE_SIZE, FIGURE_PROTECTION_KEY, FIGURE_SIZE, fill_span,
    find_pages, is_alive, is_ambiguous, known_flags, NamedQuery, OwnProcess, PagesFound,
    query_with_name, read_records, restore_into, set_figure, settled_name, SmapsEntry, SmapsRecord,
    SmapsStore, Span,
)

from vmm_linux._core.mapping_dict import check_told
from vmm_linux._core.page_runs import PageFlags, PageRun, RegionRun
from vmm_linux.flags import VmmFlags
from vmm_linux.states import PageKind, PageState

include "inspect/mappings.pxi"

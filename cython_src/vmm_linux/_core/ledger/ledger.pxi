"""The ledger of intent: which regions there are, and what each of their pages is meant to be.

A pure data structure: no I/O, no locks, no Python object on its paths; the caller
holds the mutex. What can run out of memory (``insert``, ``isolate``, ``split``) comes before
the kernel is asked and changes no page's meaning; what follows the kernel's word cannot fail.
"""

@cython.final

cdef bint alike(const Run &left, const Run &right, size_t distance) noexcept nogil:
    """Whether two neighbouring runs may be one: ``distance`` is the length of the left one."""
    return (
        left.pins == 0
        and right.pins == 0
        and left.state == right.state
        and left.protection == right.protection
        and left.ceiling == right.ceiling
        and left.kind == right.kind
        and left.opened == right.opened
        and left.backing == right.backing
        and (left.backing == NULL or left.offset + distance == right.offset)
    )


cdef bint is_closed(const Run &run) noexcept nogil:
    """Whether these are reserved private pages in a mapping without access."""
    return run.state == STATE_RESERVED and run.backing == NULL and run.opened == 0


cdef bint is_mapping(const Region &region) noexcept nogil:
    """Whether MdlMap made the region: Allocate's have RESERVE."""
    return not region.flags & FLAG_RESERVE


cdef uint64_t guards_of(const Region &region) noexcept nogil:
    """How many guard pages a region has."""
    return <uint64_t>(region.low_guard != 0) + <uint64_t>(region.high_guard != 0)


cdef uint64_t private_bytes(uintptr_t start, const Run &run) noexcept nogil:
    """Bytes of a run that are committed and no buffer's."""
    return run.end - start if run.state == STATE_COMMITTED and run.kind == KIND_PRIVATE else 0


cdef uint64_t locked_bytes(uintptr_t start, const Run &run) noexcept nogil:
    """Bytes of a run that are committed in a LOCKED region."""
    return run.end - start if run.state == STATE_COMMITTED and run.locked else 0


def set_leaf_limit(entries=None):
    """Take memory for a new leaf from so many regions or runs on; for tests.

    Args:
        entries: how many, or None for as many as the map itself says.
    """
    cdef size_t limit = <size_t>-1 if entries is None else entries
    Regions.set_leaf_limit(limit)
    Runs.set_leaf_limit(limit)


@cython.final
cdef class Ledger:
    """Regions and page runs of one VMM."""

    __reduce__ = refuse_copies("each belongs to one VMM")

    def __cinit__(self):
        self.most_mappings = <uint64_t>-1

    cdef void count(self, Runs.iterator run) noexcept nogil:
        """Add what a run has of each figure."""
        self.committed += private_bytes(dereference(run).first, dereference(run).second)
        self.locked += locked_bytes(dereference(run).first, dereference(run).second)

    cdef void discount(self, Runs.iterator run) noexcept nogil:
        """Take away what ``count`` added; before a change of state or kind."""
        self.committed -= private_bytes(dereference(run).first, dereference(run).second)
        self.locked -= locked_bytes(dereference(run).first, dereference(run).second)

    cdef bint insert(self, uintptr_t base, Region region, Run run) noexcept nogil:
        """Enter a region whose pages are all as ``run`` says; false when memory is short."""
        if not self.regions.insert(base, region):
            return False
        if not self.runs.insert(base, run):
            self.regions.erase(self.regions.find(base))
            return False
        self.covered += region.end - base
        self.guards += guards_of(region)
        self.mapped += is_mapping(region)
        self.committed += private_bytes(base, run)
        self.locked += locked_bytes(base, run)
        return True

    cdef Regions.iterator region_around(self, uintptr_t va, size_t page) noexcept nogil:
        """The region of which ``va`` is in a guard page, or ``regions.end()``."""
        cdef Regions.iterator region = self.regions.upper_bound(va)
        if region != self.regions.end():
            if dereference(region).second.low_guard and dereference(region).first - va <= page:
                return region
        if region != self.regions.begin():
            predecrement(region)
            if dereference(region).second.high_guard and va - dereference(region).second.end < page:
                return region
        return self.regions.end()

    cdef void gap_around(self, uintptr_t va, size_t page, uintptr_t *start,
                         uintptr_t *end) noexcept nogil:
        """The addresses around ``va`` that are neither a region's nor a guard's."""
        cdef Regions.iterator region = self.regions.upper_bound(va)
        start[0] = 0
        end[0] = <uintptr_t>-1
        if region != self.regions.end():
            end[0] = dereference(region).first
            if dereference(region).second.low_guard:
                end[0] -= page
        if region != self.regions.begin():
            predecrement(region)
            start[0] = dereference(region).second.end
            if dereference(region).second.high_guard:
                start[0] += page

    cpdef bint holds(self, uintptr_t va, size_t size) noexcept nogil:
        """Whether ``[va, va + size)`` lies wholly inside one region."""
        return self.is_inside(self.region_at(va), va, size)

    cdef Runs.iterator run_near(self, Runs.iterator near, uintptr_t va) noexcept nogil:
        """``run_at`` for who comes to ``va`` from a run below it, or from ``runs.end()``."""
        if near == self.runs.end() or va < dereference(near).first:
            return self.run_at(va)
        if va < dereference(near).second.end:
            return near
        preincrement(near)
        if (near != self.runs.end() and dereference(near).first <= va
                and va < dereference(near).second.end):
            return near
        return self.run_at(va)

    cpdef bint cut(self, uintptr_t at) noexcept nogil:
        """Make ``at`` a border between runs; false when memory is short."""
        cdef Runs.iterator run = self.runs.lower_bound(at)
        if run != self.runs.end() and dereference(run).first == at:
            return True
        if run == self.runs.begin():
            return True
        predecrement(run)
        return dereference(run).second.end <= at or self.cut_run(&run, at)

    cdef bint isolate(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Cover ``[start, end)`` with whole runs, which means nothing; false: memory is short."""
        cdef Runs.iterator run = self.run_at(start)
        return self.isolate_from(&run, start, end)

    cdef bint isolate_from(self, Runs.iterator *run, uintptr_t start,
                           uintptr_t end) noexcept nogil:
        """``isolate`` from the run that includes ``start``, then the one that starts there."""
        cdef bint cut = dereference(run[0]).first < start
        cdef Runs.iterator last
        if cut and not self.cut_run(run, start):
            return False
        last = run[0]
        while dereference(last).second.end < end:
            preincrement(last)
        if dereference(last).second.end > end and not self.cut_run(&last, end):
            if cut:
                self.undo_cut(run[0])
            return False
        return True

    cdef bint isolate_to_remove(self, Runs.iterator *run, uintptr_t start,
                                uintptr_t end) noexcept nogil:
        """``isolate_from`` of pages at a region's end, or all of it, which then are removed.

        That leaves no more runs than there were, so the one that it takes meanwhile is no matter
        of the limit: the kernel lets its own count pass for that, too.
        """
        cdef uint64_t most = self.most_mappings
        cdef bint isolated
        self.most_mappings = <uint64_t>-1
        isolated = self.isolate_from(run, start, end)
        self.most_mappings = most
        return isolated

    cdef bint narrow(self, Runs.iterator *run, uintptr_t *start, uintptr_t *end) noexcept nogil:
        """Leave committed pages at both ends of a range out, from the run that includes ``start``.

        So nobody cuts runs that stay as they are: those that views hold could not be joined again.
        False where no page is reserved.
        """
        cdef Runs.iterator at = run[0]
        cdef uintptr_t last = 0
        while at != self.runs.end() and dereference(at).first < end[0]:
            if dereference(at).second.state == STATE_RESERVED:
                if last == 0:
                    run[0] = at
                    start[0] = max(start[0], dereference(at).first)
                last = min(end[0], dereference(at).second.end)
            preincrement(at)
        end[0] = last
        return last != 0

    cdef bint cut_run(self, Runs.iterator *run, uintptr_t at) noexcept nogil:
        """Cut a run inside it, and go on to its right part; false when memory is short."""
        cdef Runs.iterator right = run[0]
        cdef Run part = dereference(run[0]).second
        part.offset += at - dereference(run[0]).first
        if not self.may_cut() or not self.runs.insert_after(&right, at, part):
            return False
        dereference(run[0]).second.end = at
        run[0] = right
        return True

    cdef void undo_cut(self, Runs.iterator right) noexcept nogil:
        """Undo ``cut_run``, whether or not a view holds the run."""
        cdef Runs.iterator left = right
        predecrement(left)
        dereference(left).second.end = dereference(right).second.end
        self.runs.erase(right)

    cpdef void coalesce(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Join the runs in and around ``[start, end)`` that are alike."""
        self.coalesce_from(self.runs.lower_bound(start), end)

    cdef Runs.iterator coalesce_from(self, Runs.iterator left, uintptr_t end) noexcept nogil:
        """``coalesce`` from the run that starts there, and the one before it: the last one seen."""
        cdef Runs.iterator right
        if left != self.runs.begin():
            predecrement(left)
        if left == self.runs.end():
            return left
        right = left
        preincrement(right)
        while right != self.runs.end() and dereference(right).first <= end:
            if (
                dereference(left).second.end == dereference(right).first
                and alike(dereference(left).second, dereference(right).second,
                          dereference(right).first - dereference(left).first)
                and self.regions.count(dereference(right).first) == 0
            ):
                dereference(left).second.end = dereference(right).second.end
                right = self.runs.erase(right)
            else:
                left = right
                preincrement(right)
        return left

    cdef bint split(self, uintptr_t at) noexcept nogil:
        """Make two regions of one at ``at``, which is inside it; false when memory is short."""
        cdef Regions.iterator region = self.region_at(at)
        cdef Regions.iterator place = region
        cdef Region right
        if dereference(region).first == at:
            return True
        if not self.cut(at):
            return False
        right = dereference(region).second
        right.low_guard = False
        if not self.regions.insert_after(&place, at, right):
            self.coalesce(at, at)
            return False
        dereference(region).second.end = at
        dereference(region).second.high_guard = False
        self.mapped += is_mapping(right)
        return True

    cdef void join(self, uintptr_t at) noexcept nogil:
        """Undo ``split(at)``."""
        cdef Regions.iterator right = self.regions.find(at)
        cdef Regions.iterator left
        if right == self.regions.end() or right == self.regions.begin():
            return
        left = right
        predecrement(left)
        dereference(left).second.end = dereference(right).second.end
        dereference(left).second.high_guard = dereference(right).second.high_guard
        self.mapped -= is_mapping(dereference(right).second)
        self.regions.erase(right)
        self.coalesce(at, at)

    cdef void remove_from(self, Regions.iterator region, Runs.iterator run,
                          uintptr_t end) noexcept nogil:
        """Forget whole runs of a region, from this one up to an end that is the region's end."""
        cdef uintptr_t start = dereference(run).first
        self.covered -= end - start
        while run != self.runs.end() and dereference(run).first < end:
            self.discount(run)
            run = self.runs.erase(run)
        if dereference(region).first == start:
            self.guards -= guards_of(dereference(region).second)
            self.mapped -= is_mapping(dereference(region).second)
            self.regions.erase(region)
        else:
            self.guards -= dereference(region).second.high_guard != 0
            dereference(region).second.end = start
            dereference(region).second.high_guard = False

    cpdef void set_state(self, uintptr_t start, uintptr_t end, uint8_t state) noexcept nogil:
        """Set the state of isolated pages; no guards hold them back then."""
        self.set_state_from(self.runs.lower_bound(start), end, state)

    cdef Runs.iterator set_state_from(self, Runs.iterator first, uintptr_t end,
                                      uint8_t state) noexcept nogil:
        """``set_state`` from the run that starts there: the last run that was looked at."""
        cdef Runs.iterator run = first
        while run != self.runs.end() and dereference(run).first < end:
            if dereference(run).second.state != state:
                self.discount(run)
                dereference(run).second.state = state
                self.count(run)
            dereference(run).second.opened = 0
            preincrement(run)
        return self.coalesce_from(first, end)

    cdef void set_guarded(self, Runs.iterator first, uintptr_t end) noexcept nogil:
        """Reserve isolated pages whose mappings keep the access that they had when committed."""
        cdef Runs.iterator run = first
        while run != self.runs.end() and dereference(run).first < end:
            if dereference(run).second.state == STATE_COMMITTED:
                self.discount(run)
                dereference(run).second.state = STATE_RESERVED
                dereference(run).second.opened = dereference(run).second.protection
            preincrement(run)
        self.coalesce_from(first, end)

    cdef void set_opened(self, uintptr_t start, uintptr_t end, uint8_t access) noexcept nogil:
        """Note that isolated reserved pages lie in mappings with this access now, behind guards."""
        cdef Runs.iterator run = self.runs.lower_bound(start)
        while run != self.runs.end() and dereference(run).first < end:
            if is_closed(dereference(run).second):
                dereference(run).second.opened = access
            preincrement(run)
        self.coalesce(start, end)

    cdef void set_protection_from(self, Runs.iterator first, uintptr_t end,
                                  uint8_t protection) noexcept nogil:
        """Set the protection of isolated pages, from the run that starts there."""
        cdef Runs.iterator run = first
        dereference(run).second.protection = protection
        while dereference(run).second.end < end:
            preincrement(run)
            dereference(run).second.protection = protection
        self.coalesce_from(first, end)

    cdef void set_backing(self, uintptr_t start, uintptr_t end, void *backing, uint64_t offset,
                          uint8_t kind, uint8_t ceiling) noexcept nogil:
        """Set what is behind isolated pages; ``offset``: of ``start`` in the memory object."""
        cdef Runs.iterator run = self.runs.lower_bound(start)
        while run != self.runs.end() and dereference(run).first < end:
            self.discount(run)
            dereference(run).second.backing = backing
            dereference(run).second.offset = offset + (dereference(run).first - start)
            dereference(run).second.kind = kind
            dereference(run).second.ceiling = ceiling
            self.count(run)
            preincrement(run)
        self.coalesce(start, end)

    cdef bint pin(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Hold the pages once more; false when memory is short."""
        cdef Runs.iterator run
        if not self.isolate(start, end):
            return False
        run = self.runs.lower_bound(start)
        while run != self.runs.end() and dereference(run).first < end:
            dereference(run).second.pins = dereference(run).second.pins + 1
            preincrement(run)
        return True

    cpdef void unpin(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Let go of pages that ``pin`` holds."""
        cdef Runs.iterator run = self.runs.lower_bound(start)
        while run != self.runs.end() and dereference(run).first < end:
            dereference(run).second.pins = dereference(run).second.pins - 1
            preincrement(run)
        self.coalesce(start, end)

    cdef const char *flaw(self, uintptr_t *where) noexcept nogil:
        """The first invariant that does not hold, and where; NULL when all do."""
        cdef Regions.iterator region = self.regions.begin()
        cdef Runs.iterator run = self.runs.begin()
        cdef Run left
        cdef uintptr_t start
        cdef uint64_t covered = 0, guards = 0, committed = 0, locked = 0, mapped = 0
        while region != self.regions.end():
            where[0] = dereference(region).first
            covered += dereference(region).second.end - where[0]
            guards += guards_of(dereference(region).second)
            mapped += is_mapping(dereference(region).second)
            if where[0] >= dereference(region).second.end:
                return b"an empty region"
            while where[0] < dereference(region).second.end:
                if run == self.runs.end() or dereference(run).first != where[0]:
                    return b"a gap between runs"
                start = where[0]
                left = dereference(run).second
                where[0] = left.end
                committed += private_bytes(start, left)
                locked += locked_bytes(start, left)
                if left.end <= start:
                    return b"an empty run"
                preincrement(run)
                if left.end < dereference(region).second.end and run != self.runs.end():
                    if alike(left, dereference(run).second, left.end - start):
                        return b"two runs that should be one"
            if where[0] != dereference(region).second.end:
                return b"a run across a region's end"
            preincrement(region)
            if region != self.regions.end() and dereference(region).first < where[0]:
                return b"overlapping regions"
        if run != self.runs.end():
            return b"a run outside all regions"
        if (covered != self.covered or guards != self.guards or committed != self.committed
                or locked != self.locked or mapped != self.mapped):
            return b"a count that is not what the runs add up to"
        return NULL

    def check(self):
        """Raise AssertionError if an invariant of this module's head does not hold."""
        cdef uintptr_t where = 0
        cdef const char *flaw = self.flaw(&where)
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()} at 0x{where:x}")

    # -- the same from Python, for tests: what the core knows of its ranges is checked here

    cdef int check_inside(self, uintptr_t start, uintptr_t end) except -1:
        """Refuse a range that is not inside one region."""
        if start >= end or not self.holds(start, end - start):
            raise ValueError(f"[0x{start:x}, 0x{end:x}) is not inside one region")
        return 0

    cdef int check_isolated(self, uintptr_t start, uintptr_t end) except -1:
        """Refuse a range that is not made of whole runs of one region."""
        self.check_inside(start, end)
        if (dereference(self.run_at(start)).first != start
                or dereference(self.run_at(end - 1)).second.end != end):
            raise ValueError(f"[0x{start:x}, 0x{end:x}) is not isolated")
        return 0

    def try_isolate(self, uintptr_t start, uintptr_t end):
        """``isolate``."""
        self.check_inside(start, end)
        return self.isolate(start, end)

    def try_pin(self, uintptr_t start, uintptr_t end):
        """``pin``."""
        self.check_inside(start, end)
        return self.pin(start, end)

    def try_split(self, uintptr_t at):
        """``split``."""
        self.check_inside(at, at + 1)
        return self.split(at)

    def undo_split(self, uintptr_t at):
        """``join``."""
        self.check_inside(at, at + 1)
        if at == 0 or not self.holds(at - 1, 1) or self.holds(at - 1, 2):
            raise ValueError(f"no region ends, and none starts, at 0x{at:x}")
        self.join(at)

    def remove(self, uintptr_t start, uintptr_t end):
        """Forget ``[start, end)``: whole runs, up to an end that is a region's end."""
        self.check_isolated(start, end)
        if dereference(self.region_at(start)).second.end != end:
            raise ValueError(f"no region ends at 0x{end:x}")
        self.remove_from(self.region_at(start), self.runs.lower_bound(start), end)

    def set_protection(self, uintptr_t start, uintptr_t end, uint8_t protection):
        """Set the protection of isolated pages."""
        self.check_isolated(start, end)
        self.set_protection_from(self.runs.lower_bound(start), end, protection)

    def add(self, uintptr_t base, size_t size, uint8_t protection=0):
        """Enter a region of reserved private pages; false when memory is short."""
        cdef Region region
        cdef Run run
        cdef uintptr_t free_from, free_to
        self.gap_around(base, 0, &free_from, &free_to)
        if size == 0 or base < free_from or base >= free_to or size > free_to - base:
            raise ValueError(f"{size} bytes at 0x{base:x} are no range where no region is")
        memset(&region, 0, sizeof(region))
        memset(&run, 0, sizeof(run))
        region.end = run.end = base + size
        run.state = STATE_RESERVED
        run.kind = KIND_PRIVATE
        run.protection = protection
        run.ceiling = FLAG_RWX_MASK
        return self.insert(base, region, run)

    def listing(self):
        """Every run: ``(region's base, start, end, state, protection, pins)``."""
        cdef Regions.iterator region = self.regions.begin()
        cdef Runs.iterator run = self.runs.begin()
        rows = []
        while run != self.runs.end():
            if dereference(run).first >= dereference(region).second.end:
                preincrement(region)
            rows.append((
                dereference(region).first, dereference(run).first, dereference(run).second.end,
                dereference(run).second.state, dereference(run).second.protection,
                dereference(run).second.pins))
            preincrement(run)
        return rows

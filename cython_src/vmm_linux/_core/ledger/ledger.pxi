"""The ledger of intent: which regions there are, and what each of their pages is meant to be.

A pure data structure: no I/O, no locks, no Python object on its paths; the caller holds the mutex.
What can run out of memory (``insert``, ``isolate``, ``split``) comes before the system calls and
changes no page's meaning; what comes after them cannot fail.

The state, protection and backing of pages are set on isolated pages only: those that whole runs
make up.
"""

cdef int check_inside(Ledger ledger, uintptr_t start, uintptr_t end) except -1:
    """Refuse a range that is not inside one region."""
    if start >= end or not ledger.holds(start, end - start):
        raise ValueError(f"[0x{start:x}, 0x{end:x}) is not inside one region")
    return 0


cdef int check_isolated(Ledger ledger, uintptr_t start, uintptr_t end) except -1:
    """Refuse a range that is not made of whole runs of one region."""
    check_inside(ledger, start, end)
    if ledger.run_at(start).key() != start or ledger.run_at(end - 1).value().end != end:
        raise ValueError(f"[0x{start:x}, 0x{end:x}) is not isolated")
    return 0


def set_leaf_limit(entries=None):
    """Let a leaf of the maps hold at most so many regions or runs; for tests.

    Args:
        entries: how many, or None for as many as the maps themselves say.
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

    cdef bint insert(self, uintptr_t base, Region region, Run run) noexcept nogil:
        """Enter a region whose pages are all as ``run`` says; false when memory is short."""
        if not self.regions.insert(base, region):
            return False
        if not self.runs.insert(base, run):
            self.regions.erase(self.regions.find(base))
            return False
        self.covered += region.end - base
        self.guards += guards_of(&region)
        self.mapped += is_mapping(&region)
        self.committed += private_bytes(base, &run)
        self.locked += locked_bytes(base, &run)
        return True

    cdef Regions.iterator region_around(self, uintptr_t va, size_t page) noexcept nogil:
        """The region of which ``va`` is in a guard page, or ``regions.end()``."""
        cdef Regions.iterator region = self.regions.upper_bound(va)
        if region != self.regions.end():
            if region.value().low_guard and region.key() - va <= page:
                return region
        if region != self.regions.begin():
            predecrement(region)
            if region.value().high_guard and va - region.value().end < page:
                return region
        return self.regions.end()

    cdef void gap_around(self, uintptr_t va, size_t page, uintptr_t *start,
                         uintptr_t *end) noexcept nogil:
        """The addresses around ``va`` that are neither a region's nor a guard's."""
        cdef Regions.iterator region = self.regions.upper_bound(va)
        start[0] = 0
        end[0] = <uintptr_t>-1
        if region != self.regions.end():
            end[0] = region.key()
            if region.value().low_guard:
                end[0] -= page
        if region != self.regions.begin():
            predecrement(region)
            start[0] = region.value().end
            if region.value().high_guard:
                start[0] += page

    cpdef bint holds(self, uintptr_t va, size_t size) noexcept nogil:
        """Whether ``[va, va + size)`` lies wholly inside one region."""
        return self.is_inside(self.region_at(va), va, size)

    cdef Runs.iterator run_near(self, Runs.iterator near, uintptr_t va) noexcept nogil:
        """``run_at``, quicker from a run just below ``va``. ``near`` can be ``runs.end()``."""
        if near == self.runs.end() or va < near.key():
            return self.run_at(va)
        if va < near.value().end:
            return near
        preincrement(near)
        if near != self.runs.end() and near.key() <= va < near.value().end:
            return near
        return self.run_at(va)

    cpdef bint cut(self, uintptr_t at) noexcept nogil:
        """Let a run end at ``at`` and the next start there; false when memory is short."""
        cdef Runs.iterator run = self.runs.lower_bound(at)
        if run != self.runs.end() and run.key() == at:
            return True
        if run == self.runs.begin():
            return True
        predecrement(run)
        return run.value().end <= at or cut_run(self, &run, at)

    cdef bint isolate(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Let whole runs cover ``[start, end)``; false, with all unchanged: memory is short."""
        cdef Runs.iterator run = self.run_at(start)
        return self.isolate_from(&run, start, end)

    cdef bint isolate_from(self, Runs.iterator *run, uintptr_t start, uintptr_t end) noexcept nogil:
        """``isolate``; ``run`` includes ``start`` before, and starts there afterwards."""
        cdef bint cut = run[0].key() < start
        cdef Runs.iterator last
        if cut and not cut_run(self, run, start):
            return False
        last = run[0]
        while last.value().end < end:
            preincrement(last)
        if last.value().end > end and not cut_run(self, &last, end):
            if cut:
                undo_cut(self, run[0])
            return False
        return True

    cdef bint isolate_to_remove(self, Runs.iterator *run, uintptr_t start,
                                uintptr_t end) noexcept nogil:
        """``isolate_from`` for pages at a region's end, or all of it, which are then removed.

        That leaves as many runs as before, or fewer, so the limit does not apply to the run that
        it takes meanwhile. The kernel allows its own limit to be passed for that, too.
        """
        cdef uint64_t most = self.most_mappings
        cdef bint isolated
        self.most_mappings = <uint64_t>-1
        isolated = self.isolate_from(run, start, end)
        self.most_mappings = most
        return isolated

    cdef bint narrow(self, Runs.iterator *run, uintptr_t *start, uintptr_t *end) noexcept nogil:
        """Leave out committed pages at both ends of a range, from the run that includes ``start``.

        So runs that stay unchanged are not cut; pinned ones could not be joined again. False where
        no page is reserved.
        """
        cdef Runs.iterator at = run[0]
        cdef uintptr_t last = 0
        while self.starts_below(at, end[0]):
            if at.value().state == STATE_RESERVED:
                if last == 0:
                    run[0] = at
                    start[0] = max(start[0], at.key())
                last = min(end[0], at.value().end)
            preincrement(at)
        end[0] = last
        return last != 0

    cpdef void coalesce(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Join the runs in and around ``[start, end)`` that are alike."""
        self.coalesce_from(self.runs.lower_bound(start), end)

    cdef Runs.iterator coalesce_from(self, Runs.iterator left, uintptr_t end) noexcept nogil:
        """``coalesce`` from the run before this one; returns the last run that was looked at."""
        cdef Runs.iterator right
        if left != self.runs.begin():
            predecrement(left)
        if left == self.runs.end():
            return left
        right = left
        preincrement(right)
        while right != self.runs.end() and right.key() <= end:
            if (left.value().end == right.key()
                    and alike(left.value(), right.value(), right.key() - left.key())
                    and self.regions.count(right.key()) == 0):
                left.value().end = right.value().end
                right = self.runs.erase(right)
            else:
                left = right
                preincrement(right)
        return left

    cdef bint split(self, uintptr_t at) noexcept nogil:
        """Split a region at ``at``, which is inside it; false when memory is short."""
        cdef Regions.iterator region = self.region_at(at)
        cdef Regions.iterator place = region
        cdef Region right
        if region.key() == at:
            return True
        if not self.cut(at):
            return False
        right = region.value()[0]
        right.low_guard = False
        if not self.regions.insert_after(&place, at, right):
            self.coalesce(at, at)
            return False
        region.value().end = at
        region.value().high_guard = False
        self.mapped += is_mapping(&right)
        return True

    cdef void join(self, uintptr_t at) noexcept nogil:
        """Undo ``split(at)``."""
        cdef Regions.iterator right = self.regions.find(at)
        cdef Regions.iterator left
        if right == self.regions.end() or right == self.regions.begin():
            return
        left = right
        predecrement(left)
        left.value().end = right.value().end
        left.value().high_guard = right.value().high_guard
        self.mapped -= is_mapping(right.value())
        self.regions.erase(right)
        self.coalesce(at, at)

    cdef void remove_from(self, Regions.iterator region, Runs.iterator run,
                          uintptr_t end) noexcept nogil:
        """Forget whole runs of a region, from this one up to an end that is the region's end."""
        cdef uintptr_t start = run.key()
        self.covered -= end - start
        while self.starts_below(run, end):
            discount(self, run)
            run = self.runs.erase(run)
        if region.key() == start:
            self.guards -= guards_of(region.value())
            self.mapped -= is_mapping(region.value())
            self.regions.erase(region)
        else:
            self.guards -= region.value().high_guard != 0
            region.value().end = start
            region.value().high_guard = False

    cpdef void set_state(self, uintptr_t start, uintptr_t end, uint8_t state) noexcept nogil:
        """Set the state of pages, which no guards cover then."""
        self.set_state_from(self.runs.lower_bound(start), end, state)

    cdef Runs.iterator set_state_from(self, Runs.iterator first, uintptr_t end,
                                      uint8_t state) noexcept nogil:
        """``set_state`` from a run on; returns the last run that was looked at."""
        cdef Runs.iterator run = first
        while self.starts_below(run, end):
            if run.value().state != state:
                discount(self, run)
                run.value().state = state
                count(self, run)
            run.value().opened = 0
            preincrement(run)
        return self.coalesce_from(first, end)

    cdef void set_guarded(self, Runs.iterator first, uintptr_t end) noexcept nogil:
        """Reserve committed pages, from a run on; their mappings keep the access, behind guards."""
        cdef Runs.iterator run = first
        while self.starts_below(run, end):
            if run.value().state == STATE_COMMITTED:
                discount(self, run)
                run.value().state = STATE_RESERVED
                run.value().opened = run.value().protection
            preincrement(run)
        self.coalesce_from(first, end)

    cdef void set_reserved(self, Runs.iterator first, uintptr_t end, uint8_t opened) noexcept nogil:
        """Reserve pages, from a run on; ``opened``: their mappings' access behind guards, or 0."""
        cdef Runs.iterator run = first
        while self.starts_below(run, end):
            discount(self, run)
            run.value().state = STATE_RESERVED
            run.value().opened = opened
            preincrement(run)
        self.coalesce_from(first, end)

    cdef void set_opened(self, uintptr_t start, uintptr_t end, uint8_t access) noexcept nogil:
        """Note that the mappings of closed pages have this access now, behind guards."""
        cdef Runs.iterator run = self.runs.lower_bound(start)
        while self.starts_below(run, end):
            if is_closed(run.value()):
                run.value().opened = access
            preincrement(run)
        self.coalesce(start, end)

    cdef void set_protection_from(self, Runs.iterator first, uintptr_t end,
                                  uint8_t protection) noexcept nogil:
        """Set the protection of pages, from a run on."""
        cdef Runs.iterator run = first
        run.value().protection = protection
        while run.value().end < end:
            preincrement(run)
            run.value().protection = protection
        self.coalesce_from(first, end)

    cdef void set_backing(self, uintptr_t start, uintptr_t end, void *backing, uint64_t offset,
                          uint8_t kind, uint8_t ceiling) noexcept nogil:
        """Set what is behind pages; ``offset``: of ``start`` in the memory object."""
        cdef Runs.iterator run = self.runs.lower_bound(start)
        while self.starts_below(run, end):
            discount(self, run)
            run.value().backing = backing
            run.value().offset = offset + (run.key() - start)
            run.value().kind = kind
            run.value().ceiling = ceiling
            count(self, run)
            preincrement(run)
        self.coalesce(start, end)

    cdef bint pin(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Pin the pages once more; false when memory is short."""
        cdef Runs.iterator run
        if not self.isolate(start, end):
            return False
        run = self.runs.lower_bound(start)
        while self.starts_below(run, end):
            run.value().pins += 1
            preincrement(run)
        return True

    cpdef void unpin(self, uintptr_t start, uintptr_t end) noexcept nogil:
        """Undo ``pin``."""
        cdef Runs.iterator run = self.runs.lower_bound(start)
        while self.starts_below(run, end):
            run.value().pins -= 1
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
            where[0] = region.key()
            covered += region.value().end - where[0]
            guards += guards_of(region.value())
            mapped += is_mapping(region.value())
            if where[0] >= region.value().end:
                return b"an empty region"
            while where[0] < region.value().end:
                if run == self.runs.end() or run.key() != where[0]:
                    return b"a gap between runs"
                start = where[0]
                left = run.value()[0]
                where[0] = left.end
                committed += private_bytes(start, &left)
                locked += locked_bytes(start, &left)
                if left.end <= start:
                    return b"an empty run"
                preincrement(run)
                if (left.end < region.value().end and run != self.runs.end()
                        and alike(&left, run.value(), left.end - start)):
                    return b"two runs that should be one"
            if where[0] != region.value().end:
                return b"a run across a region's end"
            preincrement(region)
            if region != self.regions.end() and region.key() < where[0]:
                return b"overlapping regions"
        if run != self.runs.end():
            return b"a run outside all regions"
        if (covered != self.covered or guards != self.guards or committed != self.committed
                or locked != self.locked or mapped != self.mapped):
            return b"a count that is not what the runs add up to"
        return NULL

    def check(self):
        """Raise AssertionError if an invariant of ``flaw`` does not hold."""
        cdef uintptr_t where = 0
        cdef const char *flaw = self.flaw(&where)
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()} at 0x{where:x}")

    # For tests, from Python: these check what the core ensures of its ranges.

    def try_isolate(self, uintptr_t start, uintptr_t end):
        """``isolate``."""
        check_inside(self, start, end)
        return self.isolate(start, end)

    def try_pin(self, uintptr_t start, uintptr_t end):
        """``pin``."""
        check_inside(self, start, end)
        return self.pin(start, end)

    def try_split(self, uintptr_t at):
        """``split``."""
        check_inside(self, at, at + 1)
        return self.split(at)

    def undo_split(self, uintptr_t at):
        """``join``."""
        check_inside(self, at, at + 1)
        if at == 0 or not self.holds(at - 1, 1) or self.holds(at - 1, 2):
            raise ValueError(f"no region ends, and none starts, at 0x{at:x}")
        self.join(at)

    def remove(self, uintptr_t start, uintptr_t end):
        """Forget ``[start, end)``: whole runs, up to a region's end."""
        check_isolated(self, start, end)
        if self.region_at(start).value().end != end:
            raise ValueError(f"no region ends at 0x{end:x}")
        self.remove_from(self.region_at(start), self.runs.lower_bound(start), end)

    def set_protection(self, uintptr_t start, uintptr_t end, uint8_t protection):
        """Set the protection of isolated pages."""
        check_isolated(self, start, end)
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
            if run.key() >= region.value().end:
                preincrement(region)
            rows.append((
                region.key(), run.key(), run.value().end,
                run.value().state, run.value().protection,
                run.value().pins))
            preincrement(run)
        return rows

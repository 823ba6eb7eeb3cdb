"""Mappings of any process, each made an object when it is asked for; one mapping; pages."""

cdef extern from "Python.h":
    object PyUnicode_DecodeFSDefaultAndSize(const char *, Py_ssize_t)

cdef tuple STATES = tuple(PageState)
cdef tuple KINDS = tuple(PageKind)
cdef dict FLAGS = {}            # numbers to VmmFlags, which are slow to make


cdef object flags_of(uint32_t bits):
    flags = FLAGS.get(bits)
    if flags is None:
        flags = FLAGS[bits] = VmmFlags(bits)
    return flags


cdef object region_of(const Intent &intent):
    return RegionRun(
        intent.base, intent.limit - intent.base, STATES[intent.state], KINDS[intent.kind],
        flags_of(intent.flags), flags_of(intent.protection), intent.sid or None)


@final
@no_gc                          # As SmapsRecord is; a part holds its whole, which is no part.
cdef class Mapping(SmapsRecord):
    """One mapping of a process, or a part of one that belongs to one of our regions.

    Attributes:
        start, end: its addresses, ``[start, end)``.
        permissions: as in ``maps``: ``rw-p``; the last letter is ``s`` for shared.
        offset: where in the file it begins, in bytes.
        device, inode: of the file, ``"00:00"`` and 0 where there is none.
        pathname: of the file, or what the kernel calls it (``[heap]``); None where it has no name.
        deleted: whether the file has no name any more.
        vm_flags: the kernel's flags as two letters each, None where they are unknown.
        figures: every figure of smaps by name, in bytes; each is an attribute too (``rss``),
            None where it is unknown.
        region: ``RegionRun`` of this process's VMM that made it, None for any other mapping.
        whole: the kernel's mapping, with its figures; itself, unless it is a part.

    The kernel merges neighbours, so one of its mappings can belong to several regions, in several
    states. It is cut at their borders then. The kernel has figures of the whole alone: the parts
    have those that hold for any part of it (page sizes, protection key), their own ``size``, and
    None for the others.
    """
    cdef readonly object region
    cdef Mapping uncut

    def __init__(self):
        """Raise TypeError: ``snapshot``, ``maps`` and ``at`` make them."""
        raise TypeError("mappings are not made by hand; ask snapshot(), maps() or at()")

    @property
    def whole(self):
        return self if self.uncut is None else self.uncut

    def __eq__(self, other):
        if isinstance(other, Mapping) and self.region != (<Mapping>other).region:
            return False
        return SmapsRecord.__eq__(self, other)

    def __hash__(self):
        return SmapsRecord.__hash__(self)

    def __reduce__(self):
        cdef tuple arguments = SmapsRecord.__reduce__(self)[1]
        return restore_mapping, (arguments, self.region, self.uncut)

    def as_dict(self):
        """All its values, as JSON can carry them.

        Returns:
            A dict of the attributes: ``vm_flags`` sorted, ``region`` a dict or None, ``whole``
            a dict for a part, else None.
        """
        return {
            "start": self.span.start,
            "end": self.span.end,
            "permissions": self.permissions,
            "offset": self.span.offset,
            "device": self.device,
            "inode": self.span.inode,
            "pathname": self.pathname,
            "vm_flags": None if self.vm_flags is None else sorted(self.vm_flags),
            "figures": dict(self.figures),
            "region": None if self.region is None else {
                name: None if value is None else int(value)
                for name, value in self.region._asdict().items()},
            "whole": None if self.uncut is None else self.uncut.as_dict(),
        }

    @staticmethod
    def from_dict(values):
        """The mapping with the values of ``as_dict``.

        Args:
            values: the dict.

        Errors:
            INVALID_ARGUMENT: it is not one of ``as_dict``; the message names the part.
        """
        check_told(values)
        major, minor = values["device"].split(":")
        letters = values["permissions"]
        permissions = sum(
            bit for letter, wanted, bit in zip(letters, "rwxs", (1, 2, 4, 8)) if letter == wanted)
        vm_flags = values["vm_flags"]
        region = values["region"]
        whole = values["whole"]
        if region is not None:
            region = RegionRun(
                region["base"], region["size"], PageState(region["state"]),
                PageKind(region["kind"]), VmmFlags(region["flags"]),
                VmmFlags(region["protection"]), region["sid"])
        return restore_mapping(
            (values["start"], values["end"], permissions, values["offset"], int(major, 16),
             int(minor, 16), values["inode"], values["pathname"],
             None if vm_flags is None else frozenset(vm_flags), values["figures"]),
            region, None if whole is None else Mapping.from_dict(whole))


def restore_mapping(tuple arguments, region, Mapping whole):
    """A new mapping with the values that ``Mapping.__reduce__`` gave."""
    cdef Mapping made = Mapping.__new__(Mapping)
    if region is not None and type(region) is not RegionRun:
        raise TypeError(f"no mapping: its region is of type {type(region).__name__}")
    if whole is not None and whole.uncut is not None:
        raise ValueError("no mapping: what it is a part of is a part itself")
    restore_into(made, arguments)
    made.region = region
    made.uncut = whole
    return made


cdef int cut(Mapping mapping, uintptr_t start, uintptr_t end, Mapping whole) except -1:
    """Make a copy of ``whole`` its part ``[start, end)``."""
    if mapping.span.inode != 0:
        mapping.span.offset += start - mapping.span.start
    mapping.span.start = start
    mapping.span.end = end
    mapping.known &= (1 << FIGURE_KERNEL_PAGE_SIZE | 1 << FIGURE_MMU_PAGE_SIZE
                      | <uint32_t>1 << FIGURE_PROTECTION_KEY)
    if mapping.known:
        set_figure(mapping, FIGURE_SIZE, end - start)
    mapping.others = None
    mapping.uncut = whole
    return 0


cdef struct Part:
    uintptr_t start, end
    uint32_t record
    int intent                  # below 0: of no region


cdef bint is_below(const Intent &one, const Intent &other) noexcept nogil:
    return one.start < other.start


@final
@no_gc
cdef class Mappings:
    """The mappings of one process, each made into an object whenever it is asked for."""
    cdef SmapsStore store
    cdef vector[Intent] intents
    cdef vector[Part] parts     # empty where no mapping is a region's
    cdef size_t cut_last        # the record whose whole this is
    cdef Mapping whole

    def __cinit__(self):
        self.store = SmapsStore.__new__(SmapsStore)

    def __init__(self):
        """Raise TypeError: ``read_mappings`` makes them."""
        raise TypeError("read_mappings() makes them")

    def __reduce__(self):
        return tuple, (tuple(self),)

    def __len__(self):
        return self.store.count if self.parts.empty() else self.parts.size()

    def __getitem__(self, index):
        cdef Py_ssize_t count = len(self)
        cdef Py_ssize_t i
        cdef list chosen
        if isinstance(index, slice):
            chosen = []
            for i in range(*index.indices(count)):
                chosen.append(self.mapping(i))
            return tuple(chosen)
        i = index
        if i < 0:
            i += count
        if not 0 <= i < count:
            raise IndexError("there are not so many mappings")
        return self.mapping(i)

    def __iter__(self):
        cdef Py_ssize_t i
        for i in range(len(self)):
            yield self.mapping(i)

    cdef Mapping mapping(self, size_t index):
        cdef const Part *part
        cdef const Span *span
        cdef Mapping made
        if self.parts.empty():
            return self.uncut_mapping(index)
        part = &self.parts[index]
        span = &self.store.at(part.record).span
        made = self.uncut_mapping(part.record)
        if part.intent >= 0:
            made.region = region_of(self.intents[part.intent])
        if part.start != span.start or part.end != span.end:
            if self.whole is None or self.cut_last != part.record:
                self.whole = self.uncut_mapping(part.record)
                self.cut_last = part.record
            cut(made, part.start, part.end, self.whole)
        return made

    cdef Mapping uncut_mapping(self, size_t index):
        cdef Mapping made = Mapping.__new__(Mapping)
        self.store.fill(made, index)
        return made

    @property
    def backslashes(self):
        """Whether a name has one, so that some may need ``settle_names``."""
        return bool(self.store.backslashes)

    def settle_names(self, int fd):
        """Ask the process's open maps for the names of which the text can mean two."""
        cdef NamedQuery query
        cdef const SmapsEntry *entry
        cdef size_t i
        for i in range(self.store.count):
            entry = self.store.at(i)
            pathname = self.store.pathname_at(entry)
            if is_ambiguous(pathname) and query_with_name(fd, entry.span.start, &query) == 0:
                # Its place in memory is its own, since it has a backslash.
                self.store.strings[<uintptr_t>entry.path] = settled_name(
                    pathname, entry.span.start, &query)

    cdef int cut_at_regions(self) except -1:
        """Divide the kernel's mappings among the regions of this process's VMMs."""
        cdef size_t i, next = 0, region
        cdef const Span *span
        cdef uintptr_t at
        if self.intents.empty():
            return 0
        sort(self.intents.begin(), self.intents.end(), is_below)
        self.parts.reserve(self.store.count + self.intents.size())
        for i in range(self.store.count):
            span = &self.store.at(i).span
            at = span.start
            while next < self.intents.size() and self.intents[next].end <= at:
                next += 1
            region = next
            while region < self.intents.size() and self.intents[region].start < span.end:
                self.add_part(i, at, self.intents[region].start, -1)
                self.add_part(i, max(at, self.intents[region].start),
                              min(span.end, self.intents[region].end), region)
                at = max(at, min(span.end, self.intents[region].end))
                region += 1
            self.add_part(i, at, span.end, -1)
        return 0

    cdef int add_part(self, size_t record, uintptr_t start, uintptr_t end,
                      Py_ssize_t intent) except -1:
        cdef Part part
        if start < end:
            part.start = start
            part.end = end
            part.record = <uint32_t>record
            part.intent = <int>intent
            self.parts.push_back(part)
        return 0


def read_mappings(int fd, bint figures, bint ours):
    """All mappings in an open smaps (with figures) or maps, in order and without overlaps.

    ``ours``: they are this process's, and cut at the borders of its regions. OSError where reading
    fails; ValueError, with the line, where one cannot be read.
    """
    cdef Mappings made = Mappings.__new__(Mappings)
    kernel.check(read_records(made.store, fd, figures))
    made.store.drop_overlapped()
    if ours:
        add_intents_of_all(&made.intents)
        made.cut_at_regions()
    return made


# Of this process. It is used with the GIL held, which keeps questions apart.
cdef OwnProcess own = OwnProcess()


def close_files():
    """Close what ``own_mapping`` keeps open; its next call opens it again."""
    own.release()


cdef Mapping mapping_of(const NamedQuery *query):
    cdef Mapping made = Mapping.__new__(Mapping)
    cdef uint32_t size = query.mapping.vma_name_size
    fill_span(&made.span, &query.mapping)
    if size > 1:
        made.pathname = PyUnicode_DecodeFSDefaultAndSize(query.name, size - 1)
    return made


cdef object found_mapping(int result, const NamedQuery *query):
    """The mapping of a query with this result; None for a hole, NotImplemented for a long name."""
    if result == -ENOENT:
        return None
    if result == -ENAMETOOLONG:
        return NotImplemented
    kernel.check(result)
    return mapping_of(query)


def own_mapping(uintptr_t va):
    """This process's mapping at ``va``, by PROCMAP_QUERY, cut at its region's borders; or None.

    NotImplemented where the text must be searched: there is no PROCMAP_QUERY, or the name is too
    long for it.
    """
    cdef NamedQuery query
    cdef Intent intent
    cdef Mapping made
    if not kernel.has(kernel.FEATURE_PROCMAP_QUERY):
        return NotImplemented
    found = found_mapping(own.name_at(va, &query), &query)
    if not isinstance(found, Mapping):
        return found
    made = found
    if intent_of_any(va, &intent):
        made.region = region_of(intent)
    if intent.start > made.span.start or intent.end < made.span.end:
        cut(made, max(made.span.start, intent.start), min(made.span.end, intent.end),
            mapping_of(&query))
    return made


def foreign_mapping(int fd, uintptr_t va):
    """The mapping at ``va`` of the process whose maps is open, or None; or NotImplemented."""
    cdef NamedQuery query
    cdef int result
    if not kernel.has(kernel.FEATURE_PROCMAP_QUERY):
        return NotImplemented
    with nogil:
        result = query_with_name(fd, va, &query)
    return found_mapping(result, &query)


cdef tuple PAGE_FLAGS = tuple(PageFlags(bits) for bits in range(256))


def read_pages(int fd, uintptr_t start, uintptr_t end, bint exclusive):
    """What is known of the pages of a range, from an open pagemap: a list of PageRun."""
    cdef PagesFound found = [NULL, 0, 0]
    cdef list runs
    cdef size_t i
    cdef int result
    try:
        with nogil:
            result = find_pages(fd, start, end, exclusive, &found)
        kernel.check(result)
        make = tuple.__new__
        runs = []
        for i in range(found.count):
            runs.append(make(PageRun, (
                found.list[i].start, found.list[i].end, PAGE_FLAGS[found.list[i].flags & 255])))
        return runs
    finally:
        free(found.list)


def has_memory(int fd):
    """Whether the process that this pagemap was opened for still has the memory it had then."""
    return bool(is_alive(fd))


def known_page_flags(bint exclusive):
    """The bits of PageFlags that can be found out here."""
    return known_flags(exclusive)

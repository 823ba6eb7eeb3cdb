"""Calls of which one of the interpreter's own allocations fails.

``_testcapi.set_nomemory`` lets the n-th fail from the moment at which it is asked. Each call is
made with n from 0 on, each time in a fresh state, until it makes fewer allocations than that. A
call that raises must leave all as it was and then work; any other must have done all that it does.
What fails in the core's own memory, and in the kernel, is :mod:`faults`.

Run by itself (``scripts/soak --memory-short`` does), this tries the groups that it is given the
names of, all without any, and writes what went wrong.
"""

from __future__ import annotations

import _testcapi
import copy
import gc
import hashlib
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from buffer_scenarios import (
    READ_ONLY,
    ask_buffer,
    buffer,
    connected,
    convert,
    first,
    holes,
    info,
    mapped,
    mapping,
    newest,
    oldest,
    receive,
    send,
    window,
)
from constants import COMMIT, FIXED, GUARDS, LOCKED, RESERVE, RW, SHAREABLE
from faults import (
    BASE,
    ELSEWHERE,
    MIXED,
    NONE,
    NOT_OURS,
    SHARED,
    SIZE,
    Ground,
    R,
    Scenario,
    ask,
    filled,
    nothing,
    over,
    pattern,
    region,
    with_protections,
)
from kernel_oracle import PAGE
from vmm_linux import (
    VMM,
    Event,
    Handle,
    Limits,
    Mdl,
    Retcode,
    Rights,
    Seal,
    empty,
    empty_like,
    full,
    inspect,
    share,
    zeros,
    zeros_like,
)
from vmm_linux._default_vmm import vmm_without_warning
from vmm_linux.audit import Audit
from vmm_linux.errors import OutOfMemory, SecurityDisallow, VmmError
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

IS_SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
#: Numbers up to this one are objects that the interpreter has already: descriptors lie above.
SMALL = 256
#: So many failures of a call are tried one by one; of later ones a part.
EACH = 150
#: Later ones come from a loop over what the machine has: more of the same.
MOST = 2_000
#: A call's number of allocations differs by less from time to time.
PROBES = 50
NEW = pattern(SIZE, 9)
OUT_OF_MEMORY = Retcode.OUT_OF_MEMORY
SHORT = OutOfMemory("", "nothing was completed")


def opened() -> dict[int, tuple[int, int]]:
    """The descriptors that were not there at the beginning, and the files that they name.

    Those of ``/proc`` are left out, which a VMM, and ``inspect``, keep for the next question.
    """
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208  a thousand times
        if number not in STANDING:
            with suppress(OSError):  # the descriptor of the listing itself
                file = os.fstat(number)
                if file.st_dev != PROC:
                    found[number] = (file.st_dev, file.st_ino)
    return found


def mappings() -> list[bytes]:
    """The mappings of this process but the interpreter's own memory.

    A sanitizer's come and go among them; then what the VMM uses has to say it.
    """
    if IS_SANITIZED:
        return []
    lines = Path("/proc/self/maps").read_bytes().splitlines()
    return [line for line in lines if not line.endswith(NOT_OURS)]


class State(NamedTuple):
    """What there is at one moment."""

    descriptors: dict[int, tuple[int, int]]
    mappings: list[bytes]
    usage: list[int]
    handles: list[int]
    contents: bytes
    waiting: bytes

    @classmethod
    def of(cls, place: Ground) -> State:
        """All that is seen from outside, and what the VMM says."""
        closed = place.closed
        return cls(
            opened(),
            mappings(),
            [] if closed else [use.used for use in VMM.usage(place)],
            [] if closed else [size_of(place, handle) for handle in place.handles],
            contents(),
            place.waiting(),
        )

    @property
    def essence(self) -> tuple[object, ...]:
        """What is the same each time."""
        return len(self.descriptors), self.usage, self.handles, self.contents, self.waiting


def size_of(place: Ground, handle: Handle) -> int:
    """The size of a buffer, or the return code."""
    try:
        return place.mdl_get_size(handle)
    except VmmError as refusal:
        return refusal.rc


def contents() -> bytes:
    """What lies at the place of the scenarios' regions, if one is there: its hash."""
    try:
        return hashlib.sha256(os.pread(MEMORY, SIZE, BASE)).digest()
    except OSError:
        return b""


MEMORY = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
PROC = os.fstat(MEMORY).st_dev
STANDING: set[int] = set()
"""The descriptors at the beginning."""


def difference(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """In what two states differ."""
    pairs = zip(before, now, strict=True)
    return "; ".join(f"{shortened(was)} to {shortened(then)}" for was, then in pairs if was != then)


def shortened(value: object) -> str:
    """Its text, or the beginning of it."""
    return f"{value}"[:700]


def probe(count: int) -> list[bytearray]:
    """Make so many allocations."""
    return [bytearray(8) for _ in range(count)]


def told(scenario: Scenario, value: object) -> object:
    """A result without what only the system knows."""
    if isinstance(value, Handle):
        return value.rights
    if scenario.placed:
        return "an address"
    plain = value is None or isinstance(value, int | str | bytes | tuple)
    return value if plain else type(value)


@dataclass
class Shortage:
    """One call, in a state that ``make`` and the scenario make."""

    scenario: Scenario
    make: Callable[[], Ground]
    answer: object = None
    reference: object = None

    def run(self, first: int, step: int) -> None:
        """Let allocations fail, from the first one on, of ``step`` one."""
        with self.make() as place:
            self.scenario.prepare(place)
            State.of(place)
            value = self.scenario.call(place)
            self.answer = told(self.scenario, value)
            self.reference = State.of(place).essence
            del value
        n = first
        while n < MOST and self.fail(n):
            n += step * (1 + max(0, n - EACH) // 10)

    def fail(self, n: int) -> bool:
        """Let the n-th allocation fail: false if the call makes fewer."""
        around = opened(), mappings()
        with self.make() as place:
            self.scenario.prepare(place)
            before = State.of(place)
            raised, value, failed = self.call(place, n)
            if raised:
                self.scenario.take_back(place, SHORT)
                now = State.of(place)
                if now != before:
                    gc.collect()
                    now = State.of(place)
                assert now == before, f"n = {n} changed {difference(before, now)}"
                value = self.scenario.call(place)
            answer = told(self.scenario, value)
            assert answer == self.answer, f"n = {n}: {answer}, not {self.answer}"
            essence = State.of(place).essence
            assert essence == self.reference, f"n = {n}: {essence} instead of {self.reference}"
            del value
        left = opened(), mappings()
        if left != around:
            gc.collect()
            left = opened(), mappings()
        assert left == around, f"n = {n} left {difference(around, left)}"
        return failed

    def call(self, place: Ground, n: int) -> tuple[bool, object, bool]:
        """Make the call with the n-th allocation failing.

        Returns:
            Whether it raised, its result, and whether an allocation of its own failed.
        """
        call, value = self.scenario.call, None
        _testcapi.set_nomemory(n, n + 1)
        try:
            value = call(place)
        except (MemoryError, SecurityDisallow):  # a policy's callable that fails denies
            return True, None, True
        except Exception as other:
            # Python's own library makes other errors of some.
            if "vmm_linux" in traceback.extract_tb(other.__traceback__)[-1].filename:
                raise
            return True, None, True
        else:
            try:
                probe(PROBES + n)
            except MemoryError:
                return False, value, False
            return False, value, True
        finally:
            _testcapi.remove_mem_hooks()


# ---- the states ----------------------------------------------------------------------------------


def keep(make: Callable[[Ground], object]) -> Callable[[Ground], None]:
    """A state with the object that this makes."""
    return lambda ground: ground.things.append(make(ground))


def thing(method: str, *arguments: object) -> Callable[[Ground], object]:
    """Call a method of the newest object."""
    return lambda ground: getattr(ground.things[-1], method)(*arguments)


def attribute(name: str) -> Callable[[Ground], object]:
    """Ask the newest object for an attribute: there is one, whatever it is."""
    return lambda ground: getattr(ground.things[-1], name) is not None


def shown(ground: Ground) -> bool:
    """Have the newest object describe itself."""
    return bool(repr(ground.things[-1]))


def left(ground: Ground) -> None:
    """Leave the ``with`` of the newest object."""
    ground.things[-1].__exit__(None, None, None)


def array_over_region(ground: Ground) -> int:
    """Make an array of which the newest object, a region, is the buffer."""
    array: np.ndarray[Any, Any] = np.ndarray(SIZE, "u1", ground.things[-1])
    return array.size


def sent_event(ground: Ground) -> None:
    """An event on its way."""
    ground.things[-1].send(ground.sockets[0])


def received_event(ground: Ground) -> Event:
    """The event that was on its way."""
    return Event.recv(ground.sockets[1])


def again(step: Callable[[Ground], object]) -> Callable[[Ground, VmmError], None]:
    """A message that was received is gone, whatever became of it: it must be sent again."""

    def take_back(ground: Ground, _error: VmmError) -> None:
        if not ground.waiting():
            step(ground)

    return take_back


def set_once(ground: Ground, _error: VmmError) -> None:
    """The newest event was set before the failed call, and not by it."""
    assert ground.things[-1].clear() == 1
    ground.things[-1].set()


def set_limits(ground: Ground) -> None:
    """Set other limits."""
    ground.limits = Limits(regions=7)


def given_descriptor(*rights: Rights) -> Callable[[Ground], bool]:
    """Take a descriptor of the newest buffer."""

    def call(ground: Ground) -> bool:
        ground.descriptor = ground.handle_fileno(ground.handles[-1], *rights)
        return bool(ground.descriptor > SMALL)

    return call


def face(method: str, *arguments: object, buffer: bool = False) -> Callable[[Ground], object]:
    """Call a method of the reference's face, which says what is short by its return code.

    ``buffer``: the newest handle is its first argument.
    """

    def call(ground: Ground) -> object:
        first = (ground.handles[-1],) if buffer else ()
        answer = getattr(ground.endpoint, method)(*first, *arguments)
        rc = answer[1] if type(answer) is tuple else answer
        if rc is OUT_OF_MEMORY:
            raise SHORT
        return rc

    return call


def clone_of_segments(ground: Ground) -> None:
    """A clone of a buffer in segments: it takes five descriptors with it."""
    ground.handles.append(ground.mdl_create(SIZE, RW, 4 * PAGE))
    window(ground)


def received_mdl(ground: Ground) -> Mdl:
    """The buffer that was on its way."""
    return Mdl.recv(ground.sockets[1], vmm=ground)


def mdl_of_a_handle(ground: Ground) -> bool:
    """Make an object of the newest handle, and leave it open."""
    ground.things[0] = Mdl.from_handle(ground, ground.handles[-1])
    return True


def unmapped(ground: Ground, _error: VmmError) -> None:
    """The mapping of a buffer's own, which its first use made, may stay: it is given back."""
    ground.things[-1]._region = None


def used_again(ground: Ground, _error: VmmError) -> None:
    """The mapping of a buffer's own is given back before the kernel is asked to seal it."""
    ground.things[-1].read(1)


def unkept(ground: Ground, _error: VmmError) -> None:
    """What NumPy would have looked at is kept until the buffer goes: a shortage of memory too."""
    ground.things[-1]._kept = ground.things[-1]._region = None


def array_over_mdl(ground: Ground) -> int:
    """Make an array of which the newest object, a buffer, is the buffer."""
    array: np.ndarray[Any, Any] = np.ndarray(SIZE, "u1", ground.things[-1])
    return array.size


def on_it(call: Callable[[Any], object]) -> Callable[[Ground], object]:
    """Something that is made of the newest object."""
    return lambda ground: call(ground.things[-1])


an_mdl = keep(lambda ground: ground.mdl(SIZE))
used = thing("read", 1)
a_used_mdl = first(an_mdl, used)
#: The first one loads what arrays need.
an_array = first(an_mdl, thing("array", 1))
a_region = keep(lambda ground: ground.region(SIZE, RW | COMMIT | FIXED, BASE))
an_event = keep(lambda _ground: Event())
a_set_event = first(an_event, thing("set"))
descriptor_of_it = keep(lambda ground: ground.things[-1].fileno())


# ---- the groups ----------------------------------------------------------------------------------

RANGES = [(BASE, 2 * PAGE), (BASE + 4 * PAGE, PAGE)]
REGIONS = [
    Scenario("allocate", nothing, lambda g: g.allocate(0, SIZE, RESERVE | RW), "", placed=True),
    Scenario(
        "allocate LOCKED SHAREABLE",
        nothing,
        lambda g: g.allocate(0, SIZE, RESERVE | RW | COMMIT | LOCKED | SHARED),
        "",
        placed=True,
    ),
    Scenario("commit", region(RW), over("commit", 4, 8), ""),
    Scenario("decommit", filled(NONE), over("decommit", 4, 8), ""),
    Scenario("commit_ranges", region(RW), lambda g: g.commit_ranges(RANGES), ""),
    Scenario("decommit_ranges", filled(NONE), lambda g: g.decommit_ranges(RANGES), ""),
    Scenario("protect", with_protections(filled(NONE), MIXED), over("protect", 2, 9, R), ""),
    Scenario("free", filled(GUARDS), over("free", 4, 8), ""),
    Scenario("view", filled(NONE), lambda g: g.view(BASE, SIZE).nbytes, ""),
    Scenario("read", filled(NONE), over("read", 0, 16), ""),
    Scenario("write", filled(NONE), lambda g: g.write(BASE, NEW), ""),
    Scenario("query", filled(GUARDS), ask(BASE + 5, smaps=False), ""),
    Scenario("query a hole", filled(GUARDS), ask(ELSEWHERE, smaps=False), ""),
    Scenario("limits", nothing, lambda g: g.limits.regions, ""),
    Scenario("limits set", nothing, set_limits, ""),
    Scenario("usage", filled(GUARDS), lambda g: tuple(use.used for use in g.usage()), ""),
    Scenario("close", filled(SHARED), VMM.close, ""),
]
BUFFERS = [
    Scenario("mdl_create", holes, lambda g: g.mdl_create(SIZE, RW), ""),
    Scenario("mdl_create in segments", holes, lambda g: g.mdl_create(SIZE, RW, 4 * PAGE), ""),
    Scenario("mdl_create_from_buf", holes, lambda g: g.mdl_create_from_buf(b"bytes", R), ""),
    Scenario("mdl_create_from_vm", filled(NONE), convert(4, 8), ""),
    Scenario("mdl_create_from_vm whole", filled(SHAREABLE), convert(0, SIZE // PAGE), ""),
    Scenario("mdl_get_size", holes, newest("mdl_get_size"), ""),
    Scenario("mdl_map", buffer(), mapping(R | GUARDS), "", placed=True),
    Scenario("mdl_clone", buffer(), newest("mdl_clone", PAGE, 3 * PAGE), ""),
    Scenario("mdl_seal", buffer(), newest("mdl_seal", Seal.FREEZE), ""),
    Scenario("handle_copy", buffer(), newest("handle_copy", Rights.COPY), ""),
    Scenario("handle_close", first(holes, buffer()), newest("handle_close"), ""),
    Scenario("handle_revoke", first(buffer(), window), oldest("handle_revoke"), ""),
    Scenario("handle_info", first(buffer(), window), info, ""),
    Scenario("query a mapping", first(buffer(), mapped(RW)), ask_buffer(smaps=False), ""),
]
TRANSFERS = [
    Scenario("send_handle", first(buffer(), connected), send(), ""),
    Scenario("send_handle, read-only", first(buffer(), connected), send(READ_ONLY), ""),
    *(
        Scenario(name, first(made, send()), receive, "", take_back=again(send()))
        for name, made in (("recv_handle", buffer()), ("recv_handle, clone", clone_of_segments))
    ),
    Scenario("handle_fileno", buffer(), given_descriptor(), ""),
    Scenario("handle_fileno, read-only", buffer(), given_descriptor(READ_ONLY), ""),
    Scenario(
        "handle_from_fd",
        first(an_mdl, descriptor_of_it),
        lambda g: g.handle_from_fd(g.things[-1]),
        "",
    ),
]
ENDPOINT = [
    Scenario("Allocate", nothing, face("Allocate", 0, SIZE, RESERVE | RW), ""),
    Scenario("Commit", region(RW), face("Commit", BASE, PAGE, 0), ""),
    Scenario("Decommit", filled(NONE), face("Decommit", BASE, PAGE), ""),
    Scenario("Protect", filled(NONE), face("Protect", BASE, PAGE, R), ""),
    Scenario("Free", filled(NONE), face("Free", BASE, PAGE), ""),
    Scenario("Query", filled(NONE), face("Query", BASE), ""),
    Scenario("MdlCreate", nothing, face("MdlCreate", SIZE, RW), ""),
    Scenario("MdlCreateFromVm", filled(NONE), face("MdlCreateFromVm", BASE, PAGE, R), ""),
    Scenario("MdlGetSize", buffer(), face("MdlGetSize", buffer=True), ""),
    Scenario("MdlMap", buffer(), face("MdlMap", 0, SIZE, 0, R, buffer=True), ""),
    Scenario("MdlClone", buffer(), face("MdlClone", 0, PAGE, buffer=True), ""),
]
OBJECTS = [
    Scenario("region", nothing, lambda g: g.region(SIZE, RW | COMMIT), ""),
    *(
        Scenario(f"Region.{method}", a_region, thing(method, *arguments), "")
        for method, arguments in (
            ("commit", (0, PAGE)),
            ("decommit", (2 * PAGE, PAGE)),
            ("protect", (R, 0, PAGE)),
            ("query", (0, False)),
            ("view", ()),
            ("read", ()),
            ("write", (pattern(SIZE),)),
            ("readinto", (bytearray(SIZE),)),
            ("__getitem__", (-1,)),
            ("__getitem__", (slice(None, None, -3),)),
            ("__setitem__", (5, 300 - SMALL)),
            ("__setitem__", (slice(None, None, -1), pattern(SIZE))),
            ("free", ()),
            ("free", (PAGE,)),
        )
    ),
    Scenario("a buffer of a Region", a_region, lambda g: memoryview(g.things[-1]).nbytes, ""),
    Scenario("an array over a Region", a_region, array_over_region, ""),
    Scenario("repr of a Region", a_region, shown, ""),
    Scenario("end of a Region", a_region, left, ""),
    Scenario("mdl", nothing, lambda g: g.mdl(SIZE), ""),
    Scenario("Mdl.from_bytes", nothing, lambda g: Mdl.from_bytes(b"bytes", vmm=g), ""),
    Scenario("Mdl.from_bytes of its own", nothing, lambda _: Mdl.from_bytes(b"bytes"), ""),
    Scenario(
        "Mdl.from_fd",
        first(an_mdl, descriptor_of_it),
        lambda g: Mdl.from_fd(g.things[-1], vmm=g),
        "",
    ),
    *(
        Scenario(f"Mdl.{method}", an_mdl, thing(method, *arguments), "")
        for method, arguments in (
            ("map", ()),
            ("map", (R, PAGE, PAGE)),
            ("clone", (PAGE, PAGE)),
            ("read_only", ()),
            ("publish", ()),
            ("freeze", ()),
            ("close", ()),
        )
    ),
    Scenario("Mdl.freeze after use", a_used_mdl, thing("freeze"), "", take_back=used_again),
    *(
        Scenario(f"Mdl.{method}", a_used_mdl, call, "")
        for method, call in (
            ("close after use", thing("close")),
            ("read", thing("read")),
            ("write", thing("write", pattern(SIZE))),
        )
    ),
    *(
        Scenario(f"Mdl.{method}", an_mdl, thing(method, *arguments), "", take_back=unmapped)
        for method, arguments in (
            ("read", (PAGE, 3)),
            ("write", (pattern(SIZE),)),
            ("readinto", (bytearray(SIZE),)),
            ("__len__", ()),
            ("__getitem__", (-1,)),
            ("__getitem__", (slice(None, None, -3),)),
            ("__setitem__", (5, 300 - SMALL)),
            ("__setitem__", (slice(None, None, -1), pattern(SIZE))),
            ("__copy__", ()),
            ("__deepcopy__", ()),
        )
    ),
    Scenario("Mdl", nothing, lambda g: Mdl(1000, vmm=g), ""),
    Scenario("Mdl in segments", nothing, lambda g: Mdl(SIZE - 1, segment_size=PAGE, vmm=g), ""),
    Scenario("Mdl.from_handle", first(holes, keep(lambda _: None)), mdl_of_a_handle, ""),
    Scenario(
        "Mdl.from_fd of a file",
        first(an_mdl, descriptor_of_it),
        lambda g: Mdl.from_fd(g.things[-1], copy=True, vmm=g),
        "",
    ),
    Scenario("Mdl.send", first(connected, an_mdl), sent_event, ""),
    Scenario(
        "Mdl.recv",
        first(connected, an_mdl, sent_event),
        received_mdl,
        "",
        take_back=again(sent_event),
    ),
    Scenario(
        "a buffer of an Mdl", an_mdl, on_it(lambda m: memoryview(m).nbytes), "", take_back=unmapped
    ),
    Scenario("bytes of an Mdl", an_mdl, lambda g: bytes(g.things[-1]), "", take_back=unmapped),
    Scenario("an array over an Mdl", an_mdl, array_over_mdl, "", take_back=unkept),
    Scenario("Mdl.array", an_array, thing("array", (4, 4)), ""),
    Scenario("Mdl.fileno", an_mdl, lambda g: g.things[-1].fileno() > SMALL, ""),
    Scenario(
        "Mdl.close with a descriptor",
        first(an_mdl, lambda g: g.things[-1].fileno()),
        thing("close"),
        "",
    ),
    *(
        Scenario(f"Mdl.{name}", an_mdl, attribute(name), "")
        for name in ("size", "rights", "seals", "sid", "nbytes")
    ),
    Scenario("Mdl.buf", an_mdl, attribute("buf"), "", take_back=unmapped),
    Scenario("repr of an Mdl", an_mdl, shown, ""),
    Scenario("end of an Mdl", an_mdl, left, ""),
    Scenario("VMM", nothing, lambda _: vmm_without_warning(), ""),
]
#: What is shared: packed, in pieces, and of records. Nothing is calculated with it: NumPy's own
#: ufuncs end the process where they find no memory, of any subclass.
SOURCES = {
    "numbers": np.arange(64.0).reshape(4, 16),
    "columns": np.arange(64.0).reshape(4, 16)[:, ::3],
    "records": np.zeros(5, [("a", "u1"), ("b", ">f8")]),
    "empty": np.zeros((0, 3)),
}
a_shared_array = keep(lambda ground: share(SOURCES["numbers"], vmm=ground))
#: A descriptor for reading stays, once it is needed.
a_shared_array = first(a_shared_array, lambda ground: ground.things[-1].read_only())
a_frozen_array = first(a_shared_array, keep(lambda ground: ground.things[-1].freeze()))
ARRAYS = [
    *(
        Scenario(f"{name} {source}", a_shared_array, call, "")
        for source, array in SOURCES.items()
        for name, call in (
            ("share", lambda g, array=array: share(array, vmm=g)),
            ("zeros_like", lambda g, array=array: zeros_like(array, vmm=g)),
        )
    ),
    Scenario("Mdl.from_array", nothing, lambda g: Mdl.from_array([1, 2], vmm=g), ""),
    Scenario("zeros", nothing, lambda g: zeros((3, 4), "f4", vmm=g), ""),
    Scenario("empty", nothing, lambda g: empty(7, vmm=g), ""),
    Scenario("full", nothing, lambda g: full((3, 4), [1, 2, 3, 4], order="F", vmm=g), ""),
    Scenario("empty_like", nothing, lambda g: empty_like([1, 2], vmm=g), ""),
    *(
        Scenario(f"SharedArray.{name}", a_shared_array, on_it(call), "")
        for name, call in (
            ("mdl", lambda a: a.mdl.nbytes),
            ("read_only", lambda a: a.read_only()),
            ("freeze", lambda a: a.freeze()),
            ("slice", lambda a: a[1:, ::2]),
            ("item", lambda a: int(a[1, 1])),
            ("T", lambda a: a.T),
            ("flat", lambda a: len(a.flat)),
            ("imag", lambda a: a.imag),
            ("reshape", lambda a: a.reshape(-1)),
            ("copy", copy.copy),
            ("deepcopy", copy.deepcopy),
            ("concatenate", lambda a: np.concatenate([a, a])),
        )
    ),
    Scenario("read_only of frozen", a_frozen_array, on_it(lambda a: a.read_only()), ""),
    Scenario("freeze of frozen", a_frozen_array, on_it(lambda a: a.freeze()), ""),
]
EVENTS = [
    Scenario("Event", nothing, lambda _: Event(), ""),
    Scenario("Event.from_fd", an_event, lambda g: Event.from_fd(g.things[-1].fileno()), ""),
    Scenario(
        "Event.recv",
        first(connected, an_event, sent_event),
        received_event,
        "",
        take_back=again(sent_event),
    ),
    Scenario("Event.send", first(connected, an_event), sent_event, ""),
    *(
        Scenario(f"Event.{method}", a_set_event, thing(method, *arguments), "")
        for method, arguments in (
            ("is_set", ()),
            ("clear", ()),
            ("wait", (0,)),
            ("close", ()),
        )
    ),
    Scenario("Event.set", a_set_event, thing("set"), "", take_back=set_once),
    Scenario("Event.fileno", an_event, lambda g: g.things[-1].fileno() > SMALL, ""),
    Scenario("repr of an Event", an_event, shown, ""),
]
INSPECTION = [
    Scenario(name, filled(GUARDS), call, "")
    for name, call in (
        ("snapshot", lambda _: inspect.snapshot()),
        ("maps", lambda _: inspect.maps()),
        ("at", lambda _: inspect.at(BASE)),
        ("rollup", lambda _: inspect.rollup()),
        ("pages", lambda _: inspect.pages(BASE, SIZE)),
        ("sharing", lambda _: inspect.sharing()),
        ("query with its record", lambda g: g.query(BASE).smaps is not None),
    )
] + [
    Scenario(
        "diff",
        keep(lambda _: inspect.snapshot()),
        lambda g: bool(inspect.diff(g.things[-1], g.things[-1])),
        "",
    ),
    *(
        Scenario(f"PageInfo.{name}", keep(lambda g: g.query(BASE)), attribute(name), "")
        for name in ("smaps", "flags", "protection", "state", "kind")
    ),
    *(
        Scenario(f"{name} of a Snapshot", keep(lambda _: inspect.snapshot()), call, "")
        for name, call in (
            ("repr", shown),
            ("slice", lambda g: len(g.things[-1][1:9])),
            ("wholes", lambda g: len(list(g.things[-1].wholes())) > 0),
            ("total", lambda g: g.things[-1].total("rss") > 0),
            ("as_dict", lambda g: len(g.things[-1][0].as_dict()) > 0),
        )
    ),
]


def watched(folder: str) -> dict[str, Callable[[], Ground]]:
    """VMMs that are watched."""
    ring, file = Audit(ring=8), Audit(Path(folder, "calls.jsonl"), ring=0)
    asking = Policy(ask=lambda question: question.usage is not None)
    return {
        "ring": lambda: Ground(audit=ring),
        "file": lambda: Ground(audit=file),
        "policy": lambda: Ground(policy=asking, audit=file),
    }


GROUPS: dict[str, list[Scenario]] = {
    "regions": REGIONS,
    "buffers": BUFFERS,
    "transfers": TRANSFERS,
    "endpoint": ENDPOINT,
    "objects": OBJECTS,
    "arrays": ARRAYS,
    "events": EVENTS,
    "inspection": INSPECTION,
    # Those that a policy and an audit watch.
    "ring": [*REGIONS, *BUFFERS, *TRANSFERS],
    "file": [*REGIONS, *BUFFERS, *TRANSFERS],
    "policy": [*REGIONS, *BUFFERS, *TRANSFERS],
}


def environment() -> dict[str, str]:
    """For a process that tries a group.

    Freed memory is overwritten, so that who uses it is seen; none of it is a mapping of its own.
    """
    if IS_SANITIZED:
        return {"PYTHONMALLOC": "malloc"}
    return {"PYTHONMALLOC": "malloc_debug", "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}


def try_group(name: str, step: int = 1) -> list[str]:
    """Try all of a group: what went wrong, and where.

    Of ``step`` allocations one fails, of each scenario another one.
    """
    gc.disable()
    # An audit tells so of what it could not write down.
    sys.unraisablehook = lambda _problem: None
    # Of numbers that take memory, but for Python's own open(2), which loses those.
    while name != "inspection" and os.dup(2) < SMALL:
        pass
    STANDING.update(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        make = watched(folder).get(name, Ground)
        for index, scenario in enumerate(GROUPS[name]):
            try:
                Shortage(scenario, make).run(index % step, step)
            except Exception:  # noqa: BLE001  it is told, and the others are tried too
                wrong.append(f"--- {name}, {scenario.name}: {traceback.format_exc(limit=-1)}")
    return wrong


if __name__ == "__main__":
    flaws = [flaw for name in sys.argv[1:] or GROUPS for flaw in try_group(name)]
    print("\n".join(flaws), end="")
    sys.exit(1 if flaws else 0)

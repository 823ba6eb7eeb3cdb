"""No object is copied, pickled or rebuilt past its rules.

Every class of every compiled module, and those of Python beside them, goes through all that can
copy or rebuild an object, in a process of its own, so that a signal is a failure. After each
attempt everything works as before: pages in view are BUSY, the policy denies, the audit writes.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import enum
import errno
import importlib
import itertools
import logging
import logging.handlers
import os
import pickle
import queue
import tempfile
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
import vmm_linux
from children import in_own_process
from constants import COMMITTED
from kernel_oracle import PAGE
from vmm_linux import (
    VMM,
    Event,
    Limits,
    Mdl,
    Region,
    Retcode,
    Rights,
    VmmError,
    VmmFlags,
    endpoint,
    errors,
    handles,
    inspect,
    limits,
)
from vmm_linux._core import endpoint as core_endpoint
from vmm_linux._core import kernel as core
from vmm_linux._mappings import SharedRegion
from vmm_linux.audit import Audit
from vmm_linux.errors import Busy, InvalidArgument, InvalidOperation, SecurityDisallow
from vmm_linux.policy import Policy, PolicyError, Rule, compile, rule  # noqa: A004

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PACKAGE = Path(vmm_linux.__file__).parent
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
TEXT = b"the original's"
#: The Python modules whose objects users get.
MODULES = (
    "endpoint errors event flags handles inspect limits mdl policy policy.compile policy.rule "
    "region states vmm"
)


def modules_named(names: Iterable[str]) -> list[Any]:
    """Modules of the package."""
    return [importlib.import_module(f"vmm_linux.{name}") for name in names]


def classes_of(modules: list[Any]) -> list[type[Any]]:
    """Every class that these modules make."""
    return [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__
    ]


def is_vocabulary(kind: type[Any]) -> bool:
    """Whether a class is an enumeration, or an exception: values that Python's own rules copy."""
    return issubclass(kind, (enum.Enum, BaseException))


COMPILED_MODULES = modules_named(
    {f"_core.{file.name.split('.')[0]}" for file in PACKAGE.glob("_core/*.so")}
)
COMPILED = classes_of(COMPILED_MODULES)
PYTHON = classes_of(modules_named(MODULES.split()))
#: Those whose objects are structures of C, by name.
CORE: dict[str, Any] = {
    kind.__name__: kind
    for kind in COMPILED
    if not is_vocabulary(kind) and not issubclass(kind, tuple)
}


class World:
    """Memory, a buffer, an event, a policy and an audit, and what must hold of them throughout."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "audit"
        self.question: Any = None
        self.audit = Audit(self.file)
        self.policy = Policy([Rule(deny=("mdl_clone",))], ask=self.keep_question)
        self.vmm = VMM(policy=self.policy, audit=self.audit)
        self.va = self.vmm.allocate(0, 4 * PAGE, COMMITTED)
        self.vmm.write(self.va, TEXT)
        self.view = self.vmm.view(self.va, PAGE)
        self.region = self.vmm.region(PAGE, COMMITTED)
        self.held = memoryview(self.region)
        self.mdl = self.vmm.mdl(PAGE)
        assert self.mdl[0] == 0  # it keeps the mapping
        self.event = Event()
        self.record = self.vmm.history()[0]
        self.info = self.vmm.query(self.va)
        self.snapshot = inspect.snapshot()
        self.told = repr(self.record.as_dict())
        self.found = repr(self.info), repr(self.info.smaps)
        self.plain = self.vmm.query(self.va, smaps=False)
        self.usage = self.vmm.usage()
        self.files = kernel.descriptors()

    def keep_question(self, question: object) -> bool:
        """Allow it."""
        self.question = question
        return True

    def check(self) -> None:
        """Assert that everything is as it was made."""
        takers: list[Callable[[], object]] = [
            lambda: self.vmm.decommit(self.va, PAGE),
            lambda: self.vmm.free(self.va, PAGE),
            self.region.free,
        ]
        for take in takers:
            with pytest.raises(Busy):
                take()
        assert bytes(self.view[: len(TEXT)]) == TEXT
        self.held[0] = 1
        lines = len(self.file.read_bytes().splitlines())
        with pytest.raises(SecurityDisallow):
            self.vmm.mdl_clone(self.mdl.handle, 0, PAGE)
        assert len(self.file.read_bytes().splitlines()) == lines + 1
        assert self.mdl.size == PAGE
        self.event.set()
        assert self.event.clear() == 1
        assert repr(self.record.as_dict()) == self.told
        assert (repr(self.info), repr(self.info.smaps)) == self.found
        assert self.plain == self.vmm.query(self.va, smaps=False)
        assert self.vmm.usage() == self.usage
        assert kernel.descriptors() == self.files
        self.vmm._check()

    def close(self) -> None:
        """Give everything back, and assert that it went: nobody else owned any of it."""
        self.view.release()
        self.held.release()
        self.vmm.decommit(self.va, PAGE)
        self.region.free()
        self.mdl.close()
        self.event.close()
        self.vmm.close()
        assert not kernel.maps_between(self.va, self.va + 4 * PAGE)


def closed(vmm: Any) -> Any:  # noqa: ANN401
    """A VMM that is closed when it is gone, so that it does not warn."""
    vmm.close()
    return vmm


#: How to come by a living object of each class that owns something: none of these is copied.
OWNERS: dict[type[Any], Callable[[World], Any]] = {
    CORE["AddressSpace"]: lambda _: CORE["AddressSpace"](),
    CORE["Audit"]: lambda world: world.audit,
    CORE["Question"]: lambda world: world.question,
    CORE["Exporter"]: lambda _: CORE["Exporter"](),
    CORE["Gate"]: lambda _: CORE["Gate"](),
    CORE["Holder"]: lambda world: world.held.obj,
    CORE["HandleTable"]: lambda _: CORE["HandleTable"](),
    CORE["Ledger"]: lambda _: CORE["Ledger"](),
    CORE["OwnProcess"]: lambda _: CORE["OwnProcess"](),
    CORE["RuleTable"]: lambda _: CORE["RuleTable"](),
    CORE["FigureAttribute"]: lambda _: vars(CORE["SmapsRecord"])["rss"],
    CORE["Parser"]: lambda _: CORE["Parser"](),
    CORE["SmapsStore"]: lambda _: CORE["SmapsStore"](),
    CORE["MemoryCgroup"]: lambda _: CORE["MemoryCgroup"]("v2", "/", "."),
    CORE["SwitchedOff"]: lambda _: CORE["SwitchedOff"](()),
    CORE["Pin"]: lambda world: world.view.obj,
    CORE["VMM"]: lambda _: closed(CORE["VMM"]()),
    endpoint.Endpoint: lambda world: world.vmm.endpoint,
    CORE["Descriptor"]: lambda world: world.event._descriptor,
    CORE["Received"]: lambda _: CORE["Received"](),
    CORE["Duplicate"]: lambda _: CORE["Duplicate"](),
    Event: lambda world: world.event,
    Mdl: lambda world: world.mdl,
    Policy: lambda world: world.policy,
    Region: lambda world: world.region,
    VMM: lambda world: world.vmm,
}
UNREAD = inspect.Unread(3, "three", None)
CHANNEL = inspect.Channel(
    inspect.Kind.MEMFD,
    "00:01",
    7,
    "a name",
    False,
    8192,
    4096,
    ("F_SEAL_SHRINK",),
    (inspect.Holder(1, "one", 0, "rw", (3,)),),
    (inspect.Mapper(2, "two", None, "rw-s", True, 8192, None),),
    None,
)
#: And of each class that is a value: a copy is equal, and another object or the same.
VALUES: dict[type[Any], Callable[[World], Any]] = {
    CORE["Record"]: lambda world: world.record,
    core_endpoint.Kind: lambda _: core_endpoint.Kind.DATA,
    core_endpoint.MethodInfo: lambda _: core_endpoint.METHODS[0],
    CORE["Mapping"]: lambda world: max(world.snapshot, key=lambda each: each.region is not None),
    CORE["Mappings"]: lambda world: world.snapshot._mappings,
    CORE["PageInfo"]: lambda world: world.info,
    CORE["SmapsRecord"]: lambda world: world.info.smaps,
    handles.Handle: lambda world: world.mdl.handle,
    handles.HandleInfo: lambda world: world.vmm.handle_info(world.mdl.handle),
    inspect.Change: lambda world: inspect.Change(world.snapshot[0], world.snapshot[0], 0, {}),
    inspect.Difference: lambda world: inspect.diff(world.snapshot, world.snapshot),
    inspect.Snapshot: lambda world: world.snapshot,
    inspect.Channel: lambda _: CHANNEL,
    inspect.Holder: lambda _: CHANNEL.holders[0],
    inspect.Mapper: lambda _: CHANNEL.mappers[0],
    inspect.Sharing: lambda _: inspect.Sharing((CHANNEL,), (UNREAD,), 3),
    inspect.Unread: lambda _: UNREAD,
    inspect.PageRun: lambda world: inspect.pages(world.va, PAGE)[0],
    inspect.RegionRun: lambda world: next(
        each.region for each in world.snapshot if each.region is not None
    ),
    Limits: lambda world: world.vmm.limits,
    limits.Usage: lambda world: world.usage,
    limits.Use: lambda world: world.usage.committed,
    Rule: lambda _: Rule(deny=("mdl_clone",)),
}
#: Parts of a policy that is being compiled and of buffers, which no caller is given.
INNER: set[type[Any]] = {
    compile.Mask,
    compile.Condition,
    compile.Compiled,
    rule.FlawError,
    SharedRegion,
}


def test_every_class_is_in_the_table() -> None:
    kinds = {kind for kind in COMPILED + PYTHON if not is_vocabulary(kind)}
    assert kinds - OWNERS.keys() - VALUES.keys() - INNER == set()


def test_no_compiled_module_has_what_cython_generates_for_pickle() -> None:
    assert len(COMPILED) > 20
    names = [name for module in COMPILED_MODULES for name in vars(module)]
    names += [name for kind in COMPILED for name in dir(kind)]
    made = ("__pyx_unpickle", "__reduce_cython__", "__setstate_cython__", "__setstate__")
    assert [name for name in names if name.startswith(made)] == []


def ways_to_copy(thing: object) -> Iterator[Callable[[], object]]:
    """Everything that Python copies, or takes apart for a copy, with."""
    yield partial(copy.copy, thing)
    yield partial(copy.deepcopy, thing)
    yield partial(copy.deepcopy, [thing])
    yield thing.__reduce__
    for protocol in PROTOCOLS:
        yield partial(pickle.dumps, thing, protocol)
        yield partial(pickle._dumps, thing, protocol)  # type: ignore[attr-defined]
        yield partial(thing.__reduce_ex__, protocol)
        yield partial(object.__reduce_ex__, thing, protocol)


@contextlib.contextmanager
def a_world() -> Iterator[World]:
    """A world that is closed, and checked once more."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        yield world
        world.check()
        world.close()


def test_what_owns_something_is_never_copied() -> None:
    in_own_process(copy_owners)


REFUSED = "neither copied nor pickled|pickled by multiprocessing alone"


def copy_owners() -> None:
    """Every way to copy, with every owner, and with one of each subclass."""
    with a_world() as world:
        for kind, make in OWNERS.items():
            for thing in [make(world), *of_subclasses(kind)]:
                assert isinstance(thing, kind)
                # Of an Mdl there are copies: another handle, another buffer.
                refused = [*ways_to_copy(thing)][3 if kind is Mdl else 0 :]
                for attempt in refused:
                    with pytest.raises(TypeError, match=REFUSED) as caught:
                        attempt()
                    assert isinstance(caught.value, InvalidOperation), (kind, attempt)
                    assert caught.value.rc is Retcode.INVALID_OPERATION
                if kind not in {Mdl, Event}:
                    with pytest.raises(TypeError, match="neither copied nor pickled"):
                        ForkingPickler.dumps(thing)
            del thing
            world.check()


def of_subclasses(kind: type[Any]) -> list[Any]:
    """An object of a Python subclass, with slots and without, if there can be one."""
    made = []
    for body in ({}, {"__slots__": ()}, {"__slots__": ("more",)}):
        try:
            sub: Any = type(f"Sub{kind.__name__}", (kind,), dict(body))
            made.append(sub.__new__(sub))
        except TypeError:  # final, or not made without arguments
            continue
        if isinstance(made[-1], CORE["VMM"]):
            made[-1].close()
    return made


def test_what_is_a_value_is_copied_whole() -> None:
    in_own_process(copy_values)


def told(value: Any) -> object:  # noqa: ANN401
    """All that a value says."""
    if isinstance(value, (inspect.Snapshot, CORE["Mappings"])):
        return [each.as_dict() for each in value]
    if isinstance(value, CORE["Record"]):
        return value.as_dict()
    if isinstance(value, handles.HandleInfo):
        return repr(value), value.sid, value.origin_sid
    return value


def copy_values() -> None:
    """Every way to copy, with every value."""
    with a_world() as world:
        for kind, make in VALUES.items():
            value = make(world)
            assert isinstance(value, kind)
            before = told(value)
            copies = [copy.copy(value), copy.deepcopy(value)]
            copies += [pickle.loads(pickle.dumps(value, p)) for p in PROTOCOLS]  # noqa: S301
            copies += [ForkingPickler.loads(ForkingPickler.dumps(value))]
            for each in copies:
                # What is made when it is looked at is a tuple once it is copied.
                assert isinstance(each, tuple if kind is CORE["Mappings"] else kind)
                assert (
                    (list(each) == list(value))
                    if kind is CORE["Mappings"]
                    else (told(each) == before)
                )
            assert told(value) == before
            world.check()


def test_a_value_is_rebuilt_of_nothing_but_what_it_can_say() -> None:
    in_own_process(rebuild_values)


JUNK: tuple[Any, ...] = (
    None,
    object(),
    -1,
    1 << 70,
    1 << 63,
    "text",
    b"text",
    1.5,
    (),
    (1, 2, 3),
    {},
    [None],
    {1: 2},
)


def with_junk(arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """These arguments with one of them, or one inside of them, replaced; with one less, or more."""
    yield arguments[:-1]
    yield (*arguments, None)
    for place, argument in enumerate(arguments):
        replaced: list[Any] = list(JUNK)
        if isinstance(argument, tuple):
            replaced += with_junk(argument)
        if isinstance(argument, dict):
            replaced += [{**argument, name: junk} for name in ("rss", 5) for junk in JUNK]
        for junk in replaced:
            yield (*arguments[:place], junk, *arguments[place + 1 :])


def rebuild_values() -> None:
    """Take values apart, change each part, and look at all that comes of it."""
    with a_world() as world:
        refused = made = 0
        for kind in (CORE["Record"], CORE["PageInfo"], CORE["SmapsRecord"], CORE["Mapping"]):
            rebuild, arguments = VALUES[kind](world).__reduce__()
            for changed in with_junk(arguments):
                try:
                    value = rebuild(*changed)
                except (TypeError, ValueError, OverflowError, InvalidArgument):
                    refused += 1
                    continue
                made += 1
                assert type(value) is kind
                look_at(value)
                assert pickle.loads(pickle.dumps(value)).__reduce__() == value.__reduce__()  # noqa: S301
        assert refused > made > 0, (refused, made)
        world.check()


def look_at(thing: Any) -> list[object]:  # noqa: ANN401
    """Everything that an object says, but for what it says that it cannot."""
    answers: list[object] = []
    for name in dir(type(thing)):
        attribute = getattr(thing, name)
        if not callable(attribute):
            answers.append(attribute)
    answers += [repr(thing), hash(thing), thing == thing]  # noqa: PLR0124
    if hasattr(thing, "as_dict"):
        answers.append(thing.as_dict())
    return answers


def test_a_mapping_is_no_part_of_a_part() -> None:
    """A chain of them would be as deep as somebody likes, and its end the interpreter's."""
    mapping = inspect.snapshot()[0]
    rebuild, (arguments, region, _) = mapping.__reduce__()  # type: ignore[str-unpack]
    part = rebuild(arguments, region, mapping)  # type: ignore[operator]
    assert part.whole is mapping
    with pytest.raises(ValueError, match="is a part itself"):
        rebuild(arguments, region, part)  # type: ignore[operator]


# ---- objects that nobody made ------------------------------------------------------------------


def test_what_was_made_without_its_class_answers_or_says_what_is_wrong() -> None:
    in_own_process(use_bare_objects)


#: Arguments for methods of which nothing is known.
SOME: list[tuple[Any, ...]] = [
    (), (0,), (PAGE,), (-1,), (1 << 63,), (None,), ("x",), (0, 0), (PAGE, PAGE), (0, 2 * PAGE),
    (1 << 63, 1 << 63), (PAGE, PAGE, 7), (0, 0, 0), (0, 0, 0, 0),
]  # fmt: skip


def use_bare_objects() -> None:
    """Every method, property and the buffer of objects of ``__new__`` alone."""
    tried = 0
    with a_world() as world:
        os.chdir(world.file.parent)  # whatever makes a file
        for kind in CORE.values():
            with pytest.raises(TypeError):
                object.__new__(kind)
            # A Descriptor closes the number that it is given, whatever that is.
            if kind is CORE["Descriptor"]:
                continue
            with contextlib.suppress(TypeError):  # a Holder takes what it holds
                tried += try_everything(kind.__new__(kind))
            for thing in of_subclasses(kind):
                tried += try_everything(thing)
            world.check()
        os.chdir("/")
    assert tried > 5000


def try_everything(thing: Any) -> int:  # noqa: ANN401
    """Every attribute, method and buffer of an object: how many calls that were."""
    tried = 0
    for name in sorted({*dir(type(thing))} - {"__class__", "__new__", "__init_subclass__"}):
        try:
            attribute = getattr(thing, name)
        except Exception:  # noqa: BLE001, S112  any is fine
            continue
        for arguments in [*SOME, (thing,)] if callable(attribute) else []:
            tried += 1
            with contextlib.suppress(Exception):
                attribute(*arguments)
    with contextlib.suppress(TypeError, BufferError, NotImplementedError):
        memoryview(thing).tobytes()
    if isinstance(thing, CORE["VMM"]):
        thing.close()
    return tried


def test_a_pin_that_pins_nothing_shows_no_memory() -> None:
    pin = CORE["Pin"].__new__(CORE["Pin"])
    with pytest.raises(BufferError, match=r"VMM\.view makes pins"):
        memoryview(pin)


def test_no_class_makes_an_object_of_another() -> None:
    for maker, kind in itertools.permutations(CORE.values(), 2):
        with pytest.raises(TypeError):
            maker.__new__(kind)


def test_an_object_never_becomes_one_of_another_compiled_class() -> None:
    in_own_process(assign_classes)


def assign_classes() -> None:
    """``__class__`` of every object, to every class and subclasses of them."""
    with a_world() as world:
        bodies: list[dict[str, Any]] = [{}, {"__slots__": ()}, {"__slots__": ("more",)}]
        kinds = [*COMPILED, *PYTHON]
        for kind, body in itertools.product(list(kinds), bodies):
            if is_vocabulary(kind):
                continue
            with contextlib.suppress(TypeError):
                kinds.append(type(f"Sub{kind.__name__}", (kind,), dict(body)))
        things = [make(world) for make in (OWNERS | VALUES).values()]
        things += [thing for kind in OWNERS for thing in of_subclasses(kind)]
        for thing, kind in itertools.product(things, kinds):
            before = type(thing)
            try:
                object.__setattr__(thing, "__class__", kind)
            except TypeError:
                continue
            assert core_of(kind) == core_of(before), (before, kind)
            with contextlib.suppress(Exception):
                look_at(thing)
            object.__setattr__(thing, "__class__", before)
        del things, thing  # a pin among them
        world.check()
        # A class in between has no say in what is asked and told.
        between = type("SubVMM", (VMM,), {"__slots__": ()})
        for kind in (between, VMM):
            object.__setattr__(world.vmm, "__class__", kind)
            world.check()


def core_of(kind: type[Any]) -> list[type[Any]]:
    """The compiled classes that a class is of."""
    return [each for each in kind.__mro__ if each in CORE.values()]


def test_classes_of_values_and_of_single_owners_have_no_subclasses() -> None:
    for kind in (CORE["Pin"], CORE["Holder"], CORE["Record"], CORE["PageInfo"], CORE["Question"]):
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Sub", (kind,), {})


# ---- objects that are made twice ----------------------------------------------------------------


def test_a_second_init_changes_nothing() -> None:
    in_own_process(make_twice)


def make_twice() -> None:
    """``__init__`` of living objects, with what they were made with and with other things."""
    with a_world() as world:
        other = world.vmm.mdl(PAGE)
        info = world.vmm.handle_info(other.handle)
        bounds = world.vmm.limits
        limited = hash(bounds)
        attempts: list[tuple[Any, tuple[Any, ...]]] = [
            (world.mdl, (world.vmm, other.handle)),
            (world.region, (world.vmm, world.va, PAGE)),
            (world.event, ()),
            (world.audit, ()),
            (world.audit, (world.file.with_name("another"),)),
            (world.policy, ()),
            (world.policy, ([Rule(allow=("mdl_clone",))],)),
            (info, (Rights(0), 0, 0, None, info.seals)),
            (bounds, ()),
            (world.record, ()),
            (world.info, ()),
            (world.info.smaps, ()),
            (world.snapshot[0], ()),
            (world.question, ()),
        ]
        for thing, arguments in attempts:
            with pytest.raises((VmmError, TypeError)):
                thing.__init__(*arguments)
        with pytest.raises(InvalidOperation, match="make another one"):
            world.vmm.__init__(policy=Policy())  # type: ignore[misc]
        world.vmm.__init__()  # type: ignore[misc]
        assert hash(bounds) == limited
        assert info.size == PAGE
        assert not world.file.with_name("another").exists()
        other.close()
        world.check()


def test_an_audit_that_is_made_while_it_is_made_keeps_one_file(tmp_path: Path) -> None:
    audit = Audit.__new__(Audit)

    class Sly(os.PathLike[str]):
        """A path that makes the audit when somebody looks at it."""

        def __fspath__(self) -> str:
            audit.__init__(tmp_path / "inner")  # type: ignore[misc]
            return str(tmp_path / "outer")

    before = kernel.descriptors()
    with pytest.raises(InvalidArgument, match="does not change"):
        audit.__init__(Sly())  # type: ignore[misc]
    assert audit.file == str(tmp_path / "inner")
    assert sorted(kernel.descriptors().keys() - before.keys()) == [
        fd for fd, target in kernel.descriptors().items() if target == str(tmp_path / "inner")
    ]
    with VMM(audit=audit) as vmm:
        vmm.allocate(0, PAGE, VmmFlags.RESERVE)
    assert b"allocate" in (tmp_path / "inner").read_bytes()
    assert (tmp_path / "outer").read_bytes() == b""


def test_an_audit_that_nobody_made_has_no_history() -> None:
    with pytest.raises(InvalidOperation, match=r"call Audit\(\)"):
        Audit.__new__(Audit).history()


def test_a_policy_that_is_compiled_while_it_is_compiled_keeps_its_rules() -> None:
    policy = Policy.__new__(Policy)

    class Sly(list[Rule]):
        """Rules that make the policy when somebody goes through them."""

        def __iter__(self) -> Iterator[Rule]:
            if not self:
                self.append(Rule(allow=("allocate",)))
                policy.__init__(default="deny")  # type: ignore[misc]
            return super().__iter__()

    with pytest.raises(InvalidOperation, match="does not change"):
        policy.__init__(Sly())  # type: ignore[misc]
    with VMM(policy=policy) as vmm, pytest.raises(SecurityDisallow):
        vmm.allocate(0, PAGE, VmmFlags.RESERVE)


def test_rules_that_are_compiled_by_hand_have_names() -> None:
    bits = (0, 0, 0)
    rule: tuple[Any, ...] = ((0,), False, 9, bits, bits, bits, (0, 9), ([], [], False))
    for names in ((), ("only",), tuple("123456789")):
        with pytest.raises(ValueError, match="has no name"):
            CORE["RuleTable"]()._compile([rule], names, True, None, 0, None)
    with pytest.raises(TypeError, match="strings"):
        CORE["RuleTable"]()._compile([rule], (None,) * 10, True, None, 0, None)
    with pytest.raises(TypeError):
        CORE["RuleTable"]()._compile([rule], None, True, None, 0, None)


# ---- what Python's own tools make ---------------------------------------------------------------


def test_what_is_put_together_again_by_hand_owns_nothing() -> None:
    in_own_process(put_together)


def put_together() -> None:
    """What ``copyreg`` makes of classes and states."""
    with a_world() as world:
        for kind, make in OWNERS.items():
            thing = make(world)
            for attempt in (
                partial(copyreg._reconstructor, kind, object, None),  # type: ignore[attr-defined]
                partial(copyreg._reconstructor, kind, kind.__base__, thing),  # type: ignore[attr-defined]
                partial(copyreg.__newobj__, kind),  # type: ignore[attr-defined]
                partial(object.__reduce__, thing),
            ):
                try:
                    made = attempt()
                except (TypeError, VmmError, IndexError, AttributeError):
                    continue
                if isinstance(made, tuple):
                    try:
                        made = made[0](*made[1])
                    except (TypeError, VmmError):
                        continue
                if isinstance(made, CORE["VMM"]):
                    made.close()
                if isinstance(made, CORE["RuleTable"]):
                    with pytest.raises(InvalidArgument, match="not a Policy"):
                        VMM(policy=made)
                del made
            del thing, attempt
            world.check()


def test_a_record_goes_through_the_queues_of_the_logging() -> None:
    received: queue.Queue[logging.LogRecord] = queue.Queue()
    logger = logging.getLogger("vmm_linux.test_copies")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.handlers.QueueHandler(received))
    with VMM(audit=Audit(logger=logger)) as vmm:
        va = vmm.allocate(0, PAGE, VmmFlags.RESERVE)
        with pytest.raises(InvalidArgument):
            vmm.free(va, 1)
        records = vmm.history()
    for record in records:
        line: Any = pickle.loads(pickle.dumps(received.get_nowait()))  # noqa: S301  our own
        assert line.vmm is not record
        assert line.vmm.as_dict() == record.as_dict()
        assert repr(line.vmm) == repr(record)


def test_exceptions_are_copied_whole() -> None:
    kinds = [*errors.EXCEPTIONS.values(), errors.NotCopyable, errors.OutOfRange]
    raised: list[VmmError] = [kind("at", "why", errno.EIO, 3) for kind in kinds]
    for error in [*raised, PolicyError("why", "file", 3)]:
        copies = [copy.copy(error), copy.deepcopy(error)]
        copies += [pickle.loads(pickle.dumps(error, p)) for p in PROTOCOLS]  # noqa: S301
        for each in copies:
            assert (type(each), str(each), vars(each)) == (type(error), str(error), vars(error))


# ---- what was found ------------------------------------------------------------------------------


def test_nothing_unpins_pages_but_the_views_own_end() -> None:
    in_own_process(copy_a_pin)


def copy_a_pin() -> None:
    """Copy what a view holds, rewrite it, and take its pages away."""
    with VMM() as vmm:
        va = vmm.allocate(0, PAGE, COMMITTED)
        view = vmm.view(va, PAGE)
        pin: Any = view.obj
        with pytest.raises(TypeError):
            copy.copy(pin)
        with pytest.raises(Busy):
            vmm.decommit(va, PAGE)
        view[0] = 7
        with pytest.raises(TypeError):
            pin.__reduce__()
        with pytest.raises(AttributeError):
            pin.__setstate__((8, None, 16, True))
        assert view[0] == 7
        view.release()
        del pin
        vmm.decommit(va, PAGE)


def test_a_vmm_keeps_its_policy_and_its_memory_when_somebody_tries_to_copy_it() -> None:
    class Mine(VMM):
        """A class of a user's, which has a dict."""

    for kind in (VMM, Mine):
        with kind(policy=Policy(default="deny"), audit=Audit()) as vmm:
            thing: Any = vmm
            for attempt in (partial(copy.copy, thing), partial(copy.deepcopy, {"vmm": thing})):
                with pytest.raises(TypeError):
                    attempt()
            with pytest.raises(TypeError):
                thing.__reduce__()
            with pytest.raises(AttributeError):
                thing.__setstate__((None, True, False, None))
            if kind is Mine:
                thing.__dict__.update(policy=None, audit=None, is_watched=False)
            with pytest.raises(SecurityDisallow):
                vmm.allocate(0, PAGE, VmmFlags.RESERVE)
            assert not vmm.closed
            assert [record.decision for record in vmm.history()] == ["deny"]


def test_a_finalizer_that_is_called_by_hand_ends_nothing_of_others(tmp_path: Path) -> None:
    descriptor = core.new_eventfd()
    number = descriptor.number
    descriptor.close()
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    assert file == number
    descriptor.close()
    del descriptor
    os.fstat(file)
    os.close(file)
    with VMM() as vmm:
        region, mdl = vmm.region(PAGE, COMMITTED), vmm.mdl(PAGE)
        base = region.base
        for thing in (region, mdl, region, mdl):
            thing.__del__()
        taken = vmm.allocate(base, PAGE, COMMITTED | VmmFlags.FIXED)
        del thing, region, mdl
        assert vmm.query(taken).base == base
        with pytest.warns(ResourceWarning, match="never closed"):
            vmm.__del__()  # type: ignore[attr-defined]
        assert vmm.query(taken).base == base

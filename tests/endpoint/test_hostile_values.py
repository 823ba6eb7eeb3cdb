"""Values whose own code raises, lies or never ends: each is a wrong argument, in a short line."""

from __future__ import annotations

import json
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

import hostile_values
from commands import run
from constants import RW
from faces import Face
from hostile_values import ERRORS, hostile_class, made_of
from kernel_oracle import PAGE
from refusals import PARAMETERS, Ground, call_with, faces, good_arguments
from vmm_linux import VMM, Event, Limits, Mdl, Retcode, Rights, VmmError, VmmFlags, inspect
from vmm_linux._core.values import describe, is_a, kind_of, one_line, shown, written
from vmm_linux.audit import Audit
from vmm_linux.errors import InvalidArgument, SecurityDisallow
from vmm_linux.inspect import Mapping
from vmm_linux.policy import Policy, Rule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


HOSTILE = [each for error in ERRORS for each in hostile_values.values(error)]
BROKEN = [*hostile_values.broken()]
EVERY = [*HOSTILE, *BROKEN]
#: One error of each sort: others come up, or do not, in the same places.
SOME = [*hostile_values.values(hostile_values.UntoldError), *BROKEN]
WRONG: Any = 1.5
#: Characters of a message, of which a path may take most.
LONGEST_MESSAGE = 1000


def check_message(error: VmmError) -> None:
    """A message is one line, which any file can hold, and short."""
    text = str(error)
    assert text.isprintable(), text[:200]
    assert len(text) < LONGEST_MESSAGE, text[:200]


def refused_or_done(name: str, call: Callable[[Any], object], value: object) -> None:
    """A call may refuse in its own words, or do; nothing of the value's comes up."""
    try:
        call(value)
    except VmmError as raised:
        error = raised
    else:
        return
    check_message(error)
    assert error.rc is not Retcode.INTERNAL_ERROR, name


@faces
def test_a_value_whose_code_raises_is_refused_by_every_method(ground: Ground, face: Face) -> None:
    before = ground.state()
    for method, parameters in PARAMETERS.items():
        for parameter in parameters:
            for name, value in EVERY:
                # The number in a subclass of int is a number like any other.
                if name.startswith("int,") or (parameter == "data" and "bytes" in name):
                    continue
                got = call_with(ground, face, method, **{parameter: value})
                assert got.rc is Retcode.INVALID_ARGUMENT, (method, parameter, name)
                if got.error is not None:
                    check_message(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("error", ERRORS)
def test_an_int_of_a_class_that_raises_is_the_number_it_is(
    ground: Ground, face: Face, error: type[Exception]
) -> None:
    kind = hostile_class(int, error)
    for method in ("query", "read", "mdl_get_size", "allocate"):
        good = good_arguments(ground, method)
        hostile = {name: made_of(kind, int, int(value)) for name, value in good.items()}
        assert call_with(ground, face, method, **hostile).rc is Retcode.OK, method
    for number in (-1, -PAGE, 1 << 64, -(1 << 64), 1 << 200):
        got = call_with(ground, face, "query", va=made_of(kind, int, number))
        assert got.rc is Retcode.INVALID_ARGUMENT, number


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with policy and audit"])
def test_what_every_other_method_is_given_comes_to_nothing_worse(*, watched: bool) -> None:
    options: dict[str, Any] = {"policy": Policy(), "audit": Audit(ring=1)} if watched else {}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, VMM(**options) as vmm, vmm.mdl(PAGE) as mdl, vmm.region(PAGE) as region:
        handle = mdl.handle
        ours.setblocking(False)
        maps = inspect.maps()
        calls: tuple[Callable[[Any], object], ...] = (
            lambda it: vmm.query(region.base, it),
            lambda it: vmm.view(region.base, PAGE, it),
            vmm.commit_ranges,
            lambda it: vmm.commit_ranges([it]),
            lambda it: vmm.decommit_ranges([(region.base, it)]),
            lambda it: vmm.commit(region.base, PAGE, it),
            lambda it: vmm.mdl_create(PAGE, RW, it),
            lambda it: vmm.send_handle(it, handle),
            lambda it: vmm.send_handle(ours, it),
            lambda it: vmm.send_handle(ours, handle, it),
            vmm.recv_handle,
            lambda it: vmm.recv_handle(ours, it, WRONG),
            lambda it: vmm.recv_handle(ours, WRONG, it),
            lambda it: vmm.recv_handle(ours, WRONG, None, it),
            vmm.handle_from_fd,
            lambda it: vmm.handle_from_fd(1, it, WRONG),
            vmm.handle_fileno,
            lambda it: vmm.handle_fileno(handle, it),
            lambda it: setattr(vmm, "limits", it),
            lambda it: Limits(regions=it),
            lambda it: Limits().replace(mdls=it),
            VMM,
            lambda it: VMM(policy=it),
            lambda it: VMM(audit=it),
            lambda it: Audit(ring=it),
            lambda it: Audit(failure=it),
            lambda it: Audit(logger=it),
            vmm.mdl,
            lambda it: Mdl.from_fd(it, vmm=vmm),
            lambda it: Mdl.from_bytes(b"x", vmm=it),
            lambda it: mdl.map(RW, it),
            mdl.map,
            mdl.clone,
            region.read,
            lambda it: region.read(1, it),
            lambda it: region.write(b"x", it),
            region.__getitem__,
            lambda it: region[it:],
            lambda it: region[:it],
            lambda it: region[::it],
            lambda it: region.__setitem__(it, 1),
            lambda it: region.__setitem__(0, it),
            lambda it: region.__setitem__(slice(0, 5), it),
            lambda it: region.__setitem__(slice(0, 9, it), b"x"),
            region.readinto,
            lambda it: region.readinto(bytearray(5), it),
            region.protect,
            vmm.region,
            lambda it: vmm.region(PAGE, it),
            Event.from_fd,
            Event.recv,
            inspect.at,
            lambda it: inspect.at(0, it),
            inspect.maps,
            lambda it: inspect.pages(it, PAGE),
            lambda it: inspect.pages(region.base, it),
            lambda it: inspect.diff(it, []),
            lambda it: inspect.diff([it], []),
            maps.at,
            maps.total,
            Mapping.from_dict,
        )
        for name, value in SOME:
            for call in calls:
                # A new event, buffer or region is closed as it goes.
                refused_or_done(name, call, value)
        with Event() as event:
            event.set()
            for name, value in SOME:
                refused_or_done(name, event.wait, value)


def test_no_part_of_a_mapping_can_be_hostile() -> None:
    told = inspect.maps()[0].as_dict()
    for part in told:
        for name, value in HOSTILE:
            if name.startswith("class"):
                continue
            with pytest.raises(InvalidArgument, match=f"{part} is "):
                Mapping.from_dict({**told, part: value})


@pytest.mark.parametrize("key", [*Rule.__dataclass_fields__])
def test_no_part_of_a_policy_can_be_hostile(key: str) -> None:
    for name, value in SOME:
        for each in (value, [value], (value,)):
            rule: dict[str, Any] = {"allow": "*", key: each}
            refused_or_done(name, lambda rule: Policy([Rule(**rule)]), rule)


@pytest.mark.parametrize("name", ["rules", "ready", "default", "ask", "audit_failure"])
def test_no_argument_of_a_policy_can_be_hostile(name: str) -> None:
    for told, value in SOME:
        for each in (value, [value]):
            refused_or_done(told, lambda given: Policy(**given), {name: each})


def test_a_rule_that_computes_its_parts_is_read_once_and_safely() -> None:
    class Moody(Rule):
        def __getattribute__(self, name: str) -> object:
            raise hostile_values.UntoldError

    with pytest.raises(InvalidArgument, match=r"rule 1: allow cannot be had: UntoldError"):
        Policy([Moody(allow="*")])


def test_arrays_refuse_hostile_shapes_and_dtypes() -> None:
    pytest.importorskip("numpy", reason="arrays are NumPy's")
    with VMM() as vmm, vmm.mdl(PAGE) as mdl:
        for name, value in SOME:
            refused_or_done(name, mdl.array, value)
            refused_or_done(name, lambda it: mdl.array((1, it)), value)
            refused_or_done(name, lambda it: mdl.array(1, it), value)
            refused_or_done(name, lambda it: mdl.array(1, "u1", it), value)
            refused_or_done(name, lambda it: mdl.array(1, "u1", 0, writable=it), value)


# ---- what is no error passes through ------------------------------------------------------------


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_meant_to_end_a_program_or_task_is_not_taken_for_a_wrong_value(
    ground: Ground, leaving: type[BaseException]
) -> None:
    class Ending:
        def __index__(self) -> int:
            raise leaving

    before = ground.state()
    with pytest.raises(leaving):
        ground.vmm.endpoint.Query(Ending())
    with pytest.raises(leaving):
        ground.vmm.commit(Ending(), PAGE)
    assert ground.state() == before


# ---- words --------------------------------------------------------------------------------------


def test_every_value_is_described_in_a_short_line() -> None:
    for name, value in EVERY:
        for text in (describe(value), shown(value), kind_of(value)):
            assert type(text) is str, name
            assert text.isprintable(), name
            assert 0 < len(text) < 500, name


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "5 of type int"),
        (True, "True of type bool"),
        (None, "None of type NoneType"),
        ("text", "'text' of type str"),
        ("x" * 41, "a str"),
        (b"by", "b'by' of type bytes"),
        (1.5, "1.5 of type float"),
        ([1, 2], "a list"),
        (1 << 64, "a number of 65 bits of type int"),
        (-(1 << 64), "a negative number of 65 bits of type int"),
        (VmmFlags.READ, "1 of type VmmFlags"),
        ("a\nb", r"'a\nb' of type str"),
    ],
)
def test_a_value_is_described_by_its_text_and_class(value: object, words: str) -> None:
    assert describe(value) == words


def test_numbers_up_to_64_bits_are_written_out() -> None:
    assert written((1 << 64) - 1) == "18446744073709551615"
    assert written((1 << 64) - 1, "#x") == "0xffffffffffffffff"
    assert written(1 << 64, "#x") == "a number of 65 bits"


def test_a_class_is_what_the_type_says_and_not_the_value() -> None:
    assert not is_a(hostile_values.liar(int), int)
    assert is_a(True, int)
    assert is_a(VmmFlags.READ, int)


def test_long_and_odd_text_becomes_one_short_line() -> None:
    assert one_line("plain \\ text") == "plain \\ text"
    assert one_line("a\nb\ud800") == r"a\nb\ud800"
    assert len(one_line("x" * 10_000)) < 500


@pytest.mark.parametrize(
    "number", [1 << 20_000_000, -(1 << 20_000_000), 10**5000], ids=["20 Mbit", "negative", "5000"]
)
def test_a_huge_number_makes_a_short_message_whatever_digits_are_allowed(
    ground: Ground, number: int
) -> None:
    allowed = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        got = call_with(ground, Face.METHODS, "commit", size=number)
    finally:
        sys.set_int_max_str_digits(allowed)
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert f"number of {number.bit_length()} bits" in str(got.error)
    assert len(str(got.error)) < 100


# ---- the audit ----------------------------------------------------------------------------------


def traced(path: Path, sid: int) -> list[dict[str, Any]]:
    """What ``audit trace`` reads of a file, which has no line that it refuses."""
    done = run("audit", "trace", "--json", hex(sid), str(path))
    assert (done.returncode, done.stderr) == (0, "")
    events: list[dict[str, Any]] = json.loads(done.stdout)["events"]
    return events


def wordy(letter: str) -> Policy:
    """A policy whose callable forbids copies with a great many words."""
    text = letter * 3_000_000
    return Policy.from_callable(lambda question: question.method != "handle_copy" or text)


WORDY = {
    **{f"answer of {letter!a}": wordy(letter) for letter in ("x", "\u00e9", "\n", '"')},
    "answer of \\U0001f600": wordy("\U0001f600"),
    "rule": Policy([Rule(deny=["handle_copy"], name="\u00e9" * 3_000_000)]),
}


@pytest.mark.parametrize("policy", WORDY.values(), ids=WORDY.keys())
def test_a_denial_of_many_words_is_a_line_that_is_read(tmp_path: Path, policy: Policy) -> None:
    path = tmp_path / "calls"
    with VMM(policy=policy, audit=Audit(path)) as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        with pytest.raises(SecurityDisallow) as caught:
            vmm.handle_copy(handle, Rights.MAP_READ)
        check_message(caught.value)
        sid = vmm.handle_info(handle).sid
    assert max(map(len, path.read_bytes().splitlines())) < 1 << 20
    assert [event["method"] for event in traced(path, sid)] == [
        "mdl_create",
        "handle_copy",
        "handle_info",
    ]


def test_an_argument_of_many_bits_is_a_line_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "calls"
    with VMM(audit=Audit(path)) as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        for name, value in EVERY:
            refused_or_done(name, lambda it: vmm.mdl_map(handle, it, PAGE, 0, RW), value)
        sid = vmm.handle_info(handle).sid
    assert max(map(len, path.read_bytes().splitlines())) < LONGEST_MESSAGE
    assert traced(path, sid)

"""``Limits``: what they are, and what counts against them."""

from __future__ import annotations

import copy
import fcntl
import os
import pickle
import random
import socket
from contextlib import suppress

import pytest

from bounds import refusal, used
from constants import COMMITTED, GUARDS, LOCKED, RESERVED, RW
from guarding import RULES, rule
from kernel_oracle import PAGE, access_between, descriptors, maps_between
from vmm_linux import VMM, Limits, Retcode, Rights, VmmError, VmmFlags
from vmm_linux.errors import InvalidArgument, InvalidOperation
from vmm_linux.limits import FIGURES, Usage

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited


#: Of the regions and buffers here.
SIZE = 8 * PAGE


# ---- Limits --------------------------------------------------------------------------------------


def test_what_is_not_named_is_unlimited() -> None:
    assert Limits() == Limits.unlimited()
    assert {getattr(Limits(), name) for name in FIGURES} == {None}
    assert Limits(handles=3).handles == 3
    assert Limits(handles=3).regions is None


def test_limits_are_compared_hashed_shown_copied_and_pickled_by_their_bounds() -> None:
    limits = Limits(regions=5, reserved=1 << 40)
    assert limits == Limits(reserved=1 << 40, regions=5) != Limits(regions=5)
    assert len({limits, Limits(regions=5, reserved=1 << 40)}) == 1
    assert repr(limits) == f"Limits(regions=5, reserved={1 << 40})"
    assert limits != (5, 1 << 40)
    for again in (copy.copy(limits), copy.deepcopy(limits), pickle.loads(pickle.dumps(limits))):  # noqa: S301
        assert again == limits


def test_limits_cannot_be_changed_only_replaced() -> None:
    limits = Limits(regions=5)
    with pytest.raises(AttributeError, match=r"set vmm.limits.replace\(regions=7\)"):
        limits.regions = 7
    with pytest.raises(AttributeError, match="cannot be changed"):
        del limits.regions
    assert limits.replace(regions=7, handles=2) == Limits(regions=7, handles=2)
    assert limits.replace(regions=None) == Limits.unlimited()
    assert limits.regions == 5


def test_whatever_has_an_index_is_a_bound() -> None:
    class Number:
        def __index__(self) -> int:
            return 7

    assert Limits(regions=Number()).regions == 7
    assert Limits(mdl_bytes=2**64 - 2).mdl_bytes == 2**64 - 2


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1, "is negative; 0 allows nothing, None everything"),
        (1.0, "is 1.0 of type float, not an integer or None"),
        (2.5, "is 2.5 of type float, not an integer or None"),
        ("5", "is '5' of type str, not an integer or None"),
        (True, "is True, not an integer or None"),
        (False, "is False, not an integer or None"),
        (2**64 - 1, r"is above 2\*\*64 - 2; None is no bound"),
        (10**400, "is a number of 1329 bits; at most 64 are expected"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_bound_is_refused_in_words(name: str, value: object, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^Limits: {name} {reason}$"):
        Limits(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=f"^Limits: {name} {reason}$"):
        Limits().replace(**{name: value})  # type: ignore[arg-type]


def test_a_figure_that_there_is_not_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no figure 'region'; there are regions, reserved"):
        Limits().replace(region=5)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [("committed", "reserved"), ("regions", "mappings"), ("mdl_mappings", "regions")],
)
def test_bounds_that_contradict_each_other_are_refused(inner: str, outer: str) -> None:
    with pytest.raises(
        InvalidArgument, match=f"{inner} 6 can never be reached, as {outer} is 5 and "
    ):
        Limits(**{inner: 6, outer: 5})
    assert getattr(Limits(**{inner: 5, outer: 5}), inner) == 5
    assert getattr(Limits(**{outer: 5}), inner) is None, "no bound at all contradicts nothing"


@pytest.mark.parametrize("value", [5, (), {"regions": 5}, "Limits", True, Limits], ids=repr)
def test_only_limits_limit_a_vmm(vmm: VMM, value: Limits) -> None:
    with pytest.raises(InvalidArgument, match=r"^VMM: limits is .*, not Limits\(\.\.\.\)$"):
        VMM(limits=value).close()
    with pytest.raises(InvalidArgument, match=r"^limits: limits is "):
        vmm.limits = value
    with pytest.raises(InvalidArgument, match=r"^limits: limits is None"):
        vmm.limits = None  # type: ignore[assignment]


def test_limits_that_do_not_tell_their_bounds_or_tell_none_are_refused(vmm: VMM) -> None:
    changed = Limits(regions=1)
    object.__setattr__(changed, "regions", -1)
    for value, reason in ((Limits.__new__(Limits), "does not tell"), (changed, "is negative")):
        with pytest.raises(InvalidArgument, match=reason):
            vmm.limits = value
        with pytest.raises(InvalidArgument, match=reason):
            VMM(limits=value)


def test_a_vmm_tells_its_limits(vmm: VMM) -> None:
    assert vmm.limits == Limits.unlimited()
    vmm.limits = Limits(regions=1, mdl_bytes=2**64 - 2)
    assert vmm.limits == Limits(regions=1, mdl_bytes=2**64 - 2)
    assert [use.bound for use in vmm.usage()] == [getattr(vmm.limits, name) for name in FIGURES]


def test_a_closed_vmm_has_neither_limits_nor_usage() -> None:
    vmm = VMM()
    vmm.close()
    for call in (lambda: vmm.limits, vmm.usage, lambda: setattr(vmm, "limits", Limits())):
        with pytest.raises(InvalidOperation, match="this VMM is closed"):
            call()


# ---- what counts ---------------------------------------------------------------------------------


def test_a_region_cut_in_two_counts_two(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, RESERVED)
    handle = vmm.mdl_create(SIZE, RW)
    mapped = vmm.mdl_map(handle, 0, SIZE, 0, RW)
    vmm.limits = Limits(regions=3, mdl_mappings=1)
    assert "1 more mdl_mappings" in str(refusal(lambda: vmm.free(mapped + PAGE, PAGE)))
    vmm.free(va + 2 * PAGE, PAGE)
    assert (used(vmm)["regions"], used(vmm)["reserved"]) == (3, 2 * SIZE - PAGE)
    assert "1 more regions" in str(refusal(lambda: vmm.free(va + 4 * PAGE, PAGE)))
    vmm.free(va + PAGE, PAGE)
    vmm._check()


def test_guards_go_with_the_pages_next_to_them(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, RESERVED | GUARDS)
    assert (used(vmm)["reserved"], used(vmm)["mappings"]) == (SIZE + 2 * PAGE, 3)
    vmm.free(va, PAGE)
    assert (used(vmm)["reserved"], used(vmm)["mappings"]) == (SIZE, 2)
    vmm.free(va + SIZE - PAGE, PAGE)
    assert (used(vmm)["reserved"], used(vmm)["mappings"]) == (SIZE - 2 * PAGE, 1)


def test_pages_that_become_a_buffer_count_there_and_no_more_as_committed(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED | LOCKED)
    handle = vmm.mdl_create_from_vm(va + PAGE, 2 * PAGE, RW)
    figures = used(vmm)
    assert figures["committed"] == SIZE - 2 * PAGE
    assert figures["locked"] == SIZE
    assert (figures["mdls"], figures["mdl_bytes"], figures["mdl_mappings"]) == (1, 2 * PAGE, 0)
    vmm.handle_close(handle)
    assert used(vmm)["mdls"] == 1, "its pages are mapped"
    vmm.free(va + PAGE, 2 * PAGE)
    assert (used(vmm)["mdls"], used(vmm)["mdl_bytes"]) == (0, 0)


def test_a_shareable_region_is_a_buffer_once_it_was_made_one(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED | VmmFlags.SHAREABLE)
    assert (used(vmm)["committed"], used(vmm)["mdl_bytes"]) == (SIZE, 0)
    vmm.limits = Limits(mdls=0)
    refusal(lambda: vmm.mdl_create_from_vm(va, SIZE, RW))
    vmm.limits = Limits(mdls=1)
    vmm.mdl_create_from_vm(va, SIZE, RW)
    figures = used(vmm)
    assert (figures["committed"], figures["mdls"], figures["mdl_bytes"]) == (0, 1, SIZE)


def test_a_clone_counts_no_bytes_and_keeps_its_origin(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, RW)
    window = vmm.mdl_clone(handle, 0, PAGE)
    vmm.handle_close(handle)
    assert (used(vmm)["mdls"], used(vmm)["mdl_bytes"], used(vmm)["handles"]) == (2, SIZE, 1)
    vmm.handle_close(window)
    assert used(vmm) == dict.fromkeys(FIGURES, 0)


def test_a_clone_that_is_received_comes_with_its_origin(vmm: VMM) -> None:
    window = vmm.mdl_clone(vmm.mdl_create(SIZE, RW), 0, PAGE)
    with VMM(limits=Limits(mdls=2, mdl_bytes=SIZE)) as receiver:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            vmm.send_handle(ours, window)
            receiver.recv_handle(theirs)
            assert (used(receiver)["mdls"], used(receiver)["mdl_bytes"]) == (2, SIZE)
            before = descriptors()
            vmm.send_handle(ours, window)
            assert "2 more mdls" in str(refusal(lambda: receiver.recv_handle(theirs)))
            assert descriptors() == before, "a descriptor of the refused message is left"


def test_revoked_handles_count_until_they_are_closed(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, RW)
    copies = [vmm.handle_copy(handle, Rights.MAP_READ) for _ in range(3)]
    vmm.handle_revoke(handle)
    assert used(vmm)["handles"] == 4
    for each in copies:
        vmm.handle_close(each)
    assert used(vmm)["handles"] == 1


def test_segments_count_a_mapping_each(vmm: VMM) -> None:
    handle = vmm.mdl_create(SIZE, RW, 2 * PAGE)
    vmm.limits = Limits(mappings=3)
    assert "4 more mappings" in str(refusal(lambda: vmm.mdl_map(handle, 0, SIZE, 0, RW)))
    vmm.limits = Limits(mappings=6)
    va = vmm.mdl_map(handle, 0, SIZE, 0, RW)
    assert used(vmm)["mappings"] == 4
    vmm.free(va + 3 * PAGE, 2 * PAGE)
    assert used(vmm)["mappings"] == 4
    vmm._check()
    vmm.free(va, 3 * PAGE)
    assert used(vmm)["mappings"] == 2
    vmm._check()


def test_views_cut_runs_and_leave_them_whole(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED)
    view = vmm.view(va + PAGE, PAGE)
    assert used(vmm)["mappings"] == 3
    vmm.limits = Limits(mappings=3)
    refusal(lambda: vmm.view(va + 3 * PAGE, PAGE))
    view.release()
    del view
    assert used(vmm)["mappings"] == 1


@pytest.mark.parametrize("name", RULES)
def test_the_kernel_has_no_more_mappings_than_are_counted(vmm: VMM, name: str) -> None:
    choose = random.Random(7)  # noqa: S311
    with rule(*RULES[name]):
        va = vmm.allocate(0, 256 * PAGE, RESERVED | GUARDS)
        for _ in range(200):
            first = choose.randrange(250)
            at, size = va + first * PAGE, choose.randrange(1, 6) * PAGE
            call = choose.choice((vmm.commit, vmm.decommit))
            call(at, size)
            vmm.protect(at, PAGE, choose.choice((1, 3)))
            found = maps_between(va - PAGE, va + 257 * PAGE)
            assert len(found) <= used(vmm)["mappings"]


def test_pages_written_before_they_became_alike_stay_apart_in_the_kernel_alone(vmm: VMM) -> None:
    with rule(*RULES["never"]):
        va = vmm.allocate(0, 64 * PAGE, RESERVED | GUARDS)
        for first in (0, 1):
            for page in range(first, 64, 2):
                vmm.commit(va + page * PAGE, PAGE)
                vmm.write(va + page * PAGE, b"x")
        assert used(vmm)["mappings"] == 3
        assert len(maps_between(va, va + 64 * PAGE)) <= 64, "what the README says"


def test_the_figures_have_one_order() -> None:
    assert Usage._fields == FIGURES == Limits.__slots__


@pytest.mark.parametrize("call", ["decommit", "protect", "mdl_create_from_vm", "free"])
def test_what_cuts_runs_is_refused_at_the_bound(vmm: VMM, call: str) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED)
    vmm.limits = Limits(mappings=2)
    arguments = {"protect": (1,), "mdl_create_from_vm": (1,)}.get(call, ())
    before = used(vmm), access_between(va, va + SIZE)
    met = refusal(lambda: getattr(vmm, call)(va + PAGE, PAGE, *arguments))
    assert "mappings" in str(met)
    assert (used(vmm), access_between(va, va + SIZE)) == before
    vmm.limits = Limits(mappings=3)
    getattr(vmm, call)(va + PAGE, PAGE, *arguments)
    vmm._check()


def test_a_regions_ends_can_be_given_back_at_the_bound(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED)
    for bound, first in ((1, va), (0, va + SIZE - PAGE)):
        vmm.limits = Limits(mappings=bound)
        vmm.free(first, PAGE)
        assert used(vmm)["mappings"] == 1
    refusal(lambda: vmm.free(va + 3 * PAGE, PAGE))
    vmm._check()


def test_ranges_are_counted_together_and_all_are_refused(vmm: VMM) -> None:
    va = vmm.allocate(0, 64 * PAGE, RESERVED)
    locked = vmm.allocate(0, SIZE, RESERVED | LOCKED)
    ranges = [(va + page * PAGE, PAGE) for page in range(0, 64, 2)]
    vmm.limits = Limits(committed=31 * PAGE)
    assert f"{32 * PAGE} more committed" in str(refusal(lambda: vmm.commit_ranges(ranges)))
    assert used(vmm)["committed"] == 0
    vmm.limits = Limits(mappings=40)
    assert "more mappings" in str(refusal(lambda: vmm.commit_ranges(ranges)))
    vmm.limits = Limits(locked=PAGE)
    pages = [(locked, PAGE), (locked + PAGE, PAGE), (va, PAGE)]
    assert f"{2 * PAGE} more locked" in str(refusal(lambda: vmm.commit_ranges(pages)))
    vmm.limits = Limits(committed=32 * PAGE)
    vmm.commit_ranges(ranges)
    assert used(vmm)["committed"] == 32 * PAGE
    vmm.limits = Limits(mappings=used(vmm)["mappings"])
    vmm.commit_ranges(ranges)
    vmm.decommit_ranges(ranges)
    assert used(vmm)["committed"] == 0
    vmm._check()


def test_pages_behind_guards_count_as_those_that_are_not() -> None:
    with rule(*RULES["always"]), VMM(limits=Limits(committed=64 * PAGE)) as vmm:
        va = vmm.allocate(0, 512 * PAGE, RESERVED)
        for page in range(0, 128, 2):
            vmm.commit(va + page * PAGE, PAGE)
        refusal(lambda: vmm.commit(va + 200 * PAGE, PAGE))
        refusal(lambda: vmm.commit_ranges([(va + 200 * PAGE, PAGE)]))
        vmm.commit(va, PAGE)
        vmm.decommit(va, PAGE)
        vmm.commit(va + 200 * PAGE, PAGE)
        vmm._check()


def test_committing_committed_pages_takes_nothing(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED)
    vmm.limits = Limits(committed=SIZE)
    vmm.commit(va, SIZE)
    vmm.commit_ranges([(va, SIZE)])


def test_a_commit_cuts_no_pages_that_a_view_holds(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, RESERVED)
    vmm.commit(va, SIZE // 2)
    view = vmm.view(va, SIZE // 2)
    assert used(vmm)["mappings"] == 2
    vmm.commit(va + PAGE, PAGE)
    vmm.commit_ranges([(va + PAGE, PAGE), (va + 3 * PAGE, PAGE)])
    assert used(vmm)["mappings"] == 2
    vmm.limits = Limits(mappings=3)
    # Into reserved pages, each of which would be a run of its own.
    apart = [(va + SIZE // 2 - PAGE, 2 * PAGE), (va + SIZE // 2 + 2 * PAGE, PAGE)]
    refusal(lambda: vmm.commit_ranges(apart))
    refusal(lambda: vmm.view(va + PAGE, PAGE))
    assert used(vmm)["mappings"] == 2
    vmm._check()
    view.release()


def test_ranges_that_are_refused_leave_no_chunk_open_that_was_closed(vmm: VMM) -> None:
    first = vmm.allocate(0, SIZE, RESERVED)
    second = vmm.allocate(0, SIZE, RESERVED)
    vmm.limits = Limits(mappings=4)
    # To hold the first range cuts it off, which makes four runs: enough for guards.
    with rule(1 << 40, 4):
        refusal(lambda: vmm.commit_ranges([(first + PAGE, PAGE), (second + PAGE, PAGE)]))
    assert used(vmm)["mappings"] == 2
    vmm._check()


def test_a_bound_below_what_there_is_holds_from_then_on(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED)
    handle = vmm.mdl_create(SIZE, RW)
    vmm.limits = Limits(
        regions=0, committed=0, locked=0, mdls=0, mdl_bytes=0, mdl_mappings=0, handles=0
    )
    vmm.write(va, b"what exists stays")
    vmm.commit(va, SIZE)
    vmm.protect(va, PAGE, VmmFlags.READ)
    vmm.decommit(va, 2 * PAGE)
    refusal(lambda: vmm.commit(va, PAGE))
    refusal(lambda: vmm.handle_copy(handle, 0))
    vmm.limits = vmm.limits.replace(committed=SIZE - PAGE)
    vmm.commit(va, PAGE)
    refusal(lambda: vmm.commit(va, 2 * PAGE))
    vmm.handle_close(handle)
    vmm.free(va, SIZE)
    assert used(vmm) == dict.fromkeys(FIGURES, 0)


def test_the_reference_face_gives_the_return_code() -> None:
    with VMM(limits=Limits(regions=0, mdls=0)) as vmm:
        assert vmm.endpoint.Allocate(0, PAGE, int(RESERVED)) == (0, Retcode.QUOTA_EXCEEDED)
        assert vmm.endpoint.MdlCreate(PAGE, 3)[1] is Retcode.QUOTA_EXCEEDED


def test_sizes_that_add_up_to_more_than_64_bits_pass_no_bound() -> None:
    huge = 2**63 - PAGE
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    taken = 0
    try:
        os.ftruncate(fd, huge)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with VMM(limits=Limits(mdl_bytes=2**64 - 2)) as vmm:
            for _ in range(4):
                with suppress(VmmError):
                    vmm.handle_from_fd(fd)
                    taken += 1
            assert taken <= 2
            assert used(vmm)["mdl_bytes"] == taken * huge
    finally:
        os.close(fd)


def test_each_vmm_has_limits_of_its_own(vmm: VMM) -> None:
    with VMM(limits=Limits(regions=1)) as other:
        other.allocate(0, PAGE, RESERVED)
        refusal(lambda: other.allocate(0, PAGE, RESERVED))
        vmm.allocate(0, PAGE, RESERVED)
        assert used(other)["regions"] == used(vmm)["regions"] == 1


def test_views_that_outlive_the_vmm_leave_nothing_behind() -> None:
    vmm = VMM(limits=Limits(regions=1))
    view = vmm.view(vmm.allocate(0, SIZE, COMMITTED), SIZE)
    vmm.close()
    view[0] = 1
    del view


def test_a_child_begins_with_its_parents_figures_and_bounds(vmm: VMM) -> None:
    va = vmm.allocate(0, SIZE, COMMITTED)
    vmm.limits = Limits(committed=SIZE + PAGE, regions=2)
    other = vmm.allocate(0, SIZE, RESERVED)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            vmm.commit(other, PAGE)
            refusal(lambda: vmm.commit(other + PAGE, PAGE))
            vmm.free(va, SIZE)
            code = 0 if used(vmm)["committed"] == PAGE else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert used(vmm)["committed"] == SIZE, "the child has nothing to do with the parent"


def test_a_vmm_that_is_closed_before_it_is_made_takes_no_limits() -> None:
    vmm = VMM.__new__(VMM)
    vmm.close()
    with pytest.raises(InvalidOperation, match="limits: this VMM is closed"):
        VMM.__init__(vmm, Limits(regions=1))

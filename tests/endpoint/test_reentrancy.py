"""Arguments and finalizers that call the VMM while it is being called."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from constants import COMMITTED
from faces import Face, call
from kernel_oracle import PAGE
from refusals import HANDLE_METHODS, PARAMETERS, Ground, call_with, faces, good_arguments
from vmm_linux import VMM, Retcode

if TYPE_CHECKING:
    from collections.abc import Callable


class Meddler:
    """An integer that does something to the VMM while it is being read."""

    def __init__(self, value: int, act: Callable[[], object]) -> None:
        self.value = int(value)
        self.act = act

    def __index__(self) -> int:
        """Act, then be a number."""
        self.act()
        return self.value


@faces
@pytest.mark.parametrize(
    "method",
    [
        "commit",
        "decommit",
        "protect",
        "free",
        "query",
        "allocate",
        "mdl_create",
        "mdl_create_from_vm",
        "mdl_get_size",
        "mdl_map",
        "mdl_clone",
    ],
)
@pytest.mark.parametrize("act", ["close", "free", "query", "commit", "handle_close", "revoke"])
def test_an_argument_may_call_the_vmm_back(
    ground: Ground, face: Face, method: str, act: str
) -> None:
    vmm, va = ground.vmm, ground.committed
    acts: dict[str, Callable[[], object]] = {
        "close": vmm.close,
        "free": lambda: call(vmm, Face.ENDPOINT, "free", va, 8 * PAGE),
        "query": lambda: vmm.query(va),
        "commit": lambda: vmm.commit(ground.reserved, PAGE),
        "handle_close": lambda: vmm.handle_close(ground.handle),
        "revoke": lambda: vmm.handle_revoke(ground.handle),
    }
    name = PARAMETERS[method][0]
    meddler = Meddler(good_arguments(ground, method)[name], acts[act])
    got = call_with(ground, face, method, **{name: meddler})
    if act == "close":
        assert got.rc is Retcode.INVALID_OPERATION
        assert vmm.closed
    elif (act == "free" and "va" in PARAMETERS[method] and method != "query") or (
        act == "handle_close" and method in HANDLE_METHODS
    ):
        assert got.rc is Retcode.RESOURCE_NOT_FOUND
    else:
        assert got.rc is Retcode.OK


class Litter:
    """Rubbish in a cycle, which calls the VMM when it is collected."""

    def __init__(self, vmm: VMM, va: int, view: memoryview | None) -> None:
        self.itself = self
        self.vmm, self.va, self.view = vmm, va, view

    def __del__(self) -> None:
        """Call the VMM from wherever the collector happens to run."""
        if not self.vmm.closed:
            self.vmm.query(self.va, smaps=False)
            call(self.vmm, Face.ENDPOINT, "commit", self.va, PAGE)


def test_the_collector_may_run_finalizers_inside_a_call(ground: Ground) -> None:
    vmm, va = ground.vmm, ground.committed
    old = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for turn in range(300):
            Litter(vmm, va, vmm.view(va, PAGE) if turn % 2 else None)
            for face in Face:
                call(vmm, face, "query", va)
                call(vmm, face, "free", ground.hole, PAGE)
                call(vmm, face, "decommit", ground.reserved, PAGE)
                call(vmm, face, "commit", "wrong", PAGE)
                got = call(vmm, face, "allocate", 0, PAGE, COMMITTED)
                assert call(vmm, face, "free", got.value, PAGE).rc is Retcode.OK
            vmm.read(va, 10)
    finally:
        gc.set_threshold(*old)
    gc.collect()
    assert vmm.read(va, 9) == b"committed"
    vmm.decommit(va, PAGE)

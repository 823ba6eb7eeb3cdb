"""Arguments of another kind: each is named before anything is asked of a broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import vmm_linux
from vmm_linux.errors import InvalidArgument
from vmm_linux.names import Client, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WRONG: Any = 5


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda path: Client(path).publish(WRONG, "frames"), "mdl is"),
        (lambda path: Ticket.of(WRONG, broker=path), "mdl is"),
        (lambda path: vmm_linux.attach("frames", vmm=WRONG, broker=path), "vmm is"),
        (lambda path: Client(path).create("frames", 10, vmm=WRONG), "vmm is"),
        (lambda _: Client(""), "no file is called"),
        (lambda _: Client("a\0b"), "no file is called"),
        (lambda _: Client(WRONG), "not a path"),
    ],
    ids=["publish", "ticket", "attach", "create", "empty path", "NUL in a path", "path"],
)
def test_an_argument_of_another_kind_is_named(
    tmp_path: Path, call: Callable[[str], object], why: str
) -> None:
    with pytest.raises(InvalidArgument, match=why):
        call(f"{tmp_path}/socket")

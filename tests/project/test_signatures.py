"""``inspect.signature`` answers for all that is public, by the names that docstrings have."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import TYPE_CHECKING, Any

import pytest

import vmm_linux
from vmm_linux import VMM, Handle, PageInfo
from vmm_linux._core import endpoint
from vmm_linux.audit import Audit
from vmm_linux.experiments import NotObservable

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = (
    "vmm_linux",
    "vmm_linux.aio",
    "vmm_linux.audit",
    "vmm_linux.doctor",
    "vmm_linux.endpoint",
    "vmm_linux.errors",
    "vmm_linux.event",
    "vmm_linux.experiments",
    "vmm_linux.flags",
    "vmm_linux.handles",
    "vmm_linux.inspect",
    "vmm_linux.limits",
    "vmm_linux.mdl",
    "vmm_linux.policy",
    "vmm_linux.region",
    "vmm_linux.states",
)
#: Classes that are made as an int or an exception is, of which Python tells no signature.
MADE_BY_PYTHON = (Handle, NotObservable)


def public_things() -> Iterator[tuple[str, Any]]:
    """Every public function and class, and every public method, with its full name."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and thing not in MADE_BY_PYTHON:
                yield f"{module_name}.{name}", thing
            for kind in inspect.getmro(thing) if inspect.isclass(thing) else ():
                # Methods of int, tuple and str are Python's.
                own = vars(kind) if kind.__module__.startswith("vmm_linux") else {}
                for member in own:
                    method = getattr(thing, member)
                    if not member.startswith("_") and callable(method):
                        yield f"{module_name}.{name}.{member}", method


THINGS = dict(public_things())


def documented(thing: object) -> list[str]:
    """The names of parameters that a docstring tells of, in order."""
    text = inspect.getdoc(thing) or ""
    section = re.search(r"^Args:\n((?: .*\n|\n)+)", text + "\n", re.MULTILINE)
    return re.findall(r"^    (\w+):", section[1], re.MULTILINE) if section else []


@pytest.mark.parametrize("name", THINGS)
def test_a_public_thing_has_a_signature_with_the_names_in_its_docstring(name: str) -> None:
    thing = THINGS[name]
    names = [each for each in inspect.signature(thing).parameters if each != "self"]
    if told := documented(thing):
        assert told == names


def test_a_vmm_is_made_with_the_arguments_that_its_signature_has() -> None:
    for kind in (VMM, endpoint.VMM):
        assert str(inspect.signature(kind)) == "(limits=None, *, policy=None, audit=None)"


@pytest.mark.parametrize("kind", [VMM, endpoint.VMM, Audit, PageInfo, endpoint.Record], ids=str)
def test_a_class_has_the_signature_of_its_init(kind: Any) -> None:  # noqa: ANN401
    first, *others = inspect.signature(kind.__init__).parameters.values()
    assert first.name == "self"
    assert list(inspect.signature(kind).parameters.values()) == others


def test_signatures_are_no_part_of_docstrings() -> None:
    for name, thing in THINGS.items():
        assert "--\n" not in (inspect.getdoc(thing) or ""), name
    assert (vmm_linux.PageInfo.__doc__ or "").lstrip().startswith("What ")

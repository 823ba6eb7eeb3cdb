"""The README says what is so: its examples run, its tables are complete."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

import pytest

from children import ROOT, run_child
from readme import README, blocks, rows_of, section
from vmm_linux import VMM, Handle, Retcode, Rights, Seal, VmmFlags
from vmm_linux._core.endpoint import MAGIC, MESSAGE_SIZE, VERSION
from vmm_linux._core.kernel import bounds_for
from vmm_linux.cli import COMMANDS
from vmm_linux.endpoint import Endpoint
from vmm_linux.errors import EXCEPTIONS
from vmm_linux.experiments._framework.catalogue import catalogue
from vmm_linux.limits import FIGURES

if TYPE_CHECKING:
    from enum import IntFlag
    from pathlib import Path

#: In a table: there is nothing to say here.
OWN = "—"


def run_examples(text: str) -> None:
    """Run the examples of a console session, and tell of those that answer something else."""
    import doctest
    import sys

    test = doctest.DocTestParser().get_doctest(text, {}, "README.md", None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    results = runner.run(test)
    print(results.attempted, "examples")
    sys.exit(results.failed != 0)


def test_every_example_answers_what_the_readme_says(tmp_path: Path) -> None:
    examples = blocks("python")
    tmp_path.chmod(0o700)  # for a broker, which ends by itself
    child = run_child(
        run_examples, "\n".join(examples), environment={"XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert (child.returncode, child.stderr) == (0, ""), child.stdout
    assert child.stdout == f"{README.count('>>> ')} examples\n"


def test_every_figure_is_in_the_table_with_its_default() -> None:
    rows = rows_of("Limits")
    assert tuple(row[0] for row in rows) == FIGURES
    for (_, _, default), bound in zip(rows, bounds_for(0), strict=True):
        told = default.replace(",", "")
        assert told == {None: told, 0: "memory"}.get(bound, str(bound))
        assert told.startswith("none: ") is (bound is None)


def test_the_tests_of_every_danger_exist() -> None:
    rows = rows_of("Dangers")
    assert {row[0] for row in rows} <= {name for name in vars(Endpoint) if name[0] != "_"}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        for name in row[3].split(", "):
            assert f"def {name}(" in tests


def test_every_method_is_in_the_table_with_its_parameters() -> None:
    public = {name for name, value in inspect.getmembers(VMM) if callable(value) and name[0] != "_"}
    described = {}
    for signature, reference, _ in rows_of("Methods"):
        name = signature.partition("(")[0]
        described[name] = reference
        parameters = [*inspect.signature(getattr(VMM, name)).parameters.values()][1:]
        assert signature == f"{name}({', '.join(map(written, parameters))})"
    assert described.keys() == public
    reference_names = {name for name in vars(Endpoint) if name[0] != "_"}
    assert set(described.values()) == reference_names | {OWN}
    assert all(
        name.title().replace("_", "") == reference
        for name, reference in described.items()
        if reference != OWN
    )


def written(parameter: inspect.Parameter) -> str:
    """A parameter as people write it: without its type, and flags by their names."""
    default = parameter.default
    name = default.name if isinstance(default, VmmFlags) else repr(default)
    return parameter.name if default is parameter.empty else f"{parameter.name}={name}"


def test_every_property_is_named() -> None:
    for name, value in inspect.getmembers(VMM):
        if name[0] != "_" and not callable(value):
            assert f"`{name}`" in section("Methods")


def test_no_table_has_an_empty_cell() -> None:
    lines = [line for line in README.splitlines() if line.startswith("|")]
    assert lines
    for line in lines:
        cells = re.split(r"(?<!\\)\|", line.strip("|"))
        assert all(cell.strip() for cell in cells), line


@pytest.mark.parametrize(
    ("title", "enum"), [("Flags", VmmFlags), ("Rights", Rights), ("Seals", Seal)]
)
def test_every_member_is_in_its_table_with_its_value(title: str, enum: type[IntFlag]) -> None:
    described = {name: int(value, 16) for name, value, _ in rows_of(title)}
    assert described == dict(enum.__members__.items())


def test_every_bit_of_a_handle_is_described() -> None:
    ones, first = Handle(2**63 - 1), 0
    for name, bits, _ in rows_of("Handles"):
        low, high = (int(bit) for bit in (bits.split("-") * 2)[:2])
        assert low == first
        first = high + 1
        if name != OWN:
            mask = (1 << first) - (1 << low)
            assert int(getattr(Handle(ones & mask), name)) == mask >> low
            assert not getattr(Handle(ones & ~mask), name)
    assert first == 64


def test_the_message_is_as_long_as_it_says() -> None:
    assert f"one message: {MESSAGE_SIZE} bytes" in section("On the wire")
    assert f"`{MAGIC.decode()}`, the version ({VERSION})" in section("On the wire")


def test_every_return_code_is_in_the_table_with_its_names_and_exceptions() -> None:
    expected = []
    for rc in Retcode:
        kinds = OWN if rc is Retcode.OK else ", ".join(kinds_of(rc))
        expected.append([rc.name, str(rc), kinds])
    assert [row[:3] for row in rows_of("Return codes")] == expected


def kinds_of(rc: Retcode) -> list[str]:
    """The exception of a return code, and Python's own that it is too."""
    exception = EXCEPTIONS[rc]
    return [exception.__name__, exception.__bases__[1].__name__]


def test_every_command_and_script_that_is_named_exists() -> None:
    for command in re.findall(r"vmm-linux (\w+)", README):
        assert command in COMMANDS
    scripts = re.findall(r"scripts/[\w-]+", README)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)


def test_every_link_leads_to_a_file_or_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        assert (ROOT / file).is_file() if file else anchor in anchors, link


def test_every_experiment_that_is_named_exists() -> None:
    named = re.findall(r"experiment run ([a-z][\w-]*)", section("Laboratory"))
    assert named
    assert set(named) <= {each.name for each in catalogue()}


def test_every_extra_is_described() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"'\.\[(\w+)\]'", README)) == project["optional-dependencies"].keys()
    assert project["requires-python"].lstrip(">=") in section("Installing")
    assert f"License: {project['license']}" in README

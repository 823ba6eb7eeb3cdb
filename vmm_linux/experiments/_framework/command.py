"""``vmm-linux experiment``: experiments on how this machine treats memory."""

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmm_linux._core.kernel import available_without_swap, memory_headroom
from vmm_linux._tools import machine
from vmm_linux._tools.atomic_write import write_whole
from vmm_linux._tools.commands import CannotTryError
from vmm_linux._tools.matplotlib import need_matplotlib
from vmm_linux._tools.tables import print_line
from vmm_linux._tools.text import printable
from vmm_linux.doctor import diagnose
from vmm_linux.experiments._framework.catalogue import Experiment, catalogue, chosen
from vmm_linux.experiments._framework.files import (
    as_csv,
    as_json,
    as_plots,
    check_file,
    check_folder,
)
from vmm_linux.experiments._framework.laboratory import Order, Result, carry_out
from vmm_linux.experiments._framework.page import page_of
from vmm_linux.experiments._framework.terminal import progress_of, show, show_list

PROGRAM = "vmm-linux experiment"
STANDARD_OUTPUT = "-"
MOST_RUNS = 1000
LARGEST_SEED = (1 << 32) - 1
MIB = 1 << 20
LEAST_MEMORY = 64 * MIB
"""The least memory that every experiment can use."""
USUAL_MEMORY = 1024 * MIB
"""The most bytes that an experiment touches by default."""
USUAL_PART = 4
"""By default an experiment touches at most the available memory divided by this."""
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0: every experiment ran, and its physical claims held or were not observable here. 1: one
        did not run, or a claim failed. 2: it cannot be tried.
    """
    asked = parser().parse_args(arguments)
    try:
        if asked.action == "list":
            return show_catalogue(as_object=asked.json)
        experiments = wanted(asked)
        outputs = {name: getattr(asked, name, None) for name in ("json", "csv", "plot", "output")}
        check({name: place for name, place in outputs.items() if place is not None})
        return run(experiments, order_of(asked), outputs)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{printable(str(error.filename))}: " if error.filename else ""
        raise CannotTryError(f"{what}{error.strerror}") from error


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Experiments on how this machine treats memory: each asks a question, states "
        "a prediction, measures, and says what held. Exit code 0: all that had to hold held, or "
        "is not observable here; 1: it did not, or an experiment could not be carried out; 2: the "
        "order could not be tried.",
    )
    actions = made.add_subparsers(dest="action", required=True, metavar="list|run|report")
    listing = actions.add_parser("list", help="which experiments there are")
    listing.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    running = actions.add_parser("run", help="run some of them, or all")
    add_common(running)
    running.add_argument(
        "--json",
        nargs="?",
        const=STANDARD_OUTPUT,
        metavar="FILE",
        help="all that was found as one JSON object; without FILE, on the standard output alone",
    )
    running.add_argument("--csv", metavar="DIR", help="every table as a file there")
    running.add_argument(
        "--plot", metavar="DIR", help="every plot as PNG and SVG there (needs matplotlib)"
    )
    reporting = actions.add_parser("report", help="run some or all; one page of HTML with it all")
    add_common(reporting)
    reporting.add_argument("--output", metavar="FILE.html", required=True, help="the page")
    return made


def add_common(action: argparse.ArgumentParser) -> None:
    """Add the common options of running and reporting."""
    action.add_argument("names", nargs="*", metavar="NAME", help="an experiment")
    action.add_argument("--all", action="store_true", help="every experiment")
    action.add_argument("--quick", action="store_true", help="seconds each, smaller sizes")
    action.add_argument(
        "--seed", type=number(0, LARGEST_SEED), default=1, metavar="N", help="of what is random"
    )
    action.add_argument(
        "--repeat",
        type=number(1, MOST_RUNS),
        default=1,
        metavar="N",
        help="run each so often: medians, the least and the largest values",
    )
    action.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="bytes that an experiment may touch, as 512M or 2G",
    )


def number(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers between two bounds."""

    def read(text: str) -> int:
        fits = text.isascii() and text.isdecimal() and len(text) < 20
        if not (fits and least <= int(text) <= most):
            message = f"{printable(text)} is no number from {least} to {most}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return read


def size(text: str) -> int:
    """A byte count."""
    digits, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
        raise argparse.ArgumentTypeError(f"{printable(text)} is no size, as 512M or 2G")
    return int(digits) * unit


def wanted(asked: argparse.Namespace) -> list[Experiment]:
    """The experiments to run."""
    file = getattr(asked, "json", None)
    if file in {each.name for each in catalogue()}:
        raise CannotTryError(f"--json {file}: that is an experiment; give --json last, or ./{file}")
    if asked.names and asked.all:
        raise CannotTryError("either names or --all")
    if not asked.names and not asked.all and asked.action == "run":
        raise CannotTryError(
            f"nothing to run: give names or --all ('{PROGRAM} list' tells what there is)"
        )
    return chosen(asked.names) if asked.names else catalogue()


def check(outputs: dict[str, str]) -> None:
    """Refuse, before measuring, files that could not be written afterwards."""
    if "plot" in outputs or "output" in outputs:
        need_matplotlib("plots")
    for name, place in outputs.items():
        if name in {"csv", "plot"}:
            check_folder(place)
        elif not (name == "json" and place == STANDARD_OUTPUT):
            check_file(place)


def order_of(asked: argparse.Namespace) -> Order:
    """The order to run experiments; refuses more memory than available."""
    available = memory_headroom(available_without_swap())
    memory = asked.memory
    if memory is None:
        memory = max(LEAST_MEMORY, min(USUAL_MEMORY, available // USUAL_PART))
    if not LEAST_MEMORY <= memory <= available:
        raise CannotTryError(
            f"--memory {memory} is out of range: from {LEAST_MEMORY} to {available} bytes, which "
            "this machine has available"
        )
    page = os.sysconf("SC_PAGE_SIZE")
    return Order(asked.quick, asked.seed, asked.repeat, memory // page * page)


def show_catalogue(*, as_object: bool) -> int:
    """The list."""
    if as_object:
        print_line(json.dumps({"experiments": [each.texts() for each in catalogue()]}, indent=1))
    else:
        show_list(catalogue())
    return 0


def run(experiments: Sequence[Experiment], order: Order, outputs: dict[str, str | None]) -> int:
    """Run them, show each result at once, and write all requested files or none."""
    facts = machine_facts()
    alone = outputs["json"] == STANDARD_OUTPUT
    results: list[Result] = []
    for experiment in experiments:
        with progress_of(experiment.name) as progress:
            results.append(carry_out(experiment, order, progress))
        if not alone:
            show(results[-1])
    deliver(results, facts, outputs)
    return 0 if all(result.ok for result in results) else 1


def deliver(
    results: Sequence[Result], machine: dict[str, Any], outputs: dict[str, str | None]
) -> None:
    """Make every file first, then write them without interruption."""
    files: dict[str, bytes] = {}
    folders = [folder for folder in (outputs["csv"], outputs["plot"]) if folder is not None]
    if outputs["csv"] is not None:
        files |= as_csv(results, outputs["csv"])
    if outputs["plot"] is not None:
        files |= as_plots(results, outputs["plot"])
    if outputs["output"] is not None:
        files[outputs["output"]] = page_of(results, machine)
    if outputs["json"] is not None:
        text = as_json(results, machine)
        if outputs["json"] == STANDARD_OUTPUT:
            print_line(text.decode())
        else:
            files[outputs["json"]] = text
    with uninterrupted(), contextlib.ExitStack() as otherwise:
        for folder in map(Path, folders):
            if not folder.exists():
                folder.mkdir()
                otherwise.callback(folder.rmdir)
        write_whole(files)
        otherwise.pop_all()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and other requests to end until this is over."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def machine_facts() -> dict[str, Any]:
    """The machine of the results: its facts and the doctor's report."""
    diagnosis = diagnose()
    memory = machine.memory()
    return {
        "taken": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "facts": {
            **asdict(diagnosis.machine),
            "kernel": f"Linux {diagnosis.machine.kernel}",
            "user_space_end": f"{diagnosis.machine.user_space_end:#x}",
            "lowest_address": f"{diagnosis.machine.lowest_address:#x}",
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory": memory.total,
            "available": memory.available,
        },
        "features": [asdict(each) for each in diagnosis.features],
        "settings": [asdict(each) for each in diagnosis.settings],
    }


def processor() -> str | None:
    """The processor's name, if the kernel reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return None

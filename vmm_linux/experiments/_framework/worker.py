"""The process of one run of one experiment: ``python -m``, started by the parent.

Its standard input is the parent's order, one JSON object. It answers on a pipe, a JSON object a
line: ``progress`` any number of times, then ``findings`` or ``problem``.
"""

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from vmm_linux import VMM, experiments
from vmm_linux._tools.children import die_with_parent, name_process
from vmm_linux.experiments import Run
from vmm_linux.experiments._framework.catalogue import chosen
from vmm_linux.experiments._framework.run import REFUSALS

OWN = 1 << 30
"""Bytes for the interpreter, its threads and its modules, beside the measured memory."""
PAUSE = 0.05
"""Seconds between two reports of progress, which so cost little."""


def main() -> None:
    """Carry out the order."""
    order = json.load(sys.stdin)
    die_with_parent(order["parent"])
    name_process(order["name"])
    confine(order["memory"])
    experiments.__path__[:] = order["folders"]  # the parent's folders
    with os.fdopen(order["answers"], "w", encoding="utf-8") as answers:
        os.set_inheritable(answers.fileno(), False)
        send(answers, measured(order, answers))


def confine(memory: int) -> None:
    """Limit this process's memory, and make it the first that the kernel kills in a shortage.

    The limit is on private writable memory without reserved addresses, and soft: an experiment
    about commitment may raise it.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = memory + OWN
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    # A crash must leave nothing: with 1, neither a file nor a call of a collector.
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (min(1, hard) if hard >= 0 else 1, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def measured(order: dict[str, Any], answers: TextIO) -> dict[str, Any]:
    """Measure, and return the findings or the problem for JSON."""
    last = 0.0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PAUSE or done == total:
            last = now
            send(answers, {"progress": [done, total, what]})

    try:
        (experiment,) = chosen([order["name"]])
        with VMM() as vmm:
            options = {name: order[name] for name in ("quick", "seed", "memory")}
            run = Run(vmm, **options, progress=progress)
            try:
                experiment.measure(run)
            except REFUSALS as answer:
                run.findings.reason = str(answer)
    except Exception as problem:  # noqa: BLE001 (the parent reports any error)
        with contextlib.suppress(OSError):  # it is reported in a line anyway
            traceback.print_exc()
        return {"problem": f"{type(problem).__name__}: {problem}"}
    return {"findings": run.findings.without_empty().as_dict()}


def send(answers: TextIO, answer: dict[str, Any]) -> None:
    """Send an answer."""
    answers.write(json.dumps(answer, allow_nan=False) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()

"""The laboratory: experiments on how this machine treats memory.

``vmm-linux experiment`` lists and runs them. Each asks a question, predicts the answer, measures
it on this machine, and reports which predictions held.

How to add an experiment
------------------------
Put one file into this folder; nothing else changes. The file's name is the experiment's
(``page_faults.py`` is ``page-faults``); the framework is in ``_framework``.
It has a number, four texts and one function::

    from vmm_linux.experiments import Run, at_least, minor_faults, timed, touch

    MIB = 1 << 20
    ORDER = 30                  # where it stands in the list
    TITLE = "Page faults"
    QUESTION = "What does the first touch of a page cost?"
    PREDICTION = "One minor fault for each page. Written down before measuring."
    EXPLANATION = "What is seen and why, for a class."

    def measure(run: Run) -> None:
        size = run.choose(quick=4 * MIB, full=64 * MIB)
        table = run.table("Faults", "pages | faults | time [µs]")
        with run.vmm.region(size) as region:
            region.commit()
            before = minor_faults()
            seconds = timed(touch, region)
            faults = minor_faults() - before
        table.add(size // run.page, faults, seconds * 1e6)
        run.physical("Each page faults once", faults, at_least(size // run.page))

* A table's columns and a plot's axes are named with their units, as in "size [B] | time [µs]".
* Make memory with ``run.vmm`` (a ``VMM``), by its public methods, and other mechanisms that are
  compared with the standard library.
* ``run.physical`` states a fact about the kernel's figures: one that does not hold is a
  failure. ``run.timing`` states the expected time, which may differ.
* What a machine cannot show is no failure: ``need(condition, "why not")`` leaves the experiment,
  or the part that ``with run.part("name")`` surrounds. So does a ``VMM`` that is out of memory, or
  meets a limit of the user's.
* ``run.steps(sequence)`` goes through a sequence and shows progress. ``run.random`` is seeded.
  ``run.memory`` is the memory that may be touched in all, in bytes, and ``run.fitting(size)`` keeps
  within it. ``run.child(function, ...)`` forks: what is not observable in the child is not
  observable in the parent.
* ``libc("madvise", ...)`` is a system call that fails with its errno; ``become`` makes a child
  another user; ``status``, ``meminfo``, ``told`` and ``figures`` are the kernel's figures, and
  ``sysctl`` is the administrator's setting.
* ``machine_code`` runs a few instructions of the processor, where the interpreter would disturb the
  measurement.
* Where pages or faults are counted, ``with small_pages()`` keeps huge ones away.
* Each experiment has a process of its own, which ends after a time and with its parent. With
  ``run.quick`` it should take no more than two seconds.
"""

from vmm_linux.experiments._framework.machine_code import machine_code
from vmm_linux.experiments._framework.results import (
    Axis,
    Column,
    NotObservable,
    Table,
    at_least,
    at_most,
    between,
    equal,
    need,
)
from vmm_linux.experiments._framework.run import (
    Child,
    Run,
    charged,
    figures,
    in_huge_pages,
    minor_faults,
    resident,
    small_pages,
    timed,
    touch,
)
from vmm_linux.experiments._framework.system import (
    NOBODY,
    become,
    errno_of,
    libc,
    mappings,
    meminfo,
    status,
    sysctl,
    told,
)

__all__ = [
    "NOBODY",
    "Axis",
    "Child",
    "Column",
    "NotObservable",
    "Run",
    "Table",
    "at_least",
    "at_most",
    "become",
    "between",
    "charged",
    "equal",
    "errno_of",
    "figures",
    "in_huge_pages",
    "libc",
    "machine_code",
    "mappings",
    "meminfo",
    "minor_faults",
    "need",
    "resident",
    "small_pages",
    "status",
    "sysctl",
    "timed",
    "told",
    "touch",
]

"""The limit of mappings: how many pieces a process's memory can have, and the way around it."""

import os
import resource
import sys
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple

from vmm_linux import VMM, Limits, VmmError, VmmFlags
from vmm_linux import experiments as lab

ORDER = 50
TITLE = "The wall of mappings"
QUESTION = "How often can every second page be committed until the kernel says ENOMEM, and why?"
PREDICTION = """
    By mprotect(2) each commit in the middle of reserved memory costs two mappings. At
    vm.max_map_count the kernel refuses with ENOMEM, after half as many commits, whatever memory is
    free. There, giving back a page in the middle fails as well, and filling a gap between committed
    pages works. By guards commits cost no mappings, go on beyond the wall, and take less time.
"""
EXPLANATION = """
    A mapping (VMA) is a range of pages with one protection. Access for a page in the middle of
    reserved ones makes three of one, and the kernel bounds how many a process may have. Whatever
    splits is refused at the wall, munmap(2) too; what merges is not: a gap that is filled makes one
    mapping of three. A guard is a mark in the page table instead (Linux 6.13). So this package
    gives a whole block access, with guards on all pages that are not committed, and commits a page
    by taking its guard away: one mapping, however many pieces. VMM_LINUX_WITHOUT=GUARD_REGIONS
    has it do without, as here for the comparison and as on older kernels.
"""

SYSCTL = "vm.max_map_count"
RESERVED = VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE
LOOKS = 15
"""How often the mappings are counted on the way to the limit."""


class Climb(NamedTuple):
    """The commits up to the limit."""

    commits: list[int]
    mappings: list[int]
    """Of the process, after so many commits; the first of both is before the first commit."""
    times: list[float]
    """Of a commit since the last measurement, in µs; of whole steps alone."""
    refusal: str = "nothing"
    message: str = ""
    free: str = ""
    """The result of giving pages back at the limit."""
    fill: str = ""
    """The result of filling a gap there."""


def measure(run: lab.Run) -> None:
    """Commit every second page, without guards and with them."""
    wall = lab.sysctl(SYSCTL)
    far = run.choose(quick=200_000, full=2_000_000)
    lab.need(wall <= far, f"{SYSCTL} is {wall}, and this run goes no further than {far}")
    most = wall * run.choose(quick=1, full=8)
    climbs = {"mprotect": climbed(run, "GUARD_REGIONS", most, wall // LOOKS)}
    with run.part("Commits by guards"):
        run.need_feature("GUARD_REGIONS")
        climbs["guards"] = climbed(run, "", most, most // LOOKS)
    show(run, climbs)

    stopped = climbs["mprotect"]
    run.physical("By mprotect the kernel refuses at last", stopped.refusal, lab.equal("ENOMEM"))
    # A split at the end may be half done, and the kernel lists one page of its own.
    near = lab.between(wall - 2, wall + 2)
    run.physical("The mappings are as many as allowed then", stopped.mappings[-1], near, "mappings")
    each = (stopped.mappings[-1] - stopped.mappings[0]) / stopped.commits[-1]
    run.physical("A commit costs two mappings", each, lab.between(1.99, 2.01), "mappings")
    run.physical("Giving a page back fails there", stopped.free, lab.equal("OUT_OF_MEMORY"))
    run.physical("Filling a gap works there", stopped.fill, lab.equal("OK"))
    if "guards" in climbs:
        beyond = climbs["guards"]
        ratio = beyond.commits[-1] / stopped.commits[-1]
        run.physical("Guards go on beyond the wall", ratio, lab.at_least(1.9), "times as far")
        cost = max(beyond.mappings) - beyond.mappings[0]
        run.physical("They cost no mappings", cost, lab.at_most(wall / 500), "mappings")
        ratio = median(beyond.times) / median(stopped.times)
        run.timing("They take less time", ratio, lab.at_most(1), "times")


def show(run: lab.Run, climbs: dict[str, Climb]) -> None:
    """A table of both ways, and a plot of each figure on the way."""
    columns = "way | commits | mappings before | mappings after | time a commit [µs] | refused with"
    table = run.table("Every second page committed", columns)
    mappings = run.plot("Mappings of the process", "commits", "mappings")
    times = run.plot("Time of a commit", "commits", "time [µs]")
    for way, climb in climbs.items():
        count, found = climb.commits[-1], climb.mappings
        table.add(way, count, found[0], found[-1], median(climb.times), climb.refusal)
        mappings.add(way, climb.commits, found)
        times.add(way, climb.commits[1 : len(climb.times) + 1], climb.times)


def climbed(run: lab.Run, without: str, most: int, step: int) -> Climb:
    """Commit up to so many pages in an interpreter of its own, without a feature of the kernel."""
    with run.child(start_anew, without, most, step) as child:
        climb: Climb = child.receive()
    lab.need(not climb.message or SYSCTL in climb.message, climb.message)  # another limit
    return climb


def start_anew(connection: Connection, without: str, most: int, step: int) -> None:
    """Start a new interpreter: the switches of features are read when the package is loaded."""
    os.set_inheritable(connection.fileno(), True)
    work = f"from {__name__} import climb; climb({connection.fileno()}, {most}, {step})"
    names = ",".join(filter(None, (os.environ.get("VMM_LINUX_WITHOUT"), without)))
    environment = {**os.environ, "VMM_LINUX_WITHOUT": names}
    os.execve(sys.executable, [sys.executable, "-P", "-c", work], environment)  # noqa: S606


def climb(descriptor: int, most: int, step: int) -> None:
    """Commit in this interpreter, and send the measurements."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # commitment alone: no page is touched
    with VMM(limits=Limits.unlimited()) as vmm:
        seen = to_the_wall(vmm, most, step)
    with Connection(descriptor) as connection:
        connection.send(seen)


def to_the_wall(vmm: VMM, most: int, step: int) -> Climb:
    """Commit every second page of a region until the kernel refuses."""
    page = os.sysconf("SC_PAGE_SIZE")
    base = vmm.allocate(0, 2 * (most + step) * page, RESERVED)
    commits, counts, times = [0], [lab.mappings()], []
    refused: VmmError | None = None
    while commits[-1] < most and not refused:
        done = commits[-1]
        begin = time.perf_counter()
        try:
            while done < commits[-1] + step:
                vmm.commit(base + (2 * done + 1) * page, page)
                done += 1
            times.append((time.perf_counter() - begin) / step * 1e6)
        except VmmError as refusal:
            refused = refusal
        commits.append(done)
        counts.append(lab.mappings())
    if not refused:
        return Climb(commits, counts, times)
    last = base + 2 * commits[-1] * page
    # A single one may still fit: it takes one mapping, and a commit two.
    frees = [vmm.endpoint.Free(last + n * page, page) for n in (3, 5, 7)]
    fill = vmm.endpoint.Commit(base + 2 * page, page, 0)
    name, message = lab.errno_of(refused), str(refused)
    return Climb(commits, counts, times, name, message, frees[-1].name, fill.name)

"""One MDL buffer in many processes: the memory that each counts, and the real sum."""

import contextlib
import os
import socket
from multiprocessing.connection import Connection

from vmm_linux import VMM, Mdl, Rights
from vmm_linux.experiments import Run, Table, between, equal, figures, touch

ORDER = 80
TITLE = "Sharing"
QUESTION = "What does one buffer cost in N processes, and which figure says so?"
PREDICTION = """
    However many processes map a buffer, there is one. Each of N processes counts all of it as
    resident (RSS), so the sum of RSS is N buffers. Each counts an Nth of it as its proportional
    share (PSS), so the sum of PSS is one buffer. Who only reads takes part like any other.
"""
EXPLANATION = """
    The pages belong to the memory file behind the buffer, and every process that maps it has its
    own entries for the same pages. RSS counts the entries of a process that have a page, whoever
    else has it. PSS divides each page by the number of entries that lead to it, so the PSS of a
    process changes when others come and go, without its doing anything. Adding up RSS, as many
    tools do, counts shared memory once for each process. What the file itself has, by fstat(2), is
    the same all along.
"""

MIB = 1 << 20


def measure(run: Run) -> None:
    """Map one buffer in more and more processes, and add up their counts."""
    size = run.choose(quick=8 * MIB, full=64 * MIB)
    run.need_memory(size)
    counts = run.choose(quick=[1, 2, 4, 8], full=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
    table = run.table(
        f"One buffer of {size // MIB} MiB",
        "processes",
        *(f"{name} [B]" for name in ("RSS of one", "PSS of one", "sum of RSS", "sum of PSS")),
        "memory of the file [B]",
    )
    with contextlib.ExitStack() as at_end:
        mdl = at_end.enter_context(run.vmm.mdl(size))
        region = at_end.enter_context(mdl.map())
        touch(region)
        places = [(os.getpid(), region.base)]
        for count in run.steps(counts, "sharing"):
            while len(places) < count:
                ours, its = socket.socketpair()
                with ours, its:
                    child = at_end.enter_context(run.child(hold, its, run.page))
                    run.vmm.send_handle(ours, mdl.handle, Rights.MAP_READ)
                    places.append((child.pid, child.receive()))
            counted = [figures(base, ("rss", "pss"), pid) for pid, base in places]
            sums = (sum(column) for column in zip(*counted, strict=True))
            table.add(count, *counted[-1], *sums, os.fstat(mdl.fileno()).st_blocks * 512)
    plot = run.plot("What N processes count", "processes", "memory [B]")
    plot.add_columns(table, "processes", "sum of RSS", "sum of PSS", "PSS of one")
    claim(run, table, size, counts[-1])


def claim(run: Run, table: Table, size: int, most: int) -> None:
    """Compare with the prediction for one buffer and the last number of processes."""
    rss, pss = table.column("sum of RSS"), table.column("sum of PSS")
    memory = table.column("memory of the file")
    run.physical("There is one buffer, however many map it", max(memory), equal(size), "B")
    run.physical("Each counts all of it as RSS", rss[-1] / size / most, equal(1), "buffers")
    for word, share in (("most", max(pss)), ("least", min(pss))):
        statement = f"At {word}, the sum of PSS is one buffer"
        run.physical(statement, share / size, between(0.99, 1.01), "buffers")
    last = table.column("PSS of one")[-1]
    run.physical("Who only reads has its share of PSS", last * most / size, between(0.99, 1.01))


def hold(connection: Connection, sock: socket.socket, page: int) -> None:
    """In one of the processes: map the received buffer, read every page, and keep it."""
    with VMM() as vmm, Mdl.from_handle(vmm, vmm.recv_handle(sock)) as mdl, mdl.map() as region:
        bytes(region.view()[::page])
        connection.send(region.base)
        connection.recv()

"""The map of a real server: PostgreSQL, with connections that share its buffers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from commands import run
from postgresql import PROGRAMS, SHARED_BUFFERS, Server, postgresql
from vmm_linux import inspect

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.postgresql,
    pytest.mark.skipif(
        PROGRAMS is None, reason="PostgreSQL is missing: apt-get install postgresql"
    ),
]

#: Less than a quarter of the buffers: a scan of more would not leave it all there.
FILL = """
create table numbers as select generate_series(1, 200000) as n;
select count(*) from numbers"""


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of this test's own."""
    with postgresql() as started:
        yield started


def map_of(pid: int) -> dict[str, Any]:
    """What the command says of a process."""
    child = run("map", str(pid), "--json", "-")
    assert (child.returncode, child.stderr) == (0, "")
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def shared_buffers(found: dict[str, Any]) -> dict[str, Any]:
    """The largest shared mapping of a map."""
    shared = [mapping for mapping in found["mappings"] if mapping["group"] == "shared"]
    largest: dict[str, Any] = max(shared, key=lambda mapping: mapping["size"])
    return largest


def test_shared_buffers_are_recognised_as_shared_among_the_servers_processes(
    server: Server,
) -> None:
    with server.session() as one, server.session() as other:
        assert one.ask(FILL) == "200000"
        assert other.ask("select count(*) from numbers") == "200000"
        first, second, parent = (
            shared_buffers(map_of(pid)) for pid in (one.pid, other.pid, server.pid)
        )
    for buffers in (first, second, parent):
        assert buffers["size"] >= SHARED_BUFFERS
        assert buffers["permissions"] == "rw-s"
        assert (buffers["device"], buffers["inode"]) == (first["device"], first["inode"])
    # Both have read the same table through the same memory: each is charged a part of it.
    for buffers in (first, second):
        assert buffers["rss"] > 4 << 20
        assert buffers["pss"] < buffers["rss"] * 2 // 3
        assert buffers["shared_dirty"] + buffers["shared_clean"] > 4 << 20


def test_the_totals_are_the_kernels_own_sums(server: Server) -> None:
    with server.session() as session:
        assert session.ask(FILL) == "200000"
        found = map_of(session.pid)
        kernel = inspect.rollup(session.pid)
    totals, mappings = found["totals"], found["mappings"]
    assert totals["resident"] == kernel.figures["rss"]
    assert totals["swap"] == kernel.figures["swap"]
    # The kernel rounds each mapping's share down to whole KiB, and its own sum once.
    assert 0 <= kernel.figures["pss"] - totals["pss"] <= 1024 * len(mappings)
    assert totals["reserved"] == sum(mapping["size"] for mapping in mappings)
    for name in ("reserved", "resident", "committed"):
        assert sum(group[name] for group in found["groups"]) == totals[name]
    assert totals["resident"] == sum(mapping["rss"] for mapping in mappings)


def test_people_see_the_program_its_libraries_and_the_shared_memory(server: Server) -> None:
    with server.session() as session:
        child = run("map", str(session.pid), COLUMNS="120")
    assert (child.returncode, child.stderr) == (0, "")
    first = child.stdout.splitlines()[0]
    assert first.startswith(f"postgres (PID {session.pid}), ")
    assert "/bin/postgres" in child.stdout
    for title in ("Shared", "Heap", "Stacks", "Programs, libraries", "Anonymous", "Total"):
        assert f"\n{title} " in child.stdout

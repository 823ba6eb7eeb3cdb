"""The audit has every call, and a buffer's way through processes can be followed in it."""

from __future__ import annotations

import array
import json
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from children import run_child
from commands import run
from constants import READ, RESERVED, RW
from kernel_oracle import PAGE
from vmm_linux import VMM, Retcode, Rights, VmmError
from vmm_linux.audit import Audit, Record
from vmm_linux.cli.audit_file import read
from vmm_linux.errors import InvalidArgument, InvalidOperation
from vmm_linux.inspect import sharing
from vmm_linux.policy import Policy, Rule

if TYPE_CHECKING:
    from collections.abc import Callable


# ---- records -------------------------------------------------------------------------------------


def test_every_call_is_recorded_with_its_decision_and_outcome() -> None:
    policy = Policy([Rule(deny=["free"], name="nothing goes")])
    with VMM(policy=policy, audit=Audit()) as vmm:
        va = vmm.allocate(0, PAGE, RESERVED)
        vmm.endpoint.Commit(va, PAGE, 0)
        vmm.endpoint.Free(va, PAGE)
        vmm.endpoint.Protect(va, PAGE, 1 << 40)
        vmm.endpoint.Protect(va, "x", READ)
        vmm.write(va, b"secret")
        region = vmm.region(2 * PAGE)
        del region
    made, committed, freed, unknown, odd, written, *_ = records = vmm.history()
    assert all(isinstance(record, Record) for record in records)
    assert [record.method for record in records] == [
        *("allocate", "commit", "free", "protect", "protect", "write", "allocate", "free", "close"),
    ]
    assert made.arguments == {"addr": 0, "size": PAGE, "flags": int(RESERVED)}
    assert (made.decision, made.rule, made.rc, made.result) == ("allow", "default", Retcode.OK, va)
    assert (made.pid, made.thread, made.error) == (os.getpid(), threading.get_native_id(), None)
    assert made.duration > 0
    assert [record.call for record in records] == [*range(made.call, made.call + len(records))]
    assert sorted(record.time for record in records) == [record.time for record in records]
    assert (committed.rc, committed.result) == (Retcode.OK, None)
    assert (freed.decision, freed.rule, freed.rc) == (
        "deny",
        "nothing goes",
        Retcode.SECURITY_DISALLOW,
    )
    assert (unknown.decision, unknown.rc) == ("allow", Retcode.INVALID_ARGUMENT)
    assert (odd.arguments, odd.decision, odd.rc) == (None, None, Retcode.INVALID_ARGUMENT)
    assert (written.arguments, written.result) == ({"va": va, "data": 6}, 6)
    assert "secret" not in repr([record.as_dict() for record in records])


def test_what_is_no_return_code_is_recorded_as_what_it_is() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, VMM(audit=Audit()) as vmm:
        with pytest.raises(EOFError):
            vmm.recv_handle(ours)
        (record,) = vmm.history()
        assert (record.rc, record.error, record.decision) == (None, "EOFError", "allow")


def test_a_closed_vmm_has_its_history_and_adds_to_it() -> None:
    vmm = VMM(audit=Audit())
    vmm.close()
    vmm.endpoint.Free(0, PAGE)
    assert [(each.method, each.rc) for each in vmm.history()] == [
        ("close", Retcode.OK),
        ("free", Retcode.INVALID_OPERATION),
    ]


def test_the_ring_has_the_last_records() -> None:
    with VMM(audit=Audit(ring=3)) as vmm, VMM(audit=Audit(ring=0)) as none:
        for address in range(10):
            vmm.query(address, smaps=False)
            none.query(address, smaps=False)
        asked = [record.arguments for record in vmm.history()]
        assert asked == [{"va": address, "smaps": False} for address in (7, 8, 9)]
        assert none.history() == ()


def test_without_an_audit_there_is_no_history_and_it_says_how_to_get_one() -> None:
    with VMM() as vmm, pytest.raises(InvalidOperation, match=r"VMM\(audit=Audit\(\)\)"):
        vmm.history()


def test_records_do_not_change() -> None:
    with VMM(audit=Audit()) as vmm:
        vmm.query(0, smaps=False)
        (record,) = vmm.history()
        assert record.arguments is not None
        record.arguments.clear()  # type: ignore[attr-defined]
        assert record.arguments == {"va": 0, "smaps": False}
        with pytest.raises(AttributeError):
            record.rc = None  # type: ignore[misc]
        with pytest.raises(TypeError):
            Record()


@pytest.mark.parametrize(
    "arguments",
    [
        {"failure": "stop"},
        {"ring": -1},
        {"ring": 1.5},
        {"ring": True},
        {"ring": 1 << 40},
        {"file": 3.5},
        {"file": "a\0b"},
        {"file": "a\0b", "failure": "continue"},
        {"logger": "name"},
    ],
)
def test_arguments_of_an_audit_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Audit(**arguments)


@pytest.mark.parametrize("value", [3, "file", Audit, Audit.__new__(Audit)])
def test_what_is_no_audit_is_refused(value: Any) -> None:  # noqa: ANN401
    with pytest.raises(InvalidArgument, match="not an Audit"):
        VMM(audit=value)


def test_an_audit_does_not_change() -> None:
    audit = Audit()
    with pytest.raises(InvalidArgument, match="does not change"):
        audit.__init__("elsewhere")  # type: ignore[misc]


# ---- logging -------------------------------------------------------------------------------------


def test_calls_are_logged_denied_ones_as_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vmm_linux.audit")
    policy = Policy([Rule(deny=["free"])])
    with VMM(policy=policy, audit=Audit()) as vmm:
        vmm.query(0, smaps=False)
        vmm.endpoint.Free(PAGE, PAGE)
    query, free, _ = caplog.records
    assert (query.levelname, free.levelname) == ("INFO", "WARNING")
    assert query.getMessage() == "query {'va': 0, 'smaps': False}: rcOk"
    assert "free: the policy does not allow it" in free.getMessage()
    assert free.__dict__["vmm"] is vmm.history()[1]


class Handler(logging.Handler):
    """Does something with each record."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def emit(self, _: logging.LogRecord) -> None:
        """Do it."""
        self.act()


def logger_that(act: Callable[[], object]) -> logging.Logger:
    """A logger that nobody else hears."""
    logger = logging.Logger("alone", logging.INFO)  # noqa: LOG001
    logger.addHandler(Handler(act))
    return logger


def test_a_handler_that_calls_the_vmm_is_recorded_and_not_logged_again() -> None:
    logged: list[int] = []

    def act() -> None:
        logged.append(1)
        if not vmm.closed:
            vmm.query(0, smaps=False)

    with VMM(audit=Audit(logger=logger_that(act))) as vmm:
        vmm.query(PAGE, smaps=False)
        assert len(logged) == 1
        asked = [record.arguments for record in vmm.history()]
        assert asked == [{"va": PAGE, "smaps": False}, {"va": 0, "smaps": False}]


def test_a_handler_that_fails_takes_nothing_away_from_the_caller_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def act() -> None:
        raise ValueError("the handler")

    told: list[tuple[str, bool]] = []

    def tell(unraisable: sys.UnraisableHookArgs) -> None:
        told.append((repr(unraisable.exc_value), unraisable.exc_traceback is not None))

    monkeypatch.setattr(sys, "unraisablehook", tell)
    with VMM(audit=Audit(logger=logger_that(act))) as vmm:
        va = vmm.allocate(0, PAGE, RESERVED)
        assert vmm.query(va, smaps=False).base == va
    assert told == [("ValueError('the handler')", True)] * 3


# ---- a buffer's way ------------------------------------------------------------------------------


def send_from_another_process(address: str, path: str) -> None:
    """Make a buffer, send it, and leave."""
    import os
    import socket

    from vmm_linux import VMM, Rights, Seal, VmmFlags
    from vmm_linux.audit import Audit

    page = os.sysconf("SC_PAGE_SIZE")
    with socket.socket(socket.AF_UNIX) as sock, VMM(audit=Audit(path)) as vmm:
        sock.connect(address)
        buffer = vmm.mdl_create(4 * page, VmmFlags.READ | VmmFlags.WRITE)
        va = vmm.mdl_map(buffer, 0, page, 0, VmmFlags.READ | VmmFlags.WRITE)
        vmm.free(va, page)
        vmm.mdl_seal(buffer, Seal.FREEZE)
        clone = vmm.mdl_clone(buffer, 0, page)
        vmm.send_handle(sock, buffer, Rights.MAP_READ | Rights.COPY | Rights.GET_SID)
        vmm.handle_close(clone)
        print(os.getpid(), vmm.handle_info(buffer).sid)


def traced(tmp_path: Path) -> tuple[list[Path], int, int]:
    """The audit files of a sender and of this receiver, the buffer's id, and the sender's pid."""
    files = [tmp_path / "sender.jsonl", tmp_path / "receiver.jsonl"]
    address = f"\0vmm-linux-audit-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, VMM(audit=Audit(files[1])) as vmm:
        listener.bind(address)
        listener.listen()
        child = run_child(send_from_another_process, address, str(files[0]))
        assert (child.returncode, child.stderr) == (0, "")
        connection, _ = listener.accept()
        with connection:
            handle = vmm.recv_handle(connection)
        vmm.free(vmm.mdl_map(handle, 0, PAGE, 0, READ), PAGE)
        vmm.handle_close(vmm.handle_copy(handle, Rights.MAP_READ))
        sid = vmm.handle_info(handle).sid
    pid, sent_sid = map(int, child.stdout.split())
    assert sid == sent_sid
    return files, sid, pid


def test_a_buffer_is_followed_through_processes(tmp_path: Path) -> None:
    files, sid, sender = traced(tmp_path)
    shown = run("audit", "trace", hex(sid), *map(str, reversed(files)), "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    answer = json.loads(shown.stdout)
    us, uid = os.getpid(), os.getuid()
    told = [(each["pid"], each["what"]) for each in answer["events"]]
    assert [(pid, what.partition(" into ")[0]) for pid, what in told] == [
        (sender, "created, 16 KiB"),
        (sender, "mapped READ|WRITE, 4 KiB"),
        (sender, "sealed FREEZE"),
        (sender, "cloned"),
        (sender, f"sent to pid {us} (uid {uid})"),
        (sender, "handle closed"),
        (sender, "looked at"),
        (us, f"received from pid {sender} (uid {uid})"),
        (us, "mapped READ, 4 KiB"),
        (us, "handle copied with MAP_READ"),
        (us, "handle closed"),
        (us, "looked at"),
    ]
    assert (answer["sid"], answer["left_out"]) == (sid, [])
    shown = run("audit", "trace", str(sid), *map(str, files))
    assert shown.stdout.endswith("Calls: 12. Processes: 2.\n")
    assert "sealed FREEZE" in shown.stdout


def test_sent_comes_before_received_whoever_writes_first(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    path = tmp_path / "calls.jsonl"
    with ours, theirs, VMM(audit=Audit(path)) as vmm:
        # The receiver has begun long before it is sent.
        receiver = threading.Thread(target=vmm.recv_handle, args=(theirs,))
        receiver.start()
        handle = vmm.mdl_create(PAGE, READ)
        vmm.send_handle(ours, handle)
        receiver.join()
    entries, _ = read([str(path)])
    methods = [entry.record["method"] for entry in entries]
    assert methods == ["mdl_create", "send_handle", "recv_handle", "close"]
    sids = {entry.record["sid"] for entry in entries[:3]}
    assert len(sids) == 1
    assert None not in sids


def test_a_clone_names_its_origin_in_the_trace_of_both(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with VMM(audit=Audit(path)) as vmm:
        origin = vmm.mdl_create(2 * PAGE, READ)
        info = vmm.handle_info(vmm.mdl_clone(origin, 0, PAGE))
        vmm.handle_close(origin)
    for sid, words in (
        (info.sid, f"cloned from {info.origin_sid:#x}"),
        (info.origin_sid, f"cloned into {info.sid:#x}"),
    ):
        shown = run("audit", "trace", str(sid), str(path))
        assert words in shown.stdout


def test_half_a_last_line_is_skipped_and_told(tmp_path: Path) -> None:
    files, sid, _ = traced(tmp_path)
    with files[0].open("ab") as file:
        file.write(files[0].read_bytes()[:77])
    count = len(files[0].read_bytes().splitlines())
    shown = run("audit", "trace", str(sid), *map(str, files))
    assert shown.returncode == 0
    assert shown.stderr == f"vmm-linux audit: {files[0]}:{count}: half a line, the last one\n"
    assert "Calls: 12." in shown.stdout


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "no object"),
        ("{}", "v is missing"),
        ("WHOLE:time=true", "time is of a wrong type"),
        ("WHOLE:sid='x'", "sid is of a wrong type"),
        ("WHOLE:peer=[1, 2]", "peer is not a process, a user and a group"),
        ("WHOLE:v=2", "of another version"),
        pytest.param("x" * (9 << 20), "longer than 4194304 bytes", id="long"),
    ],
)
def test_a_corrupt_line_is_named_and_nothing_else_is_lost(
    tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "calls.jsonl"
    with VMM(audit=Audit(path)) as vmm:
        sid = vmm.handle_info(vmm.mdl_create(PAGE, READ)).sid
    whole = path.read_text().splitlines()
    if line.startswith("WHOLE:"):
        name, _, value = line.removeprefix("WHOLE:").partition("=")
        line = json.dumps(json.loads(whole[0]) | {name: json.loads(value.replace("'", '"'))})
    path.write_text("\n".join([whole[0], line, *whole[1:]]) + "\n")
    shown = run("audit", "trace", str(sid), str(path))
    assert shown.returncode == 1
    assert shown.stderr == f"vmm-linux audit: {path}:2: {reason}\n"
    assert "Calls: 2. Processes: 1." in shown.stdout


def test_odd_values_in_a_file_are_shown_as_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with VMM(audit=Audit(path)) as vmm:
        vmm.mdl_create(PAGE, READ)
    record = json.loads(path.read_text().splitlines()[1])
    odd = [
        {"time": 10**40, "sid": 7},
        {"method": "mdl_map", "arguments": {"prot": 1 << 60, "length": "x"}, "sid": 7},
        {"method": "\x1b[31m{0}", "error": "\x07", "rc": None, "sid": 7},
        {"method": "send_handle", "peer": None, "sid": 7, "event": "begin", "call": 99},
        {"method": "mdl_clone", "sid": None, "origin_sid": 7, "arguments": None},
    ]
    path.write_text("".join(json.dumps(record | each) + "\n" for each in odd))
    shown = run("audit", "trace", "7", str(path))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\x1b" not in shown.stdout
    for words in ("began; how it ended", "sent to somebody", f"{1 << 60:#x}", "Calls: 5"):
        assert words in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("trace", "1", "/no/such/file"), 2),
        (("trace", "x", "/dev/null"), 2),
        (("trace", "-1", "/dev/null"), 2),
        (("trace", "1"), 2),
        ((), 2),
        (("trace", "1", "/dev/null"), 1),
    ],
)
def test_what_cannot_be_traced_is_said(arguments: tuple[str, ...], code: int) -> None:
    shown = run("audit", *arguments)
    assert shown.returncode == code
    assert "Traceback" not in shown.stderr


# ---- concealment ---------------------------------------------------------------------------------


def test_a_buffer_passed_on_without_the_package_is_seen_as_shared_and_missing_in_the_audit(
    tmp_path: Path,
) -> None:
    path = tmp_path / "calls.jsonl"
    ours, theirs = socket.socketpair()
    with ours, theirs, VMM(audit=Audit(path)) as vmm:
        child = os.fork()
        if child == 0:
            # Another program: it waits for a descriptor, and keeps it until it is told to end.
            try:
                ours.close()
                _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
                theirs.send(b"+" if ancillary else b"-")
                theirs.recv(1)
            finally:
                os._exit(0)
        theirs.close()
        buffer = vmm.mdl_create(3 * PAGE, RW)
        sid = vmm.handle_info(buffer).sid
        # The buffer's memory, found in /proc by whoever is in this process.
        numbers = [
            int(entry.name)
            for entry in Path("/proc/self/fd").iterdir()
            if entry.is_symlink()
            and "memfd:" in str(entry.readlink())
            and os.fstat(int(entry.name)).st_size == 3 * PAGE
        ]
        rights = array.array("i", numbers[:1])
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert ours.recv(1) == b"+"
        inode = os.fstat(numbers[0]).st_ino
        shared = [each for each in sharing().channels if each.inode == inode]
        ours.send(b"x")
        os.waitpid(child, 0)
    assert len(shared) == 1
    assert {holder.pid for holder in shared[0].holders} == {os.getpid(), child}
    methods = [each.record["method"] for each in read([str(path)])[0] if each.record["sid"] == sid]
    assert methods == ["mdl_create", "handle_info"]
    with pytest.raises(VmmError):
        vmm.send_handle(ours, buffer)

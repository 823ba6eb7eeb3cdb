"""The audit has every call, and a buffer's way through processes can be followed in it."""

from __future__ import annotations

import array
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import faults
from children import ROOT, run_child
from commands import run
from forked import in_child
from vmm_linux import VMM, PageState, Retcode, Rights, VmmError, VmmFlags
from vmm_linux._audit_file import read
from vmm_linux.audit import Audit, Record
from vmm_linux.errors import InvalidArgument, InvalidOperation, SecurityDisallow
from vmm_linux.inspect import sharing
from vmm_linux.policy import Policy, Rule

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = os.sysconf("SC_PAGE_SIZE")
READ = VmmFlags.READ
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
RESERVED = VmmFlags.RESERVE | READ_WRITE


library = pytest.fixture(scope="session")(faults.make_library)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records in a file, every line of which is one."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


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


# ---- the file ------------------------------------------------------------------------------------


def test_a_line_comes_before_each_call_and_one_after_it(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with VMM(audit=Audit(path), policy=Policy([Rule(deny=["free"], name='"\\\n'[:2])])) as vmm:
        va = vmm.allocate(0, PAGE, RESERVED)
        vmm.endpoint.Free(va, PAGE)
    begun, ended, denied, closed = lines_of(path)
    assert [each["event"] for each in (begun, ended, denied, closed)] == ["begin", *["end"] * 3]
    assert begun == {**ended, "event": "begin", "rc": None, "duration": 0, "result": None}
    assert (denied["rc"], denied["rule"]) == ("rcSecurityDisallow", '"\\')
    assert closed["method"] == "close"
    history = [{"v": 1, "event": "end", **record.as_dict()} for record in vmm.history()]
    assert history == [ended, denied, closed]
    assert path.stat().st_mode & 0o777 == 0o600


def test_with_continue_there_is_one_line_a_call(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with VMM(audit=Audit(str(path), failure="continue")) as vmm:
        vmm.allocate(0, PAGE, RESERVED)
    assert [each["event"] for each in lines_of(path)] == ["end", "end"]


def test_threads_and_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    audit = Audit(path, failure="continue")

    def work() -> int:
        with VMM(audit=audit) as vmm:
            for _ in range(50):
                vmm.query(0, smaps=False)
        return os.getpid()

    child = in_child(work)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = lines_of(path)
    assert len(records) == 4 * 51
    assert len({(each["pid"], each["call"]) for each in records}) == len(records)
    assert {each["pid"] for each in records} == {os.getpid(), child}


def call_until_killed(path: str) -> None:
    """Call and call, and tell when there is something to see."""
    import sys

    from vmm_linux import VMM
    from vmm_linux.audit import Audit

    with VMM(audit=Audit(path)) as vmm:
        for number in range(1_000_000):
            vmm.query(number, smaps=False)
            if number == 100:
                sys.stdout.write("now\n")
                sys.stdout.flush()


def test_what_a_killed_process_wrote_is_whole_lines(tmp_path: Path) -> None:
    import inspect
    import textwrap

    path = tmp_path / "calls.jsonl"
    code = (
        f"{textwrap.dedent(inspect.getsource(call_until_killed))}\ncall_until_killed({str(path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"now\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    # The kernel ends a write at the border of a page when its process is to die.
    whole, _, half = path.read_bytes().rpartition(b"\n")
    records = [json.loads(line) for line in whole.splitlines()]
    asked = [each["arguments"]["va"] for each in records if each["event"] == "end"]
    assert asked == [*range(len(asked))]
    assert len(asked) > 100
    assert [problem.killed for problem in read([str(path)])[1]] == ([True] if half else [])


def test_a_descriptor_that_became_another_files_is_not_written_to(tmp_path: Path) -> None:
    path, other = tmp_path / "calls.jsonl", tmp_path / "other"
    audit = Audit(path, failure="continue")
    with VMM(audit=audit) as vmm, other.open("w") as file:
        number = next(
            int(entry.name)
            for entry in Path("/proc/self/fd").iterdir()
            if entry.exists() and entry.resolve() == path
        )
        os.dup2(file.fileno(), number)
        with pytest.warns(RuntimeWarning, match="Bad file descriptor"):
            vmm.query(0, smaps=False)
    assert (other.read_text(), path.read_text()) == ("", "")


# ---- a file that cannot be written ---------------------------------------------------------------


def test_a_call_that_cannot_be_written_down_is_refused_before_it_is_done() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VMM(audit=Audit("/dev/full")) as vmm:
            before = Path("/proc/self/maps").read_text().count("---p")
            for _ in range(3):
                with pytest.raises(SecurityDisallow, match=r"'/dev/full'.*ENOSPC"):
                    vmm.allocate(0, PAGE, RESERVED)
            assert Path("/proc/self/maps").read_text().count("---p") == before
            va, rc = vmm.endpoint.Allocate(0, PAGE, RESERVED)
            assert (va, rc) == (0, Retcode.SECURITY_DISALLOW)
            assert [each.rc for each in vmm.history()] == [Retcode.SECURITY_DISALLOW] * 4
    assert [str(each.message) for each in caught] == [
        (
            "the audit file '/dev/full' cannot be written (No space left on device): records are "
            "missing in it"
        )
    ]
    assert vmm.closed


def test_with_continue_it_is_done_and_a_warning_comes_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VMM(audit=Audit("/dev/full", failure="continue")) as vmm:
            vmm.allocate(0, PAGE, RESERVED)
            vmm.allocate(0, PAGE, RESERVED)
            assert len(vmm.history()) == 2
    assert [each.category for each in caught] == [RuntimeWarning]


@pytest.mark.parametrize("failure", ["deny", "continue"])
def test_a_policys_word_on_that_comes_first(failure: str) -> None:
    other = "deny" if failure == "continue" else "continue"
    policy = Policy(audit_failure=failure)
    vmm = VMM(policy=policy, audit=Audit("/dev/full", failure=other))
    with pytest.warns(RuntimeWarning, match="No space left"):
        rc = vmm.endpoint.Allocate(0, PAGE, RESERVED)[1]
    vmm.close()
    assert rc == (Retcode.OK if failure == "continue" else Retcode.SECURITY_DISALLOW)


def test_a_file_that_cannot_be_opened_leaves_no_audit_or_one_that_warns(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path / "no" / "folder", tmp_path, pipe):
        with pytest.raises(OSError, match="Errno"):
            Audit(path)
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            audit = Audit(path, failure="continue")
        with VMM(audit=audit) as vmm:
            vmm.allocate(0, PAGE, RESERVED)


def test_a_file_that_was_deleted_cannot_be_written_and_one_that_was_renamed_can(
    tmp_path: Path,
) -> None:
    path = tmp_path / "calls.jsonl"
    with VMM(audit=Audit(path)) as vmm:
        vmm.query(1, smaps=False)
        renamed = path.rename(tmp_path / "calls.jsonl.1")
        vmm.query(2, smaps=False)
        assert len(renamed.read_bytes().splitlines()) == 4
        renamed.unlink()
        with (
            pytest.warns(RuntimeWarning, match="No such file"),
            pytest.raises(SecurityDisallow, match="cannot be written"),
        ):
            vmm.query(3, smaps=False)


@pytest.mark.parametrize("by_another", [False, True])
def test_half_a_line_that_a_full_disk_left_spoils_no_other(
    tmp_path: Path, by_another: bool
) -> None:
    path = tmp_path / "calls.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with VMM(audit=Audit(path, failure="continue")) as vmm:
        vmm.query(1, smaps=False)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, limits[1]))
            with pytest.warns(RuntimeWarning, match="records are missing"):
                vmm.query(2, smaps=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if by_another:
            with Path(path).open("ab") as other:
                # As another process does, which does not know of the half line.
                other.write(path.read_bytes().splitlines(keepends=True)[0])
        vmm.query(3, smaps=False)
    entries, problems = read([str(path)])
    queries = 3 if by_another else 2
    assert [entry.record["method"] for entry in entries] == ["query"] * queries + ["close"]
    assert [(problem.line, problem.killed) for problem in problems] == [(2, False)]
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line and number != 2:
            json.loads(line)


def test_a_disk_that_is_full_between_the_two_lines_leaves_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with VMM(audit=Audit(path)) as vmm:
        va = vmm.allocate(0, PAGE, RESERVED)
        vmm.commit(va, PAGE)
        before = path.read_bytes().splitlines(keepends=True)[-2]
        assert b'"begin"' in before
        try:
            room = path.stat().st_size + len(before) + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.warns(RuntimeWarning, match="records are missing"):
                vmm.decommit(va, PAGE)
            with pytest.raises(SecurityDisallow, match="cannot be written"):
                vmm.free(va, PAGE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert vmm.query(va, smaps=False).state is PageState.RESERVED
    entries, _ = read([str(path)])
    told = [(each.record["method"], each.record["event"]) for each in entries]
    assert told == [
        ("allocate", "end"),
        ("commit", "end"),
        ("decommit", "begin"),
        ("query", "end"),
        ("close", "end"),
    ]


def audit_where_writing_raises_a_signal(kind: str, failure: str) -> None:
    """Write to a pipe that nobody reads any more, or past the limit for files; runs in a child."""
    import os
    import resource
    import signal
    import tempfile
    import warnings
    from pathlib import Path

    from vmm_linux import VMM, VmmError
    from vmm_linux.audit import Audit

    raised = {"pipe": signal.SIGPIPE, "file": signal.SIGXFSZ}[kind]
    signal.signal(raised, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        path = Path(folder, "calls.jsonl")
        (os.mkfifo if kind == "pipe" else Path.touch)(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with VMM(audit=Audit(path, failure=failure)) as vmm:
            vmm.query(0, smaps=False)
            print(os.read(reader, 1 << 16).endswith(b"\n"))
            os.close(reader)
            if kind == "file":
                resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size,) * 2)
            try:
                vmm.query(0, smaps=False)
                print("done")
            except VmmError as refusal:
                print(refusal.errno and os.strerror(refusal.errno))
            assert signal.sigpending() == set()
            assert signal.pthread_sigmask(signal.SIG_BLOCK, {raised}) == set()
            # One that waits already is the program's own.
            for whole_process in (True, False):
                if whole_process:
                    os.kill(os.getpid(), raised)
                else:
                    signal.raise_signal(raised)
                vmm.endpoint.Query(0)
                assert signal.sigpending() == {raised}
                assert signal.sigwait({raised}) == raised
                assert signal.sigpending() == set()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {raised})
            seen: list[int] = []
            signal.signal(raised, lambda number, _frame: seen.append(number))
            vmm.endpoint.Query(0)
            assert seen == []
    assert len(warned) == 1, warned


@pytest.mark.parametrize("failure", ["deny", "continue"])
@pytest.mark.parametrize(("kind", "reason"), [("pipe", "Broken pipe"), ("file", "File too large")])
def test_a_line_that_cannot_be_written_raises_no_signal_whatever_the_program_does_with_it(
    kind: str, reason: str, failure: str
) -> None:
    child = run_child(audit_where_writing_raises_a_signal, kind, failure)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == f"True\n{reason if failure == 'deny' else 'done'}\n"


def test_a_pipe_is_not_waited_for_when_it_is_full(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VMM(audit=Audit(pipe)) as vmm:
            while vmm.endpoint.Query(0)[1] is Retcode.OK:
                pass
            lines = os.read(reader, 1 << 20).splitlines(keepends=True)
            vmm.query(0, smaps=False)
            assert [json.loads(line)["event"] for line in lines[:2]] == ["begin", "end"]
            assert json.loads(os.read(reader, 1 << 20).splitlines()[-1])["rc"] == "rcOk"
    os.close(reader)
    assert [each.category for each in caught] == [RuntimeWarning]


def audit_on_small_and_read_only_disks() -> None:
    """Fill a tiny file system, and use one that nothing can be written to, in a namespace."""
    import contextlib
    import ctypes
    import errno
    import os
    import sys
    import tempfile
    import warnings
    from pathlib import Path

    from vmm_linux import VMM, Retcode, VmmFlags
    from vmm_linux.audit import Audit

    libc = ctypes.CDLL(None, use_errno=True)
    private, recursive, read_only, remount = 1 << 18, 1 << 14, 1, 32
    if libc.unshare(0x20000) != 0:  # CLONE_NEWNS
        print("no namespaces")
        return
    libc.mount(b"none", b"/", None, private | recursive, None)
    with tempfile.TemporaryDirectory() as folder:
        place = folder.encode()
        if libc.mount(b"tmpfs", place, b"tmpfs", 0, b"size=16k") != 0:
            print("no mounts")
            return
        path = Path(folder, "calls.jsonl")
        audit = Audit(path)
        with warnings.catch_warnings(record=True) as caught, VMM(audit=audit) as vmm:
            warnings.simplefilter("always")
            done = 0
            while vmm.endpoint.Query(0)[1] is Retcode.OK:
                done += 1
            before = len([*Path("/proc/self/fd").iterdir()])
            rc = vmm.endpoint.MdlCreate(os.sysconf("SC_PAGE_SIZE"), VmmFlags.READ)[1]
            assert rc is Retcode.SECURITY_DISALLOW
            assert len([*Path("/proc/self/fd").iterdir()]) == before
            assert 5 < done < 60
            assert len(caught) == 1
        del audit, vmm
        path.unlink()
        libc.mount(b"tmpfs", place, b"tmpfs", read_only | remount, None)
        with contextlib.suppress(OSError):
            Audit(path)
            sys.exit("opened a file on a read-only file system")
        try:
            os.open(path, os.O_CREAT | os.O_WRONLY)
        except OSError as problem:
            print(errno.errorcode[problem.errno or 0])
        libc.umount2(place, 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")
def test_full_and_read_only_disks_are_never_passed_over_in_silence() -> None:
    child = run_child(audit_on_small_and_read_only_disks)
    assert (child.returncode, child.stderr) == (0, "")
    if child.stdout.startswith("no "):
        pytest.skip(child.stdout.strip())
    assert child.stdout == "EROFS\n"


def audit_as_anybody() -> None:
    """Audit calls to a file, with a child that writes too."""
    import logging  # noqa: F401  before the library is out of reach
    import os
    import tempfile
    from pathlib import Path

    from vmm_linux import VMM, VmmFlags
    from vmm_linux.audit import Audit

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calls.jsonl")
        with VMM(audit=Audit(path)) as vmm:
            vmm.mdl_create(os.sysconf("SC_PAGE_SIZE"), VmmFlags.READ)
            if os.fork() == 0:
                vmm.query(0)
                os._exit(0)
            os.wait()
        print(os.geteuid(), len(path.read_text().splitlines()))


@pytest.mark.parametrize("nobody", [False, True])
def test_every_user_can_audit(nobody: bool) -> None:
    child = run_child(audit_as_anybody, nobody=nobody)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.split()[1] == "5"


def test_a_vmm_that_names_no_audit_has_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("VMM_LINUX_AUDIT", str(path))
    with VMM() as vmm, VMM(audit=Audit()):
        vmm.query(0)
    assert [each["method"] for each in lines_of(path)] == ["query", "query", "close"]
    monkeypatch.setenv("VMM_LINUX_AUDIT", str(tmp_path / "no" / "folder"))
    with pytest.raises(FileNotFoundError):
        VMM()


def try_watched_calls() -> None:
    """Let each call of a watched VMM fail at every place; runs in a child."""
    import tempfile
    from itertools import count
    from pathlib import Path

    from faults import Faults, Mode, surroundings
    from kernel_oracle import PAGE
    from vmm_linux import VMM, VmmError, VmmFlags
    from vmm_linux.audit import Audit
    from vmm_linux.policy import Policy

    flags = VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.READ | VmmFlags.WRITE
    library = Faults()
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(ready=["W^X"])
        path = Path(folder, "calls.jsonl")
        with VMM(policy=policy, audit=Audit(path, failure="continue")) as vmm:
            vmm.free(vmm.allocate(0, PAGE, flags), PAGE)
            for n in count(1):
                before = surroundings()
                va = 0
                try:
                    with library.armed(Mode.ALONE, n):
                        va = vmm.allocate(0, PAGE, flags)
                except (VmmError, MemoryError):
                    assert surroundings() == before, library.name
                if va:
                    vmm.free(va, PAGE)
                if not library.name:
                    break
        assert n > 3
        assert path.read_bytes().endswith(b"\n")


def test_a_watched_call_that_fails_leaves_everything_as_it_was(library: Path) -> None:
    faults.run(library, try_watched_calls)


def close_without_memory(failure: str) -> None:
    """Close a watched VMM, with each allocation of the interpreter's failing; runs in a child."""
    import sys
    import tempfile
    from contextlib import suppress
    from itertools import count
    from pathlib import Path

    from faults import Faults, Mode, surroundings
    from kernel_oracle import PAGE
    from vmm_linux import VMM, VmmFlags
    from vmm_linux.audit import Audit

    told: list[str] = []
    sys.unraisablehook = lambda problem: told.append(problem.exc_type.__name__)
    library = Faults()
    with tempfile.TemporaryDirectory() as folder:
        audit = Audit(Path(folder, "calls.jsonl"), failure=failure)
        around = surroundings()
        begun = 0
        for n in count(1):
            vmm = VMM(audit=audit)
            vmm.allocate(0, PAGE, VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.READ)
            refused = False
            with suppress(MemoryError), library.armed(Mode.INTERPRETER, n):
                begun += 1
                try:
                    vmm.close()
                except MemoryError:
                    refused = True
            assert not refused, n
            vmm.close()  # where what arms the library found no memory itself
            assert surroundings() == around, n
            if not library.name:
                break
        assert begun > 5, begun
        assert {*told} == {"MemoryError"}


@pytest.mark.parametrize("failure", ["deny", "continue"])
def test_a_vmm_is_closed_even_where_no_record_of_it_can_be_made(
    library: Path, failure: str
) -> None:
    faults.run(library, close_without_memory, failure)


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
        ("WHOLE:peer=[1, 2]", "peer is not three numbers"),
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
        buffer = vmm.mdl_create(3 * PAGE, READ_WRITE)
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

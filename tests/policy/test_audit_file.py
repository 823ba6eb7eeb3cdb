"""The file of an audit: what is in it, and what happens when it cannot be written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import faults
from children import ROOT, run_child
from constants import RESERVED
from forked import in_child
from kernel_oracle import PAGE
from vmm_linux import VMM, PageState, Retcode
from vmm_linux.audit import Audit
from vmm_linux.cli.audit_file import read
from vmm_linux.errors import SecurityDisallow
from vmm_linux.policy import Policy, Rule


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records in a file, every line of which is one."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


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
    del audit, vmm
    assert os.fstat(number).st_ino == other.stat().st_ino, "nor closed"
    os.close(number)


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

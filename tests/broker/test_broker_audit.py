"""The audit of a broker: a line for every operation, with the client as the kernel knows it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from brokers import ALLOW, lines_of, running
from commands import run
from vmm_linux import Mdl, Seal
from vmm_linux.audit import Audit
from vmm_linux.errors import Retcode, SecurityDisallow, VmmError
from vmm_linux.names import Client


def test_every_operation_is_a_line_with_the_true_peer(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with (
        running(tmp_path, "--audit", str(audit)) as broker,
        Client(broker.path) as client,
        client.create("frames", 8192) as mdl,
        Mdl(10) as other,
    ):
        client.open("frames").close()
        client.publish(other, "other")
        client.clone("frames", "part", 4096, 4096)
        client.seal("frames", Seal.PUBLISH)
        client.keep("frames")
        client.stat("frames")
        client.names()
        client.revoke("frames")
        for name in ("frames", 'nothing "\n'):
            with pytest.raises(VmmError):
                client.open(name)
        client.unlink("frames")
        sids = mdl.sid, other.sid
    lines = lines_of(audit)
    begins = [each for each in lines if each["event"] == "begin"]
    ends = [each for each in lines if each["event"] == "end"]
    assert len(begins) == len(ends)
    assert [each["method"] for each in ends] == [
        *("create", "open", "publish", "clone", "seal", "keep", "stat", "list", "revoke"),
        *("open", "open", "unlink"),
    ]
    for each in ends:
        assert each["peer"] == [os.getpid(), os.geteuid(), os.getegid()]
        assert each["pid"] == broker.process.pid
        assert (each["decision"], each["rule"]) == ("allow", "default")
    assert ends[0]["arguments"] == {"name": "frames", "size": 8192, "lifetime": 1}
    assert [each["sid"] for each in ends[:3]] == [sids[0], sids[0], sids[1]]
    assert [each["rc"] for each in ends[-3:]] == ["rcHandleRevoked", "rcResourceNotFound", "rcOk"]
    assert ends[3]["arguments"]["other"] == "part"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_audited_is_refused_and_not_done(tmp_path: Path) -> None:
    with running(tmp_path, "--audit", "/dev/full") as broker, Client(broker.path) as client:
        with pytest.raises(SecurityDisallow, match="audit file"):
            client.create("frames", 10)
        with Mdl(10) as mdl, pytest.raises(SecurityDisallow, match="audit file"):
            client.publish(mdl, "frames")
        if os.geteuid() == 0:
            before = broker.descriptors()
            with Mdl(10) as mdl, pytest.raises(SecurityDisallow):
                client.publish(mdl, "frames")
            assert broker.descriptors() == before


def test_a_refused_publication_is_in_the_audit_with_its_rule(tmp_path: Path) -> None:
    policy, audit = tmp_path / "policy.toml", tmp_path / "audit.jsonl"
    policy.write_text(ALLOW + '[[rule]]\nname = "no"\ndeny = ["publish"]\nnames = ["a"]\n')
    options = ("--policy", str(policy), "--audit", str(audit))
    with running(tmp_path, *options) as broker, Client(broker.path) as client, Mdl(5) as mdl:
        with pytest.raises(SecurityDisallow, match="rule: no"):
            client.publish(mdl, "a")
        client.publish(mdl, "b")
    ends = [each for each in lines_of(audit) if each["event"] == "end"]
    assert [(each["decision"], each["rule"], each["rc"]) for each in ends] == [
        ("deny", "no", "rcSecurityDisallow"),
        ("allow", "default", "rcOk"),
    ]


def test_a_trace_tells_what_a_broker_did_with_a_buffer(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with (
        running(tmp_path, "--audit", str(audit)) as broker,
        Client(broker.path) as client,
        client.create("frames", 8192) as mdl,
    ):
        client.open("frames").close()
        client.clone("frames", "a\nb", 0, 4096)
        client.seal("frames", Seal.PUBLISH)
        client.publish(mdl, "a\n")
        sid = mdl.sid
    done = run("audit", "trace", hex(sid), str(audit))
    assert done.returncode == 0
    me = f"pid {os.getpid()} (uid {os.geteuid()})"
    for what in (
        f"created as frames for {me}",
        f"opened as frames by {me}",
        f"sealed PUBLISH as frames by {me}",
        rf"published as 'a\n' by {me}",
    ):
        assert what in done.stdout


def test_a_record_of_an_operation_pickles_with_its_name() -> None:
    audit = Audit()
    record = audit._begin("open", {"name": "frames", "size": 5}, (1, 2, None))
    audit._end(record, Retcode.OK, None, "allow", "default", 7)
    assert audit.history() == (record,)
    copy = pickle.loads(pickle.dumps(record))  # noqa: S301  our own
    assert copy.as_dict() == record.as_dict()
    assert copy.arguments == {"name": "frames", "size": 5}

"""What two experiments have to do with what is outside: what they leave there, what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from children import run_child
from readme import rows_of
from vmm_linux.experiments.rights import ATTACKS, CHANGED, USERS


def be_killed_half_way() -> None:
    """Make what kill -9 leaves behind, name it, and have the whole group killed."""
    import json
    import os
    import signal
    import socket

    from vmm_linux import VMM
    from vmm_linux.experiments import Run
    from vmm_linux.experiments.left_behind import SHM, Means, cleaner, free_key, live_on

    os.setpgid(0, 0)
    run = Run(VMM(), quick=True, seed=1, memory=1 << 26)
    file = SHM / f"vmm-linux-test-{os.getpid()}"
    with socket.socket() as nobody, cleaner(run, [means := Means(file, free_key(), nobody)]):
        children = [run.child(live_on, way, 1 << 16, means) for way in (str(SHM), "System V")]
        numbers = [child.receive().number for child in children]
        print(json.dumps([str(file), file.exists(), numbers[1]]), flush=True)
        os.killpg(0, signal.SIGKILL)


@pytest.mark.parametrize("nobody", [False, True])
def test_an_experiment_that_is_killed_leaves_no_name_and_no_segment(nobody: bool) -> None:
    # The last process that has the output is the one that cleans up: afterwards all is clean.
    child = run_child(be_killed_half_way, nobody=nobody)
    assert (child.returncode, child.stderr) == (-9, "")
    file, was_there, segment = json.loads(child.stdout)
    assert was_there
    assert not Path(file).exists()
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    assert segment not in [int(line.split()[1]) for line in lines]


def clean_up_beside_what_cannot_be_removed() -> None:
    """Make a segment, name a folder as the file to be removed, and clean up: the segment."""
    import socket

    from vmm_linux import VMM
    from vmm_linux.experiments import Run
    from vmm_linux.experiments.left_behind import SHM, Means, cleaner, free_key, live_on

    with VMM() as vmm, socket.socket() as nobody:
        run = Run(vmm, quick=True, seed=1, memory=1 << 26)
        means = Means(SHM, free_key(), nobody)
        with cleaner(run, [means]), run.child(live_on, "System V", 1 << 16, means) as child:
            print(child.receive().number)


def test_what_cannot_be_removed_keeps_no_segment_from_being_removed() -> None:
    child = run_child(clean_up_beside_what_cannot_be_removed)
    assert (child.returncode, child.stderr) == (0, "")
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    assert int(child.stdout) not in [int(line.split()[1]) for line in lines]


def test_the_experiment_about_rights_predicts_what_the_readme_says() -> None:
    predicted = [
        [name, *("succeeds" if attack.predicted(user) == CHANGED else "refused" for user in USERS)]
        for name, attack in ATTACKS.items()
    ]
    rows = rows_of("Attacks")
    assert predicted[: len(rows)] == rows
    assert all("succeeds" not in own for own in predicted[len(rows) :])

"""A Weston compositor that ends with the test, on a display without a screen."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The compositor and the display that it draws on, which has a keyboard; None if one is missing.
WESTON, XVFB = shutil.which("weston"), shutil.which("Xvfb")
#: Seconds until both must be there.
PATIENCE = 60.0


@contextlib.contextmanager
def weston(folder: Path) -> Iterator[dict[str, str]]:
    """A compositor with its socket in ``folder``: the environment of its clients."""
    if WESTON is None or XVFB is None:
        raise FileNotFoundError("weston, Xvfb")
    folder.chmod(0o700)
    environment = {"XDG_RUNTIME_DIR": str(folder), "WAYLAND_DISPLAY": "wayland-test"}
    with contextlib.ExitStack() as at_end:
        log = at_end.enter_context((folder / "log").open("wb"))
        number, answer = os.pipe()
        # It chooses a display that is free, and says its number.
        screen = [XVFB, "-displayfd", str(answer), "-screen", "0", "640x480x24", "-nolisten", "tcp"]
        at_end.callback(end, start(screen, log.fileno(), {}, answer))
        os.close(answer)
        with os.fdopen(number) as stream:
            display = stream.readline().strip()
        assert display, (folder / "log").read_text()
        compositor = [WESTON, "--backend=x11-backend.so", "--no-config", "--idle-time=0"]
        named = [*compositor, f"--socket={environment['WAYLAND_DISPLAY']}"]
        at_end.callback(end, start(named, log.fileno(), {**environment, "DISPLAY": f":{display}"}))
        deadline = time.monotonic() + PATIENCE
        while not (folder / environment["WAYLAND_DISPLAY"]).exists():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.02)
        yield environment


def start(
    command: list[str], log: int, environment: dict[str, str], *kept: int
) -> subprocess.Popen[bytes]:
    """Start a program of its own group, which dies with this process."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, **environment},
        pass_fds=kept,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread runs here)
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program and wait for it; then end all of its group."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

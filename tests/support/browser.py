"""A headless Chromium, driven through its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The program, None where it is not installed.
CHROMIUM = shutil.which("chromium")
#: Seconds that an answer may take; the first one waits for the browser's start.
PATIENCE = 60.0

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)


class PageError(AssertionError):
    """The browser refused a command, or did not answer."""


class Page:
    """A page in a browser, and everything that the browser told of it.

    Attributes:
        events: every event of the protocol, in order.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def attach(self) -> Self:
        """Take the first page that the browser has, and listen to all of it."""
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in targets if info["type"] == "page")
        answer = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command and wait for what it answers."""
        self._number += 1
        message: dict[str, object] = {
            "id": self._number,
            "method": method,
            "params": parameters,
        }
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise PageError(f"{method}: no answer")

    def wait_for(self, event: str) -> None:
        """Wait for an event, if it has not come yet."""
        if any(seen["method"] == event for seen in self.events):
            return
        for _ in self._messages():
            if self.events and self.events[-1]["method"] == event:
                return
        raise PageError(f"{event} did not come")

    def _messages(self) -> Iterator[dict[str, Any]]:
        """What the browser says, as long as patience lasts; events are remembered."""
        deadline = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while True:
                while b"\0" in self._buffer:
                    text, _, self._buffer = self._buffer.partition(b"\0")
                    message: dict[str, Any] = json.loads(text)
                    if "method" in message:
                        self.events.append(message)
                    yield message
                if not selector.select(deadline - time.monotonic()):
                    return
                piece = os.read(self._answers, 1 << 20)
                if not piece:
                    return
                self._buffer += piece

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded and has been drawn."""
        self.send("Page.navigate", url=path.as_uri())
        self.wait_for("Page.loadEventFired")
        self.settle()

    def run(self, script: str) -> Any:  # noqa: ANN401 (whatever the script answers)
        """The value of an expression in the page; of a promise, what it comes to."""
        answer = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise PageError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what was asked to be drawn has been drawn."""
        self.run(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def mouse(self, kind: str, x: float, y: float, **more: object) -> None:
        """Move the mouse, turn its wheel or press its button, and wait for what comes of it."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        self.settle()

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def prefer(self, scheme: str) -> None:
        """Have the system's colours "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.settle()

    def screenshot(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[str]:
        """Whatever went to the console, and exceptions that nobody caught."""
        kinds = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Everything that was asked for, the page itself included."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]


@contextlib.contextmanager
def chromium(folder: Path, width: int = 1280, height: int = 1000) -> Iterator[Page]:
    """A browser with an empty profile in ``folder``: its page. It has ended when this ends."""
    if CHROMIUM is None:
        raise FileNotFoundError("chromium")
    its_commands, commands = os.pipe()
    answers, its_answers = os.pipe()
    # A shell puts the two pipes where the browser looks for them: descriptors 3 and 4.
    shell = f'exec "$0" "$@" 3<&{its_commands} 4>&{its_answers}'
    options = [*OPTIONS, f"--user-data-dir={folder}", f"--window-size={width},{height}"]
    with contextlib.ExitStack() as at_end:
        at_end.callback(os.close, answers)
        with open(folder / "log", "wb") as log:  # noqa: PTH123 (as the rest of this function)
            process = subprocess.Popen(
                ["/bin/bash", "-c", shell, CHROMIUM, *options, "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(folder)},
                pass_fds=(its_commands, its_answers),
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread runs here)
            )
        at_end.callback(end, process)
        at_end.callback(os.close, commands)
        os.close(its_commands)
        os.close(its_answers)
        yield Page(commands, answers).attach()


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the browser, whose commands have come to their end; then for all of its group."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

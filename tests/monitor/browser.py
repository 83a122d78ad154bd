"""A headless Chromium driven over its DevTools pipe: no driver, no websocket, no port.

`--dump-dom` cannot be used on a live page: with an open event stream its virtual time stands still.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --remote-debugging-pipe"
)
_ANSWER_SECONDS = 30.0


def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. Collects what the page complains about in `complaints`."""

    def __init__(self, program: str) -> None:
        self.complaints: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        command = f"exec {program} {FLAGS} --user-data-dir={self._profile.name} 3<&{their_in} 4>&{their_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._buffer = b""
        self._calls = 0
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def open_fresh(self, url: str) -> None:
        """Leaves the page before, with its complaints: its event stream asks on after its server stopped.

        What it said may lie unread in the pipe, so it is forgotten only after an answer of the next page.
        """
        self.open("about:blank")  # also because a mere change of the hash would not load anything
        self.evaluate("0")
        self.complaints.clear()
        self.open(url)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_until(self, script: str, *, deadline_seconds: float = 20.0) -> Any:
        """Poll until the expression is true; its value."""
        deadline = time.monotonic() + deadline_seconds
        patient = f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
        while not (value := self.evaluate(patient)):
            if time.monotonic() > deadline:
                text = self.evaluate("document.body.innerText")
                raise AssertionError(f"never true: {script}\ncomplaints: {self.complaints}\npage:\n{text}")
            time.sleep(0.05)
        return value

    def drag(self, start: tuple[float, float], end: tuple[float, float], *, moves: int = 6) -> None:
        """With the left button, in pixels of the window."""
        self._mouse("mouseMoved", *start)
        self._mouse("mousePressed", *start, buttons=1)
        for move in range(1, moves + 1):
            x, y = (a + (b - a) * move / moves for a, b in zip(start, end, strict=True))
            self._mouse("mouseMoved", x, y, buttons=1)
        self._mouse("mouseReleased", *end)

    def press(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def hover(self, x: float, y: float) -> None:
        self._mouse("mouseMoved", x, y)

    def _mouse(self, kind: str, x: float, y: float, *, buttons: int = 0) -> None:
        button = "none" if kind == "mouseMoved" and not buttons else "left"
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1
        )

    def show(self, *, width: int, height: int, dark: bool = False) -> None:
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if is_phone else 1, mobile=is_phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path) -> None:
        """The whole page, below the fold too."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(image))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        request: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._out, json.dumps(request).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            message = self._receive(deadline)
            if message.get("id") == self._calls:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return dict(message["result"])
            self._note(message)

    def wait_for_unread(self, text: bytes, *, deadline_seconds: float = 20.0) -> None:
        """Until the browser has said this, without taking note of it."""
        deadline = time.monotonic() + deadline_seconds
        while text not in self._buffer:
            self._read_more(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            self._read_more(deadline)
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def _read_more(self, deadline: float) -> None:
        ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(self._in, 1 << 16) if ready else b""
        if not chunk:
            raise AssertionError("the browser does not answer")
        self._buffer += chunk

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            entry = parameters["entry"]
            self.complaints.append(f"{entry['text']} ({entry.get('url', 'no address')})")

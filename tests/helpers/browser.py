"""A headless Chromium for tests of pages, driven over its own pipe: no port, no driver and no further package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60.0  # that the browser has for one answer, its start on a busy machine included


def chromium() -> str | None:
    """Return the browser named in OPSD_CHROMIUM, or the first on the path; None without one."""
    names = [os.environ.get("OPSD_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(
    chromium() is None, reason="needs Chromium: put it on the path, or name it in OPSD_CHROMIUM"
)


class Browser:
    """A browser with one tab.

    Attributes:
        errors: What the page wrote to the console as an error or warning, and exceptions that it did not catch.
        requests: Addresses that the page asked for, its own and data: left out.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._write, self._read, self._rest, self._number = to_browser, from_browser, b"", 0
        self._session: str | None = None
        self._loaded, self._address = False, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page, by its file or its address. Widths below 600 pixels emulate a phone."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=phone, deviceScaleFactor=1)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        # Transitions would leave colours half-way when they are read.
        self.call("Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}])
        self._loaded, self._address = False, page if isinstance(page, str) else page.resolve().as_uri()
        assert "errorText" not in self.call("Page.navigate", url=self._address), f"cannot open {page}"
        deadline = time.monotonic() + SECONDS
        while not self._loaded:
            self._take(deadline)

    def js(self, expression: str) -> Any:
        """Return the value of an expression in the page, after its promise if it is one."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse to the first element of a selector, and click if asked."""
        find = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        place = self.js(f"(() => {{ {find} return e.getClientRects()[0].toJSON(); }})()")
        at = {"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for event in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=event, button="left", clickCount=1, **at)

    def press(self, key: str) -> None:
        """Press a key by its name, such as ArrowRight."""
        codes = {
            "Tab": 9,
            "Enter": 13,
            "Escape": 27,
            "End": 35,
            "Home": 36,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }
        for event in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=event, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """Write a PNG of the visible part, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
        return path

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._take(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _take(self, deadline: float) -> dict[str, Any]:
        """Return the browser's next message."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"the browser said nothing for {SECONDS:.0f} seconds"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has gone"
            self._rest += more
        text, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, found: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(argument.get("value")) for argument in found["args"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = found["request"]["url"]
            if address != self._address and not address.startswith(("data:", "about:")):
                self.requests.append(address)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser, and stop it at the end."""
    program = chromium()
    assert program is not None
    their_end, ours = os.pipe()
    back, their_back = os.pipe()
    # Chromium takes commands on 3 and answers on 4: the ends are first moved out of the way of both.
    far = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (their_end, their_back)]
    os.close(their_end)
    os.close(their_back)

    def connect() -> None:
        os.dup2(far[0], 3)
        os.dup2(far[1], 4)

    with tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True) as folder:
        flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-gpu", "--no-first-run"]
        flags += [
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        process = subprocess.Popen(
            [program, *flags], preexec_fn=connect, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in far:
            os.close(fd)
        try:
            yield Browser(ours, back)
        finally:
            os.close(ours)  # which ends it
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(back)

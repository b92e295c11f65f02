"""Headless Chromium by its DevTools protocol over a pipe: what a page shows, a click, a picture."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
]


class Page:
    """One tab. `faults` are exceptions of its scripts that nobody caught."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._numbers = to_browser, from_browser, count(1)
        self._rest, self._session, self.faults = b"", None, list[str]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Runtime.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number, session = next(self._numbers), {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("method") == "Runtime.exceptionThrown":
                self.faults.append(message["params"]["exceptionDetails"]["exception"]["description"])
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._from, 2**16)
            assert data, "the browser has ended"
            self._rest += data
        first, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        return message

    def open(self, url: str, width: int = 1200, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression (an element is {}); None where it raises, as on a page that is not complete yet."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Its value, once that is neither false nor nothing."""
        deadline = time.monotonic() + 60
        while (value := self.value(expression)) in (None, False, 0, ""):
            assert time.monotonic() < deadline, f"{expression} never came true; {self.faults}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        return str(self.wait_for(f"document.querySelector({json.dumps(selector)})?.textContent"))

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of an element: what lies above it would get the click."""
        box = self.wait_for(f"document.querySelector({json.dumps(selector)})?.getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self) -> bytes:
        """A PNG of what is to be seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    (read, to_browser), (from_browser, write) = os.pipe(), os.pipe()
    quietly = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pipes = [(os.POSIX_SPAWN_DUP2, read, 3), (os.POSIX_SPAWN_DUP2, write, 4)]  # where it looks for them
    command = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}"]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[*quietly, *pipes])
    try:
        os.close(read)
        os.close(write)
        yield Page(to_browser, from_browser)
    finally:
        os.close(to_browser)  # upon which it ends
        os.waitpid(process, 0)
        os.close(from_browser)

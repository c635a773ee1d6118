"""A headless Chromium that tests drive through its debugging pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """A browser with a profile of its own; `requests` are the addresses that pages asked for, `problems` what their
    scripts did not catch and what their content security policy refused."""

    def __init__(self, profile: Path) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip("there is no Chromium here")
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # out of the way of 3 and 4, where Chromium looks for its pipe
        safe = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10) for number in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
            + ["--window-size=1280,800", f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=lambda: (os.dup2(safe[0], 3), os.dup2(safe[1], 4)),
        )
        for number in (theirs_in, theirs_out, *safe):
            os.close(number)
        self.read_from, self.write_to, self.buffer, self.count = ours_in, ours_out, b"", 0
        self.requests: list[str] = []
        self.problems: list[str] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.count:
            if answer["method"] == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            elif answer["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(answer["params"]))
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, path: Path, fragment: str = "") -> Page:
        """A page in a tab of its own, once it has drawn its trees."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable", session)
        page = Page(self, session)
        self.call("Page.navigate", session, url=f"{path.as_uri()}#{fragment}")
        page.wait("document.documentElement?.dataset.ready !== undefined")
        return page

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self.process.wait(timeout=20)
        os.close(self.read_from)
        os.close(self.write_to)

    def _message(self, seconds: float = 20.0) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.read_from], [], [], seconds)[0], "Chromium does not answer"
            self.buffer += os.read(self.read_from, 1 << 20)
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def __call__(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.browser.call("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 10.0) -> None:
        """Go on once a condition holds."""
        end = time.monotonic() + seconds
        while not self(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.01)

    def texts(self, selector: str) -> list[str]:
        """The text of all elements that a CSS selector finds."""
        return self(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent)")

    def press(self, *keys: str) -> None:
        """Type keys, one after the other."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.browser.call("Input.dispatchKeyEvent", self.session, type="keyDown", key=key, **text)
            self.browser.call("Input.dispatchKeyEvent", self.session, type="keyUp", key=key)

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the pointer to an element, and click on it."""
        x, y = self(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getClientRects()[0];"
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        events = ["mouseMoved", "mousePressed", "mouseReleased"] if click else ["mouseMoved"]
        for event in events:
            self.browser.call(
                "Input.dispatchMouseEvent", self.session, type=event, x=x, y=y, button="left", clickCount=1
            )

    def emulate(self, scheme: str) -> None:
        """Prefer light or dark colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.call("Emulation.setEmulatedMedia", self.session, features=features)

    def screenshot(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode(self.browser.call("Page.captureScreenshot", self.session)["data"])

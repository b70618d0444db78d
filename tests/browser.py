"""A headless Chromium for tests of pages, by DevTools' protocol over two pipes: no package."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = "chromium-browser google-chrome google-chrome-stable chrome chrome-headless-shell".split()
PATIENCE = 60.0  # seconds, for a start and for each answer, on a busy machine
FOUND = map(shutil.which, (os.environ.get("CHROMIUM", "chromium"), *NAMES))
EXECUTABLE = next(filter(None, FOUND), None)
needs_browser = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium or Chrome on the path (or in $CHROMIUM)"
)


class Browser:
    """One tab. `errors` keeps what a page throws or logs, `requests` what it asks the network."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [  # it reads commands from file descriptor 3 and answers on 4
            *("bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "-", EXECUTABLE or ""),
            *("--headless=new", "--remote-debugging-pipe", "--no-sandbox"),
            *("--disable-gpu", "--hide-scrollbars"),
            *("--disable-background-networking", "--no-first-run", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={self._folder.name}", "about:blank"),
        ]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), **quiet)
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._pending, self._session = 0, b"", None
        self.errors: list[str] = []
        self.requests: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._folder.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(
        self, page: Path | str, fragment: str = "", *, width: int = 1280, dark: bool = False
    ) -> None:
        """Open a file or an address in a window of this width, and wait until it has drawn."""
        self.errors.clear()
        self.requests.clear()
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **window)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[scheme, still])
        address = page if isinstance(page, str) else page.absolute().as_uri()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address + fragment)
        self.wait_for(
            f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'"
        )
        self.settle()

    def settle(self) -> None:
        """Wait for two frames: what a change causes is drawn then."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript and return its JSON value."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector: str) -> list[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.run(f"{found}.map(e => e.textContent)")

    def type(self, selector: str, text: str) -> None:
        """Write into a field, as its user does."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{field}.value = {json.dumps(text)}; {field}.dispatchEvent(new Event('input'))")
        self.settle()

    def wait_for(self, expression: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def click(self, selector: str, x: float | None = None, y: float | None = None) -> None:
        """Click with the mouse on an element: its middle, or x, y from its corner."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        left, top, width, height = self.run(
            f"(b => [b.left, b.top, b.width, b.height])({element}.getBoundingClientRect())"
        )
        at = {"x": left + (x or width / 2), "y": top + (y or height / 2), "clickCount": 1}
        for kind in ("Moved", "Pressed", "Released"):
            button = "none" if kind == "Moved" else "left"
            self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", button=button, **at)
        self.settle()

    def press(self, *keys: str) -> None:
        """Press keys by name, such as ArrowRight, Enter, Escape."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39}  # a slider listens to these
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            more = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, **more)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **more)
        self.settle()

    def _next(self) -> dict[str, Any]:
        """Return the next message, and keep the page's errors and requests."""
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, f"the browser is silent; its exit code: {self._process.poll()}"
            self._pending += part
        line, self._pending = self._pending.split(b"\0", 1)
        message = json.loads(line)
        what, parameters = message.get("method"), message.get("params", {})
        level = parameters.get("entry", {}).get("level") or parameters.get("type")
        logs = what in ("Log.entryAdded", "Runtime.consoleAPICalled")
        logged = logs and level in ("error", "warning", "assert")
        if logged or what == "Runtime.exceptionThrown":
            self.errors.append(str(parameters))
        elif what == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            if not address.startswith(("about:", "data:")):
                self.requests.append(address)
        return message

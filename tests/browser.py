"""A headless Chromium that is driven through a pipe, for pages that must work in a browser."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
    "--window-size=1280,900",
)
SECONDS = 60


class Browser:
    """Sends DevTools commands and keeps the events that come back; ``session`` is the open page's."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back, self.rest, self.count, self.session = to, back, b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = os.read(self.back, 1 << 16)
            assert more, "the browser is gone"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.count += 1
        whole = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            whole["sessionId"] = self.session
        os.write(self.to, json.dumps(whole).encode() + b"\0")
        while (message := self.receive()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until JavaScript in the page is true."""
        until = time.monotonic() + SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.1)

    def open(self, where: Path | str, width: int = 0) -> None:
        """Open a file or an address, with all that happens in it recorded, in a window of ``width`` pixels."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=0, deviceScaleFactor=0, mobile=False)
        self.send("Page.navigate", url=where.as_uri() if isinstance(where, Path) else where)
        self.wait_for("document.readyState === 'complete' && location.protocol !== 'about:'")

    def complaints(self) -> list[str]:
        """Errors, on the console and elsewhere."""
        found = []
        for event in self.events:
            what, facts = event.get("method"), event.get("params", {})
            if what == "Runtime.exceptionThrown":
                found.append(str(facts))
            if what == "Runtime.consoleAPICalled" and facts["type"] in {"error", "assert"}:
                found.append(str(facts["args"]))
            if what == "Log.entryAdded" and facts["entry"]["level"] == "error":
                found.append(facts["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Every address that was asked for, but for what the page itself holds."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with nothing open; it ends with the block."""
    to_browser, send = os.pipe()
    receive, from_browser = os.pipe()
    redirected = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    options = (*OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe")
    process = subprocess.Popen(
        ["bash", "-c", redirected, "bash", program, *options],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(send, receive)
    finally:
        os.close(send)
        os.close(receive)
        process.terminate()
        process.wait(30)

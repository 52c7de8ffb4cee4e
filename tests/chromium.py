"""Debian's Chromium, without a window, driven over its debugging pipe (DevTools protocol)."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """One tab. `requests` are the addresses that it asked for, `errors` what its scripts threw."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in, self._rest = to_browser, from_browser, b""
        self._n, self._session = 0, ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        self._n += 1
        message: dict[str, Any] = {"id": self._n, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._n:
                assert "error" not in found, found
                result: dict[str, Any] = found["result"]
                return result

    def open(self, url: str) -> None:
        loader = self.call("Page.navigate", url=url).get("loaderId")
        # the load event may still be that of the page before
        self.wait_for(
            f"document.readyState === 'complete' && ({json.dumps(loader)} === null ||"
            f" location.href.startsWith({json.dumps(url.partition('#')[0])}))"
        )

    def value(self, script: str) -> Any:
        """What a script comes to in the page."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        more = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def wait_for(self, script: str, seconds: float = 20) -> Any:
        """What a script comes to, once that is true."""
        end = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert self.errors == [], self.errors
            assert time.monotonic() < end, f"{script} did not become true"
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def key(self, key: str, modifiers: int = 0) -> None:
        """A key with a name: Enter, Tab, ArrowLeft …; modifiers: 2 is Ctrl, 8 Shift."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27}
        text = {"text": "\r"} if key == "Enter" else {}
        more: dict[str, Any] = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                modifiers=modifiers,
                **(more | (text if kind == "keyDown" else {})),
            )

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The whole page, or what the window shows of it."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 16)
            assert more, "the browser has gone"
            self._rest += more
        text, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(text)
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["params"]["request"]["url"])
        if found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["params"]["exceptionDetails"])[:500])
        return found


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a fresh browser; its profile goes to `folder`."""
    assert PROGRAM is not None
    their_in, ours_out = os.pipe()
    ours_in, their_out = os.pipe()
    words = [PROGRAM, "--headless", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    words += ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update"]
    words += ["--window-size=1400,1000", "--force-color-profile=srgb", "about:blank"]
    # the browser reads commands from descriptor 3 and answers on 4
    line = f'exec 3<&{their_in} 4>&{their_out}; exec "$@"'
    process = subprocess.Popen(
        ["/bin/bash", "-c", line, "chromium", *words],
        pass_fds=(their_in, their_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(ours_out, ours_in)
    finally:
        os.close(ours_out)
        os.close(ours_in)
        process.terminate()
        process.wait(20)

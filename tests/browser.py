"""Headless Chromium, spoken to through two pipes: what a page shows, says and does in a real browser.

Owns the DevTools protocol's few messages that the tests need. No port is opened and the network is off.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "needs a browser: apt-get install chromium"


class Browser:
    """One page of one browser; `problems` is all that the console and the network complained of."""

    def __init__(self, profile):
        down, self.requests = os.pipe()
        self.answers, up = os.pipe()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{down} 4>&{up}', "bash", CHROMIUM, *flags, "about:blank"],
            pass_fds=(down, up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(down)
        os.close(up)
        self.unread, self.number, self.session = b"", 0, None
        self.problems, self.loaded = [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        everything = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.send("Network.emulateNetworkConditions", offline=True, **everything)

    def send(self, method, **parameters):
        """One command; what it returns."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self.unread:
            block = os.read(self.answers, 1 << 20)
            assert block, "the browser has gone"
            self.unread += block
        line, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(line)
        method, found = message.get("method"), message.get("params", {})
        said = method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning")
        if said or method in ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.problems.append(found)
        elif method == "Network.requestWillBeSent":
            self.loaded.append(found["request"]["url"])
        return message

    def open(self, path: Path, *, width=1600, height=1000, dark=False):
        """A file, drawn to the end at this width."""
        self.problems, self.loaded = [], []
        self.send("Emulation.setEmulatedMedia", features=[_scheme(dark)])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=path.as_uri())
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(path.as_uri())}")

    def wait(self, condition):
        """Until an expression is true."""
        deadline = time.monotonic() + 300
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never: {condition}"
            time.sleep(0.05)

    def dark(self, wanted):
        self.send("Emulation.setEmulatedMedia", features=[_scheme(wanted)])

    def run(self, script):
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key, code=0, text=""):
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, path: Path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def pdf(self, path: Path):
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.7)["data"]))

    def close(self):
        os.close(self.requests)
        self.process.terminate()
        self.process.wait(20)
        os.close(self.answers)


def _scheme(dark):
    return {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}

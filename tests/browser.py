"""Headless Chromium for tests, driven over a pipe (Chrome DevTools Protocol): no package is needed for it."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 60  # seconds for an answer


@contextlib.contextmanager
def opened():
    """A Page in a Chromium of its own, which ends with the block."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (on Debian: apt-get install chromium)")
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    # Chromium reads commands from 3 and answers on 4; from 10 on, the shell can move both without a clash.
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
    # Processes of Chromium may outlive the first one, and still write into the profile while it is removed.
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with scratch as profile, tempfile.TemporaryFile() as log:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 f"--user-data-dir={profile}", "--remote-debugging-pipe"]  # fmt: skip
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", CHROMIUM, *flags]
        process = subprocess.Popen(shell, pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for end in (theirs_in, theirs_out, *theirs):
            os.close(end)
        try:
            yield Page(ours_in, ours_out)
        finally:
            process.terminate()
            process.wait(timeout=TIMEOUT)
            os.close(ours_in)
            os.close(ours_out)


class Page:
    """A tab: `complaints` holds what its console said and every exception, dialog and refused load."""

    COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded",
                  "Page.javascriptDialogOpening", "Network.requestWillBeSent")  # fmt: skip

    def __init__(self, read_from, write_to):
        self.read_from, self.write_to, self.buffer = read_from, write_to, b""
        self.numbers, self.session, self.loaded, self.complaints = itertools.count(1), None, False, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The result of a command of the protocol; events that come before it are noted."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        message.update({"sessionId": self.session} if self.session else {})
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.note(answer)

    def receive(self):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_from], [], [], TIMEOUT)
            assert ready, f"Chromium is silent for {TIMEOUT} s"
            received = os.read(self.read_from, 1 << 20)
            assert received, "Chromium has ended"
            self.buffer += received
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def note(self, event):
        self.loaded |= event["method"] == "Page.loadEventFired"
        if event["method"] in self.COMPLAINTS:
            self.complaints.append((event["method"], event["params"]))

    def open(self, path):
        """Load a file; its own request is no complaint."""
        self.loaded = False
        address = path.as_uri()
        self.call("Page.navigate", url=address)
        while not self.loaded:
            self.note(self.receive())
        time.sleep(0.1)
        self.call("Runtime.evaluate", expression="0")  # what was said while it loaded has come by then
        own = [c for c in self.complaints if c[1].get("request", {}).get("url") == address]
        self.complaints = [c for c in self.complaints if c not in own]

    def busy_seconds(self):
        """How long the page's main thread has worked, in the time domain of Performance.enable."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def evaluate(self, expression):
        """The value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def count(self, selector):
        """How many elements of the page match a selector."""
        return self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")

    def click(self, selector):
        """A click of the mouse in the middle of an element."""
        box = self.evaluate(
            "(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2] })"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def resize(self, width, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip

    def dark(self):
        feature = {"name": "prefers-color-scheme", "value": "dark"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def pdf(self):
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False, paperWidth=8.27,
                                          paperHeight=11.69)["data"])  # fmt: skip

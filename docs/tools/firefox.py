"""A page in headless Firefox, driven by WebDriver BiDi over a WebSocket: what browser.py does with
Chromium, as far as the check of align.html needs it, and with the standard library alone.

    with firefox.Browser() as b:
        page = b.open("align.html")
        page.evaluate("document.title")   # an expression; a promise is waited for
        page.errors, page.requests        # of the console and of scripts; addresses asked for

FIREFOX: the program, if it is not firefox-esr or firefox in PATH.
"""

import base64
import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time

# No first-run pages, no updates, no telemetry: the browser asks for nothing of its own.
PREFERENCES = {
    "app.normandy.enabled": False,
    "app.update.enabled": False,
    "browser.aboutwelcome.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.homepage_override.mstone": "ignore",
    "browser.tabs.unloadOnLowMemory": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "dom.disable_open_during_load": False,
    "dom.ipc.processPriorityManager.enabled": False,
    "dom.max_script_run_time": 0,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "toolkit.telemetry.reportingpolicy.firstRun": False,
}


class Browser:
    def __init__(self, program=None):
        program = (
            program
            or os.environ.get("FIREFOX")
            or shutil.which("firefox-esr")
            or shutil.which("firefox")
        )
        if not program:
            raise RuntimeError(
                "no Firefox: apt-get install firefox-esr, or set FIREFOX to the program"
            )
        self.folder = tempfile.mkdtemp(prefix="firefox.")
        with open(os.path.join(self.folder, "user.js"), "w") as f:
            for name, value in PREFERENCES.items():
                f.write(f"user_pref({json.dumps(name)}, {json.dumps(value)});\n")
        log = os.path.join(self.folder, "log")
        arguments = ["--headless", "--no-remote", "--profile", self.folder]
        self.process = subprocess.Popen(
            [program, *arguments, "--remote-debugging-port", "0", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=open(log, "w"),
            env={**os.environ, "HOME": self.folder, "MOZ_CRASHREPORTER_DISABLE": "1"},
        )
        self.number, self.answers, self.pages, self.buffer = 0, {}, {}, b""
        self.connect(log)
        self.version = self.call("session.new", capabilities={})["capabilities"]["browserVersion"]
        events = ["log.entryAdded", "network.beforeRequestSent"]
        self.call("session.subscribe", events=events)

    def connect(self, log):
        """The address is the last thing that Firefox says when it has started."""
        until = time.monotonic() + 120
        while not (found := re.search(r"ws://([\w.]+):(\d+)", open(log).read())):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("Firefox did not start: " + open(log).read()[-500:])
            time.sleep(0.1)
        self.socket = socket.create_connection((found[1], int(found[2])), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /session HTTP/1.1\r\nHost: {found[1]}:{found[2]}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            "\r\n".encode()
        )
        while b"\r\n\r\n" not in self.buffer:
            self.buffer += self.socket.recv(4096)
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise RuntimeError(f"Firefox refused the connection: {head!r}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if not self.process:
            return
        try:
            self.call("browser.close", timeout=10)
        except (RuntimeError, OSError):
            pass
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.socket.close()
        self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- WebSocket (RFC 6455): frames, those of a client masked

    def send(self, text):
        data, mask = text.encode(), os.urandom(4)
        n = len(data)
        if n < 126:
            size = bytes([0x80 | n])
        elif n < 65536:
            size = bytes([0x80 | 126]) + struct.pack(">H", n)
        else:
            size = bytes([0x80 | 127]) + struct.pack(">Q", n)
        pad = (mask * (n // 4 + 1))[:n]
        masked = (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(n, "big")
        self.socket.sendall(b"\x81" + size + mask + masked)

    def take(self, n, until):
        while len(self.buffer) < n:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            piece = self.socket.recv(1 << 20)
            if not piece:
                raise RuntimeError("Firefox ended")
            self.buffer += piece
        return self.buffer[:n]

    def receive(self, until):
        """One message; False when none came until then. A frame counts as read only when all of it
        is there."""
        text, at = b"", 0
        try:
            while True:
                head = self.take(at + 2, until)[at:]
                n, at = head[1] & 127, at + 2
                if n >= 126:
                    more = 2 if n == 126 else 8
                    n = int.from_bytes(self.take(at + more, until)[at:], "big")
                    at += more
                text += self.take(at + n, until)[at : at + n] if head[0] & 15 < 8 else b""
                at += n
                if head[0] & 0x80:
                    break
        except (TimeoutError, socket.timeout):
            return False
        self.buffer = self.buffer[at:]
        if text:
            self.hear(json.loads(text))
        return True

    def hear(self, message):
        if message.get("id") is not None:
            self.answers[message["id"]] = message
        elif message["type"] == "event":
            p = message["params"]
            context = p.get("context") or p.get("source", {}).get("context")
            for page in self.pages.values():
                if context in (None, page.context):
                    page.event(message["method"], p)

    def call(self, method, timeout=60, **parameters):
        self.number += 1
        number, until = self.number, time.monotonic() + timeout
        self.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while number not in self.answers:
            if not self.receive(until):
                raise RuntimeError(f"{method}: no answer in {timeout} s")
        answer = self.answers.pop(number)
        if answer["type"] == "error":
            raise RuntimeError(f"{method}: {answer['error']}: {answer['message']}")
        return answer["result"]

    def open(self, where, width=1400, height=900, timeout=60):
        url = where if "://" in str(where) else pathlib.Path(where).resolve().as_uri()
        context = self.call("browsingContext.create", type="tab")["context"]
        page = self.pages[context] = Page(self, context)
        size = {"width": width, "height": height}
        self.call("browsingContext.setViewport", context=context, viewport=size)
        self.call(
            "browsingContext.navigate", timeout, context=context, url=url, wait="complete"
        )
        return page


class Page:
    def __init__(self, browser, context):
        self.browser, self.context = browser, context
        self.errors, self.requests = [], []

    def event(self, method, p):
        if method == "log.entryAdded" and p["level"] in ("error", "warn"):
            self.errors.append(f"{p['type']} {p['level']}: {p['text']}")
        elif method == "network.beforeRequestSent":
            url = p["request"]["url"]
            self.requests.append(url)
            if not url.startswith(("file:", "data:", "about:", "blob:")):
                self.errors.append(f"asks the network: {url}")

    def evaluate(self, script, timeout=60):
        """The value of an expression, awaited, by way of JSON."""
        r = self.browser.call(
            "script.evaluate",
            timeout,
            expression=f"(async () => JSON.stringify(await ({script})))()",
            target={"context": self.context},
            awaitPromise=True,
            userActivation=True,
        )
        if r["type"] == "exception":
            raise RuntimeError(r["exceptionDetails"]["text"])
        return json.loads(r["result"]["value"]) if "value" in r["result"] else None

    def screenshot(self, path):
        data = self.browser.call("browsingContext.captureScreenshot", context=self.context)["data"]
        with open(path, "wb") as f:
            f.write(base64.b64decode(data))

    def close(self):
        self.browser.pages.pop(self.context, None)
        self.browser.call("browsingContext.close", context=self.context)

"""A headless Chromium for tests of pages, driven by its DevTools protocol: no package is needed.

Page opens an address, runs JavaScript, presses keys, moves the pointer, takes pictures, and
collects whatever the page reports on its console."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
KEYS = {" ": "Space"}  # codes that are not the key's own name


class WebSocket:
    """A client that sends and receives texts."""

    def __init__(self, address):
        parts = urllib.parse.urlsplit(address)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=60)
        self.file = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert b"101" in self.file.readline()
        while self.file.readline().strip():
            pass

    def send(self, text):
        data, mask = text.encode(), os.urandom(4)
        size = len(data)
        head = bytes([0x81, 0xFE]) + struct.pack(">H", size) if size < 65536 else None
        head = head or bytes([0x81, 0xFF]) + struct.pack(">Q", size)
        masked = bytes(b ^ mask[i % 4] for i, b in enumerate(data))
        self.socket.sendall(head + mask + masked)

    def receive(self):
        parts, final = [], False
        while not final:
            first, size = self.file.read(2)
            final = first & 0x80
            if size > 125:
                size = int.from_bytes(self.file.read(2 if size == 126 else 8))
            parts.append(self.file.read(size))
        return b"".join(parts).decode()


class Page:
    """One tab of a browser of its own. errors: what it reported; requests: addresses it loaded."""

    def __init__(self, folder, *flags):
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                 "--no-first-run", f"--user-data-dir={folder}", *flags)  # fmt: skip
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.number, self.errors, self.requests = 0, [], []
        port_file = Path(folder) / "DevToolsActivePort"
        self.wait(lambda: port_file.exists() and port_file.read_text().count("\n"), seconds=60)
        listing = f"http://127.0.0.1:{port_file.read_text().split()[0]}/json"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        find = lambda: [t for t in json.load(opener.open(listing)) if t["type"] == "page"]
        self.wait(find, seconds=60)
        self.socket = WebSocket(find()[0]["webSocketDebuggerUrl"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(20)

    def wait(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < end, "timed out"
            time.sleep(0.05)
        return result

    def __call__(self, method, **params):
        """Call a DevTools method; events that arrive before its answer are noted."""
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while (message := json.loads(self.socket.receive())).get("id") != self.number:
            self.note(message["method"], message["params"])
        assert "error" not in message, message
        return message["result"]

    def note(self, method, params):
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", details).get("description", str(details)))
        elif method == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, address, width=1200, height=800, dark=False, still=False, phone=False):
        metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self("Emulation.setDeviceMetricsOverride", **metrics)
        features = {"prefers-color-scheme": "dark" if dark else "light",
                    "prefers-reduced-motion": "reduce" if still else "no-preference"}  # fmt: skip
        features = [dict(name=name, value=value) for name, value in features.items()]
        self("Emulation.setEmulatedMedia", features=features)
        self("Page.navigate", url=str(address))
        self.wait(lambda: self.js("document.readyState") == "complete")

    def js(self, expression):
        result = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=20):
        return self.wait(lambda: self.js(expression), seconds)

    def press(self, key):
        code = dict(key=key, code=KEYS.get(key, key), text=key if len(key) == 1 else "")
        keys = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36,
                "End": 35, "Escape": 27}  # fmt: skip
        code["windowsVirtualKeyCode"] = keys.get(key, ord(key[0]))
        self("Input.dispatchKeyEvent", type="keyDown", **code)
        self("Input.dispatchKeyEvent", type="keyUp", **code)

    def point(self, selector, click=False):
        """Move the pointer onto an element, and click."""
        self.js(
            f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})"
        )
        box = f"document.querySelector({json.dumps(selector)}).getClientRects()[0]"
        x, y = self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path):
        data = self("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))

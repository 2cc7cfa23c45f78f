"""A headless Chromium, driven with the standard library through chromedriver's WebDriver protocol (W3C)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from servers.swift import free_ports

START_SECONDS = 60.0
COMMANDS = ("chromium", "chromedriver")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """One window. No page in it can reach the network, as it resolves no host but this machine."""

    def __init__(self) -> None:
        (port,) = free_ports(1)
        self._driver = f"http://127.0.0.1:{port}"
        command = ["chromedriver", f"--port={port}", "--log-level=OFF"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )

    @staticmethod
    def missing() -> str:
        """The reason why no browser can run here, or ""."""
        missing_commands = [command for command in COMMANDS if shutil.which(command) is None]
        if not missing_commands:
            return ""
        packages = "chromium chromium-driver (python3 scripts/install.py --test)"
        return f"no {', '.join(missing_commands)} here: apt-get install {packages}"

    def __enter__(self) -> Browser:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._ask("GET", "/status")
                break
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self._end()
                    raise
                time.sleep(0.05)
        chrome_options = {
            "binary": shutil.which("chromium"),
            "args": [*OPTIONS, "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"],
        }
        capabilities = {"goog:chromeOptions": chrome_options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{answer['sessionId']}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._ask("DELETE", self._session)
        finally:
            self._end()

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open the page of a file in a window of this size in CSS pixels. Returns when the page is loaded."""
        self.console()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._control("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._control("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._ask("POST", f"{self._session}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a function body on the page. Returns its value."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Click on the first element that a CSS selector matches, as a user's mouse does."""
        element = self._ask("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"{self._session}/element/{next(iter(element.values()))}/click", {})

    def console(self) -> list[str]:
        """The messages of the console since the last call: errors, warnings, refused requests."""
        return [entry["message"] for entry in self._ask("POST", f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self._ask("GET", f"{self._session}/screenshot"))

    def _control(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._driver + path, data=data, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=START_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {os.fsdecode(error.read())[:500]}") from None

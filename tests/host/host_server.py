"""A real ComfyUI server for tests: on a free port, with a base directory of its own, driven over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, PROMPT_SECONDS = 600, 300  # for a busy machine; an idle one takes seconds


class InvalidPrompt(Exception):
    """The server refused a prompt; `args[0]` is its answer."""


class HostServer:
    """One server process.

    Args:
        comfyui: the folder of a ComfyUI.
        python: the interpreter that has its requirements.
        base: an empty folder for models, inputs, outputs and the link to this pack.
    """

    def __init__(self, comfyui: Path, python: Path, base: Path, *arguments: str):
        self.base, self.comfyui = base, comfyui
        for name in (
            "models/unidiffuser",
            "models/checkpoints",
            "models/loras",
            "input",
            "output",
            "temp",
            "user",
            "custom_nodes",
        ):
            (base / name).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "UniDiffuser"
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log_path = base / "server.log"
        command = [
            str(python),
            "main.py",
            "--cpu",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
            "--database-url",
            f"sqlite:///{base}/user/comfyui.db",
            "--disable-auto-launch",
            *arguments,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self._wait_for_start()

    def _wait_for_start(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode}:\n{self.log[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start within {START_SECONDS} s:\n{self.log[-4000:]}")

    @property
    def log(self) -> str:
        """The output of the server so far."""
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def request(self, path: str, data: Any = None) -> bytes:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt and return its id.

        Raises:
            InvalidPrompt: the server refused it.
        """
        try:
            return json.loads(self.request("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise InvalidPrompt(json.loads(error.read())) from None

    def wait(self, prompt_id: str, seconds: float = PROMPT_SECONDS) -> dict[str, Any]:
        """Wait for the end of a prompt, in success or error, and return its history entry."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"].get("status_str"):
                return entry
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode}:\n{self.log[-4000:]}")
            time.sleep(0.05)
        raise TimeoutError(f"The prompt did not end within {seconds} s:\n{self.log[-4000:]}")

    def run(self, prompt: dict[str, Any], seconds: float = PROMPT_SECONDS) -> dict[str, dict[str, Any]]:
        """Run a prompt and return what each node showed, by node id.

        Raises:
            RuntimeError: a node failed; the text is its message.
        """
        entry = self.wait(self.queue(prompt), seconds)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(error_of(entry))
        return entry["outputs"]

    def file(self, shown: dict[str, str]) -> bytes:
        """The bytes of a file that a node showed ({"filename", "subfolder", "type"})."""
        return self.request("/view?" + urllib.parse.urlencode(shown))


def error_of(entry: dict[str, Any]) -> str:
    """The message of the node that failed, or "interrupted"."""
    for kind, message in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{message['node_type']}: {message['exception_type']}: {message['exception_message']}"
        if kind == "execution_interrupted":
            return "interrupted"
    return "the prompt failed without a message"

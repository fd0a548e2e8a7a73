"""Servers in separate processes, which can be killed and restarted."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx2

from helpers.paths import ROOT

RECIPE = ROOT / "recipes" / "serve_retriever.py"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`recipes/serve_retriever.py`, or another script, on a free port of the loopback device."""

    def __init__(self, *arguments, script=RECIPE, port=None):
        self.arguments = [str(argument) for argument in arguments]
        self.script = script
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, str(self.script), *self.arguments, "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        return self

    def wait_until_ready(self, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server has ended: {self.process.stderr.read()[-2000:]}")
            try:
                if httpx2.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise TimeoutError("The server is not ready.")

    def kill(self):
        """Kill the process without notifying clients, as if its node were lost."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def __enter__(self):
        return self.start().wait_until_ready()

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()

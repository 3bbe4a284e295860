"""A Space in a process of its own, as a host starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


APP = Path(__file__).parent.parent / "space" / "app.py"


class Server:
    """`python space/app.py` with some options; ready once it is made."""

    def __init__(self, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        self.store = folder / "ratings.sqlite"
        command = [sys.executable, str(APP), "--port", str(port), "--store", str(self.store), *options]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "gradio")}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                self.health = json.load(urllib.request.urlopen(self.url + "/healthz", timeout=5))
                return
            except OSError:
                time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"The Space did not start:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """As when the power goes: no handler runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def post(self, place: str, body: object) -> tuple[int, dict]:
        """The status and what was answered; `body` is bytes, or becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + place, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

"""A Space in a process of its own, as a host starts it."""

import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

from fresh import HEAVY, Nursery


APP = Path(__file__).parent.parent / "space" / "app.py"


class Server:
    """`python space/app.py` with some options; ready once it is made."""

    def __init__(self, nursery: Nursery, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.store = folder / "ratings.sqlite"
        command = [APP, "--port", port, "--store", self.store, *options]
        variables = {"GRADIO_TEMP_DIR": str(folder / "gradio")}
        self.process = nursery.start(*command, cwd=folder, imports=[*HEAVY, "gradio"], **variables)
        for _ in range(2400):
            if self.process.poll() is not None:
                break
            try:
                self.health = json.load(urllib.request.urlopen(self.url + "/healthz", timeout=5))
                return
            except OSError:
                time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"The Space did not start:\n{self.process.said()[-4000:]}")

    def kill(self) -> None:
        """As when the power goes: no handler runs."""
        self.process.kill()
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

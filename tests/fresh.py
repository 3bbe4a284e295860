"""Fresh processes that need not import torch and diffusers anew: each is forked from one that has done so.

What is started knows neither the package nor the tests; its folder, arguments and output are its own. What
huggingface_hub reads of the environment at import (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE) is as the nursery has it.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path


HEAVY = ["torch", "peft", "diffusers.pipelines.auto_pipeline", "transformers.models.clip.modeling_clip"]


class Child:
    """A process that a nursery has started, with what subprocess.Popen has of it."""

    def __init__(self, pid: int, folder: Path):
        self.pid, self.folder, self.returncode = pid, folder, None

    def poll(self) -> int | None:
        if self.returncode is None and (self.folder / "status").exists():
            self.returncode = int((self.folder / "status").read_text())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def said(self, where: str = "stderr") -> str:
        return (self.folder / where).read_text()


class Nursery:
    """`env` is the environment of the process that imports, and of all that are forked from it."""

    def __init__(self, env: dict[str, str]):
        self.home = tempfile.TemporaryDirectory(prefix="minim-tests-")
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def start(self, *command, cwd: Path | None = None, imports: list[str] = HEAVY, **variables: str) -> Child:
        """Starts what comes after `python` on a command line: a script, `-c` and code, or `-m` and a module."""
        folder = Path(tempfile.mkdtemp(dir=self.home.name))
        asked = {"command": [str(word) for word in command], "cwd": str(cwd or Path.cwd()), "folder": str(folder)}
        self.process.stdin.write(json.dumps(asked | {"imports": imports, "variables": variables}) + "\n")
        self.process.stdin.flush()
        return Child(int(self.process.stdout.readline()), folder)

    def run(self, *command, timeout: float = 300, **options) -> subprocess.CompletedProcess:
        child = self.start(*command, **options)
        code = child.wait(timeout)
        return subprocess.CompletedProcess(command, code, child.said("stdout"), child.said())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.home.cleanup()


def serve() -> None:
    """Forks for each line that is read; in the forked process it returns, or raises, when its command is done."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        asked = json.loads(line)
        for name in asked["imports"]:
            importlib.import_module(name)
        gc.freeze()  # no page is copied to look for garbage on it
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if (pid := os.fork()) == 0:
                return execute(**asked)
            os.write(1, f"{pid}\n".encode())
            _, status = os.waitpid(pid, 0)
            place = Path(asked["folder"], "status")
            place.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
            place.with_suffix(".part").rename(place)
            os._exit(0)


def execute(command: list[str], cwd: str, folder: str, imports: list[str], variables: dict[str, str]) -> None:
    for number, name in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.update(variables)
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(command[1], main.__dict__)
    elif command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], cwd
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    serve()

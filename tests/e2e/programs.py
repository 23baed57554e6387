"""Programs as a user runs them: started, read line by line, and always ended."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[2]
FLUFFLE = str(Path(sys.executable).with_name("fluffle"))
PATIENCE_S = 60.0
REGRESSION = f"{ROOT / 'examples/numpy_regression.py'}:task"


def _import_path() -> str:
    """Let programs find the tests' tasks, and whatever our own process was told to import."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


class Program:
    """One running command whose output is read as it comes."""

    def __init__(self, *words: object, cwd: Path, env: dict[str, str] | None = None) -> None:
        self.words = list(map(str, words))
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            self.words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": _import_path(), **(env or {})},
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def wait_for(self, pattern: str) -> str:
        """Return the next line, of those not waited for yet, that the pattern is found in."""
        while True:
            try:
                line = self._new.get(timeout=PATIENCE_S)
            except queue.Empty:
                raise AssertionError(self._told(f"never said '{pattern}'")) from None
            if line is None:
                self._new.put(None)
                raise AssertionError(self._told(f"ended and never said '{pattern}'"))
            self.lines.append(line)
            if re.search(pattern, line):
                return line

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        while True:
            try:
                line = self._new.get(timeout=PATIENCE_S)
            except queue.Empty:
                raise AssertionError(self._told("does not end")) from None
            if line is None:
                return self.process.wait(PATIENCE_S)
            self.lines.append(line)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def _told(self, what: str) -> str:
        return f"{' '.join(self.words)} {what}; it said:\n" + "\n".join(self.lines[-40:])


class Federation:
    """The programs of one test, in a folder of their own, on one broker."""

    def __init__(self, name: str, url: str, folder: Path) -> None:
        self.name, self.url, self.folder = name, url, folder
        self.run = folder / "run"
        self.programs: list[Program] = []

    def start(self, *words: object, env: dict[str, str] | None = None) -> Program:
        """Start any command."""
        program = Program(*words, cwd=self.folder, env=env)
        self.programs.append(program)
        return program

    def coordinator(self, *flags: object) -> Program:
        """Start a coordinator."""
        where = ("--federation", self.name, "--url", self.url, "--run", self.run)
        return self.start(FLUFFLE, "coordinator", *where, *flags)

    def worker(
        self,
        data: str,
        *flags: object,
        task: str = REGRESSION,
        env: dict[str, str] | None = None,
    ) -> Program:
        """Start a worker."""
        where = ("--federation", self.name, "--url", self.url, "--heartbeat", 0.2)
        return self.start(
            FLUFFLE, "worker", *where, "--task", task, "--data", data, *flags, env=env
        )

    def base(self, number: int) -> str:
        """Return what the weights are named that a round begins with; they must be on disk."""
        with safe_open(self.run / f"round-{number - 1:04d}.safetensors", "numpy") as model:
            return str(model.metadata()["base"])

    def close(self) -> None:
        """End whatever is left."""
        for program in self.programs:
            if program.process.poll() is None:
                program.process.kill()
            program.process.wait(PATIENCE_S)
            program.reader.join(PATIENCE_S)

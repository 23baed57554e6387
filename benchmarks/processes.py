"""Processes that a benchmark starts and stops, and their CPU time and memory (Linux's /proc)."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from fluffle_broker.node import node

ROOT = Path(__file__).parents[1]
FLUFFLE = [str(Path(sys.executable).with_name("fluffle"))]
_PATIENCE_S = 10.0


class Died(RuntimeError):
    """A program of the benchmark ended or stopped responding too early."""


class Programs:
    """A context manager that stops all programs it started, even after an error.

    Args:
        folder: the folder for their logs, one file each.
        env: additional environment variables of all programs.
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._env = {**os.environ, "PYTHONPATH": python_path, **(env or {})}
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._afterwards = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all programs."""
        with self._afterwards:
            self.end(*self._running)

    def afterwards(self, close: Callable[[], object]) -> None:
        """Register a function to call once all programs have stopped."""
        self._afterwards.callback(close)

    def start(
        self,
        name: str,
        *command: object,
        pipes: bool = False,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program with its output in ``<folder>/<name>.log`` or, with ``pipes``, a pipe."""
        with (self.folder / f"{name}.log").open("w") as log:
            program = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else log,
                stderr=log if pipes else subprocess.STDOUT,
                text=True,
                cwd=cwd,
                env={**self._env, **(env or {})},
                start_new_session=True,  # Ctrl-C reaches only this process, which stops them
            )
        self._running[name] = program
        return program

    def check(self) -> None:
        """Raise ``Died`` if a program has ended."""
        for name, program in self._running.items():
            if program.poll() is not None:
                tail = self.log(name).read_text(errors="replace").splitlines()[-20:]
                raise Died(f"{name} ended with {program.returncode}:\n" + "\n".join(tail))

    def log(self, name: str) -> Path:
        """Return the log file of a program."""
        return self.folder / f"{name}.log"

    def end(self, *names: str) -> None:
        """Stop programs concurrently: with SIGTERM first, with SIGKILL after 10 seconds."""
        ending = [self._running.pop(name) for name in names]
        for program in ending:
            with contextlib.suppress(ProcessLookupError):
                program.terminate()
        for program in ending:
            try:
                program.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                pass
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)  # including its children
            program.wait()
            for pipe in filter(None, (program.stdin, program.stdout)):
                with contextlib.suppress(OSError):
                    pipe.close()


@contextlib.contextmanager
def scratch(within: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder, and make SIGTERM exit as cleanly as Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if within is not None:
        within.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fluffle-bench-", dir=within))
    # On ext4, recently deleted files nearby slow down the creation of new ones. This flag places
    # the folder elsewhere on the disk; other file systems do not need it.
    with contextlib.suppress(OSError):
        subprocess.run(["chattr", "+T", folder], check=False, capture_output=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def private_broker(folder: Path, extra_conf: str = "") -> Iterator[node.NodeInfo]:
    """Run a private RabbitMQ in a folder, on free ports, with fluffle's configuration."""
    try:
        yield node.up(folder, ports=node.Ports(0, 0, 0, 0, 0), extra_conf=extra_conf)
    finally:
        node.down(folder, grace_s=0)


def peak_bytes(pid: int) -> int | None:
    """Return the peak resident memory of a process, or None if the system does not report it.

    Not ``getrusage``: on Linux that also counts what the process was before it became this program.
    """
    with contextlib.suppress(OSError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def reset_peak(pid: int) -> None:
    """Reset the peak memory of a process to its current memory, if the system permits that."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_s(pid: int) -> float:
    """Return the CPU time of the current threads of a process so far."""
    nanoseconds = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread may just have ended
            nanoseconds += int(thread.read_text().split()[0])
    return nanoseconds / 1e9


def machine() -> dict[str, Any]:
    """Return a description of the machine and the versions."""
    names = ("fluffle", "numpy", "aio-pika", "aiormq")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def allow_files(wanted: int) -> None:
    """Raise the limit of open files of this process and the processes that it starts.

    Raises:
        SystemExit: if the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(
            f"this needs {wanted} open files per process, but the system allows {hard}; raise the "
            f"hard limit (ulimit -Hn {wanted}) or use fewer workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

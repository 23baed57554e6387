"""Programs that a benchmark starts and ends, and what the system tells of them (Linux's /proc)."""

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
from types import TracebackType
from typing import IO, Any, Self

from fluffle_broker.node import node

ROOT = Path(__file__).parents[1]
FLUFFLE = [str(Path(sys.executable).with_name("fluffle"))]
_PATIENCE_S = 10.0


class Died(RuntimeError):
    """A program of the benchmark has ended before its time."""


class Programs:
    """Programs that all end when the block ends, however it ends.

    Args:
        folder: where their logs go, one file each.
        env: added to the environment of all of them.
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._env = {**os.environ, "PYTHONPATH": python_path, **(env or {})}
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._afterwards = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Begin with none."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all of them."""
        with self._afterwards:
            self.end(*self._running)

    def afterwards(self, close: Callable[[], object]) -> None:
        """Do something once all have ended."""
        self._afterwards.callback(close)

    def start(
        self,
        name: str,
        *words: object,
        pipes: bool = False,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start one; it writes to ``<folder>/<name>.log``, or is talked to where it has pipes."""
        with (self.folder / f"{name}.log").open("w") as log:
            program = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else log,
                stderr=log if pipes else subprocess.STDOUT,
                text=True,
                cwd=cwd,
                env={**self._env, **(env or {})},
                start_new_session=True,  # Ctrl-C is ours; we end them
            )
        self._running[name] = program
        return program

    def check(self) -> None:
        """Raise ``Died`` where one has ended."""
        for name, program in self._running.items():
            if program.poll() is not None:
                told = self.log(name).read_text(errors="replace").splitlines()[-20:]
                raise Died(f"{name} ended with {program.returncode}:\n" + "\n".join(told))

    def log(self, name: str) -> Path:
        """Return the file that a program writes to."""
        return self.folder / f"{name}.log"

    def end(self, *names: str) -> None:
        """End some, all at once: first with a word, after a while by force."""
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
                os.killpg(program.pid, signal.SIGKILL)  # and what it has started itself
            program.wait()
            for pipe in (program.stdin, program.stdout):
                _close(pipe)


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):
            pipe.close()


@contextlib.contextmanager
def scratch(within: Path | None = None) -> Iterator[Path]:
    """Make a folder that is gone afterwards, and let SIGTERM end us as cleanly as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if within is not None:
        within.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fluffle-bench-", dir=within))
    # On ext4, files that were just deleted nearby slow new ones down. What is in this folder goes
    # elsewhere on the disk, as what is in the root does; where there is no such thing, no matter.
    with contextlib.suppress(OSError):
        subprocess.run(["chattr", "+T", folder], check=False, capture_output=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def private_broker(folder: Path, extra_conf: str = "") -> Iterator[node.NodeInfo]:
    """Run a RabbitMQ of our own in a folder, on free ports, with fluffle's configuration."""
    try:
        yield node.up(folder, ports=node.Ports(0, 0, 0, 0, 0), extra_conf=extra_conf)
    finally:
        node.down(folder, grace_s=0)


def peak_bytes(pid: int) -> int | None:
    """Return the peak of a process's resident memory; None where the system does not tell.

    Not ``getrusage``: on Linux that also counts what the process was before it became this program.
    """
    with contextlib.suppress(OSError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def reset_peak(pid: int) -> None:
    """Let the peak of a process begin again from what it holds now, where the system lets us."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_s(pid: int) -> float:
    """Return the processor time that the threads a process now has have used so far."""
    nanoseconds = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it may just have ended
            nanoseconds += int(thread.read_text().split()[0])
    return nanoseconds / 1e9


def machine() -> dict[str, Any]:
    """Say on what the numbers were measured."""
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
    """Raise this process's limit of open files, and so that of what it starts.

    Raises:
        SystemExit: where the system does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(
            f"this takes {wanted} open files a process, and the system allows {hard}: "
            f"raise the hard limit (ulimit -Hn {wanted}), or ask for fewer workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

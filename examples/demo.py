"""The demo: three workers train one model to read handwritten letters.

    make demo        or        .venv/bin/python examples/demo.py

It starts a private broker, draws handwritten letters, and starts a coordinator and three workers as
separate processes. Then it shows how well the model reads the letters that the workers held out,
and the letters of a fourth writer, on which no worker trained. Each step is an ordinary ``fluffle``
command, which is printed first; the README runs the same commands by hand in five terminals.

The demo has its own broker, federation and run folder (``.fluffle/demo``, ``demo``, ``runs/demo``),
so it does not disturb anything else that runs here. The output of each process is also in
``runs/demo-logs``.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

FEDERATION = "demo"
CLIENTS = 3
ROUNDS = 6
DATA = Path("data")
DATA_ELSEWHERE = Path("runs/demo-data")  # if `data` has other content
UNSEEN = f"writer-{CLIENTS + 1}"
RUN = Path("runs") / FEDERATION
LOGS = Path("runs/demo-logs")
STATE = Path(".fluffle/demo")
MODEL = RUN / f"round-{ROUNDS:04d}.safetensors"
FLUFFLE = shutil.which("fluffle", path=str(Path(sys.executable).parent)) or "fluffle"
TIMEOUT_S = 1200.0
LEAVE_S = 60.0  # for the workers to leave after the coordinator has ended
STOP_S = 15.0  # for a process to end after SIGINT
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COLOURS = {"coordinator": "1;36", "client-1": "32", "client-2": "33", "client-3": "35"}
IN_COLOUR = (
    sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
)


class Failed(Exception):
    """A command of the demo failed; the text names it and its log."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code if code > 0 else 1


class Interrupted(BaseException):
    """A signal asks the demo to stop: Ctrl-C, ``kill``, or a closed terminal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Signals:
    """Raises the first stop signal as `Interrupted`, but not inside a `deferred` block."""

    def __init__(self) -> None:
        self._deferring = False
        self._pending: int | None = None

    def install(self) -> None:
        """Install the handlers."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def ignore(self) -> None:
        """Ignore stop signals from now on, so that the clean-up is not interrupted."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Raise a signal only at the end of the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._pending is not None:
            number, self._pending = self._pending, None
            raise Interrupted(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.ignore()  # a second signal must not interrupt the clean-up
        if not self._deferring:
            raise Interrupted(number)
        self._pending = number


SIGNALS = Signals()


class Program:
    """A command in the background; its output is shown under its name and saved in a log."""

    def __init__(self, programs: list[Program], name: str, *words: object) -> None:
        self.name = name
        self.log = LOGS / f"{name}.log"
        say(f"\n{bold(shown(words))} &")
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        with SIGNALS.deferred():  # a signal between the two lines would leave a process behind
            self.process = start(words, stdout=pipe, stderr=out, encoding="utf-8", errors="replace")
            programs.append(self)
        self._reader = threading.Thread(target=self._echo, daemon=True)
        self._reader.start()

    def _echo(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(OSError), self.log.open("w", encoding="utf-8") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                if not line.isspace():  # a blank line follows the ^C of a terminal
                    say(labelled(self.name, line.rstrip("\n")))

    def ended(self) -> bool:
        """Return whether the command has ended.

        Raises:
            Failed: if it ended with an error.
        """
        code = self.process.poll()
        if code:
            self._reader.join(1)  # show its last lines first
            raise Failed(f"{self.name} ended with {reason(code)}; see {self.log}", code)
        return code is not None


def main() -> int:
    """Run the demo; return its exit code."""
    SIGNALS.install()
    began = time.monotonic()
    os.environ["FLUFFLE_STATE"] = str(STATE)
    for name in ("FLUFFLE_URL", "FLUFFLE_FEDERATION", "FLUFFLE_MANAGEMENT_URL"):
        os.environ.pop(name, None)  # they would select another broker
    programs: list[Program] = []
    lock = None
    try:
        LOGS.mkdir(parents=True, exist_ok=True)
        lock = hold_lock()
        say(bold(f"$ export FLUFFLE_STATE={STATE}"))
        run("broker", "up", "--port", "0")
        data = letters()
        train(data, programs)
        show(data)
        code = 0
    except Failed as why:
        explain(f"The demo failed: {why}.")
        code = why.code
    except Interrupted as why:
        say(f"\n{why}: stopping everything …")
        code = why.code
    except OSError as why:
        explain(f"The demo failed: {why}.")
        code = 1
    finally:
        SIGNALS.ignore()
        stop([program.process for program in programs])
        if lock and STATE.is_dir():
            run("broker", "down", check=False)
    if not code:
        explain(
            f"Done in {time.monotonic() - began:.0f} s. The models, the history and the charts "
            f"are in {RUN}/, the output of each process in {LOGS}/."
        )
        explain(
            "Next, run a federation by hand: see 'By hand, in five terminals' in README.md. To add "
            "rounds to this run, as the coordinator suggests, first run 'export "
            f"FLUFFLE_STATE={STATE}' in each terminal and 'fluffle broker up' in one."
        )
    return code


def hold_lock() -> IO[str]:
    """Return an open file that keeps other demos out of this folder until the process ends.

    Raises:
        Failed: if another demo runs here; it has the same broker and files.
    """
    lock = (LOGS / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failed(
            "another demo is running in this folder; wait until it has ended, or run the demo in "
            "another clone of the repository",
            1,
        ) from None
    return lock


def letters() -> Path:
    """Return the folder of the letters; generate them if they do not exist yet."""
    names = [*(f"client-{number}" for number in range(1, CLIENTS + 1)), UNSEEN]
    for folder in (DATA, DATA_ELSEWHERE):
        if all((folder / name).is_dir() for name in names):
            say(f"\nUsing the letters in {folder}/.")
            return folder
        if not folder.exists() or (folder.is_dir() and set(os.listdir(folder)) <= {".unfinished"}):
            break
        if folder == DATA:
            say(f"\n{folder}/ has other content, so the letters go into {DATA_ELSEWHERE}/.")
    run("letters", folder, "--clients", CLIENTS, "--per-client", 250, "--unseen", 1, "--seed", 1)
    return folder


def train(data: Path, programs: list[Program]) -> None:
    """Run the federation to its end, and show its queues during the second round."""
    federation = ("--federation", FEDERATION)
    rules = ("--quorum", CLIENTS, "--rounds", ROUNDS, "--fresh")
    first_model = RUN / "round-0001.safetensors"
    earlier = written_ns(first_model)  # an earlier run may have left its own
    coordinator = Program(programs, "coordinator", "coordinator", *federation, *rules)
    for number in range(1, CLIENTS + 1):
        folder = data / f"client-{number}"
        Program(programs, folder.name, "worker", *federation, "--data", folder)
    deadline, queues_shown = time.monotonic() + TIMEOUT_S, False
    while running := [program for program in programs if not program.ended()]:
        if time.monotonic() > deadline:
            raise Failed(f"{running[0].name} did not end in time; see {running[0].log}", 1)
        if coordinator not in running:
            deadline = min(deadline, time.monotonic() + LEAVE_S)
        elif not queues_shown and written_ns(first_model) not in (None, earlier):
            queues_shown = True
            run("queues", *federation, check=False)
        time.sleep(0.1)


def written_ns(file: Path) -> int | None:
    """Return when a file was last written, in nanoseconds; None if there is no file."""
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime_ns
    return None


def show(data: Path) -> None:
    """Show the results of the run."""
    explain(
        "Each client held out a tenth of its letters. The table shows how well the model of each "
        "round reads them. Dividing the model's outputs by the temperature calibrates them, so "
        "that the model's confidence matches its accuracy; 1 changes nothing."
    )
    run("history", RUN)
    run("plot", RUN, "--out", RUN / "accuracy.png")
    explain(
        "Those letters are new to the model, but their writers are not. No client has a letter of "
        f"{UNSEEN}, so the next figures show how well the model reads an unknown writer: "
        "first one letter, then all letters."
    )
    image = min((data / UNSEEN).glob("*/*.png"))
    run("predict", "--model", MODEL, "--image", image)
    matrix = RUN / "confusion.png"
    run("confusion", "--model", MODEL, "--data", data / UNSEEN, "--unseen", "--out", matrix)


def run(*words: object, check: bool = True) -> None:
    """Run one command to its end.

    Raises:
        Failed: if it fails and ``check`` is set.
    """
    say(f"\n{bold(shown(words))}")
    process = None
    try:
        with SIGNALS.deferred():
            process = start(words)
        code = process.wait()
    except Interrupted:
        stop([process] if process else [])
        raise
    if check and code:
        logs = f" and the logs in {STATE}/broker/log/" if words[0] == "broker" else ""
        raise Failed(
            f"'{shown(words)[2:]}' ended with {reason(code)}; see its output above{logs}", code
        )


def start(words: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """Start a command in its own session, so that Ctrl-C reaches the demo alone."""
    return subprocess.Popen(
        [FLUFFLE, *map(str, words)], stdin=subprocess.DEVNULL, start_new_session=True, **options
    )


def stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Send SIGINT to the processes that still run; kill those that do not end in time."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_S
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reason(code: int) -> str:
    """Return how a process ended: its exit code or its signal."""
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def shown(words: Sequence[object]) -> str:
    """Return a command as a user types it."""
    return f"$ fluffle {' '.join(map(str, words))}"


def bold(text: str) -> str:
    """Return text that a terminal shows in bold."""
    return f"\033[1m{text}\033[0m" if IN_COLOUR else text


def labelled(name: str, line: str) -> str:
    """Put a process's name before a line; on a terminal, wrap and indent long lines."""
    label = f"{name:<11} "
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns - len(label))
        rows = textwrap.wrap(line, width, subsequent_indent=" " * 10, break_on_hyphens=False)
        line = f"\n{' ' * len(label)}".join(rows)
    return f"\033[{COLOURS.get(name, '0')}m{label}\033[0m{line}" if IN_COLOUR else f"{label}{line}"


def explain(text: str) -> None:
    """Print a paragraph, wrapped to the terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    say(f"\n{textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)}")


def say(text: str) -> None:
    """Print, and continue even if nobody reads the output any more."""
    try:
        print(f"{text}\n", end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())

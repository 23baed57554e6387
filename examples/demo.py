"""The whole of it in one go: three workers teach one model to read handwriting.

    make demo        or        .venv/bin/python examples/demo.py

It starts a private broker, draws handwritten letters, starts a coordinator and three workers as
processes of their own, and then shows how well the model reads: letters that the workers held out,
and those of a fourth writer, whom no worker trained on. Everything it runs is an ordinary
``fluffle`` command, printed before it runs; the README does the same by hand in five terminals.

Broker, federation and run are the demo's own (``.fluffle/demo``, ``demo``, ``runs/demo``), so that
it disturbs nothing else that runs in this folder. What each process printed is also in
``runs/demo-logs``.
"""

from __future__ import annotations

import contextlib
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
from typing import Any

FEDERATION = "demo"
CLIENTS = 3
ROUNDS = 6
DATA = Path("data")
DATA_ELSEWHERE = Path("runs/demo-data")  # if there is something else in `data`
UNSEEN = f"writer-{CLIENTS + 1}"
RUN = Path("runs") / FEDERATION
LOGS = Path("runs/demo-logs")
STATE = Path(".fluffle/demo")
MODEL = RUN / f"round-{ROUNDS:04d}.safetensors"
FLUFFLE = shutil.which("fluffle", path=str(Path(sys.executable).parent)) or "fluffle"
PATIENCE_S = 1200.0
AFTER_S = 60.0  # for the workers to hear that the run has ended
STOP_S = 15.0
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COLOURS = {"coordinator": "1;36", "client-1": "32", "client-2": "33", "client-3": "35"}
IN_COLOUR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")


class Failed(Exception):
    """A part of the demo failed; the text says which, and where to look."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code if code > 0 else 1


class Ended(BaseException):
    """Somebody wants the demo to end: Ctrl-C, ``kill``, or a terminal that was closed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Signals:
    """Turns the first signal that asks for the end into `Ended`, at a moment that suits."""

    def __init__(self) -> None:
        self._holding = False
        self._kept: int | None = None

    def listen(self) -> None:
        """Begin to listen."""
        for number in ENDING:
            signal.signal(number, self._heard)

    def ignore(self) -> None:
        """Hear no more of them: what now follows is short, and must be done."""
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep a signal until the block has ended."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._kept is not None:
            kept, self._kept = self._kept, None
            raise Ended(kept)

    def _heard(self, number: int, _: FrameType | None) -> None:
        self.ignore()  # a second one would only disturb what the first one causes
        if not self._holding:
            raise Ended(number)
        self._kept = number


SIGNALS = Signals()


class Program:
    """A command in the background; its lines are shown, with its name, and kept in a file."""

    def __init__(self, programs: list[Program], name: str, *words: object) -> None:
        self.name = name
        self.log = LOGS / f"{name}.log"
        say(f"\n{bold(shown(words))} &")
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        with SIGNALS.held():  # else one between the two would leave a process behind
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
                say(labelled(self.name, line.rstrip("\n")))

    def ended(self) -> bool:
        """Tell whether it has ended well; raise Failed if it ended otherwise."""
        code = self.process.poll()
        if code:
            self._reader.join(1)  # its last words come first
            raise Failed(f"{self.name} ended with {reason(code)}: see {self.log}", code)
        return code is not None


def main() -> int:
    """Run the demo; return its exit code."""
    SIGNALS.listen()
    began = time.monotonic()
    os.environ["FLUFFLE_STATE"] = str(STATE)
    for name in ("FLUFFLE_URL", "FLUFFLE_FEDERATION", "FLUFFLE_MANAGEMENT_URL"):
        os.environ.pop(name, None)  # they would lead away from the broker of the demo
    programs: list[Program] = []
    try:
        LOGS.mkdir(parents=True, exist_ok=True)
        say(bold(f"$ export FLUFFLE_STATE={STATE}"))
        run("broker", "up", "--port", "0")
        data = letters()
        train(data, programs)
        show(data)
        code = 0
    except Failed as why:
        explain(f"The demo failed: {why}.")
        code = why.code
    except Ended as why:
        say(f"\n{why}: stopping everything …")
        code = why.code
    except OSError as why:
        explain(f"The demo failed: {why}.")
        code = 1
    finally:
        SIGNALS.ignore()
        stop([program.process for program in programs])
        if STATE.is_dir():
            run("broker", "down", check=False)
    if not code:
        explain(
            f"Done in {time.monotonic() - began:.0f} s. The models, the history and the pictures "
            f"are in {RUN}/, what each process printed in {LOGS}/."
        )
    return code


def letters() -> Path:
    """Return the folder of the letters, drawn if they are not there yet."""
    wanted = [*(f"client-{number}" for number in range(1, CLIENTS + 1)), UNSEEN]
    for folder in (DATA, DATA_ELSEWHERE):
        if all((folder / name).is_dir() for name in wanted):
            say(f"\nThe letters in {folder}/ are there already.")
            return folder
        if not folder.exists() or (folder.is_dir() and set(os.listdir(folder)) <= {".unfinished"}):
            break
        if folder == DATA:
            say(f"\n{folder} holds something else: the letters go into {DATA_ELSEWHERE}/.")
    run("letters", folder, "--clients", CLIENTS, "--per-client", 250, "--unseen", 1, "--seed", 1)
    return folder


def train(data: Path, programs: list[Program]) -> None:
    """Run the federation to its end, with a look into its queues in the second round."""
    federation = ("--federation", FEDERATION)
    rules = ("--quorum", CLIENTS, "--rounds", ROUNDS, "--fresh")
    coordinator = Program(programs, "coordinator", "coordinator", *federation, *rules)
    for number in range(1, CLIENTS + 1):
        folder = data / f"client-{number}"
        Program(programs, folder.name, "worker", *federation, "--data", folder)
    until, looked = time.monotonic() + PATIENCE_S, False
    while running := [program for program in programs if not program.ended()]:
        if time.monotonic() > until:
            raise Failed(f"{running[0].name} is not done in time: see {running[0].log}", 1)
        if coordinator not in running:
            until = min(until, time.monotonic() + AFTER_S)
        elif not looked and (RUN / "round-0001.safetensors").exists():
            looked = True
            run("queues", *federation, check=False)
        time.sleep(0.1)


def show(data: Path) -> None:
    """Show what came of the run."""
    explain(
        "Each client held out a tenth of its letters. On those, the model of each round did as "
        "follows. The temperature is what the model's outputs are divided by so that it is as sure "
        "as it is right; 1 changes nothing."
    )
    run("history", "--run", RUN)
    run("plot", "--run", RUN, "--out", RUN / "accuracy.png")
    explain(
        "Those were other letters of writers that the model knows. None of the clients has any of "
        f"{UNSEEN}, so this is how well it reads a stranger: one letter first, then all."
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
        with SIGNALS.held():
            process = start(words)
        code = process.wait()
    except Ended:
        stop([process] if process else [])
        raise
    if check and code:
        more = f", and the logs in {STATE}/broker/log/" if words[0] == "broker" else ""
        raise Failed(f"'{shown(words)[2:]}' ended with {reason(code)}: see above{more}", code)


def start(words: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """Start a command in a session of its own: the demo hears Ctrl-C, and ends what it started."""
    return subprocess.Popen(
        [FLUFFLE, *map(str, words)], stdin=subprocess.DEVNULL, start_new_session=True, **options
    )


def stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End what is still there, all at once, as Ctrl-C does; by force if it takes too long."""
    there = [process for process in processes if process.poll() is None]
    for process in there:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + STOP_S
    for process in there:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reason(code: int) -> str:
    """Say how a process ended."""
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def shown(words: Sequence[object]) -> str:
    """Return a command as one would type it."""
    return f"$ fluffle {' '.join(map(str, words))}"


def bold(text: str) -> str:
    """Print in bold on a terminal."""
    return f"\033[1m{text}\033[0m" if IN_COLOUR else text


def labelled(name: str, line: str) -> str:
    """Put a process's name before its line; on a terminal, wrap what is too long below the text."""
    label = f"{name:<11} "
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns - len(label))
        rows = textwrap.wrap(line, width, subsequent_indent=" " * 10, break_on_hyphens=False) or [
            ""
        ]
        line = f"\n{' ' * len(label)}".join(rows)
    return f"\033[{COLOURS.get(name, '0')}m{label}\033[0m{line}" if IN_COLOUR else f"{label}{line}"


def explain(text: str) -> None:
    """Print a few sentences, no wider than the terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    say(f"\n{textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)}")


def say(text: str) -> None:
    """Print, as long as anybody reads it."""
    try:
        print(f"{text}\n", end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())

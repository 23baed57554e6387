"""The whole of it in one go: three workers teach one model to read handwriting.

    make demo        or        .venv/bin/python examples/demo.py

It starts a private broker, draws handwritten letters for three clients, starts a coordinator and
three workers as processes of their own, and then shows what came of it. Everything it runs is an
ordinary ``fluffle`` command, printed before it runs; the README does the same by hand in five
terminals.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

CLIENTS = 3
ROUNDS = 6
DATA = Path("data")
RUN = Path("runs/letters")
MODEL = RUN / f"round-{ROUNDS:04d}.safetensors"
FLUFFLE = shutil.which("fluffle", path=str(Path(sys.executable).parent)) or "fluffle"
COLOURS = {"coordinator": "\033[1;36m", "client-1": "\033[32m", "client-2": "\033[33m"}


def main() -> int:
    """Run the demo; return its exit code."""
    began = time.monotonic()
    ours = run("broker", "status", quiet=True, check=False) != 0
    processes: list[subprocess.Popen[str]] = []
    try:
        if ours:
            run("broker", "up", "--port", "0")
        if not all((DATA / f"client-{n}").is_dir() for n in range(1, CLIENTS + 1)):
            run("letters", DATA, "--clients", CLIENTS, "--per-client", 250, "--seed", 1)
        federation = ("--federation", "letters")
        coordinator = start(
            "coordinator", *federation, "--quorum", CLIENTS, "--rounds", ROUNDS, "--fresh"
        )
        processes.append(coordinator)
        for number in range(1, CLIENTS + 1):
            processes.append(start("worker", *federation, "--data", DATA / f"client-{number}"))
        look_once_it_runs(coordinator)
        codes = [process.wait() for process in processes]
        if any(codes):
            return next(code for code in codes if code)
        show()
    finally:
        for process in processes:
            stop(process)
        if ours:
            run("broker", "down", check=False)
    print(f"\nDone in {time.monotonic() - began:.0f} s. The models and the history are in {RUN}/.")
    return 0


def show() -> None:
    """Show what came of the run."""
    run("history", "--run", RUN)
    run("plot", "--run", RUN, "--out", RUN / "accuracy.png")
    image = sorted((DATA / "client-1" / "a").iterdir())[0]
    run("predict", "--model", MODEL, "--image", image)
    run("confusion", "--model", MODEL, "--data", DATA / "client-1", "--out", RUN / "confusion.png")


def look_once_it_runs(coordinator: subprocess.Popen[str]) -> None:
    """Look into the queues while the second round is under way."""
    while coordinator.poll() is None and not (RUN / "round-0001.safetensors").exists():
        time.sleep(0.2)
    if coordinator.poll() is None:
        run("queues", "--federation", "letters", check=False)


def run(*words: object, quiet: bool = False, check: bool = True) -> int:
    """Run one command to its end; return its exit code, or end the demo where it failed."""
    command = [FLUFFLE, *map(str, words)]
    if not quiet:
        print(f"\n\033[1m$ fluffle {' '.join(command[1:])}\033[0m", flush=True)
    output = subprocess.DEVNULL if quiet else None
    code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if check and code:
        raise SystemExit(code)
    return code


def start(*words: object) -> subprocess.Popen[str]:
    """Start one command in the background, its lines marked with its name."""
    command = [FLUFFLE, *map(str, words)]
    print(f"\n\033[1m$ fluffle {' '.join(command[1:])} &\033[0m", flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    name = "coordinator" if words[0] == "coordinator" else Path(str(words[-1])).name
    assert process.stdout is not None
    threading.Thread(target=echo, args=(name, process.stdout), daemon=True).start()
    return process


def echo(name: str, lines: IO[str]) -> None:
    """Print the lines of a process."""
    for line in lines:
        print(f"{COLOURS.get(name, chr(27) + '[35m')}{name:<11}\033[0m {line}", end="", flush=True)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that is still there, as Ctrl-C does; by force if it takes too long."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

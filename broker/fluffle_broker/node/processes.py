"""What can be told about processes of this machine without any package: alive, since when, whose.

A process is named by its pid *and* its birth, as pids are used again. Zombies count as gone: only
their parent can do anything about them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_POLL_S = 0.05


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    birth: str


def birth(pid: int) -> str | None:
    """Say when process ``pid`` was born; None where none lives. Only to be compared."""
    if _has_proc():
        found = _read_proc(pid)
    else:
        found = next((each for each in _living() if each.pid == pid), None)
    return found.birth if found else None


def stop_tree(root: int, *, grace_s: float) -> bool:
    """Ask a process to end, wait for it and all below it, then kill what is left.

    Returns:
        Whether everything ended by itself within ``grace_s``.
    """
    tree = _tree(root)

    def gone() -> bool:
        living = set(_living())
        return not any(each in living for each in tree)

    _signal(root, signal.SIGTERM)
    if wait_until(gone, timeout_s=grace_s):
        return True
    # What was begun in the meantime, and orphans, which have another parent now.
    tree = {*_tree(root), *(each for each in _living() if each.pid in {one.pid for one in tree})}
    for each in tree:
        _signal(each.pid, signal.SIGKILL)
    wait_until(gone, timeout_s=5)
    return False


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    """Look until the condition holds or the time is over; return whether it holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_S)
    return True


def listener(port: int) -> str | None:
    """Name the process that listens on a TCP port, as "name (pid 123)", where it can be told."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in _living() if wanted else ():
        # Another user's process hides its files; a process may end while it is looked at.
        with contextlib.suppress(OSError):
            folder = _PROC / str(process.pid)
            if any(os.readlink(each) in wanted for each in (folder / "fd").iterdir()):
                return f"{(folder / 'comm').read_text().strip()} (pid {process.pid})"
    return None


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _tree(root: int) -> set[_Process]:
    living = list(_living())
    tree = {each for each in living if each.pid == root}
    while more := {
        each for each in living if each not in tree and each.parent in {one.pid for one in tree}
    }:
        tree |= more
    return tree


def _living() -> Iterator[_Process]:
    if _has_proc():
        for entry in _PROC.iterdir():
            if entry.name.isdigit() and (found := _read_proc(int(entry.name))):
                yield found
        return
    command = ["ps", "-axo", "pid=,ppid=,stat=,lstart="]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in shown.splitlines():
        fields = line.split(maxsplit=3)
        if len(fields) == 4 and not fields[2].startswith("Z"):
            yield _Process(int(fields[0]), int(fields[1]), fields[3].strip())


def _has_proc() -> bool:
    return (_PROC / "self" / "stat").exists()


def _read_proc(pid: int) -> _Process | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field, the name, stands in parentheses and may contain anything.
    state, parent, *rest = text[text.rindex(")") + 1 :].split()
    return None if state in "ZX" else _Process(pid, int(parent), rest[17])


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]

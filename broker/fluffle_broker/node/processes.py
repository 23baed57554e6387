"""Processes of this machine: since when one lives, what listens on a port, and ending a tree.

A process is named by its pid *and* its birth, as pids are used again. Zombies count as gone: only
their parent can do anything about them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil

_POLL_S = 0.05


def birth(pid: int) -> str | None:
    """Say when process ``pid`` was born; None where none lives. Only to be compared."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            # Since the boot, which does not change when the clock is set.
            return f"{process.create_time() - psutil.boot_time():.2f}"
    return None


def stop_tree(root: int, *, grace_s: float) -> bool:
    """Ask a process to end, wait for it and all below it, then kill what is left.

    Returns:
        Whether everything ended by itself within ``grace_s``.
    """
    try:
        top = psutil.Process(root)
        tree = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        top.terminate()
    if wait_until(lambda: not any(map(_lives, tree)), timeout_s=grace_s):
        return True
    # What was begun in the meantime; orphans have another parent now, and are in the tree.
    for each in list(tree):
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += [new for new in each.children(recursive=True) if new not in tree]
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    wait_until(lambda: not any(map(_lives, tree)), timeout_s=5)
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
    with contextlib.suppress(psutil.Error, OSError):  # another user's hides what it holds
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()} (pid {each.pid})"
    return None


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        # Whether it is the same process as before, and not another with its pid.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False

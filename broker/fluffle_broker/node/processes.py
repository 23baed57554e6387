"""Identifying processes, stopping process trees, and finding who listens on a port.

A process is identified by its pid *and* its start time, because pids are reused. Zombies count as
gone, since only their parent can remove them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_POLL_S = 0.05


def birth(pid: int) -> str | None:
    """Return a start time to compare with others; None if the process does not run."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            # Relative to the boot time, so that setting the clock does not change it.
            return f"{process.create_time() - psutil.boot_time():.2f}"
    return None


def stop_tree(root: int, *, grace_s: float) -> bool:
    """Stop a process and its descendants, at last by force; return whether ``grace_s`` sufficed."""
    try:
        top = psutil.Process(root)
        tree = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        top.terminate()
    if wait_until(lambda: not any(map(_lives, tree)), timeout_s=grace_s):
        return True
    # Add processes that were started meanwhile, also by orphans, which are in the list.
    for each in list(tree):
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += [new for new in each.children(recursive=True) if new not in tree]
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    wait_until(lambda: not any(map(_lives, tree)), timeout_s=5)
    return False


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    """Poll a condition until it holds or the time is up; return whether it holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_S)
    return True


def listener(port: int) -> str | None:
    """Return the process that listens on a TCP port as "name (pid 123)"; None if unknown.

    If it is the broker of another folder, that folder is named too.
    """
    with contextlib.suppress(psutil.Error, OSError):  # other users' processes are hidden
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                process = psutil.Process(each.pid)
                return f"{process.name()} (pid {each.pid}){_fluffle_broker(process)}"
    return None


def _fluffle_broker(process: psutil.Process) -> str:
    """Name the state folder of a node that ``fluffle broker up`` started, by its environment."""
    with contextlib.suppress(psutil.Error, OSError):
        folder = Path(process.environ().get("RABBITMQ_CONFIG_FILE", "")).parent.parent
        if (folder / "node.json").is_file():
            return f", the fluffle broker of {folder.parent}"
    return ""


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        # is_running() also checks that the pid was not reused.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False

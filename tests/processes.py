"""Processes that cannot say themselves how far they are."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time

import psutil

_PATIENCE_S = 60.0


def wait_until_computed(pid: int, seconds: float) -> None:
    """Wait until a process has computed for so long.

    Only then is one that has nothing left to do but a single call of C in this call.
    """
    process = psutil.Process(pid)
    begun = process.cpu_times().user
    end = time.monotonic() + _PATIENCE_S
    while process.cpu_times().user < begun + seconds:
        assert time.monotonic() < end, f"process {pid} does not compute"
        time.sleep(0.01)


def press_ctrl_c_until_it_ends(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int:
    """Send SIGINT until a process ends; return its code.

    The kernel merges signals that are sent before the process runs again, so two need not be two.
    """
    end = time.monotonic() + _PATIENCE_S
    while process.poll() is None:
        assert time.monotonic() < end, f"process {process.pid} does not end"
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    return process.returncode

"""What the jobs of a run share: a broker, or a folder that is expensive to make."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fluffle_broker.node import node, record


def _shared(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return the path of something in the folder of all jobs."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name


@contextlib.contextmanager
def shared_node(
    factory: pytest.TempPathFactory, name: str, *, advanced: str = "[].", **options: Any
) -> Iterator[node.NodeInfo]:
    """Run a private RabbitMQ that the first job starts and the last one stops.

    A test must not stop it, and must not disturb what others do on it. ``advanced`` is the text of
    advanced.config.

    Raises:
        BrokerError: if it cannot be started.
    """
    state = _shared(factory, name)
    etc = record.broker_folder(state) / "etc"
    etc.mkdir(parents=True, exist_ok=True)
    (etc / "advanced.config").write_text(advanced + "\n")
    # The system unlocks it if a job is killed.
    with (state / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        info = node.up(state, ports=node.Ports(0, 0, 0, 0, 0), **options)
        try:
            yield info
        finally:
            with contextlib.suppress(BlockingIOError):  # another job uses it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                node.down(state, grace_s=0)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first job has made; nobody may change it."""
    folder = _shared(factory, name)
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a job that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder

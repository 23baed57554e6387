"""The folder of a run in this process, and what happens to it afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from fluffle.results import Run
from fluffle_common.cli.console import warn
from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.storage.history import read_history_lines
from fluffle_coordinator.storage.run_store import RunStore


class Place:
    """The folder of a run: the user's, or a temporary one.

    A temporary folder is deleted together with the ``Run`` that is returned to the user. If the run
    fails, the folder is kept if a round was committed, and the user is told how to continue.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.temporary = folder is None
        self.path = Path(tempfile.mkdtemp(prefix="fluffle-") if folder is None else folder)

    def handed_over(self, run: Run) -> Run:
        """Return ``run``; a temporary folder is deleted when ``run`` is garbage-collected."""
        if self.temporary:
            weakref.finalize(run, shutil.rmtree, self.path, ignore_errors=True)
        return run

    def how_to_go_on(self) -> str:
        """Return how to continue the run, for an error; empty if no round was committed."""
        done = committed(self.path)
        call = f"the same call with folder={str(self.path)!r} goes on with round {done + 1}"
        return f"; {call}" if done else ""

    def left(self, why: BaseException) -> None:
        """Delete or keep a temporary folder after a run that failed; warn if it is kept."""
        if self.temporary and not committed(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.temporary and not isinstance(why, RunError):  # a RunError already says so
            warn(f"the run is kept{self.how_to_go_on()}")


@contextlib.contextmanager
def place_of(folder: str | os.PathLike[str] | None) -> Iterator[Place]:
    """Yield the folder of a run; None makes a temporary one."""
    place = Place(folder)
    try:
        yield place
    except BaseException as why:
        place.left(why)
        raise


@contextlib.contextmanager
def locked(place: Place) -> Iterator[RunStore]:
    """Yield the locked store of a run folder, so that no other coordinator uses it.

    Raises:
        RunError: if another coordinator uses it.
    """
    store = RunStore(place.path)
    if not store.try_lock():
        raise RunError(f"another coordinator is at work in {place.path}; give another folder=")
    try:
        yield store
    finally:
        store.unlock()


def committed(folder: Path) -> int:
    """Return the number of the last round committed in a folder; 0 if there is none."""
    try:
        return max(int(line["round"]) for line in read_history_lines(folder))
    except UsageError:
        return 0

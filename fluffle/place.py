"""Where a run of this process is kept, and what becomes of the folder afterwards."""

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
    """Where a run is kept: a folder of the user's, or a temporary one.

    A temporary one goes when its run is no longer in use. If something goes wrong, it stays as long
    as there is a round to go on from, and the user is told of it.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.temporary = folder is None
        self.path = Path(tempfile.mkdtemp(prefix="fluffle-") if folder is None else folder)

    def handed_over(self, run: Run) -> Run:
        """Let a temporary folder go with a run."""
        if self.temporary:
            weakref.finalize(run, shutil.rmtree, self.path, ignore_errors=True)
        return run

    def how_to_go_on(self) -> str:
        """Say how a run goes on that has committed a round; nothing of any other."""
        done = committed(self.path)
        call = f"the same call with folder={str(self.path)!r} goes on with round {done + 1}"
        return f"; {call}" if done else ""

    def left(self, why: BaseException) -> None:
        """Say what is left of a run that did not come to its end."""
        if self.temporary and not committed(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.temporary and not isinstance(why, RunError):  # which says so itself
            warn(f"the run is kept{self.how_to_go_on()}")


@contextlib.contextmanager
def place_of(folder: str | os.PathLike[str] | None) -> Iterator[Place]:
    """Give a run its place; None makes a temporary folder."""
    place = Place(folder)
    try:
        yield place
    except BaseException as why:
        place.left(why)
        raise


@contextlib.contextmanager
def locked(place: Place) -> Iterator[RunStore]:
    """Keep every other coordinator out of a place.

    Raises:
        RunError: where one is at work there.
    """
    store = RunStore(place.path)
    if not store.try_lock():
        raise RunError(f"another coordinator is at work in {place.path}; give another folder=")
    try:
        yield store
    finally:
        store.unlock()


def committed(folder: Path) -> int:
    """Return how many rounds a folder holds."""
    try:
        return max(int(line["round"]) for line in read_history_lines(folder))
    except UsageError:
        return 0

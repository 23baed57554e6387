"""The folder of a run in this process, and what happens to it afterwards."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Self

from fluffle.results import Run, folder_path
from fluffle_common.cli.console import warn
from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.service.run_opening import usable
from fluffle_coordinator.storage.history import read_history_lines
from fluffle_coordinator.storage.run_store import RunStore


class _Kept:
    """An object whose life is that of a temporary folder."""

    def __deepcopy__(self, _: object) -> Self:
        return self


class RunFolder:
    """The folder of a run, locked while the context is open.

    A temporary folder is deleted together with the ``Run`` that is returned to the user and the
    rounds of its history. If the run fails, the folder is kept if a round was committed, and the
    user is told how to continue; after Ctrl-C, so is the user of any other folder.

    Without ``folder``, a temporary one is made.

    Raises:
        UsageError: if ``folder`` is not a path, or an empty text, which would mean the current
            folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        if folder == "":
            raise UsageError(
                "folder= is empty; give a folder, or omit folder= to use a temporary folder"
            )
        # Absolute, because the code of a task may change the current folder.
        self._given = None if folder is None else folder_path(folder).absolute()

    def __enter__(self) -> Self:
        """Create the folder, if it does not exist, and lock it.

        Raises:
            RunError: if it cannot be created or locked, or another coordinator uses it.
        """
        self.store = RunStore(self._given or Path(tempfile.mkdtemp(prefix="fluffle-")))
        with usable(self.store.shown):
            locked = self.store.try_lock()
        if not locked:
            holder = self.store.holder()
            raise RunError(
                f"another coordinator{f' ({holder})' if holder else ''} is using "
                f"{self.store.shown}; choose another folder with folder="
            )
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.store.unlock()
        temporary = self._given is None
        if error is None or not (temporary or isinstance(error, asyncio.CancelledError)):
            return
        if not committed(self.store.folder):
            if temporary:
                shutil.rmtree(self.store.folder, ignore_errors=True)
        elif not isinstance(error, RunError):  # a RunError already says how to continue
            warn(f"the committed rounds are kept{self._how_to_continue()}")

    def result(self, state: State) -> Run:
        """Return the run that ended in this state.

        Raises:
            RunError: if the run stopped before its end.
        """
        if state.outcome == "stopped":
            raise RunError(f"the run stopped: {state.reason}{self._how_to_continue()}")
        run = Run(self.store.folder)
        if self._given is None:
            run._kept = _Kept()
            weakref.finalize(run._kept, shutil.rmtree, self.store.folder, ignore_errors=True)
        return run

    def _how_to_continue(self) -> str:
        done = committed(self.store.folder)
        call = f"repeat the call with folder={str(self.store.shown)!r}"
        return f"; {call} to continue after round {done}" if done else ""


def committed(folder: Path) -> int:
    """Return the number of the last round committed in a folder; 0 if there is none."""
    try:
        return max(int(line["round"]) for line in read_history_lines(folder))
    except UsageError:
        return 0

"""A run as its folder records it, whoever ran it: its rounds, its models, and how it ended."""

from __future__ import annotations

import html
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluffle.history import History, Round
from fluffle_common.cli.printing import one_line
from fluffle_common.errors import UsageError
from fluffle_common.plural import plural
from fluffle_coordinator.cli.history_chart import history_chart
from fluffle_coordinator.storage.history import merged, read_history_lines
from fluffle_coordinator.storage.run_file import read_run_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fluffle_common.tensors.weights import Array


class Run:
    """A run, read from its folder; ``fluffle.run`` returns one.

    Args:
        folder: the folder of any run, such as ``runs/letters``.

    Raises:
        UsageError: if it is not a path, has no run, or the run has not committed a round yet.
    """

    _kept: object = None  # keeps a temporary folder alive, as do the rounds

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder_path(folder)
        self._lines = read_history_lines(self.folder)

    @cached_property
    def history(self) -> History:
        """The rounds, as rows (``run.history[-1]``) and columns (``run.history["loss"]``)."""
        return History.of(merged(self._lines), self.folder, self._kept)

    @property
    def weights(self) -> dict[str, Array]:
        """The last round's model: its arrays by name, read from disk at each access."""
        return self.history[-1].weights

    @property
    def best(self) -> Round:
        """The round with the lowest loss, federated or else of the test; without one, the last.

        For another metric, use ``run.history.best("accuracy")``.
        """
        for metric in ("loss", "test/loss"):
            if metric in self.history.columns:
                return self.history.best(metric)
        return self.history[-1]

    @property
    def id(self) -> str:
        """The run's id, on the wire and in its files."""
        return str(read_run_file(self.folder).get("run", ""))

    @property
    def reason(self) -> str:
        """Why the run ended, such as ``6 rounds are done``; empty if it has not ended."""
        last = self._lines[-1]
        return str(last.get("reason", "")) if last["event"] == "ended" else ""

    def plot(self, file: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the losses and the other metrics after each round.

        Args:
            file: a file to save the figure to; its suffix, such as ``.png``, gives the format.

        Returns:
            A matplotlib figure, which a notebook displays.

        Raises:
            UsageError: if matplotlib is not installed, or no round has a metric.
        """
        figure = history_chart(merged(self._lines))
        if file is not None:
            figure.savefig(file, dpi=150)
        return figure

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self.history!r}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._headline())}</p>{self.history._repr_html_()}"

    def _headline(self) -> str:
        end = f"; {one_line(self.reason)}" if self.reason else ""
        return f"Run {self.id}: {plural(len(self.history), 'round')} in {self.folder}{end}"


def folder_path(folder: Any) -> Path:
    """Return the path of a folder that a user named.

    Raises:
        UsageError: if it is not a path.
    """
    given = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
    if not isinstance(given, str) or "\0" in given:
        raise UsageError(f"folder = {folder!r} is not a path; use text such as 'runs/letters'")
    return Path(given)

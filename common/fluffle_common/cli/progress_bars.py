"""Progress bars of a fixed width; the text next to them is shortened to fit."""

from __future__ import annotations

import sys
from typing import IO, cast

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from fluffle_common.cli.printing import is_terminal

_BAR_WIDTH, _NARROW_BAR_WIDTH, _NARROW = 24, 12, 100
_LABEL_WIDTH = 9


class _Fitting:
    """The first of some texts that fits; the last one, truncated, if none does."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = (text for text in self._texts if cell_len(text) <= options.max_width)
        # Text, not markup: a description may contain brackets.
        yield Text(next(fitting, self._texts[-1]), no_wrap=True, overflow="ellipsis")


class _Description(ProgressColumn):
    """The description of a bar, or its field ``brief`` where the description does not fit."""

    def render(self, task: Task) -> _Fitting:
        """Return the description."""
        return _Fitting(task.description, task.fields.get("brief") or task.description)


class _Shortened:
    """The bars, with room at the end of each line.

    The terminal shows Ctrl-C as ``^C`` behind the last bar. If that began a new line, the first
    bar would not be erased.
    """

    def __init__(self, bars: RenderableType) -> None:
        self._bars = bars

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Constrain(self._bars, options.max_width - len("^C"))


class _Bars(Progress):
    def get_renderable(self) -> RenderableType:
        return _Shortened(super().get_renderable())


def progress_on(stream: object) -> Progress:
    """Return a progress display on a stream."""
    console = Console(file=cast("IO[str]", stream), highlight=False, emoji=False)
    width = _BAR_WIDTH if console.width >= _NARROW else _NARROW_BAR_WIDTH
    return _Bars(
        TextColumn(
            f"{{task.fields[label]:<{_LABEL_WIDTH}}}",  # padded, so that all bars are aligned
            style="bold",
            markup=False,
            table_column=Column(no_wrap=True, min_width=_LABEL_WIDTH),
        ),
        BarColumn(bar_width=width, table_column=Column(no_wrap=True, min_width=width)),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=4)),
        _Description(Column(no_wrap=True, ratio=1)),
        console=console,
        expand=True,
        # If stderr goes to a file, leave it there.
        redirect_stderr=is_terminal(sys.stderr),
    )

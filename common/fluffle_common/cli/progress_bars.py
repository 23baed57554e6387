"""Progress bars on a terminal: a bar keeps its width, the text beside it gives way."""

from __future__ import annotations

import sys
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from fluffle_common.cli.printing import is_terminal

_BAR_WIDTH, _NARROW_BAR_WIDTH, _NARROW = 24, 12, 100
_LABEL_WIDTH = 9


class _Label(ProgressColumn):
    """What a bar counts, at the same width for all bars, or they would not be aligned."""

    def render(self, task: Task) -> Text:
        """Return the label."""
        return Text(f"{task.fields['label']:<{_LABEL_WIDTH}}", style="bold", no_wrap=True)


def progress_on(stream: object) -> Progress:
    """Return bars that are drawn on a stream."""
    console = Console(file=cast("IO[str]", stream), highlight=False)
    width = _BAR_WIDTH if console.width >= _NARROW else _NARROW_BAR_WIDTH
    return Progress(
        _Label(Column(no_wrap=True, min_width=_LABEL_WIDTH)),
        BarColumn(bar_width=width, table_column=Column(no_wrap=True, min_width=width)),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=4)),
        # Text, not markup: a description may hold brackets.
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=console,
        expand=True,
        # What goes to a file stays out of the bars' terminal.
        redirect_stderr=is_terminal(sys.stderr),
    )

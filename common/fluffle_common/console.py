"""What people see while something runs: bars on a terminal, plain lines in a pipe, or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, Any, Literal, Self

import click

LogFormat = Literal["auto", "plain", "json"]
_as_json = json.JSONEncoder(default=str).encode


class Console:
    """Writes events as lines, and progress as bars where a terminal is there to see them.

    Args:
        log_format: ``auto`` draws bars on a terminal and writes plain lines elsewhere.
        always: fields that every JSON line carries, such as the federation.
        stream: where to write; stdout unless told.
    """

    def __init__(
        self, log_format: LogFormat, always: Mapping[str, Any], stream: IO[str] | None = None
    ) -> None:
        self._stream = stream or sys.stdout
        self._json = log_format == "json"
        self._always = dict(always)
        self._bars: dict[str, Any] = {}
        self._progress: Any = None
        if log_format == "auto" and self._stream.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.fields[label]:<9}", style="bold"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=RichConsole(file=self._stream, highlight=False),
            )

    def __enter__(self) -> Self:
        """Begin to draw."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            for bar in self._bars.values():
                self._progress.remove_task(bar)
            self._progress.stop()

    @property
    def draws(self) -> bool:
        """Whether there is a terminal to draw bars on."""
        return self._progress is not None

    def line(
        self, event: str, text: Callable[[], str], fields: Mapping[str, Any] | None = None
    ) -> None:
        """Write one event: ``text`` for people, ``event`` and ``fields`` for programs."""
        if self._json:
            told = {"time": timestamp(), "event": event, **self._always, **(fields or {})}
            written = _as_json(told)
        else:
            written = f"{time.strftime('%H:%M:%S')}  {text()}"
        if self._progress is not None:
            self._progress.console.print(written, markup=False)
        else:
            self._stream.write(f"{written}\n")
            self._stream.flush()

    def bar(self, label: str, done: float, total: float, description: str = "") -> None:
        """Draw or move a bar; nothing happens where there is no terminal."""
        if self._progress is None:
            return
        if label not in self._bars:
            self._bars[label] = self._progress.add_task("", label=label, total=total)
        self._progress.update(
            self._bars[label], completed=done, total=total, description=description
        )


def timestamp() -> str:
    """Return the time now, UTC, as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def log_format_option(command: Any) -> Any:
    """Add ``--log-format`` to a command."""
    return click.option(
        "--log-format",
        type=click.Choice(["auto", "plain", "json"]),
        default="auto",
        show_default=True,
        help="auto: bars on a terminal, plain lines elsewhere; json: one object a line.",
    )(command)


def warn(text: str) -> None:
    """Write a line of warning to stderr."""
    click.echo(f"fluffle: {text}", err=True)

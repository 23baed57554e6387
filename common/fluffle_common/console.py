"""What people see while something runs: bars on a terminal, plain lines in a pipe, or JSON."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, Any, Literal, Self

import click
from pydantic_core import to_json

LogFormat = Literal["auto", "plain", "json"]
# So long a line may wait for others, so that they are written in one go.
_WITHIN_S = 0.02


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
        self._held: list[str] = []  # lines that are not written yet
        self._wrong: OSError | None = None  # what has become of those before
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
        """Write what is to be written, and leave the terminal as it was."""
        self._flush()
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
            told = {"time": timestamp("microseconds"), "event": event, **self._always}
            told.update(fields or {})
            written = json_line(told)
        else:
            written = f"{time.strftime('%H:%M:%S')}  {text()}"
        if self._progress is not None:
            self._progress.console.print(written, markup=False)
        else:
            self._hold(f"{written}\n")

    def _hold(self, line: str) -> None:
        """Keep a line for a moment, since several often follow each other, if there is a loop."""
        if self._wrong is not None:
            raise self._wrong
        self._held.append(line)
        if len(self._held) > 1:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._flush()
        else:
            loop.call_later(_WITHIN_S, self._flush_now)

    def _flush_now(self) -> None:
        try:
            self._flush()
        except OSError as why:  # nobody reads it any more, or the disk is full
            self._wrong = why  # the loop would only make a note of it

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held:
            self._stream.write("".join(held))
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


def json_line(told: Mapping[str, Any]) -> str:
    """Return JSON in one line, in ASCII; what JSON has no word for is said by ``str``."""
    try:
        return to_json(told, ensure_ascii=True, fallback=str).decode()
    except ValueError:  # not every name of a file is text
        return json.dumps(told, default=str, separators=(",", ":"))


def timestamp(timespec: str = "milliseconds") -> str:
    """Return the time now, UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=timespec)


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

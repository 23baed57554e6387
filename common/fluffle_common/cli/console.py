"""The output of a running program: progress bars, plain lines or JSON lines."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, Self

import click
from pydantic_core import to_json

from fluffle_common.cli.background_stream import BackgroundStream
from fluffle_common.cli.printing import (
    can_redraw,
    echo,
    echo_sentences,
    printable,
    visible_json,
    wrapped,
)
from fluffle_common.clock import time_is_simulated, timestamp, wall_time

if TYPE_CHECKING:
    from fluffle_common.protocol.events import RunEvent

LogFormat = Literal["auto", "plain", "json"]
# How long a line may wait for others, so that they are written together.
_WITHIN_S = 0.02
# How long to wait at the end until a slow terminal or pipe has taken the last lines.
_SETTLE_S = 2.0


class Console:
    """Writes events as lines, and draws progress bars if the output is a terminal.

    It never raises and never blocks, so a full disk or a stuck terminal cannot stop the program
    (see ``background_stream``).

    Args:
        log_format: ``auto`` draws bars on a terminal and writes plain lines elsewhere.
        always: fields that every JSON line contains, such as the federation.
        stream: the output stream; stdout by default.
    """

    def __init__(
        self, log_format: LogFormat, always: Mapping[str, Any], stream: IO[str] | None = None
    ) -> None:
        self._stream = BackgroundStream(stream or sys.stdout)
        self._json = log_format == "json"
        self._always = dict(always)
        self._pending: list[Callable[[], str]] = []  # render lines that are not written yet
        self._prompt = True  # whether the output has taken every line in time so far
        self._bars: dict[str, Any] = {}
        self._progress: Any = None
        if log_format == "auto" and can_redraw(self._stream):
            from fluffle_common.cli.progress_bars import progress_on

            self._progress = progress_on(self._stream)

    def __enter__(self) -> Self:
        """Start drawing bars."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write the remaining lines and restore the terminal."""
        self._flush()
        if self._progress is not None:
            for bar in self._bars.values():
                self._progress.remove_task(bar)
            self._progress.stop()
        self._stream.settle(_SETTLE_S)

    @property
    def draws(self) -> bool:
        """Whether bars are drawn."""
        return self._progress is not None

    def event(self, event: RunEvent) -> None:
        """Write an event: its sentence for people, its name and fields for programs.

        A traceback for people goes to stderr, unabridged, for the author of the task.
        """
        if event.verbatim and not self._json:
            echo(*event.sentence().splitlines(), err=True)
        else:
            self._record(event.name, event.sentence, event.fields)

    def line(self, name: str, text: str, fields: Mapping[str, Any] | None = None) -> None:
        """Write a line: ``text`` for people, ``name`` and ``fields`` for programs."""
        self._record(name, lambda: text, lambda: fields or {})

    def _record(
        self, name: str, sentence: Callable[[], str], fields: Callable[[], Mapping[str, Any]]
    ) -> None:
        if self._json:
            at = wall_time()
            self._write(lambda: self._as_json(at, name, fields()))
        else:
            clock = time.localtime()
            self._write(lambda: _as_text(clock, sentence()))

    def _as_json(self, at: float, name: str, fields: Mapping[str, Any]) -> str:
        return json_line(
            {"time": timestamp("microseconds", at), "event": name, **self._always, **fields}
        )

    def _write(self, render: Callable[[], str]) -> None:
        if self._progress is not None:
            width = self._progress.console.width
            text = wrapped(self._rendered(render), width)
            self._progress.console.print(text, markup=False, soft_wrap=True)
        else:
            self._hold(render)

    def _hold(self, render: Callable[[], str]) -> None:
        """Collect lines for a moment of real time if an event loop runs; else write at once.

        They are rendered when they are written, because that costs less for several at once, and
        no message of a round waits for it.
        """
        self._pending.append(render)
        if len(self._pending) > 1:
            return
        if time_is_simulated():
            self._flush()
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._flush()
            if self._prompt:  # do not wait again for an output that was slow once
                self._prompt = self._stream.settle(_SETTLE_S)
        else:
            loop.call_later(_WITHIN_S, self._flush)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            self._stream.write("".join([f"{self._rendered(render)}\n" for render in pending]))

    def _rendered(self, render: Callable[[], str]) -> str:
        try:
            return render()
        except Exception as wrong:  # a bug, which must not take the other lines with it
            text = f"a line cannot be shown ({wrong!r})"
            if self._json:
                return self._as_json(wall_time(), "unshown", {"reason": text})
            return _as_text(time.localtime(), text)

    def bar(
        self, label: str, done: float, total: float, description: str = "", brief: str = ""
    ) -> None:
        """Draw or update a bar; do nothing without a terminal.

        Where ``description`` does not fit next to the bar, ``brief`` takes its place.
        """
        if self._progress is None:
            return
        texts = {"description": printable(description), "brief": printable(brief)}
        if label not in self._bars:
            self._bars[label] = self._progress.add_task("", label=label, total=total)
        self._progress.update(self._bars[label], completed=done, total=total, **texts)


def _as_text(clock: time.struct_time, text: str) -> str:
    return f"{time.strftime('%H:%M:%S', clock)}  {printable(text)}"


def json_line(value: Any) -> str:
    """Return one line of ASCII JSON; NaN and infinity become null, other objects text."""
    try:
        text = to_json(value, ensure_ascii=True, inf_nan_mode="null", fallback=str).decode()
    except ValueError:  # a file name may not be valid Unicode
        text = json.dumps(finite(value), separators=(",", ":"))
    return visible_json(text)


def finite(value: Any) -> Any:
    """Return a value for JSON: numbers that are not finite become None, and other objects text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


log_format_option = click.option(
    "--log-format",
    type=click.Choice(["auto", "plain", "json"]),
    default="auto",
    show_default=True,
    help="Format of the log. 'auto' shows progress bars on a terminal and plain lines "
    "elsewhere; 'plain' always shows plain lines; 'json' shows one JSON object per line.",
)


def warn(text: str) -> None:
    """Write a warning to stderr."""
    echo_sentences(f"fluffle: {text}", err=True)

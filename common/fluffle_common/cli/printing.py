"""Printing to a terminal or a pipe, with untrusted text escaped and errors handled.

A reason, a tensor's name or a file's name may contain anything, such as an escape sequence that
rewrites the screen or a newline that forges a log line. All text that fluffle prints for people
therefore passes through ``printable``: lines in ``echo`` and ``Console``, tables in ``table``. JSON
is ASCII already.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from io import TextIOBase
from itertools import chain, islice
from operator import add
from typing import IO, TYPE_CHECKING, Any

from fluffle_common.errors import FluffleError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Characters that move the cursor, end a line, change the text direction, or are invisible: the
# Unicode categories Cc, Cf, Cs, Zl and Zp without joiners, which emoji and several scripts need.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e"
    "\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001-\U000e007f]"
)
_WIDTH_IN_A_PIPE = 140
_PIECES_AT_ONCE = 10_000  # of JSON text


class OutputError(FluffleError):
    """The output cannot be written."""


class ReaderGone(FluffleError):
    """The reader closed the pipe, as with ``| head``; this is not an error."""

    exit_code = 0


def printable(text: str) -> str:
    r"""Return a text with control and invisible characters escaped.

    >>> printable("north"), printable("no\nrth\x1b[2J")
    ('north', 'no\\nrth\\x1b[2J')
    """
    if text.isprintable():
        return text
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a text with all white space collapsed, and escaped by ``printable``."""
    return printable(" ".join(text.split()))


def echo(*lines: str, err: bool = False) -> None:
    """Print lines, escaped and flushed; raise ``ReaderGone`` (``| head``) or ``OutputError``."""
    _write(["".join(f"{printable(line)}\n" for line in lines or ("",))], err=err)


def echo_sentences(*lines: str, err: bool = False) -> None:
    """Print lines as ``echo`` does, but wrap them between words on a terminal."""
    if is_terminal(sys.stderr if err else sys.stdout):
        width = shutil.get_terminal_size().columns
        lines = tuple(wrapped(printable(line), width) for line in lines)
        _write(["".join(f"{line}\n" for line in lines)], err=err)
    else:
        echo(*lines, err=err)


def wrapped(line: str, width: int) -> str:
    """Wrap a line between words; the lines after the first are indented.

    A path or a URL that is longer than a line stays whole, so that it can be copied.
    """
    return textwrap.fill(
        line, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def echo_json(value: Any, *, indent: int | None = 2) -> None:
    """Print ASCII JSON, on one line if ``indent`` is None; raise what ``echo`` does."""
    encoder = json.JSONEncoder(indent=indent, default=str)
    # The text of a long history takes more memory than the history: it is written in pieces.
    pieces = iter([encoder.encode(value)] if indent is None else encoder.iterencode(value))
    texts = iter(lambda: "".join(islice(pieces, _PIECES_AT_ONCE)), "")
    _write(chain(map(visible_json, texts), "\n"))


def visible_json(text: str) -> str:
    """Escape DEL, the one control character that ASCII JSON may contain."""
    return text.replace("\x7f", "\\u007f")


def _write(texts: Iterable[str], *, err: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # closed before the process started (`>&-`)
        return
    for text in texts:
        with output_errors(quiet=err):
            stream.write(text)
    with output_errors(quiet=err):
        stream.flush()


@contextlib.contextmanager
def output_errors(*, quiet: bool = False) -> Iterator[None]:
    """Map errors of writing to ours; ``quiet`` suppresses them, since stderr itself fails."""
    try:
        yield
    except BrokenPipeError:
        if not quiet:
            raise ReaderGone from None
    except (OSError, ValueError) as why:  # a closed stream is a ValueError
        if not quiet:
            reason = getattr(why, "strerror", None) or why
            raise OutputError(f"cannot write the output ({reason})") from None


def screen() -> Console:
    """Return a rich console on stdout, with a fixed width unless stdout is a terminal."""
    from rich.console import Console

    class Screen(Console):
        def _write_buffer(self) -> None:
            with output_errors():
                super()._write_buffer()

    width = None  # as wide as the terminal is now; `watch` sets COLUMNS to its width
    if not is_terminal(sys.stdout):
        width = shutil.get_terminal_size((_WIDTH_IN_A_PIPE, 0)).columns
    stream = sys.stdout or open(os.devnull, "w")
    return Screen(file=stream, width=width, highlight=False, markup=False, emoji=False)


def table(*, caption: str | None = None, **options: Any) -> Table:
    """Return a rich table that escapes cells and caption; ``options`` go to rich."""
    from rich import box
    from rich.table import Table

    class Escaped(Table):
        def add_row(self, *cells: Any, **more: Any) -> None:
            super().add_row(
                *(printable(cell) if isinstance(cell, str) else cell for cell in cells), **more
            )

        def add_column(self, header: Any = "", *others: Any, **more: Any) -> None:
            text = printable(header) if isinstance(header, str) else header
            super().add_column(text, *others, **more)

    caption = caption if caption is None else printable(caption)
    return Escaped(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", **options)


def aligned(name: str, cells: Iterable[str], *, left: bool = False) -> list[str]:
    """Return a column for ``text_table``: its name and its cells, escaped, in the same width.

    >>> aligned("loss", ["0.5000", ""])
    ['  loss', '0.5000', '      ']
    """
    from rich.cells import cell_len

    texts = [printable(cell) for cell in (name, *cells)]
    width = max(map(cell_len, texts))
    spaces = [" " * (width - cell_len(text)) for text in texts]
    return list(map(add, texts, spaces) if left else map(add, spaces, texts))


def text_table(columns: Iterable[list[str]]) -> list[str]:
    """Return the lines of a table, which may have very many rows: rich needs a minute for those.

    >>> text_table([aligned("round", ["9", "10"]), aligned("loss", ["0.5000", ""])])
    ['round    loss', '    9  0.5000', '   10        ']
    """
    return list(map("  ".join, zip(*columns, strict=True)))


def is_terminal(stream: IO[str] | TextIOBase | None) -> bool:
    """Return whether a stream is a terminal; False if it is closed or None."""
    with contextlib.suppress(OSError, ValueError):
        return stream is not None and stream.isatty()
    return False


def can_redraw(stream: IO[str] | TextIOBase | None) -> bool:
    """Return whether a stream is a terminal that can move its cursor, unlike that of Emacs."""
    return is_terminal(stream) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def prepare_streams() -> None:
    """Make stdout and stderr safe for any text.

    A standard stream that is closed is opened on the null device, so that no other file or socket
    gets its number. Characters that the encoding lacks are escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # opens the lowest free descriptor, which is this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def settle_streams() -> None:
    """Flush stdout and stderr; drop unwritable text, which Python would retry at exit."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            continue
        try:
            stream.flush()
        except Exception:  # a user's code may have put any object here
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
            except Exception:
                setattr(sys, name, None)

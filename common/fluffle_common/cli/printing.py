"""The one way to a terminal or a pipe: other people's text is escaped, a failing output has a name.

A reason, a tensor's name or a file's name may hold anything, also an escape sequence that rewrites
the screen, or a newline that forges a line of the log. Everything that fluffle prints for people
passes through ``printable``: lines by ``echo`` and ``Console``, tables by ``table`` and ``screen``.
JSON is ASCII already.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from fluffle_common.errors import FluffleError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# What moves the cursor, ends a line, turns the direction of reading, or cannot be seen: Unicode's
# categories Cc, Cf, Cs, Zl and Zp. Joiners stay: emoji and several scripts are made with them.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e"
    "\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001-\U000e007f]"
)
_WIDTH_IN_A_PIPE = 140


class OutputError(FluffleError):
    """What was to be printed cannot be written."""


class ReaderGone(FluffleError):
    """Whoever reads the output has had enough, as in ``| head``; nothing is wrong."""

    exit_code = 0


def printable(text: str) -> str:
    r"""Return a text in one line in which everything can be seen.

    >>> printable("north"), printable("no\nrth\x1b[2J")
    ('north', 'no\\nrth\\x1b[2J')
    """
    if text.isprintable():
        return text
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a text of our own that may have several lines in one, with everything visible."""
    return printable(" ".join(text.split()))


def echo(*lines: str, err: bool = False) -> None:
    """Print lines for people, escaped, and at once.

    Raises:
        ReaderGone: when the reader has what it wanted (``| head``).
        OutputError: when they cannot be written for another reason, such as a full disk.
    """
    _write("".join(f"{printable(line)}\n" for line in lines or ("",)), err=err)


def echo_sentences(*lines: str, err: bool = False) -> None:
    """Print sentences as ``echo`` does; on a terminal, wrap them between words, indented."""
    if is_terminal(sys.stderr if err else sys.stdout):
        width = shutil.get_terminal_size().columns
        wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
        lines = tuple(wrap.fill(printable(line)) for line in lines)
        _write("".join(f"{line}\n" for line in lines), err=err)
    else:
        echo(*lines, err=err)


def echo_json(value: Any, *, indent: int | None = 2) -> None:
    """Print JSON, in ASCII, in one line if there is no indent; raises what ``echo`` does."""
    _write(f"{visible_json(json.dumps(value, indent=indent, default=str))}\n")


def visible_json(text: str) -> str:
    """Escape the one control character that JSON in ASCII may hold as it is."""
    return text.replace("\x7f", "\\u007f")


def _write(text: str, *, err: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # the process was started without it (`>&-`)
        return
    with named_errors(quiet=err):
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def named_errors(*, quiet: bool = False) -> Iterator[None]:
    """Turn an error of stdout into one line; ``quiet`` drops it, as there is nowhere to say it."""
    try:
        yield
    except BrokenPipeError:
        if not quiet:
            raise ReaderGone from None
    except (OSError, ValueError) as why:  # a closed stream is a ValueError
        if not quiet:
            reason = getattr(why, "strerror", None) or why
            raise OutputError(f"cannot write the output ({reason})") from None


def screen(*, width_in_a_pipe: int = _WIDTH_IN_A_PIPE) -> Console:
    """Return where tables are drawn: as wide as the terminal, and wide enough in a pipe."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise ReaderGone from None

        def _write_buffer(self) -> None:
            with named_errors():
                super()._write_buffer()

    width = None if is_terminal(sys.stdout) else width_in_a_pipe
    stream = sys.stdout or open(os.devnull, "w")
    return Screen(file=stream, width=width, highlight=False, markup=False)


def table(*, caption: str | None = None, **options: Any) -> Table:
    """Return a table whose cells and caption are escaped; ``options`` are those of rich."""
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


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal; one that is closed or missing is not."""
    with contextlib.suppress(OSError, ValueError):
        return stream is not None and stream.isatty()
    return False


def prepare_streams() -> None:
    """Make stdout and stderr ready for every text, whatever they can print and wherever they go.

    A stream that the process was started without gets the null device, so that no file or socket
    of ours takes its place, and a character that an encoding lacks is escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def settle_streams() -> None:
    """Flush stdout and stderr; drop what cannot be written, or it would be tried again at exit."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)

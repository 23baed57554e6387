"""The command line of a benchmark: its options and the output of its results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--json``.

    Args:
        name: the name of the module in ``benchmarks``.
        doc: its docstring, whose first line becomes the description.
    """
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(doc or "").partition("\n")[0]
    )
    options.add_argument("--json", action="store_true", help="print the results as one JSON object")
    return options


def listed(convert: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """Return the type of an option whose value lists several, separated by commas."""
    return lambda text: [convert(part) for part in text.split(",")]


def add_rounds(options: argparse.ArgumentParser) -> None:
    """Add ``--rounds``, whose default depends on the model's size (``stats.enough_rounds``)."""
    options.add_argument(
        "--rounds", type=int, help="rounds of each side that count (12; more for a small model)"
    )


def show(
    results: Mapping[str, Any],
    options: argparse.Namespace,
    as_text: Callable[[Mapping[str, Any]], str],
) -> None:
    """Print results as JSON or as text."""
    print(json.dumps(results) if options.json else as_text(results))


def report(text: str) -> None:
    """Print a line about the progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table as plain text; the first column is left-aligned, the others right-aligned.

    >>> print(table(["size", "ms"], [["1 MB", 3.14159], ["10 MB", None]]))
    size     ms
    1 MB   3.14
    10 MB     -
    """
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *others = row
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)

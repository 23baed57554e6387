"""What every benchmark is as a command: its options, and what it prints at the end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's options, with ``--json``.

    Args:
        name: the module's, below ``benchmarks``.
        doc: its docstring, whose first line is the description.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(doc or "").partition("\n")[0]
    )
    made.add_argument("--json", action="store_true", help="print one object")
    return made


def add_rounds(made: argparse.ArgumentParser) -> None:
    """Add ``--rounds``; None where it is not given, for ``figures.enough_rounds`` to say."""
    made.add_argument(
        "--rounds", type=int, help="rounds of each side that count (12; more of a small model)"
    )


def show(
    told: Mapping[str, Any],
    options: argparse.Namespace,
    as_text: Callable[[Mapping[str, Any]], str],
) -> None:
    """Print what was found, as was asked."""
    print(json.dumps(told) if options.json else as_text(told))

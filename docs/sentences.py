"""Prints random sentences from the docs, the help texts and the errors, to review their English."""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIDES = ("fluffle", "broker", "common", "coordinator", "worker")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_MIN_WORDS = 4  # a shorter text is a name, not a sentence


def of_page(path: Path) -> list[str]:
    """Return the sentences of a page, without tables, code and headings."""
    no_prose = r"(?ms)^ *```.*?^ *```|^ *(?:[|#!]|<!--).*?$"
    text = re.sub(no_prose, "", path.read_text(encoding="utf-8"))
    text = re.sub(r"(?m)^ *([-*]|\d+\.) ", "\n\n", text)  # each item of a list begins anew
    sentences = [each.split() for each in re.split(r"(?<=[.:])\s+(?=[A-Z*`-])|\n\n", text)]
    return [" ".join(words) for words in sentences if len(words) >= _MIN_WORDS]


def of_code() -> Iterator[tuple[str, str]]:
    """Yield ``("help", text)`` for every option and ``("error", text)`` for every ``raise``."""
    for side in SIDES:
        for path in sorted((ROOT / side).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "help":
                    yield "help", ast.unparse(node.value)
                elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    yield from (("error", ast.unparse(text)) for text in node.exc.args[:1])


def main() -> None:
    """Print the sentences of each kind under a heading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "seed", type=int, nargs="?", default=1, help="of the sample (default: %(default)s)"
    )
    parser.add_argument(
        "count", type=int, nargs="?", default=10, help="per page and kind (default: %(default)s)"
    )
    options = parser.parse_args()
    kinds = {str(page.relative_to(ROOT)): of_page(page) for page in PAGES}
    for kind, text in of_code():
        if len(text.split()) >= _MIN_WORDS:
            kinds.setdefault(kind, []).append(text)
    draw = random.Random(options.seed)
    for kind, texts in kinds.items():
        sample = draw.sample(texts, min(options.count, len(texts)))
        sys.stdout.write("\n".join((f"\n# {kind}", *sample)) + "\n")


if __name__ == "__main__":
    main()

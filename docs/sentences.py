"""Prints sentences of fluffle drawn at random, so that a fresh reader can judge their English.

python docs/sentences.py 1 10       seed 1, ten of each kind
"""

from __future__ import annotations

import ast
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIDES = ("fluffle", "broker", "common", "coordinator", "worker")
PAGES = ("README.md", "docs/guarantees.md", "docs/debugging.md")
_SHORTEST = 4  # words of a message, else it is a name


def of_page(path: Path) -> list[str]:
    """Return the sentences of a page's prose; tables, code and headings are left out."""
    text = re.sub(r"(?ms)^```.*?^```|^[|#!].*?$", "", path.read_text(encoding="utf-8"))
    found = re.split(r"(?<=[.:])\s+(?=[A-Z*`-])|\n\n", text)
    return [" ".join(one.split()) for one in found if len(one.split()) >= _SHORTEST]


def of_code() -> Iterator[tuple[str, str]]:
    """Yield ``("help", text)`` of every option and ``("error", text)`` of every ``raise``."""
    for side in SIDES:
        for path in sorted((ROOT / side).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "help":
                    yield "help", ast.unparse(node.value)
                elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    yield from (("error", ast.unparse(one)) for one in node.exc.args[:1])


def main() -> None:
    """Write the sentences to stdout, a heading before each kind."""
    seed, count = (int(one) for one in (*sys.argv[1:], "1", "10")[:2])
    kinds = {page: of_page(ROOT / page) for page in PAGES}
    for kind, text in of_code():
        if len(text.split()) >= _SHORTEST:
            kinds.setdefault(kind, []).append(text)
    draw = random.Random(seed)
    for kind, texts in kinds.items():
        chosen = draw.sample(texts, min(count, len(texts)))
        sys.stdout.write("\n".join((f"\n# {kind}", *chosen)) + "\n")


if __name__ == "__main__":
    main()

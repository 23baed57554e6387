"""Draws the rooms of fluffle from its folders, for ``architecture.md``.

    python docs/rooms.py            writes the picture and the list into architecture.md
    python docs/rooms.py --check    ends with 1 if they are not what the folders say

A room is a folder of modules, and the first line of its ``__init__.py`` says what is in it. An
arrow leads from a room to a room that it imports.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("architecture.md")
SIDES = ("fluffle", "broker", "coordinator", "worker", "common")
BEGIN, END = "<!-- rooms: made by docs/rooms.py -->", "<!-- rooms: end -->"


def rooms() -> dict[str, Path]:
    """Return every folder that holds modules, by the name it is imported under."""
    found = {}
    for side in SIDES:
        base = ROOT if side == "fluffle" else ROOT / side
        for init in sorted(base.glob(f"{_package(side)}/**/__init__.py")):
            if init.parent.parent == base and len(list(init.parent.glob("*.py"))) == 1:
                continue  # nothing but rooms
            found[".".join(init.parent.relative_to(base).parts)] = init.parent
    return found


def _package(side: str) -> str:
    return side if side == "fluffle" else f"fluffle_{side}"


def arrows(names: set[str]) -> list[tuple[str, str]]:
    """Return which room imports which, each pair once, none from a room to itself."""
    graph = grimp.build_graph(*map(_package, SIDES))
    pairs = {
        (_room(module, names), _room(imported, names))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return sorted((one, other) for one, other in pairs if one and other and one != other)


def _room(module: str, names: set[str]) -> str:
    while module and module not in names:
        module = module.rpartition(".")[0]
    return module


def _short(room: str) -> str:
    return room.removeprefix("fluffle_").replace(".", "/")


def _side(room: str) -> str:
    return _short(room).partition("/")[0]


def _node(room: str) -> str:
    """Return what a room is called within the picture, where a side is a box of its own."""
    short = _short(room)
    return f"{short}_files" if short in SIDES else short.replace("/", "_")


def picture(names: list[str], pairs: list[tuple[str, str]]) -> str:
    """Return the rooms and arrows as a Mermaid flowchart, a box a side.

    Everyone may import ``common``: those arrows are drawn from side to side, or no other could be
    seen.
    """
    lines = ["flowchart TD"]
    for side in SIDES:
        lines.append(f"    subgraph {side}")
        for room in (one for one in names if _side(one) == side):
            inner = _short(room).partition("/")[2] or "(its own files)"
            lines.append(f'        {_node(room)}["{inner}"]')
        lines.append("    end")
    within = [(a, b) for a, b in pairs if _side(a) == _side(b)]
    lines += [f"    {_node(a)} --> {_node(b)}" for a, b in within]
    across = sorted({(_side(a), _side(b)) for a, b in pairs if _side(a) != _side(b)})
    lines += [f"    {a} ==> {b}" for a, b in across]
    return "\n".join(lines)


def contents() -> str:
    """Return what stands between the marks: the picture, and what is in each room."""
    found = rooms()
    names = sorted(found, key=lambda name: (SIDES.index(_side(name)), name))
    text = [
        "```mermaid",
        picture(names, arrows(set(found))),
        "```",
        "",
        "| room | what is in it |",
        "|---|---|",
    ]
    for name in names:
        told = ast.get_docstring(ast.parse((found[name] / "__init__.py").read_text())) or ""
        path = found[name].relative_to(ROOT)
        text.append(f"| [`{_short(name)}`](../{path}) | {told.splitlines()[0]} |")
    return "\n".join(text)


def page(text: str) -> str:
    """Return the page with its rooms drawn anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{contents()}\n{END}{after}"


def main() -> int:
    """Write the page, or check it."""
    text = PAGE.read_text(encoding="utf-8")
    drawn = page(text)
    if "--check" in sys.argv:
        return int(drawn != text)
    PAGE.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

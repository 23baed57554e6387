"""Generates the diagram and the table of packages in ``architecture.md``.

    python docs/packages.py            updates architecture.md
    python docs/packages.py --check    exits with 1 if architecture.md is out of date

Packages without modules are left out. The first line of its docstring describes a package, and an
arrow leads from a package to each package that it imports.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("architecture.md")
SIDES = ("fluffle", "broker", "coordinator", "worker", "common")
BEGIN, END = "<!-- packages: made by docs/packages.py -->", "<!-- packages: end -->"


def packages() -> dict[str, Path]:
    """Return the folder of every package, by its import name."""
    folders = {}
    for side in SIDES:
        base = ROOT if side == "fluffle" else ROOT / side
        for init in sorted(base.glob(f"{_package(side)}/**/__init__.py")):
            if init.parent.parent == base and len(list(init.parent.glob("*.py"))) == 1:
                continue  # the package of a side that has no modules of its own
            folders[".".join(init.parent.relative_to(base).parts)] = init.parent
    return folders


def _package(side: str) -> str:
    return side if side == "fluffle" else f"fluffle_{side}"


def arrows(names: set[str]) -> list[tuple[str, str]]:
    """Return the pairs of a package and another that it imports, each once."""
    graph = grimp.build_graph(*map(_package, SIDES), cache_dir=None)
    pairs = {
        (_package_of(module, names), _package_of(imported, names))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return sorted((one, other) for one, other in pairs if one and other and one != other)


def _package_of(module: str, names: set[str]) -> str:
    while module and module not in names:
        module = module.rpartition(".")[0]
    return module


def _short(package: str) -> str:
    return package.removeprefix("fluffle_").replace(".", "/")


def _side(package: str) -> str:
    return _short(package).partition("/")[0]


def _node(package: str) -> str:
    """Return a package's node id in the diagram, where the name of a side is that of its box."""
    short = _short(package)
    return f"{short}_files" if short in SIDES else short.replace("/", "_")


def picture(names: list[str], pairs: list[tuple[str, str]]) -> str:
    """Return the packages and arrows as a Mermaid flowchart with one box per side.

    Arrows between sides are merged into one per pair; otherwise those to ``common`` would hide all
    others.
    """
    lines = ["flowchart TD"]
    for side in SIDES:
        lines.append(f"    subgraph {side}")
        for name in (each for each in names if _side(each) == side):
            inner = _short(name).partition("/")[2] or "(its own files)"
            lines.append(f'        {_node(name)}["{inner}"]')
        lines.append("    end")
    within = [(a, b) for a, b in pairs if _side(a) == _side(b)]
    lines += [f"    {_node(a)} --> {_node(b)}" for a, b in within]
    across = sorted({(_side(a), _side(b)) for a, b in pairs if _side(a) != _side(b)})
    lines += [f"    {a} ==> {b}" for a, b in across]
    return "\n".join(lines)


def contents() -> str:
    """Return the text between the marks: the diagram and the table."""
    folders = packages()
    names = sorted(folders, key=lambda name: (SIDES.index(_side(name)), name))
    lines = [
        "```mermaid",
        picture(names, arrows(set(folders))),
        "```",
        "",
        "| package | what it contains |",
        "|---|---|",
    ]
    for name in names:
        docstring = ast.get_docstring(ast.parse((folders[name] / "__init__.py").read_text())) or ""
        path = folders[name].relative_to(ROOT)
        lines.append(f"| [`{_short(name)}`](../{path}) | {docstring.splitlines()[0]} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the text of the page with its generated part updated."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{contents()}\n{END}{after}"


def main() -> int:
    """Update the page, or check it."""
    text = PAGE.read_text(encoding="utf-8")
    updated = page(text)
    if "--check" in sys.argv:
        return int(updated != text)
    PAGE.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

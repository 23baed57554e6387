"""``docs/architecture.md`` says how the folders are, and where to look."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("packages", DOCS / "packages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_the_folders_as_they_are(drawing):
    text = drawing.PAGE.read_text(encoding="utf-8")
    assert drawing.page(text) == text, "run: python docs/packages.py"


def test_every_package_says_in_one_line_what_it_contains(drawing):
    rows = [line for line in drawing.contents().splitlines() if line.startswith("| [`")]
    assert len(rows) == len(drawing.packages())
    assert all(re.fullmatch(r"\| \[`[\w/]+`\]\(\.\./[\w/]+\) \| \S.*\S \|", row) for row in rows)


def test_the_changelog_names_pages_that_exist():
    text = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    missing = {
        name
        for name in re.findall(r"`(docs/[\w/]+\.\w+)`", text)
        if not (DOCS.parent / name).exists()
    }
    assert not missing


def test_the_classes_of_an_update_are_where_the_page_says():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(\w+)/([\w/.]+)` \|$", text, re.MULTILINE)
    assert rows
    for name, side, rest in rows:
        source = (DOCS.parent / side / f"fluffle_{side}" / rest).read_text(encoding="utf-8")
        assert f"class {name}" in source, name


def test_the_files_to_look_in_are_there():
    root = DOCS.parent
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"## Where to look for.*?(?=\n## )", text, re.DOTALL)
    named = re.findall(r"`((?:common|coordinator|worker|broker)/[\w/.]+)`", table)
    assert len(named) > 15
    for name in named:
        side, _, rest = name.partition("/")
        assert (root / side / f"fluffle_{side}" / rest).exists(), name


FOLDERS = ("benchmarks", "broker", "common", "coordinator", "docs", "examples", "fluffle", "worker")
FILES = [path for folder in FOLDERS for path in sorted((DOCS.parent / folder).rglob("*.py"))]
MOST_OF_A_FILE, MOST_OF_A_FUNCTION = 400, 60


def test_no_file_except_tests_has_more_than_400_lines():
    long = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: lines for path, lines in long.items() if lines > MOST_OF_A_FILE}


def test_no_function_except_in_tests_has_more_than_60_lines_besides_its_docstring():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) is not None else None
                lines = node.end_lineno - node.lineno + 1
                lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                if lines > MOST_OF_A_FUNCTION:
                    long.append(f"{path.name}: {node.name} has {lines} lines")
    assert not long

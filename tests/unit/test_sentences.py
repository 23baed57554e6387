"""The sentences of the docs: the script that samples them, and their lines."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (*DOCS.glob("*.md"), *(DOCS.parent / f"{name}.md" for name in ("README", "CHANGELOG")))


def output(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["sentences.py", *arguments])
    runpy.run_path(str(DOCS / "sentences.py"), run_name="__main__")
    return capsys.readouterr().out


def test_it_samples_every_page_the_help_texts_and_the_errors(monkeypatch, capsys):
    lines = output(monkeypatch, capsys).splitlines()
    pages = {f"# docs/{page.name}" for page in DOCS.glob("*.md")}
    assert {"# README.md", "# help", "# error", *pages} <= set(lines)
    assert lines == output(monkeypatch, capsys, "1", "10").splitlines()
    assert lines != output(monkeypatch, capsys, "2").splitlines()


def test_it_has_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        output(monkeypatch, capsys, "--help")
    assert ended.value.code == 0
    assert "(default: 10)" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_have_at_most_120_characters_and_no_inline_code_is_split(page):
    prose = re.sub(r"(?ms)^ *```.*?^ *```|^ *\|.*?$", "\n", page.read_text(encoding="utf-8"))
    assert [line for line in prose.splitlines() if len(line) > 120] == []
    # The odd parts between the backticks of a paragraph are code.
    paragraphs = re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", prose)
    code = [part for text in paragraphs for part in re.split("`+", text)[1::2]]
    assert [part for part in code if "\n" in part] == []

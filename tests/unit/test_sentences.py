"""The script that samples sentences of the docs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


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

"""Printing: untrusted text is escaped, and errors of the output are handled."""

from __future__ import annotations

import errno
import io
import json
import re
import subprocess
import sys
import types
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import SchemaError, SchemaValidator, core_schema

from fluffle_common.cli import app as cli
from fluffle_common.cli import printing
from fluffle_common.cli.printing import (
    OutputError,
    ReaderGone,
    echo,
    echo_json,
    one_line,
    printable,
    screen,
    table,
)
from fluffle_common.cli.progress_bars import progress_on
from fluffle_common.errors import FluffleError, RunError
from fluffle_common.protocol.events import REGISTRY, from_fields
from tests.history_lines import committed

ROOT = Path(__file__).resolve().parents[2]
ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = {"\u200c", "\u200d"}
HOSTILE = "a\x1b[2J\r\n12:00:00  finished\x9b31m\u202e\u2066\u2028\x07\udcffz"


def acts(text: str) -> list[str]:
    return [c for c in text if unicodedata.category(c) in ACTING and c not in JOINERS]


def test_control_and_invisible_characters_are_escaped():
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        category = unicodedata.category(character)
        if category in ACTING and character not in JOINERS:
            assert printable(character).startswith("\\"), hex(number)
            assert printable(character).isascii()
        elif category != "Cn":  # not assigned yet
            assert printable(character) == character


@given(st.text(st.characters(), max_size=50))
def test_printable_text_is_unchanged(text):
    shown = printable(text)
    assert not acts(shown)
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown


_odd = st.sampled_from([HOSTILE, "\x1b]0;title\x07"]) | st.text(st.characters(), max_size=10)
_value = _odd | st.integers() | st.floats() | st.none() | st.lists(_odd, max_size=2)
_fields = {field for name in REGISTRY for field in REGISTRY[name].field_names}


@given(
    st.sampled_from([*REGISTRY, "unheard of"]),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(_fields, _value) | {"metrics": st.dictionaries(_odd, _value)}
    ),
)
def test_every_event_sentence_is_printed_escaped_in_one_line(what, fields):
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        echo(from_fields(what, fields).sentence())
    assert not acts(out.getvalue().removesuffix("\n"))
    assert out.getvalue().count("\n") == 1


def test_cells_headers_and_captions_of_tables_are_escaped(capsys):
    rows = table(caption=HOSTILE)
    rows.add_column(HOSTILE)
    rows.add_row(HOSTILE)
    printing.screen().print(rows)
    shown = capsys.readouterr().out
    assert not acts(shown.replace("\n", ""))
    assert shown.count(r"\x1b[2J") == 3


def test_json_is_ascii_without_control_characters(capsys):
    echo_json({"name": HOSTILE + "\x7f"}, indent=None)
    shown = capsys.readouterr().out
    assert shown.removesuffix("\n").isprintable()
    assert json.loads(shown) == {"name": HOSTILE + "\x7f"}


def test_only_these_modules_print():
    """Any other way to a terminal would bypass the escaping."""
    around = re.compile(
        r"click\.(?:secho|echo)\b|\bprint\(|rich\.print|std(?:out|err)\.write|"
        r"from rich\.(?:console|table) import (?:Console|Table)\b"
    )
    allowed = {"printing.py", "background_stream.py", "progress_bars.py"}
    lines = [
        f"{path.name}: {line.strip()}"
        for side in ("broker", "common", "coordinator", "worker")
        for path in (ROOT / side).rglob("*.py")
        if path.name not in allowed
        for line in path.read_text().splitlines()
        if around.search(line) and not re.search(r"(screen\(.*\)|shown|console)\.print\(", line)
    ]
    # Imports for type annotations, and a spinner that shows only our own text.
    types = {line for line in lines if line.endswith(("import Table", "import Console"))}
    assert set(lines) - types == set()


@pytest.mark.parametrize(
    "wrong", [OSError(errno.ENOSPC, "No space left on device"), ValueError("closed file")], ids=str
)
def test_an_unwritable_output_is_an_error_in_one_line(monkeypatch, wrong):
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise wrong

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OutputError, match="cannot write the output"):
        echo("text")
    with pytest.raises(OutputError, match="cannot write the output"):
        printing.screen().print("text")
    monkeypatch.setattr(sys, "stderr", Full())
    echo("text", err=True)  # there is nowhere to say it


def test_a_closed_pipe_ends_the_command_quietly(monkeypatch):
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(ReaderGone):
        echo("text")
    with pytest.raises(ReaderGone):
        printing.screen().print("text")


# --- the program -------------------------------------------------------------------------------


@pytest.fixture
def raising(monkeypatch):
    """Return a function that makes the program raise and returns its exit code."""

    def run(wrong: BaseException) -> int:
        def fail(**_: object) -> None:
            raise wrong

        monkeypatch.setattr(cli.fluffle, "main", fail)
        return cli._exit_code()

    monkeypatch.delenv("FLUFFLE_DEBUG", raising=False)
    return run


def test_an_unexpected_error_is_one_line_with_its_place(raising, capsys):
    assert raising(KeyError("x\x1b[2J\ny")) == 1
    message = capsys.readouterr().err
    assert message.startswith("fluffle: unexpected error, caused by a bug in fluffle (KeyError: ")
    assert re.search(r", at app\.py:\d+\)", message)
    assert "FLUFFLE_DEBUG=1" in message
    assert len(message.splitlines()) == 1
    assert "\x1b" not in message


def test_ctrl_c_that_pydantic_wraps_is_no_bug(raising, capsys):
    class Interrupted:
        def __repr__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(SchemaError) as wrapped:
        SchemaValidator(core_schema.literal_schema([Interrupted()]))
    assert raising(wrapped.value) == 130
    assert not capsys.readouterr().err


def test_debug_shows_the_traceback(raising, capsys, monkeypatch):
    monkeypatch.setenv("FLUFFLE_DEBUG", "1")
    assert raising(KeyError("x")) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "cannot use /x/y (Permission denied)"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write a file (No space left on"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory"),
            "folder was removed; change",
        ),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "'ulimit -n 4096'"),
        (OSError(errno.ENFILE, "Too many open files in system"), "files on this machine"),
        (ModuleNotFoundError("No module", name="rpds"), "the package 'rpds' is missing"),
        (ExceptionGroup("g", [ValueError("inner")]), "ValueError: inner"),
    ],
)
def test_errors_of_the_system_are_not_reported_as_bugs(raising, capsys, wrong, message):
    assert raising(wrong) == 1
    assert message in capsys.readouterr().err


def test_a_fluffle_error_is_escaped_and_keeps_its_exit_code(raising, capsys):
    assert raising(RunError("tensor 'a\x1b[2J\nforged'")) == 4
    assert capsys.readouterr().err == "fluffle: tensor 'a\\x1b[2J forged'\n"
    assert isinstance(OutputError("x"), FluffleError)
    assert one_line("a\n\tb\x1b") == "a b\\x1b"


def test_the_json_of_a_long_list_is_written_in_pieces(monkeypatch):
    written = []
    stdout = types.SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stdout)
    value = [{"round": n, "reason": "\x7f"} for n in range(10_000)]
    echo_json(value)
    text = "".join(written)
    assert json.loads(text) == value
    assert "\x7f" not in text
    assert max(map(len, written)) < len(text) / 4


def test_what_json_cannot_hold_is_no_fault_of_the_output():
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="Circular"):
        echo_json(circle)


def test_an_object_in_place_of_stdout_that_raises_is_dropped_at_the_end(monkeypatch):
    class Raising:
        def flush(self) -> None:
            raise RuntimeError

    monkeypatch.setattr(sys, "stdout", Raising())
    printing.settle_streams()
    assert sys.stdout is None


RUN_HISTORY = "".join(
    f"{json.dumps(committed(number))}\n"
    for number in range(1, 1500)  # more than the 64 KiB that a pipe holds
)


@pytest.mark.parametrize(
    ("flags", "redirection", "code"),
    [
        ("", ">&- 2>&-", 0),
        ("", ">/dev/full", 1),
        ("--json", ">/dev/full", 1),
        ("", "| head -1", 0),
        ("--json", "| head -1", 0),
    ],
)
def test_a_command_without_a_usable_stdout_ends_without_a_traceback(
    tmp_path, redirection, code, flags
):
    (tmp_path / "history.jsonl").write_text(RUN_HISTORY)
    script = f"{sys.executable} -c 'from fluffle_common.cli.app import main; main()'"
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"set -o pipefail; {script} history {tmp_path} {flags} {redirection}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert len(done.stderr.splitlines()) == (redirection == ">/dev/full")
    assert done.returncode == code


def test_text_with_the_name_of_an_emoji_is_unchanged(capsys):
    rows = table()
    rows.add_column(":a:")
    rows.add_row("codec.py:x:0.5")
    screen().print(rows)
    screen().print("codec.py:b:1")
    printed = capsys.readouterr().out
    assert all(text in printed for text in (":a:", "codec.py:x:0.5", "codec.py:b:1"))
    bars = progress_on(io.StringIO())
    bars.console.print("codec.py:x:0.5")
    assert bars.console.file.getvalue() == "codec.py:x:0.5\n"

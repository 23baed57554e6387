"""The console: when lines are written, and what happens when the output is broken."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import json
import os
import select
import threading
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.text import Text

from fluffle_common.cli.background_stream import BackgroundStream
from fluffle_common.cli.console import _WITHIN_S, Console, json_line
from fluffle_common.clock import in_time_of
from fluffle_common.protocol.events import RunEvent

PATIENCE_S = 60.0


class Stream(io.StringIO):
    """A stream that counts writes and may be closed at the other end."""

    def __init__(self) -> None:
        super().__init__()
        self.writes, self.wrong = 0, None
        self.reads = threading.Event()  # whoever reads; clear: nobody takes anything
        self.reads.set()

    def write(self, text: str) -> int:
        self.reads.wait(PATIENCE_S)
        self.writes += 1
        if self.wrong is not None:
            raise self.wrong
        return super().write(text)


class Terminal(Stream):
    def isatty(self) -> bool:
        return True


async def written(console: Console) -> None:
    """Wait until all pending lines are written."""
    await asyncio.sleep(2 * _WITHIN_S)
    console._stream.settle(PATIENCE_S)


def events(stream: Stream) -> list[str]:
    return [json.loads(line)["event"] for line in stream.getvalue().splitlines()]


def test_without_an_event_loop_lines_are_written_at_once():
    stream = Stream()
    with Console("json", {"worker": "a"}, stream) as console:
        console.line("one", "")
        assert events(stream) == ["one"]
        console.line("two", "", {"round": 3})
        assert json.loads(stream.getvalue().splitlines()[1])["round"] == 3


async def test_in_simulated_time_lines_are_written_at_once():
    class Stopped:
        def time(self) -> float:
            return 0.0

        wall_time = time

    stream = Stream()
    with Console("plain", {}, stream) as console, in_time_of(Stopped()):
        console.line("disk", "the disk is full")
        console._stream.settle(PATIENCE_S)
        assert "the disk is full" in stream.getvalue()


async def test_lines_in_quick_succession_are_written_together():
    stream = Stream()
    with Console("json", {}, stream) as console:
        console.line("one", "")
        console.line("two", "")
        assert not stream.writes
        await written(console)
        assert (events(stream), stream.writes) == (["one", "two"], 1)


async def test_pending_lines_are_written_at_the_end():
    stream = Stream()
    with pytest.raises(KeyboardInterrupt), Console("plain", {}, stream) as console:
        console.line("one", "the last words")
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("the last words\n")


GONE = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EBADF, "Bad file descriptor"),
    ValueError("I/O operation on closed file."),
]


@pytest.mark.parametrize("kind", [Stream, Terminal])
@pytest.mark.parametrize("wrong", GONE, ids=str)
async def test_a_broken_output_never_raises(kind, wrong, capsys):
    stream = kind()
    with Console("auto", {}, stream) as console:
        stream.wrong = wrong
        for _ in range(3):
            console.line("one", "lost")
            console.bar("rounds", 1, 3, "going on")
            await written(console)
    error = capsys.readouterr().err
    assert error.count("cannot write the log") == 1
    assert "continuing without it" in error


async def test_writing_resumes_after_a_full_disk_and_counts_lost_lines():
    stream = Stream()
    with Console("plain", {}, stream) as console:
        stream.wrong = OSError(errno.ENOSPC, "No space left on device")
        for text in ("lost 1", "lost 2"):
            console.line("one", text)
            await written(console)
        stream.wrong = None
        console.line("two", "here again")
        await written(console)
    first, second = stream.getvalue().splitlines()
    assert first == "… 2 lines could not be written here"
    assert second.endswith("here again")


async def test_a_stuck_reader_does_not_block_the_writer():
    stream = Stream()
    stream.reads.clear()
    with Console("plain", {}, stream) as console:
        for _ in range(300):
            console.line("one", "x" * 10_000)  # more than may wait
            console._flush()
        assert stream.writes == 0  # none has ended
        stream.reads.set()
    assert "lines could not be written here" in stream.getvalue() or stream.writes


def test_without_an_event_loop_a_stuck_reader_is_waited_for_once(monkeypatch):
    monkeypatch.setattr("fluffle_common.cli.console._SETTLE_S", 0.05)
    stream = Stream()
    stream.reads.clear()
    waits = []
    with Console("plain", {}, stream) as console:
        settle = console._stream.settle
        monkeypatch.setattr(console._stream, "settle", lambda s: (waits.append(s), settle(s))[1])
        for _ in range(3):
            console.line("one", "text")
        assert len(waits) == 1
        stream.reads.set()


def test_a_process_without_stdout_writes_nowhere(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with Console("auto", {}) as console:
        console.line("one", "text")
        assert not console.draws


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_the_encoding_lacks_is_escaped(tmp_path, encoding):
    path = tmp_path / "log"
    with path.open("w", encoding=encoding) as file, Console("plain", {}, file) as console:
        console.line("one", "metric Ödem 字")
    text = path.read_text(encoding)
    assert text.rstrip("\n").endswith(
        {
            "ascii": r"metric \xd6dem \u5b57",
            "latin-1": r"metric Ödem \u5b57",
            "utf-8": "metric Ödem 字",
        }[encoding]
    )


def test_untrusted_text_is_escaped_into_one_line():
    stream = Stream()
    with Console("plain", {}, stream) as console:
        console.line("one", "reason\n12:00:00  committed \x1b[2J\u202eevil")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r"reason\n12:00:00  committed \x1b[2J\u202eevil")


class Unshowable(RunEvent):
    """An event with a bug."""

    def fields(self) -> dict[str, object]:
        raise KeyError("a field")

    def sentence(self) -> str:
        raise KeyError("a field")


@pytest.mark.parametrize(
    ("log_format", "stream"), [("plain", Stream()), ("json", Stream()), ("auto", Terminal())]
)
def test_an_event_that_cannot_be_shown_is_a_line_like_any_other(log_format, stream):
    with Console(log_format, {"federation": "letters"}, stream) as console:
        console.event(Unshowable())
        console.line("next", "next", {})
    assert "cannot be shown (KeyError('a field'))" in stream.getvalue()
    if log_format == "json":
        assert events(stream) == ["unshown", "next"]


def test_bars_keep_their_width_and_text_is_truncated(monkeypatch):
    for columns, width in ((60, 12), (80, 12), (120, 24)):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Terminal()
        with Console("auto", {}, stream) as console:
            text = "round 2: " + ", ".join(f"client-{n} training {n}/40" for n in range(1, 9))
            console.bar("rounds", 6, 6, "")
            console.bar("updates", 3, 3, text)
            console._progress.refresh()
            console._stream.settle(PATIENCE_S)
            drawn = Text.from_ansi(stream.getvalue()).plain
        lines = [line for line in drawn.splitlines() if line.startswith("updates")]
        assert lines[-1].startswith("updates   " + "━" * width + " 3/3"), lines
        assert cell_len(lines[-1]) <= columns - len("^C")  # else the first bar is not erased
        assert any(line.startswith("rounds    ") for line in drawn.splitlines())


def test_where_names_do_not_fit_a_bar_counts_take_their_place(monkeypatch):
    names = "round 2: client-1 training, client-2 training, client-3 training"
    for columns, shown in ((80, "round 2: 3 training"), (120, names)):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Terminal()
        with Console("auto", {}, stream) as console:
            console.bar("updates", 0, 3, names, "round 2: 3 training")
            console._progress.refresh()
            console._stream.settle(PATIENCE_S)
            drawn = Text.from_ansi(stream.getvalue()).plain
        assert any(line.rstrip().endswith(f"0/3  {shown}") for line in drawn.splitlines()), drawn


@pytest.mark.parametrize(("term", "draws"), [("dumb", False), ("xterm", True)])
def test_a_terminal_that_cannot_move_its_cursor_gets_no_bars(monkeypatch, term, draws):
    monkeypatch.setenv("TERM", term)
    stream = Terminal()
    with Console("auto", {}, stream) as console:
        assert console.draws == draws
        console.line("one", "a line")
    assert "a line\n" in stream.getvalue().replace("\r", "")


def test_a_long_line_on_a_terminal_continues_with_an_indent(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    path = "/a-long-path" * 10
    with Console("auto", {}, stream) as console:
        console.line("one", " ".join(["words"] * 30))
        console.line("two", f"see {path}")
        console._stream.settle(PATIENCE_S)
    assert path in stream.getvalue()  # it can be copied
    shown = [line for line in stream.getvalue().splitlines() if "words" in line]
    assert len(shown) == 3
    assert max(map(len, shown)) <= 80
    assert all(line.startswith("  words") for line in shown[1:])


@pytest.mark.parametrize(
    "value",
    [
        'Übergröße \n"',
        0.1,
        1e300,
        2**63,
        True,
        None,
        ["a", 1],
        {"of": {"w1": 3}},
        "no text: \udcff",
        "a delete: \x7f",
    ],
)
def test_json_lines_are_ascii(value):
    written = json_line({"value": value})
    assert written.isascii()
    assert written.isprintable()
    assert json.loads(written) == {"value": value}


def test_json_converts_other_types():
    entry = {"path": Path("/a"), "many": ("x", "y"), "none": float("nan"), "why": OSError("gone")}
    decoded = json.loads(json_line(entry))
    assert decoded == {"path": "/a", "many": ["x", "y"], "none": None, "why": "gone"}


def test_a_writable_output_needs_no_thread(tmp_path):
    with (tmp_path / "log").open("w") as file:
        stream = BackgroundStream(file)
        stream.write("ä line\n")
        assert (tmp_path / "log").read_text() == "ä line\n"
        assert stream._thread is None


def test_a_full_pipe_gets_the_rest_later():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe, os.fdopen(reader, "rb") as lines:
        stream = BackgroundStream(pipe)
        text = "0123456789abcde\n" * 2**13  # twice what the pipe holds
        stream.write(text)
        assert stream._thread is not None
        assert lines.read(len(text)) == text.encode()
        assert stream.settle(10)


def test_a_terminal_that_nobody_reads_does_not_block_the_writer():
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        stream = BackgroundStream(terminal)

        def write() -> None:
            for _ in range(2_000):  # much more than a terminal holds
                stream.write("0123456789abcde\n" * 8)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(20)
        still_writing = writing.is_alive()
        os.close(reader)  # which ends a write that waits
    assert not still_writing


def test_a_character_at_the_edge_of_a_full_pipe_stays_whole():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as pipe, os.fdopen(reader, "rb") as lines:
        room = select.PIPE_BUF
        filler = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) - room
        os.write(writer, b"." * filler)
        text = "…" * room + "\n"  # three bytes, which do not divide the room that is left
        stream = BackgroundStream(pipe)
        stream.write(text)
        assert lines.read(filler + len(text.encode())).decode()[filler:] == text
        assert stream.settle(10)


def test_a_line_that_a_full_disk_cut_off_counts_as_lost(tmp_path, monkeypatch):
    write, full = os.write, [OSError(errno.ENOSPC, "No space left on device")] * 2

    def limited(descriptor: int, data: memoryview) -> int:
        if not stream._lost_lines and data[:3] == b"ABC":
            return write(descriptor, data[:3])
        if full:
            raise full.pop()
        return write(descriptor, data)

    monkeypatch.setattr("os.write", limited)
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        stream = BackgroundStream(file)
        stream.write("ABCDEF\n")
        assert stream.settle(10)
        stream.write("here again\n")
        assert stream.settle(10)
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert lines == ["ABC… 1 line could not be written here", "here again"]

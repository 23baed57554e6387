"""Lines for people and programs: when they are written, and what is left of them."""

from __future__ import annotations

import asyncio
import io
import json
import math
from pathlib import Path

import pytest

from fluffle_common.console import Console, json_line

PATIENCE_S = 5.0


class Stream(io.StringIO):
    """Counts how often it is written to, and may be closed at the other end."""

    def __init__(self) -> None:
        super().__init__()
        self.writes, self.closed_there = 0, False
        self.written = asyncio.Event()

    def write(self, text: str) -> int:
        self.written.set()
        self.writes += 1
        if self.closed_there:
            raise BrokenPipeError
        return super().write(text)


def events(stream: Stream) -> list[str]:
    return [json.loads(line)["event"] for line in stream.getvalue().splitlines()]


def test_without_a_loop_every_line_is_written_at_once():
    stream = Stream()
    with Console("json", {"worker": "a"}, stream) as console:
        console.line("one", str)
        assert events(stream) == ["one"]
        console.line("two", str, {"round": 3})
        assert json.loads(stream.getvalue().splitlines()[1])["round"] == 3


async def test_lines_that_follow_each_other_are_written_in_one_go_a_moment_later():
    stream = Stream()
    with Console("json", {}, stream) as console:
        console.line("one", str)
        console.line("two", str)
        assert not stream.writes
        async with asyncio.timeout(PATIENCE_S):
            await stream.written.wait()
        assert (events(stream), stream.writes) == (["one", "two"], 1)


async def test_what_is_held_is_written_at_the_end():
    stream = Stream()
    with pytest.raises(KeyboardInterrupt), Console("plain", {}, stream) as console:
        console.line("one", lambda: "the last words")
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("the last words\n")


async def test_where_nobody_reads_any_more_the_next_line_says_so():
    stream = Stream()
    with Console("json", {}, stream) as console:
        stream.closed_there = True
        console.line("one", str)
        async with asyncio.timeout(PATIENCE_S):
            await stream.written.wait()
        with pytest.raises(BrokenPipeError):
            console.line("two", str)


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
    ],
)
def test_json_says_what_it_was_told_in_one_ascii_line(value):
    written = json_line({"value": value})
    assert written.isascii()
    assert "\n" not in written
    assert json.loads(written) == {"value": value}


def test_json_finds_a_word_for_everything():
    told = {"path": Path("/a"), "many": ("x", "y"), "none": float("nan"), "why": OSError("gone")}
    said = json.loads(json_line(told))
    assert math.isnan(said.pop("none"))
    assert said == {"path": "/a", "many": ["x", "y"], "why": "gone"}

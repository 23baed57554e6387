"""The list of ``fluffle rejected``, on terminals of different widths."""

from __future__ import annotations

import json
import time

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from fluffle_broker.cli import rejected as cli
from fluffle_broker.inspect.decode import decode_message
from fluffle_broker.inspect.rejected import Rejected
from fluffle_common.cli.printing import printable
from fluffle_common.protocol.topology import Queue
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker

REASON = (
    "the message belongs to run ef6d17eff8f5, but this coordinator runs 5ff8b96f6f8b; start the "
    "worker again\x1b[2J"
)
HEADERS = {"reason": REASON, "cause": "not_finite", "rejected_at": "2026-11-29T21:00:00+00:00"}


async def some_rejected() -> list[Rejected]:
    link = await MemoryBroker().open()
    await link.declare([Queue("q", "of a test")])
    for _ in range(2):
        await link.publish(b"", Properties(headers=HEADERS), exchange="", keys=["q"])
    messages = [await link.get("q") for _ in range(2)]
    return [
        Rejected(number, decode_message(message, "f", values=False))
        for number, message in enumerate(messages, 1)
        if message is not None
    ]


async def test_a_terminal_shows_the_reason_in_lines_of_its_own(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("fluffle_common.cli.printing.is_terminal", lambda _: True)
    cli._print_rows(await some_rejected())
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["#", "when", "kind", "worker", "round", "size", "cause"]
    rows = [number for number, line in enumerate(lines) if "not_finite" in line]
    assert rows == [0, 3]
    assert lines[0].split()[:3] == ["1", "2026-11-29", "21:00:00"]
    assert " ".join(line.strip() for line in lines[1:3]) == printable(REASON)
    assert max(map(cell_len, lines)) <= 80


async def test_times_are_local_and_a_sender_may_write_anything(monkeypatch, capsys):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for text, shown in ((HEADERS["rejected_at"], "2026-11-30 06:00:00"), ("soon", "?")):
            monkeypatch.setitem(HEADERS, "rejected_at", text)
            cli._print_rows(await some_rejected())
            assert capsys.readouterr().out.splitlines()[1].split("  ")[1].strip() == shown
    finally:
        monkeypatch.undo()
        time.tzset()


async def test_no_sender_can_hide_the_other_columns(capsys):
    link = await MemoryBroker().open()
    await link.declare([Queue("q", "of a test")])
    long = Properties(type="k" * 255, headers={"worker": "w" * 400, "cause": "c" * 400, **HEADERS})
    for sent in (long, long._replace(headers={**long.headers, "cause": "c" * 400})):
        await link.publish(b"", sent, exchange="", keys=["q"])
    messages = [decode_message(await link.get("q"), "f", values=False) for _ in range(2)]
    rejects = [Rejected(number, message) for number, message in enumerate(messages, 1)]
    cli._print_rows(rejects)
    header, first, _, second, _ = capsys.readouterr().out.splitlines()
    assert all(name in header for name in ("#", "when", "kind", "worker", "round", "size"))
    assert first.startswith("1")
    assert first.endswith("not_finite")
    assert second.startswith("2")
    assert second.rstrip().endswith("unknown")
    assert f"{'w' * 39}…" in first
    assert cell_len(first) < 140


@pytest.mark.parametrize(("flags", "numbers"), [(["-n", "1"], [2]), ([], [1, 2])])
async def test_json_lists_the_newest_messages_if_a_number_is_given(monkeypatch, flags, numbers):
    rejects = await some_rejected()
    monkeypatch.setattr(cli, "with_link", lambda *_: rejects)
    monkeypatch.setattr(cli, "available_figures", lambda *_: {})
    command = ["--federation", "f", "--url", "amqp://h", "--json", *flags]
    printed = json.loads(CliRunner().invoke(cli.rejected, command).output)
    assert printed["kept"] == 2
    assert [message["number"] for message in printed["messages"]] == numbers


def test_the_short_help_of_each_sub_command_is_complete():
    assert "..." not in CliRunner().invoke(cli.rejected, ["--help"]).output.partition("Commands")[2]

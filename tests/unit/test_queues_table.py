"""The table and the hints of ``fluffle queues``."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.cells import cell_len
from rich.console import Console

from fluffle_broker.inspect import queues
from fluffle_broker.inspect.queues import QueueOverview
from fluffle_broker.inspect.queues_table import build_table, group_quiet, hints, legend
from fluffle_common.cli.printing import screen
from fluffle_common.errors import BrokerError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import AccessRefused, Counts
from fluffle_common.transport.rabbitmq.management import Management, QueueFigures

TOPOLOGY = Topology("letters")
SHARED = ("journal", "presence", "rejected", "unrouted", "updates")


def queue(name: str, ready: int = 0, consumers: int = 0, **more: object) -> QueueFigures:
    figures = {"size_bytes": 7, "in_rate": 0.5, "out_rate": None, **more}
    full = f"letters.{name}"
    purpose = TOPOLOGY.purpose(full) or "?"
    return QueueFigures(full, purpose, ready, 0, consumers, **figures)  # type: ignore[arg-type]


def federation(workers: int, absent: int = 0, **more: object) -> QueueOverview:
    queues = [queue(name, consumers=int(name in ("updates", "presence"))) for name in SHARED]
    for number in range(workers):
        queues.append(queue(f"inbox.client-{number}", consumers=int(number >= absent)))
        queues.append(queue(f"outbox.client-{number}"))
    return QueueOverview(TOPOLOGY, queues, [], **more)  # type: ignore[arg-type]


def text(overview: QueueOverview, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(build_table(overview, width))
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize("workers", [3, 30, 300])
@pytest.mark.parametrize("width", [80, 120, 160])
def test_the_table_is_short_and_fits_the_width(workers, width):
    lines = text(federation(workers), width)
    assert len(lines) <= 13
    assert max(map(cell_len, lines)) <= width
    assert all(name in "\n".join(lines) for name in SHARED)
    assert ("purpose" in lines[0]) == (width >= 150)


def test_a_narrow_terminal_shows_all_names_and_the_first_figures():
    lines = text(federation(3), 44)
    assert lines[0].split() == ["queue", "ready", "unacked", "consumers"]
    assert all(
        any(line.split()[0] == name for line in lines) for name in (*SHARED, "inbox.client-2")
    )


def test_what_a_stream_never_reports_is_not_called_unknown():
    known = queue("updates", out_rate=0.0)
    stream = queue("journal", ready=5, size_bytes=None, type="stream")
    overview = QueueOverview(TOPOLOGY, [known, stream], [])
    assert legend(overview) == ["-  RabbitMQ does not report this figure for a stream"]
    row = text(overview, 80)[-1].split()
    assert (row[0], row[4], row[-1]) == ("journal", "-", "-")
    new = queue("rejected", size_bytes=None)
    assert legend(QueueOverview(TOPOLOGY, [new], [])) == [
        "?  unknown, because RabbitMQ has not reported this figure"
    ]
    assert not legend(QueueOverview(TOPOLOGY, [known], []))


def test_the_name_of_the_queue_of_a_page_is_not_wrapped_at_80_columns():
    overview = federation(1)
    overview.queues[-1] = queue("journal", 12_345, 123, size_bytes=123_456_000, in_rate=123.0)
    overview.queues.append(queue("tap.page-487bdd57", consumers=1))
    assert any(line.split()[0] == "tap.page-487bdd57" for line in text(overview, 80))


def test_only_empty_queues_of_a_kind_share_a_row():
    overview = federation(30)
    overview.queues.append(queue("inbox.busy", ready=3, consumers=1))
    for lock in ("lock", "lock2"):
        overview.queues.extend(queue(f"{lock}.inbox.client-{number}") for number in range(30))
    shown = {one.name: one for one in group_quiet(overview)}
    assert shown["inbox.* (30 empty)"].consumers == 30
    assert shown["inbox.* (30 empty)"].in_rate == pytest.approx(15)
    assert shown["inbox.* (30 empty)"].out_rate is None
    assert shown["inbox.busy"].ready == 3
    locks = {"lock.* (30 empty)", "lock2.* (30 empty)"}
    assert {"outbox.* (30 empty)", *locks, *SHARED} < shown.keys()


def test_each_hint_is_a_line_and_absent_workers_share_one():
    overview = federation(30, absent=15)
    overview.queues.append(queue("inbox.far", ready=2))
    overview.queues.append(queue("rejected", ready=1))
    lines = hints(overview)
    assert "inbox.far: worker far is not connected; 2 messages wait for it" in lines
    assert "rejected: 1 message rejected; see 'fluffle rejected --federation letters'" in lines
    names = ", ".join(f"client-{number}" for number in range(12))
    assert f"15 workers are not connected: {names} and 3 more" in lines
    assert len(lines) == 3


def test_hints_are_escaped():
    overview = federation(1)
    overview.queues.append(QueueFigures("letters.a\x1b[2J", "?", 1, 0, 0, 0, known=False))
    assert [line for line in hints(overview) if r"a\x1b[2J: foreign" in line]
    assert "\x1b[2J" not in "\n".join(text(overview, 80))


def test_there_are_no_hints_after_a_run():
    # The last worker's goodbye is still there.
    queues = [queue(name, ready=int(name == "presence")) for name in (*SHARED, "inbox.w1")]
    over = QueueOverview(TOPOLOGY, queues, [])
    assert over.at_rest
    assert not hints(over)
    waiting = QueueOverview(TOPOLOGY, [*over.queues, queue("inbox.w2", ready=1)], [])
    assert not waiting.at_rest
    assert len(hints(waiting)) == 4  # nobody reads updates and presence; w1; w2 and its message
    unknown = QueueOverview(TOPOLOGY, over.queues, [], note="the management API does not answer")
    assert not unknown.at_rest


def everything(terminal: int) -> bytes:
    """Read from a terminal until it is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # that is how Linux says so
        while piece := os.read(terminal, 65536):
            shown += piece
    return shown


def test_a_pipe_gets_a_hint_in_one_line_and_a_terminal_wraps_it(monkeypatch, capsys):
    from fluffle_broker.cli.queues import _show

    overview = federation(0)
    overview.queues.append(queue("inbox.far", ready=2))
    overview.queues[0] = queue("unrouted", ready=1)
    _show(overview)
    remedy = "fluffle peek unrouted --federation letters"
    line = f"! unrouted: 1 message matched no queue; see '{remedy}'"
    assert line in capsys.readouterr().out.splitlines()
    main, terminal = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    with ThreadPoolExecutor() as reading:  # a terminal holds little, and gives it in pieces
        shown_there = reading.submit(everything, main)
        with os.fdopen(terminal, "w") as stream:
            monkeypatch.setattr("sys.stdout", stream)
            _show(overview)
        shown = shown_there.result().decode()
    os.close(main)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(cell_len(line) for line in plain.splitlines()) <= 80
    assert "--federation" in plain


def test_a_pipe_is_as_wide_as_its_reader_says(monkeypatch, capsys):
    from fluffle_broker.cli.queues import _show

    widths = []
    for columns in ("60", ""):  # as `watch` sets it, and a shell does not
        monkeypatch.setenv("COLUMNS", columns)
        _show(QueueOverview(TOPOLOGY, [queue(name) for name in SHARED], []))
        assert (
            "see the last run with 'fluffle explain --federation letters'"
            in (capsys.readouterr().out.splitlines()[-1])
        )
        widths.append(screen().width)
    assert widths == [60, 140]


def test_without_a_coordinator_the_federations_of_the_broker_are_named(monkeypatch, capsys):
    from fluffle_broker.cli.queues import _show

    names = ["leters.inbox.w", "letters.updates", "digits.updates", "digits.journal", "other"]

    mistyped = Topology("leters")
    figures = [QueueFigures(names[0], "", 0, 0, 0, 0)]
    monkeypatch.setattr(Management, "queue_figures", lambda *_, **__: figures)
    monkeypatch.setattr(
        Management,
        "queues",
        lambda _, pattern: [{"name": name} for name in names if re.search(pattern, name)],
    )
    monkeypatch.setattr(Management, "alarms", lambda _: [])
    monkeypatch.setattr(queues, "_with_counts", lambda figures, _: figures)
    overview = queues.read_overview(Management("amqp://127.0.0.1/", "http://127.0.0.1"), mistyped)
    assert overview.others == ("digits", "letters")
    _show(overview)
    shown = " ".join(capsys.readouterr().out.split())
    assert "check --federation (this broker has digits, letters)" in shown
    assert "fluffle explain" not in shown
    _show(QueueOverview(TOPOLOGY, [queue(name) for name in SHARED], []))
    assert "fluffle explain --federation letters" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["terminal", "pipe", "json"])
def test_watching_an_idle_federation_shows_an_alarm(monkeypatch, capsys, kind):
    from fluffle_broker.cli import queues as command

    def once() -> QueueOverview:
        return QueueOverview(TOPOLOGY, [queue("updates")], ["disk"])

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "can_redraw", lambda _: kind == "terminal")
    monkeypatch.setattr("time.sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        command._watch(once, as_json=kind == "json")
    printed = capsys.readouterr()
    shown = printed.out if kind == "terminal" else printed.err
    assert "the broker has run out of disk" in shown


def test_a_queue_without_statistics_yet_is_counted_and_the_rest_is_unknown(monkeypatch):
    entry = {"name": "letters.updates", "type": "classic", "durable": True}

    async def counts(names: object, url: str) -> dict[str, Counts | None]:
        return {"letters.updates": Counts(ready=3, consumers=1)}

    monkeypatch.setattr(Management, "queues", lambda *_: [entry])
    monkeypatch.setattr(Management, "alarms", lambda _: [])
    monkeypatch.setattr(queues, "_counts", counts)
    (updates,) = queues.read_overview(Management("amqp://h/", "http://h"), TOPOLOGY).queues
    assert (updates.ready, updates.consumers) == (3, 1)
    assert (updates.unacknowledged, updates.size_bytes) == (None, None)


def test_queues_of_a_failed_node_are_not_counted(monkeypatch):
    names = ("letters.updates", "letters.lock.presence")
    states = ("running", "down")
    entries = [{"name": name, "state": state} for name, state in zip(names, states, strict=True)]
    counted = []

    async def counts(names: Iterable[str], url: str) -> dict[str, Counts | None]:
        counted.extend(names)
        return {}

    monkeypatch.setattr(Management, "queues", lambda *_: entries)
    monkeypatch.setattr(Management, "alarms", lambda _: [])
    monkeypatch.setattr(queues, "_counts", counts)
    assert len(queues.read_overview(Management("amqp://h/", "http://h"), TOPOLOGY).queues) == 2
    assert counted == ["letters.updates"]


def test_a_user_who_may_not_count_gets_the_statistics_or_the_remedy(monkeypatch):
    class Link:
        async def counts(self, queue: str) -> Counts:
            raise AccessRefused(f"the broker does not let user 'eve' read queue '{queue}'")

    @contextlib.asynccontextmanager
    async def open_once(_: object) -> AsyncIterator[Link]:
        yield Link()

    figures = [queue("updates")]
    api = Management("amqp://h/", "http://h")
    monkeypatch.setattr(queues, "open_once", open_once)
    monkeypatch.setattr(Management, "queue_figures", lambda *_, **__: figures)
    monkeypatch.setattr(Management, "alarms", lambda _: [])
    assert queues.read_overview(api, TOPOLOGY).queues == figures

    def no_answer(*_: object, **__: object) -> list[QueueFigures]:
        raise OSError("refused")

    monkeypatch.setattr(Management, "queue_figures", no_answer)
    with pytest.raises(BrokerError, match=r"user 'eve' read queue '.*'; give .*'monitoring'"):
        queues.read_overview(api, TOPOLOGY)

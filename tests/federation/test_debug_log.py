"""The debug log of a run, and that it costs nothing without ``--debug``."""

from __future__ import annotations

import logging
import re

import pytest

from fluffle_common.cli import debug_log
from fluffle_common.debug_loggers import ROOT, log_step, logger


@pytest.fixture
def listening():
    """Enable the loggers like ``--debug``, and disable them afterwards."""
    log = logging.getLogger(ROOT)
    before = log.level, list(log.handlers)
    debug_log.show_debug_log()
    debug_log.show_debug_log()  # a second call must not duplicate lines
    yield
    log.setLevel(before[0])
    log.handlers[:] = before[1]


class Unspeakable:
    def __repr__(self) -> str:
        raise AssertionError("it is put into words")


def test_each_event_and_each_link_has_a_debug_line(federated, listening, capsys):
    async def scenario(federation):
        coordinator = federation.coordinator(2)
        worker = federation.worker("a")
        federation.worker("b")
        await coordinator.log.until("committed")
        worker.line.cut()
        assert (await coordinator.end()).outcome == "finished"

    federated(scenario)
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3}  fluffle\.[a-z.]+  \S", line) for line in lines)
    text = "\n".join(line.split("  ", 1)[1] for line in lines)
    for line in (
        r"fluffle\.coordinator\.machine  Seen\(.*'a'.* -> .*Welcome\(",
        r"fluffle\.coordinator\.machine  Folded\(.* -> .*Commit\(",
        r"fluffle\.coordinator\.machine  Committed\(.* -> .*Ack\(",
        r"fluffle\.worker\.machine  Asked\(.* -> Begin\(",
        r"fluffle\.worker\.machine  Sent\(.* -> ",
        r"fluffle\.transport\.link  opened a link to ",
        r"fluffle\.transport\.link  closed the link after ",
        r"fluffle\.transport\.link  declaring Queue\(name='letters\.updates'",
    ):
        assert re.search(line, text), line
    assert "Tick(" not in re.sub(r".*Tick\(.* -> (?!nothing).*", "", text)


def test_nothing_is_formatted_without_debug(caplog):
    log_step(logger("coordinator.machine"), Unspeakable(), [Unspeakable()])
    assert not caplog.records


def test_only_long_effects_are_cut(caplog):
    caplog.set_level(logging.DEBUG, ROOT)
    log_step(logger("worker.machine"), "e" * 10_000, ["short", "f" * 10_000])
    (record,) = caplog.records
    event, effects = record.getMessage().split(" -> ")
    assert event.endswith("eee…")
    assert effects.startswith("'short', 'fff")
    assert len(record.getMessage()) < 1000

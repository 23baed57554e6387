"""``/metrics``: what ``promtool check metrics`` would say of it, and that labels are bounded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fluffle_common.errors import CAUSES
from fluffle_common.protocol.events import from_fields
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.feed import Feed
from fluffle_coordinator.dashboard.metrics import PHASES, ROLES, registry, role
from fluffle_coordinator.observe.run_view import OUTCOMES, STEPS
from fluffle_coordinator.observe.worker_view import ABSENT, STATES
from tests.history_lines import committed, participant

_NO_BASE_UNITS = re.compile(
    r"_(milliseconds?|ms|microseconds?|minutes?|hours?|days?|kilobytes?|kb|megabytes?|mb|percent|"
    r"bits?|celsius_degrees)(_|$)"
)
_TYPES = re.compile(r"_(counter|gauge|summary|histogram|metric)(_|$)")
_ABBREVIATIONS = re.compile(r"_(s|sec|secs|b|byte|second)(_total)?$")
_BOUNDED = {
    "version": None,
    "phase": set(PHASES),
    "state": {*STATES, *ABSENT},
    "outcome": set(OUTCOMES),
    "cause": set(CAUSES),
    "step": set(STEPS),
    "queue": set(ROLES),
}


def lint(families: list[Metric]) -> Iterator[str]:
    """Yield what is wrong with metrics, by the rules of ``promtool check metrics``."""
    seen: set[str] = set()
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        if name in seen:
            yield f"{name}: twice"
        seen.add(name)
        if not family.documentation.strip():
            yield f"{name}: no help"
        if not re.fullmatch(r"fluffle_[a-z][a-z0-9_]*", name):
            yield f"{name}: no name of ours in snake case"
        if family.type != "counter" and name.endswith("_total"):
            yield f"{name}: only counters end in _total"
        if family.type not in ("histogram", "summary") and re.search("_(count|sum|bucket)$", name):
            yield f"{name}: ends like a part of a summary"
        if _NO_BASE_UNITS.search(name) or _ABBREVIATIONS.search(name):
            yield f"{name}: not in a base unit, written out"
        if _TYPES.search(name):
            yield f"{name}: names its type"
        if family.type in ("unknown", "untyped"):
            yield f"{name}: no type"
        for sample in family.samples:
            for label, value in sample.labels.items():
                allowed = _BOUNDED.get(label, set())
                if allowed is not None and value not in allowed:
                    yield f"{name}: label {label} may be anything, such as {value!r}"


def families(board: Board) -> list[Metric]:
    """Return the metrics of a board, through the text that Prometheus reads."""
    text = generate_latest(registry(Feed(board))).decode()
    return list(text_string_to_metric_families(text))


def busy() -> Board:
    """Return a board that has taken in every kind of event, with hostile names."""
    board = Board("letters")
    board.add(1.0, from_fields("started", {"run": "r", "folder": "f"}))
    board.add(1.0, from_fields("connected", {}))
    for name in ("north", 'we"ird\n'):
        board.add(2.0, from_fields("joined", {"worker": name, "num_examples": 5}))
        board.add(2.0, from_fields("rejected", {"reason": name, "cause": "sender", "worker": name}))
        board.add(2.0, from_fields("rejected", {"reason": name, "cause": name, "worker": name}))
    board.add(
        3.0, from_fields("opened", {"round": 1, "asked": ["north"], "needed": 1, "deadline_s": 9.0})
    )
    counted = {"worker": "north", "round": 1, "num_examples": 5, "updates": 1, "needed": 1}
    board.add(5.0, from_fields("counted", {**counted, "bytes": 400}))
    for what in ("late", "duplicate"):
        board.add(6.0, from_fields(what, {"worker": "north", "round": 1, "num_examples": 5}))
    board.add(6.0, from_fields("failure", {"worker": "north", "round": 1, "reason": "x"}))
    timings = {f"{step}_s": 0.5 for step in STEPS} | {"surprise_s": 3.0}
    board.add(
        7.0, from_fields("committed", {"round": 1, "participants": ["north"], "timings": timings})
    )
    metrics = {"accuracy": 0.75, "their_own": 3.0}
    board.add(
        8.0,
        from_fields("evaluated", {"round": 1, "loss": 0.5, "num_examples": 2, "metrics": metrics}),
    )
    board.add(9.0, from_fields("disconnected", {"reason": "cut"}))
    figures = {"ready": 1, "unacknowledged": 2, "consumers": 3, "size_bytes": 4}
    queues = ("updates", "inbox.north", "inbox.south", "outbox.north", "made.by.hand")
    board.queues([{"name": f"letters.{name}", **figures} for name in queues])
    return board


def samples(board: Board) -> dict[str, float]:
    """Return every sample as ``name{label=value}``."""
    values = {}
    for family in families(board):
        for sample in family.samples:
            labels = ",".join(f"{label}={value}" for label, value in sample.labels.items())
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


@pytest.mark.parametrize("board", [Board("letters"), busy()], ids=["new", "busy"])
def test_they_pass_the_lint(board: Board) -> None:
    assert list(lint(families(board))) == []


def test_the_lint_finds_what_is_wrong() -> None:
    text = (
        "# TYPE fluffle_wait_ms gauge\nfluffle_wait_ms 1\n"
        "# HELP fluffle_rounds_total x\n# TYPE fluffle_rounds_total gauge\nfluffle_rounds_total 1\n"
        "# HELP fluffle_seen_gauge x\n# TYPE fluffle_seen_gauge gauge\n"
        'fluffle_seen_gauge{worker="north"} 1\n'
    )
    wrong = "\n".join(lint(list(text_string_to_metric_families(text))))
    for word in ("no help", "base unit", "only counters", "names its type", "label worker"):
        assert word in wrong


def test_what_they_say() -> None:
    values = samples(busy())
    expected = {
        "fluffle_rounds_committed_total": 1,
        "fluffle_round": 2,
        "fluffle_broker_linked": 0,
        "fluffle_broker_outages_total": 1,
        "fluffle_phase{phase=waiting}": 1,
        "fluffle_phase{phase=open}": 0,
        "fluffle_updates_total{outcome=counted}": 1,
        "fluffle_updates_total{outcome=late}": 1,
        "fluffle_updates_total{outcome=rejected}": 4,
        "fluffle_updates_total{outcome=duplicate}": 1,
        "fluffle_rejected_messages_total{cause=sender}": 2,
        "fluffle_rejected_messages_total{cause=malformed}": 2,
        "fluffle_rejected_messages_total{cause=tensors}": 0,
        "fluffle_received_update_bytes_total": 400,
        "fluffle_round_step_seconds_sum{step=open}": 0.5,
        "fluffle_round_step_seconds_count{step=open}": 1,
        "fluffle_last_commit_timestamp_seconds": 7,
        "fluffle_workers{state=idle}": 2,
        "fluffle_workers{state=gone}": 0,
        "fluffle_worker_failures_total": 1,
        "fluffle_federated_loss": 0.5,
        "fluffle_federated_accuracy_ratio": 0.75,
        "fluffle_queue_ready_messages{queue=inboxes}": 2,
        "fluffle_queue_size_bytes{queue=other}": 4,
    }
    assert {name: values[name] for name in expected} == expected


def test_a_restarted_coordinator_knows_when_the_run_had_its_last_commit() -> None:
    board = Board("letters")
    row = committed(1, participant("north"))
    board.view.remember([row])
    board.add(9e9, from_fields("resumed", {"run": row["run"], "round": 1}))
    at = datetime.fromisoformat(row["committed_at"]).timestamp()
    values = samples(board)
    assert values["fluffle_last_commit_timestamp_seconds"] == at
    assert values["fluffle_rounds_committed_total"] == 0


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ("letters.updates", "updates"),
        ("letters.inbox.a.b", "inboxes"),
        ("letters.outbox.a", "outboxes"),
        ("letters.mine", "other"),
        ("letters.other", "other"),
    ],
)
def test_the_role_of_a_queue(queue: str, expected: str) -> None:
    assert role(queue, "letters") == expected

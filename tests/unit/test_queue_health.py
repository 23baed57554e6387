"""Hints about queues, and figures from the management API."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluffle_common.cli import settings
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.management import Management, QueueFigures, read_queue
from fluffle_common.transport.rabbitmq.queue_health import hint

TOPOLOGY = Topology("f")


def figures(name: str, ready: int = 0, consumers: int = 1, **more: object) -> QueueFigures:
    purpose = TOPOLOGY.purpose(name)
    return QueueFigures(
        name, purpose or "", ready, 0, consumers, 0, known=purpose is not None, **more
    )


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (figures("f.inbox.w3", consumers=0), "worker w3 is not connected"),
        (
            figures("f.inbox.w.3", 1, consumers=0),
            "worker w.3 is not connected; 1 message waits for it",
        ),
        (figures("f.updates", consumers=0), "no coordinator is connected"),
        (
            figures("f.updates", 2, consumers=0),
            "no coordinator is connected; 2 messages wait for one",
        ),
        (figures("f.presence", consumers=0), "no coordinator is connected"),
        (
            figures("f.rejected", 1200, consumers=0),
            "1,200 messages rejected; see 'fluffle rejected",
        ),
        (figures("f.unrouted", 1, consumers=0), "1 message matched no queue; see 'fluffle peek"),
        (figures("f.updates", 50, growth_rate=3.0), "growing by 3 messages per second"),
        (figures("f.mine"), "foreign: fluffle uses no queue of this name in federation f"),
        (figures("f.updates", state="down"), "the state 'down'; check"),
        (replace(figures("f.updates"), consumers=0, ready=30, growth_rate=2.0), "; growing by 2"),
    ],
)
def test_problems_have_a_hint(queue, expected):
    assert expected in (hint(queue, TOPOLOGY) or "")


@pytest.mark.parametrize(
    "queue",
    [
        figures("f.inbox.w3"),
        figures("f.outbox.w3", 26, consumers=0),
        figures("f.updates", 3),
        figures("f.updates", 3, growth_rate=3.0),
        figures("f.updates", 300, growth_rate=0.5),
        figures("f.updates", 300, growth_rate=-4.0),
        figures("f.rejected", consumers=0),
        figures("f.unrouted", consumers=0),
        figures("f.journal", 5000, consumers=0, growth_rate=9.0, type="stream"),
        figures("f.tap.1a2b", 40),
    ],
)
def test_healthy_queues_have_no_hint(queue):
    assert hint(queue, TOPOLOGY) is None


@pytest.mark.parametrize(
    ("limits", "full"),
    [
        ({"max-length": 0, "overflow": "reject-publish"}, "max-length 0 of policy mine"),
        ({"max-length": 5, "overflow": "reject-publish-dlx"}, "max-length 5 of policy mine"),
        ({"max-length": 6, "overflow": "reject-publish"}, None),
        (
            {"max-length-bytes": 4000, "max-length": 6, "overflow": "reject-publish"},
            "max-length-bytes 4,000 of policy mine",
        ),
        ({"max-length": 5}, None),  # drops the oldest message
        ({}, None),
    ],
)
def test_a_queue_whose_policy_refuses_messages_names_the_limit(limits, full):
    entry = {
        "name": "f.inbox.w",
        "consumers": 1,
        "messages_ready": 5,
        "message_bytes_ready": 4001,
        "policy": "mine",
        "effective_policy_definition": limits,
    }
    expected = None if full is None else f"full ({full}): it refuses messages"
    assert hint(read_queue(entry, TOPOLOGY, 0.0), TOPOLOGY) == expected


def test_an_alarm_is_shown_at_the_queues_that_workers_publish_to():
    text = hint(figures("f.updates"), TOPOLOGY, ["memory", "disk"])
    assert text == "blocked: the broker has run out of memory and disk; nobody can publish"
    assert hint(figures("f.rejected", consumers=0), TOPOLOGY, ["memory"]) is None


# --- the management API --------------------------------------------------------------------------


def test_figures_are_read_from_the_management_api():
    description = {
        "name": "f.updates", "messages_ready": 4, "messages_unacknowledged": 2, "consumers": 1,
        "message_bytes": 900, "type": "classic", "state": "running",
        "head_message_timestamp": 1000, "messages_ready_details": {"rate": 0.0, "avg_rate": 1.5},
        "message_stats": {
            "publish": 10, "publish_details": {"rate": 2.0}, "ack": 3, "get_no_ack": 1,
            "deliver_get": 7, "deliver_get_details": {"rate": 0.4},
        },
    }  # fmt: skip
    queue = read_queue(description, TOPOLOGY, now=1012.0)
    assert (queue.ready, queue.unacknowledged, queue.size_bytes) == (4, 2, 900)
    assert (queue.in_rate, queue.out_rate, queue.growth_rate) == (2.0, 0.4, 1.5)
    assert (queue.oldest_s, queue.published, queue.settled) == (12.0, 10, 4)
    assert queue.known


def test_a_new_queue_has_no_statistics():
    queue = read_queue({"name": "f.other"}, TOPOLOGY, now=0.0)
    assert (queue.ready, queue.known) == (0, False)
    assert (queue.in_rate, queue.oldest_s, queue.published, queue.growth_rate) == (None,) * 4


def test_a_sender_clock_ahead_of_ours_gives_age_zero():
    description = {"name": "f.updates", "head_message_timestamp": 1000}
    assert read_queue(description, TOPOLOGY, now=990.0).oldest_s == 0.0


@pytest.mark.parametrize(
    ("url", "given", "record", "expected"),
    [
        ("amqp://h:1/", "http://m:2/", {}, "http://m:2"),
        ("amqp://h:1/", None, {}, "http://h:15672"),
        ("amqps://h/", None, {}, "https://h:15671"),
        ("amqp://h:1/,amqp://i:1/", None, {}, "http://h:15672"),
        (
            "amqp://h:1/", None, {"url": "amqp://h:1/", "management_url": "http://x:9/"},
            "http://x:9",
        ),
    ],
)  # fmt: skip
def test_management_url(monkeypatch, url, given, record, expected):
    monkeypatch.setattr(settings, "node_record", lambda _: record)
    assert settings.management_finder(given)(url).base == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [("amqp://h/", "%2F"), ("amqp://h", "%2F"), ("amqp://h/%2Fa", "%2Fa"), ("amqp://h/v", "v")],
)
def test_the_vhost_of_a_url(url, expected):
    assert Management(url, "http://h").quoted_vhost == expected

"""``/metrics``: the board's figures for Prometheus.

They are computed from the board at each scrape, so a run pays nothing for them. Every label value
comes from a fixed set (causes, states, phases, roles of queues), so no worker can add series.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from fluffle_common.errors import CAUSES
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.feed import Feed
from fluffle_coordinator.dashboard.snapshot import latest
from fluffle_coordinator.machine.state import Phase
from fluffle_coordinator.observe.run_view import OUTCOMES, STEPS, Counters

PHASES = ("standby", *Phase)
ROLES = ("updates", "presence", "rejected", "unrouted", "journal", "inboxes", "outboxes", "other")

_QUEUE_FIGURES = {
    "ready": ("fluffle_queue_ready_messages", "Messages waiting to be delivered."),
    "unacknowledged": (
        "fluffle_queue_unacknowledged_messages",
        "Messages delivered but not acknowledged; an update stays unacknowledged until its round "
        "is committed.",
    ),
    "consumers": ("fluffle_queue_consumers", "Number of consumers of these queues."),
    "size_bytes": ("fluffle_queue_size_bytes", "Bytes of the messages in these queues."),
}


def registry(feed: Feed) -> CollectorRegistry:
    """Return a registry whose only collector reads this feed's board."""
    collectors = CollectorRegistry(auto_describe=False)
    collectors.register(BoardCollector(feed))
    return collectors


class BoardCollector(Collector):
    """Turns the board of ``feed`` into metrics."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        board = self._feed.board
        build = {version("fluffle"): 1}
        yield _labelled(
            "fluffle_build_info", "Version of fluffle, as a label; always 1.", "version", build
        )
        yield from _run(board)
        yield from _counters(board.view.counters)
        states = board.view.workers.by_state()
        yield _labelled("fluffle_workers", "Number of workers in each state.", "state", states)
        yield from _queues(board)


def _run(board: Board) -> Iterator[Metric]:
    run, (updates, needed) = board.run(), board.filling
    phases = {phase: int(phase == run["phase"]) for phase in PHASES}
    words = "Phase of the run: 1 for the current phase, 0 for the others."
    yield _labelled("fluffle_phase", words, "phase", phases)
    required = "Number of updates that must arrive before the open round can close."
    ratio = "Federated accuracy of the last evaluated model, from 0 to 1."
    commit = "Time of the run's last commit, in seconds since 1970."
    last = board.view.rounds.get(board.view.committed)
    loss, accuracy = latest(board.view, "loss"), latest(board.view, "accuracy")
    for name, words, value in (
        ("broker_linked", "1 if this process is connected to the broker, else 0.", run["linked"]),
        ("round", "Number of the open round, or of the next if none is open.", run["round"]),
        ("rounds_planned", "Number of rounds of the run.", run["rounds"]),
        ("quorum_received_updates", "Number of updates counted in the open round.", updates),
        ("quorum_needed_updates", required, needed),
        ("federated_loss", "Federated loss of the last evaluated model.", loss),
        ("federated_accuracy_ratio", ratio, accuracy),
        ("last_commit_timestamp_seconds", commit, last.committed_at if last else None),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"fluffle_{name}", words, float(value))


def _counters(counters: Counters) -> Iterator[Metric]:
    failures = "Number of times that a worker failed in a round."
    outages = "Number of times that the connection to the broker was lost."
    sizes = "Number of bytes of all counted updates, as received."
    for name, words, value in (
        ("fluffle_rounds_committed", "Number of committed rounds.", counters.rounds),
        ("fluffle_worker_failures", failures, counters.failures),
        ("fluffle_broker_outages", outages, counters.outages),
        ("fluffle_received_update_bytes", sizes, counters.update_bytes),
    ):
        yield CounterMetricFamily(name, words, value)
    outcomes = {outcome: counters.outcomes[outcome] for outcome in OUTCOMES}
    words = "Number of updates, by outcome."
    yield _labelled("fluffle_updates", words, "outcome", outcomes, CounterMetricFamily)
    causes: dict[str, float] = {cause: counters.causes[cause] for cause in CAUSES}
    words = "Number of rejected messages, by cause."
    yield _labelled("fluffle_rejected_messages", words, "cause", causes, CounterMetricFamily)
    words = "Seconds that committed rounds spent in each step."
    steps = SummaryMetricFamily("fluffle_round_step_seconds", words, labels=["step"])
    for step in STEPS:
        steps.add_metric([step], counters.step_rounds[step], counters.step_seconds[step])
    yield steps


def _queues(board: Board) -> Iterator[Metric]:
    for figure, (name, words) in _QUEUE_FIGURES.items():
        sums = Counter[str]()
        for queue in board.figures:
            if queue.get(figure) is not None:
                sums[role(str(queue["name"]), board.federation)] += queue[figure]
        if sums:
            yield _labelled(name, words, "queue", sums)


def _labelled(
    name: str,
    words: str,
    label: str,
    values: Mapping[str, float],
    kind: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily,
) -> Metric:
    family = kind(name, words, labels=[label])
    for value_of_label, value in values.items():
        family.add_metric([value_of_label], value)
    return family


def role(queue: str, federation: str) -> str:
    """Return what a queue is for, as one of ``ROLES``.

    Example:
        >>> role("letters.inbox.client-1", "letters"), role("letters.updates", "letters")
        ('inboxes', 'updates')
    """
    kind = queue.removeprefix(f"{federation}.").partition(".")[0]
    plural = {"inbox": "inboxes", "outbox": "outboxes"}.get(kind, kind)
    return plural if plural in ROLES else "other"

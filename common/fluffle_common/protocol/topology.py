"""All exchanges, queues and bindings on the broker, with the arguments of each queue.

The coordinator declares the shared entities and makes every binding. A worker declares its own two
queues and needs no right to configure anything else.

Declaring a queue again with different arguments is an error (406). So arguments contain only what
defines a queue's behaviour; how much it may hold is a policy, which operators can change at any
time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from fluffle_common.protocol.messages import FEDERATION_PATTERN

ArgumentValue = str | int | bool
QueueType = Literal["classic", "quorum"]

GiB = 2**30
_INBOX_BYTES = 8 * GiB  # several copies of a large model
_UPDATES_BYTES = 16 * GiB
_REJECTED_MESSAGES = 1000
_JOURNAL_BYTES = GiB // 4
_UNUSED_MS = 30 * 60 * 1000
# Longer than any upload: only getting from a quorum queue, or consuming, counts as using it.
_UNUSED_OUTBOX_MS = {"classic": _UNUSED_MS, "quorum": 24 * 60 * 60 * 1000}


@dataclass(frozen=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: Literal["direct", "topic", "fanout"]
    alternate: str | None = None


@dataclass(frozen=True)
class Queue:
    """A durable queue."""

    name: str
    purpose: str  # as ``fluffle queues`` shows it
    arguments: dict[str, ArgumentValue] = field(default_factory=dict)  # of its declaration
    # How much it may hold, as the definition of a policy; not part of the declaration.
    limits: dict[str, ArgumentValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """A RabbitMQ policy that limits the queues whose names its ``pattern`` is found in.

    RabbitMQ applies only the matching policy with the highest priority.
    """

    name: str
    pattern: str
    definition: dict[str, ArgumentValue]
    priority: int


@dataclass(frozen=True)
class Binding:
    """A binding: messages published to ``exchange`` with the routing ``key`` reach ``queue``."""

    queue: str
    exchange: str
    key: str


Entity = Exchange | Queue | Binding


@dataclass(frozen=True)
class Topology:
    """The names of one federation on the broker, all of which start with its name."""

    federation: str
    queue_type: QueueType = "classic"  # or quorum, on a cluster; coordinator and workers must agree

    @property
    def work(self) -> str:
        """Exchange from coordinator to workers; routing keys (also in ``CC``) are worker ids."""
        return f"{self.federation}.work"

    @property
    def results(self) -> str:
        """Exchange from workers to coordinator; routing keys are ``<kind>.<worker>``."""
        return f"{self.federation}.results"

    @property
    def unrouted(self) -> str:
        """Exchange and queue of results that no binding matches."""
        return f"{self.federation}.unrouted"

    @property
    def updates(self) -> str:
        """Queue of updates, evaluations and first weights."""
        return f"{self.federation}.updates"

    @property
    def presence(self) -> str:
        """Queue of hello, heartbeat, bye and failure."""
        return f"{self.federation}.presence"

    @property
    def rejected(self) -> str:
        """Queue of rejected messages, each with the reason in its headers."""
        return f"{self.federation}.rejected"

    @property
    def journal(self) -> str:
        """Stream of all events of the federation; any number of readers can read it."""
        return f"{self.federation}.journal"

    def inbox(self, worker: str) -> str:
        """Queue of messages for a worker."""
        return f"{self.federation}.inbox.{worker}"

    def outbox(self, worker: str) -> str:
        """Queue of the parts of a worker's update, if it is too large for one message."""
        return f"{self.federation}.outbox.{worker}"

    def rejecting(self, worker: str) -> str:
        """Routing key with which a worker publishes rejected messages to ``results``."""
        return f"{_REJECTING}.{worker}"

    def shared(self) -> list[Entity]:
        """Return all entities that are shared, in the order in which to declare them.

        The binding of ``unrouted`` comes last. Until then, the broker returns a result that has no
        binding yet to its sender, instead of moving it to ``unrouted``.
        """
        return [
            Exchange(self.work, "direct"),
            Exchange(self.unrouted, "fanout"),
            Exchange(self.results, "topic", alternate=self.unrouted),
            self._queue(
                self.unrouted,
                "messages from workers that matched no queue; should be empty",
                limits={"max-length": _REJECTED_MESSAGES, "overflow": "drop-head"},
            ),
            self._queue(
                self.rejected,
                "rejected messages, each with its reason in its headers",
                limits={
                    "max-length": _REJECTED_MESSAGES,
                    "max-length-bytes": GiB // 4,
                    "overflow": "drop-head",
                },
            ),
            self._queue(
                self.updates,
                "updates and evaluations on their way to the coordinator; "
                "unacknowledged until their round is committed",
                {
                    "x-single-active-consumer": True,
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": self.rejected,
                },
                # When the queue is full, the sender gets a nack, keeps its update and tries again.
                {"max-length-bytes": _UPDATES_BYTES, "overflow": "reject-publish"},
            ),
            self._queue(
                self.presence,
                "presence of the workers: hello, heartbeat, bye, failure",
                {"x-message-ttl": 60_000},
                {"max-length": 100_000, "overflow": "drop-head"},
            ),
            self.journal_stream(),
            *(Binding(self.updates, self.results, f"{kind}.#") for kind in UPDATE_KINDS),
            *(Binding(self.presence, self.results, f"{kind}.#") for kind in PRESENCE_KINDS),
            Binding(self.rejected, self.results, f"{_REJECTING}.#"),
            Binding(self.unrouted, self.unrouted, ""),
        ]

    def required(self) -> list[Entity]:
        """Return what every broker supports of ``shared``: all but the journal."""
        journal = self.journal_stream()
        return [entity for entity in self.shared() if entity != journal]

    def journal_stream(self) -> Queue:
        """Return the journal."""
        return Queue(
            self.journal,
            "every event of the federation; reading removes nothing",
            {
                "x-queue-type": "stream",
                # RabbitMQ deletes whole segments, and no policy can change their size later.
                "x-stream-max-segment-size-bytes": _JOURNAL_BYTES // 16,
            },
            {"max-length-bytes": _JOURNAL_BYTES, "max-age": "30D"},
        )

    def of_worker(self, worker: str) -> list[Entity]:
        """Return a worker's queues and their bindings."""
        return [*self.queues_of(worker), *self.bindings_of(worker)]

    def bindings_of(self, worker: str) -> list[Binding]:
        """Return the bindings of a worker's queues; the coordinator makes them on its hello."""
        return [
            Binding(self.inbox(worker), self.work, worker),
            Binding(self.outbox(worker), self.results, f"part.{worker}"),
        ]

    def queues_of(self, worker: str) -> list[Queue]:
        """Return a worker's queues, which the worker declares itself."""
        return [
            self._queue(
                self.inbox(worker),
                f"messages for worker {worker}, such as the work of a round",
                {"x-expires": _UNUSED_MS},  # for workers that never return
                {"max-length-bytes": _INBOX_BYTES, "overflow": "drop-head"},
            ),
            self._queue(
                self.outbox(worker),
                f"parts of an update of worker {worker} that is too large for one message",
                {"x-expires": _UNUSED_OUTBOX_MS[self.queue_type]},
                {"max-length-bytes": _INBOX_BYTES, "overflow": "reject-publish"},
            ),
        ]

    def tap(self, unique: str) -> Queue:
        """Return the queue of a ``fluffle tap``; when its reader is slow, the oldest copies go.

        On a cluster, it is replicated too. RabbitMQ 4.3 keeps a classic queue of a failed node, and
        refuses every message that it cannot copy to it.
        """
        arguments: dict[str, ArgumentValue] = {
            "x-max-length": 10_000,
            "x-max-length-bytes": GiB // 4,
            "x-overflow": "drop-head",
        }
        if self.queue_type == "quorum":  # which cannot be exclusive
            arguments["x-expires"] = 60_000
        return self._queue(f"{self.federation}.tap.{unique}", _TAP_PURPOSE, arguments)

    def purpose(self, queue: str) -> str | None:
        """Return the description of a queue; None if it is not of this federation."""
        if queue.startswith(f"{self.federation}.tap."):
            return _TAP_PURPOSE
        if queue.startswith((f"{self.federation}.lock.", f"{self.federation}.lock2.")):
            return "lock that gives one process at a time the queue of the same name; always empty"
        declared = self.find(queue)
        return declared.purpose if declared else None

    def find(self, queue: str) -> Queue | None:
        """Return a queue by name, except taps and locks; None if there is no such queue."""
        entities: Iterable[Entity] = self.shared()
        for kind in ("inbox", "outbox"):
            prefix = f"{self.federation}.{kind}."
            if queue.startswith(prefix):
                entities = self.queues_of(queue.removeprefix(prefix))
        return next((e for e in entities if isinstance(e, Queue) and e.name == queue), None)

    def _queue(
        self,
        name: str,
        purpose: str,
        arguments: dict[str, ArgumentValue] | None = None,
        limits: dict[str, ArgumentValue] | None = None,
    ) -> Queue:
        arguments = {"x-queue-type": self.queue_type, **(arguments or {})}
        return Queue(name, purpose, arguments, limits or {})


def policies(federation: str | None = None) -> list[Policy]:
    """Return the policies that limit a federation's queues, or those of all federations (None).

    Policies of one federation have a higher priority than those of all.

    >>> [policy.name for policy in policies("letters")][:2]
    ['fluffle.letters.unrouted', 'fluffle.letters.rejected']
    """
    name, priority = (f"fluffle.{federation}", 1) if federation else ("fluffle", 0)
    prefix = federation or FEDERATION_PATTERN.strip("^$")
    topology = Topology(federation or "any")
    shared = [entity for entity in topology.shared() if isinstance(entity, Queue)]
    result = []
    for queue in (*shared, *topology.queues_of("W")):
        kind = queue.name.split(".")[1]
        suffix = rf"{kind}\..+" if queue.name.endswith(".W") else kind
        result.append(Policy(f"{name}.{kind}", rf"^{prefix}\.{suffix}$", queue.limits, priority))
    return result


def locks_of(queue: str) -> tuple[str, str]:
    """Return the names of the two lock queues of a quorum queue.

    Quorum queues do not enforce exclusive consumers, so an exclusive queue serves as the lock. The
    only consumer declares one of the two, and the other one only if a failed node keeps the first.

    >>> locks_of("letters.inbox.w1")
    ('letters.lock.inbox.w1', 'letters.lock2.inbox.w1')
    """
    federation, _, rest = queue.partition(".")
    return f"{federation}.lock.{rest}", f"{federation}.lock2.{rest}"


_TAP_PURPOSE = "copies of messages for 'fluffle tap'; deleted soon after the command ends"
UPDATE_KINDS = ("update", "evaluation", "first_weights", "exchange")
PRESENCE_KINDS = ("hello", "heartbeat", "bye", "failure")
_REJECTING = "rejected"

"""Every exchange and queue name, and every queue's arguments, in this one place.

The coordinator declares what is shared, and binds. A worker declares its own two queues and needs
no right to anything else. Declaring again with the same arguments changes nothing, with others it
is an error for everybody. So an argument is only what belongs to the meaning of a queue, and how
much it may hold is a policy, which an operator can change at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from fluffle_common.protocol.messages import FEDERATION_PATTERN

ArgumentValue = str | int | bool
QueueType = Literal["classic", "quorum"]

GiB = 2**30
_INBOX_BYTES = 8 * GiB  # several copies of a large model; the oldest go first, newest work wins
_UPDATES_BYTES = 16 * GiB
_REJECTED_MESSAGES = 1000
_REJECTED_BYTES = GiB // 4
_PRESENCE_MESSAGES = 100_000
_PRESENCE_TTL_MS = 60_000
_TAP_MESSAGES = 10_000
_TAP_BYTES = GiB // 4
_ABSENT_MS = 30 * 60 * 1000
_JOURNAL_BYTES = GiB // 4
_JOURNAL_AGE = "30D"


@dataclass(frozen=True)
class Exchange:
    """An exchange to declare; always durable."""

    name: str
    type: Literal["direct", "topic", "fanout"]
    alternate: str | None = None


@dataclass(frozen=True)
class Queue:
    """A queue to declare; always durable.

    Args:
        name: of the queue.
        purpose: what ``fluffle queues`` says of it.
        arguments: what it is declared with.
        limits: how much it may hold, in the words of a policy; nobody declares that.
    """

    name: str
    purpose: str
    arguments: dict[str, ArgumentValue] = field(default_factory=dict)
    limits: dict[str, ArgumentValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """The limits of some queues, as RabbitMQ takes them.

    Args:
        name: of the policy.
        pattern: a regular expression; the queues whose names it is found in.
        definition: the limits.
        priority: of the policies that match a queue, the one with the highest counts, alone.
    """

    name: str
    pattern: str
    definition: dict[str, ArgumentValue]
    priority: int


@dataclass(frozen=True)
class Binding:
    """Lets what is published to ``exchange`` under ``key`` reach ``queue``."""

    queue: str
    exchange: str
    key: str


Entity = Exchange | Queue | Binding


@dataclass(frozen=True)
class Topology:
    """The names of one federation on the broker.

    Args:
        federation: what every name starts with.
        queue_type: ``classic``, or ``quorum`` on a cluster; the same for everyone who takes part.
    """

    federation: str
    queue_type: QueueType = "classic"

    @property
    def work(self) -> str:
        """Exchange, coordinator to workers: the routing keys (also in ``CC``) are worker ids."""
        return f"{self.federation}.work"

    @property
    def results(self) -> str:
        """Exchange, workers to coordinator: the routing keys are ``<kind>.<worker>``."""
        return f"{self.federation}.results"

    @property
    def unrouted(self) -> str:
        """Exchange and queue for results that no queue is bound for."""
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
        """Queue of what was refused, with the reason in its headers."""
        return f"{self.federation}.rejected"

    @property
    def journal(self) -> str:
        """Stream of every event of the federation; anyone may read it, any number of times."""
        return f"{self.federation}.journal"

    def inbox(self, worker: str) -> str:
        """Queue of a worker's mail."""
        return f"{self.federation}.inbox.{worker}"

    def outbox(self, worker: str) -> str:
        """Queue of the parts of a worker's update that is too large for one message."""
        return f"{self.federation}.outbox.{worker}"

    def rejecting(self, worker: str) -> str:
        """Routing key under which a worker sends what it refuses to ``results``."""
        return f"{_REJECTING}.{worker}"

    def shared(self) -> list[Entity]:
        """Everything that is no worker's own, as the coordinator declares it.

        ``unrouted`` is bound last: until all of it is there, a result is unroutable, which its
        sender is told, and not lost there.
        """
        return [
            Exchange(self.work, "direct"),
            Exchange(self.unrouted, "fanout"),
            Exchange(self.results, "topic", alternate=self.unrouted),
            self._queue(
                self.unrouted,
                "results that no queue was bound for; should be empty",
                limits={"max-length": _REJECTED_MESSAGES, "overflow": "drop-head"},
            ),
            self._queue(
                self.rejected,
                "messages that were refused, each with its reason in its headers",
                limits={
                    "max-length": _REJECTED_MESSAGES,
                    "max-length-bytes": _REJECTED_BYTES,
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
                # Full means wait: the sender is told, keeps its update and tries again.
                {"max-length-bytes": _UPDATES_BYTES, "overflow": "reject-publish"},
            ),
            self._queue(
                self.presence,
                "presence of the workers: hello, heartbeat, bye, failure",
                {"x-message-ttl": _PRESENCE_TTL_MS},  # an older one tells nothing
                {"max-length": _PRESENCE_MESSAGES, "overflow": "drop-head"},
            ),
            self.journal_stream(),
            *(Binding(self.updates, self.results, f"{kind}.#") for kind in UPDATE_KINDS),
            *(Binding(self.presence, self.results, f"{kind}.#") for kind in PRESENCE_KINDS),
            Binding(self.rejected, self.results, f"{_REJECTING}.#"),
            Binding(self.unrouted, self.unrouted, ""),
        ]

    def journal_stream(self) -> Queue:
        """The journal; it is in ``shared``, and not every broker can have it."""
        return Queue(
            self.journal,
            "every event of the federation; reading it takes nothing out",
            {
                "x-queue-type": "stream",
                # The oldest segment goes as a whole. No policy cuts a stream that exists anew.
                "x-stream-max-segment-size-bytes": _JOURNAL_BYTES // 16,
            },
            {"max-length-bytes": _JOURNAL_BYTES, "max-age": _JOURNAL_AGE},
        )

    def of_worker(self, worker: str) -> list[Entity]:
        """What there is for one worker besides ``shared``."""
        return [*self.queues_of(worker), *self.bindings_of(worker)]

    def bindings_of(self, worker: str) -> list[Binding]:
        """How a worker's own queues are bound; the coordinator does it when it hears of them."""
        return [
            Binding(self.inbox(worker), self.work, worker),
            Binding(self.outbox(worker), self.results, f"part.{worker}"),
        ]

    def queues_of(self, worker: str) -> list[Queue]:
        """A worker's own queues, which it declares itself."""
        return [
            self._queue(
                self.inbox(worker),
                f"messages for worker {worker}: the work of a round",
                # Without it, the queues of workers that never come again would stay for good.
                {"x-expires": _ABSENT_MS},
                {"max-length-bytes": _INBOX_BYTES, "overflow": "drop-head"},
            ),
            self._queue(
                self.outbox(worker),
                f"parts of an update of worker {worker} that is too large for one message",
                {"x-expires": _ABSENT_MS},
                {"max-length-bytes": _INBOX_BYTES, "overflow": "reject-publish"},
            ),
        ]

    def tap(self, unique: str) -> Queue:
        """Return the queue of someone who looks; a slow reader loses copies, and costs no more."""
        return Queue(
            f"{self.federation}.tap.{unique}",
            _TAP_PURPOSE,
            {
                "x-queue-type": "classic",
                "x-max-length": _TAP_MESSAGES,
                "x-max-length-bytes": _TAP_BYTES,
                "x-overflow": "drop-head",
            },
        )

    def purpose(self, queue: str) -> str | None:
        """Say in words what a queue of this federation is for; None for a foreign queue."""
        if queue.startswith(f"{self.federation}.tap."):
            return _TAP_PURPOSE
        if queue.startswith(f"{self.federation}.lock."):
            return _LOCK_PURPOSE
        found = self.find(queue)
        return found.purpose if found else None

    def find(self, queue: str) -> Queue | None:
        """Return a queue of the federation that holds messages, as it is declared; None else."""
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
        arguments: Mapping[str, ArgumentValue] = MappingProxyType({}),
        limits: Mapping[str, ArgumentValue] = MappingProxyType({}),
    ) -> Queue:
        own = {"x-queue-type": self.queue_type, **arguments}
        return Queue(name, purpose, own, dict(limits))


def policies(federation: str | None = None) -> list[Policy]:
    """Return the policies that bound a federation's queues; None: those of every federation.

    >>> [one.name for one in policies("letters")][:2]
    ['fluffle.letters.unrouted', 'fluffle.letters.rejected']
    """
    # What is said of one federation counts for more than what is said of all.
    name, priority = (f"fluffle.{federation}", 1) if federation else ("fluffle", 0)
    head = federation or FEDERATION_PATTERN.strip("^$")
    topology = Topology(federation or "any")
    shared = [one for one in topology.shared() if isinstance(one, Queue)]
    found = []
    for queue in (*shared, *topology.queues_of("W")):
        kind = queue.name.split(".")[1]
        tail = rf"{kind}\..+" if queue.name.endswith(".W") else kind
        found.append(Policy(f"{name}.{kind}", rf"^{head}\.{tail}$", queue.limits, priority))
    return found


def lock_of(queue: str) -> str:
    """Name the lock that whoever alone may read a quorum queue holds; see ``rabbitmq``.

    >>> lock_of("letters.inbox.w1")
    'letters.lock.inbox.w1'
    """
    federation, _, rest = queue.partition(".")
    return f"{federation}.lock.{rest}"


_LOCK_PURPOSE = "always empty; a lock, held by the only consumer of the queue it is named after"
_TAP_PURPOSE = "copies of the traffic for 'fluffle tap'; deleted when it ends"
UPDATE_KINDS = ("update", "evaluation", "first_weights", "exchange")
PRESENCE_KINDS = ("hello", "heartbeat", "bye", "failure")
_REJECTING = "rejected"

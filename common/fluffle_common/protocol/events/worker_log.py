"""Events that only a worker's own log shows; none is in the journal.

Events that workers and coordinators share (connections, rejected messages) are in ``runs`` and
``rounds``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fluffle_common.protocol.events.base import (
    Integer,
    Names,
    Number,
    Numbers,
    RunEvent,
    Text,
    decimal,
    event,
    formatted,
)
from fluffle_common.protocol.metric_names import avoid_fields

_ACTIVITIES = {"init": "making the first weights", "fit": "training", "evaluate": "evaluating"}
_ANSWERS = {"init": "first weights", "fit": "update", "evaluate": "evaluation"}
# The keys of a JSON log line that no metric may replace.
_LOG_KEYS = frozenset({"event", "federation", "kind", "metrics", "round", "time", "worker"})


@dataclass(frozen=True, slots=True)
class WorkerEvent(RunEvent):
    """An event in a worker's log."""

    journalled: ClassVar[bool] = False


@event("loaded", "task {task}: {num_examples:example}{more}")
class Loaded(WorkerEvent):
    task: Text = None
    num_examples: Integer = None
    classes: Names = None

    def _derived(self) -> dict[str, str]:
        return {"more": f", classes {formatted(self.classes)}" if self.classes else ""}


@event("alone", "federation {federation} has no queues yet; waiting for a coordinator")
class Alone(WorkerEvent):
    federation: Text = None


@event(
    "occupied",
    "another connection already uses this worker's ID; waiting up to {pause_s:.0f} s, in case the "
    "broker has not closed an earlier connection of this worker yet",
    "odd",
)
class Occupied(WorkerEvent):
    pause_s: Number = None


@event("welcome", "joined run {run}, round {round} of {rounds}", "good")
class Welcomed(WorkerEvent):
    run: Text = None
    round: Integer = None
    rounds: Integer = None


@event("begin", "round {round}: {doing}")
class Begun(WorkerEvent):
    """The worker has started on its work; ``kind`` is ``init``, ``fit`` or ``evaluate``."""

    round: Integer = None
    kind: Text = None

    def _derived(self) -> dict[str, str]:
        return {"doing": _ACTIVITIES.get(self.kind or "", "?")}


@event("frozen_received", "round {round}: received the federation's frozen tensors {digest:.12}")
class FrozenReceived(WorkerEvent):
    """The coordinator has sent frozen tensors, which replace those of the task."""

    round: Integer = None
    digest: Text = None


@event(
    "abandoned", "round {round}: closed without this worker's update; starting newer work", "odd"
)
class Abandoned(WorkerEvent):
    round: Integer = None


@event("sent", "round {round}: {answer} sent{loss}", "good")
class Sent(WorkerEvent):
    """The broker has confirmed the worker's answer; ``metrics`` are those of an update."""

    round: Integer = None
    kind: Text = None
    metrics: Numbers = None

    def fields(self) -> dict[str, Any]:
        """Return the fields, and each metric under a name that is not that of a log field."""
        return {**RunEvent.fields(self), **avoid_fields(self.metrics or {}, _LOG_KEYS)}

    def _derived(self) -> dict[str, str]:
        loss = (self.metrics or {}).get("loss")
        return {
            "answer": _ANSWERS.get(self.kind or "", "?"),
            "loss": "" if loss is None else f", training loss {decimal(loss)}",
        }


@event("unsent", "round {round}: the result is not sent yet ({reason}); trying again", "odd")
class Unsent(WorkerEvent):
    round: Integer = None
    reason: Text = None


@event(
    "not_counted",
    "round {round}: the update was rejected ({reason}); the worker trains again if the "
    "coordinator asks again",
    "bad",
)
class NotCounted(WorkerEvent):
    """The coordinator rejected an update; ``cause`` is one of ``errors.CAUSES``."""

    round: Integer = None
    reason: Text = None
    cause: Text = None


@event("unfit", "{reason}", "odd")
class Unfit(WorkerEvent):
    """The task returned something unusable, which was left out."""

    reason: Text = None


@event("traceback", "{text}", "bad")
class Traceback(WorkerEvent):
    """The traceback of the task's own code, in ``text``."""

    verbatim: ClassVar[bool] = True

    text: Text = None


@event("ended", "the run has ended: {reason}")
class Ended(WorkerEvent):
    reason: Text = None


@event("leaving", "left the federation; run the same command to join again", "odd")
class Leaving(WorkerEvent):
    """The worker was asked to stop."""

"""Events of one worker, as its own log tells them; none is in the journal.

What happens to a worker as to a coordinator (the link, a refused message) has one class for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fluffle_common.protocol.events.base import (
    Names,
    Number,
    Numbers,
    RunEvent,
    Text,
    Whole,
    event,
    spoken,
)
from fluffle_common.protocol.metric_names import beside

_BEGUN = {"init": "making the first weights", "fit": "training", "evaluate": "evaluating"}
_ANSWERS = {"init": "first weights", "fit": "update", "evaluate": "evaluation"}
# What a JSON line says besides the metrics of an update.
_BESIDE_METRICS = frozenset({"event", "federation", "kind", "metrics", "round", "time", "worker"})


@dataclass(frozen=True, slots=True)
class OfAWorker(RunEvent):
    """An event that only the worker's own log has."""

    journalled: ClassVar[bool] = False


@event("loaded", "task {task}: {num_examples} examples{more}")
class Loaded(OfAWorker):
    """The task is made; ``classes`` are those of its data."""

    task: Text = None
    num_examples: Whole = None
    classes: Names = None

    def sentence(self) -> str:
        """See ``RunEvent``."""
        more = f", classes {spoken(self.classes)}" if self.classes else ""
        return self.words.format_map({**self._spoken(), "more": more})


@event(
    "alone",
    "federation {federation} has no queues yet; waiting for a coordinator",
)
class Alone(OfAWorker):
    """This worker is here before any coordinator."""

    federation: Text = None


@event(
    "occupied",
    "another worker has this id; waiting up to {pause_s:.0f} s, in case it is our own earlier "
    "connection, which the broker has not closed yet",
    "odd",
)
class Occupied(OfAWorker):
    """Another connection reads this worker's inbox."""

    pause_s: Number = None


@event("welcome", "joined run {run}, round {round} of {rounds}", "good")
class Welcomed(OfAWorker):
    """The coordinator has answered."""

    run: Text = None
    round: Whole = None
    rounds: Whole = None


@event("begin", "round {round}: {doing}")
class Begun(OfAWorker):
    """A work has begun; ``kind`` is ``init``, ``fit`` or ``evaluate``."""

    round: Whole = None
    kind: Text = None

    def sentence(self) -> str:
        """See ``RunEvent``."""
        return self.words.format_map({**self._spoken(), "doing": _BEGUN.get(self.kind or "", "?")})


@event("abandoned", "round {round}: closed without this worker's update; taking newer work", "odd")
class Abandoned(OfAWorker):
    """Nobody wants the work under way any more."""

    round: Whole = None


@event("sent", "round {round}: {answer} sent{loss}", "good")
class Sent(OfAWorker):
    """The broker has the answer to a work; ``metrics`` are those of an update."""

    round: Whole = None
    kind: Text = None
    metrics: Numbers = None

    def fields(self) -> dict[str, Any]:
        """Return what is known of it; each metric stands beside the fields, too."""
        known = RunEvent.fields(self)
        return {**known, **beside(self.metrics or {}, _BESIDE_METRICS)}

    def sentence(self) -> str:
        """See ``RunEvent``."""
        loss = (self.metrics or {}).get("loss")
        told = "" if loss is None else f", training loss {loss:.4f}"
        answer = _ANSWERS.get(self.kind or "", "?")
        return self.words.format_map({**self._spoken(), "answer": answer, "loss": told})


@event("unsent", "round {round}: not sent yet ({reason}); trying again", "odd")
class Unsent(OfAWorker):
    """The broker did not take an answer."""

    round: Whole = None
    reason: Text = None


@event(
    "not_counted",
    "round {round}: the update was rejected: {reason}; it is trained again if the round is "
    "asked for again",
    "bad",
)
class NotCounted(OfAWorker):
    """The coordinator refused this worker's update."""

    round: Whole = None
    reason: Text = None


@event("unfit", "the task: {reason}", "odd")
class Unfit(OfAWorker):
    """Something that the task returns is not fit for use, and left out."""

    reason: Text = None


@event("traceback", "{text}", "bad")
class Traceback(OfAWorker):
    """The task's own code failed; ``text`` has a line for each frame of it."""

    text: Text = None


@event("ended", "the run has ended: {reason}")
class Ended(OfAWorker):
    """The coordinator says that the run is over."""

    reason: Text = None


@event("leaving", "left; the same command joins again", "odd")
class Leaving(OfAWorker):
    """The worker was asked to stop."""

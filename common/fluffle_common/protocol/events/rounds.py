"""Events of a round: its opening, the outcome of each update, its commit and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluffle_common.plural import plural
from fluffle_common.protocol.events.base import (
    Integer,
    Names,
    Number,
    Numbers,
    RunEvent,
    Text,
    decimal,
    event,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEvent(RunEvent):
    """An event of one round."""

    round: Integer = None


@event("opened", "round {round}: opened for {asked}; {needed:update} needed")
class Opened(RoundEvent):
    asked: Names = None
    needed: Integer = None
    deadline_s: Number = None


@event("reopened", "{reason}; reopened for {asked}", "odd")
class Reopened(RoundEvent):
    """A round has reopened after its deadline passed."""

    asked: Names = None
    needed: Integer = None
    deadline_s: Number = None
    reason: Text = None


@event("closed", "{reason}; closed with the updates that have arrived", "odd")
class Closed(RoundEvent):
    """A round has closed at its deadline: below its quorum, or although its schedule waits."""

    reason: Text = None


@event("quorum", "round {round}: now needs {needed:update} instead of {was} ({reason})")
class Quorum(RoundEvent):
    needed: Integer = None
    was: Integer = None
    reason: Text = None


@event(
    "counted",
    "round {round}: update of {worker} counted, {num_examples:example}{stale} ({updates}/{needed})",
)
class Counted(RoundEvent):
    """An update was counted, as number ``updates`` of the ``needed`` ones.

    A stale update counts with ``weight`` examples instead of ``num_examples``.
    """

    worker: Text = None
    num_examples: Integer = None
    updates: Integer = None
    needed: Integer = None
    train_s: Number = None
    bytes: Integer = None
    staleness: Integer = None
    weight: Number = None

    def _derived(self) -> dict[str, str]:
        if not self.staleness:
            return {"stale": ""}
        old = f"{plural(self.staleness, 'version')} old"
        return {"stale": f", discounted to {self.weight or 0.0:.1f} for being {old}"}


@event("late", "round {round}: update of {worker} arrived late and was discarded", "odd")
class Late(RoundEvent):
    worker: Text = None
    num_examples: Integer = None


@event("duplicate", "round {round}: update of {worker} arrived again; it is already counted", "odd")
class Duplicate(RoundEvent):
    worker: Text = None


@event("resend", "asking {worker} to send its update again: {reason}", "odd")
class Resend(RunEvent):
    worker: Text = None
    reason: Text = None


@event("rejected", "rejected a message{of}: {reason}", "bad")
class Rejected(RunEvent):
    """A message was moved to the rejected queue; ``cause`` is one of ``errors.CAUSES``."""

    reason: Text = None
    cause: Text = None
    kind: Text = None
    worker: Text = None
    round: Integer = None
    num_examples: Integer = None

    def _derived(self) -> dict[str, str]:
        # A message with the wrong sender is not of the worker that it names.
        return {"of": f" of {self.worker}" if self.worker and self.cause != "sender" else ""}


@event("failure", "round {round}: {worker} failed: {reason}", "bad")
class Failure(RoundEvent):
    """A worker's task failed, or the coordinator gave up on it; in round 0, on first weights."""

    worker: Text = None
    reason: Text = None


@event(
    "stalled",
    "round {round}: {worker} sends heartbeats, but has reported no progress for {still_s:.0f} s "
    "({state}{where}); to count this as a failure, set --stall-timeout",
    "odd",
)
class Stalled(RoundEvent):
    """A worker's work stands still; ``step`` and ``steps`` are None if it has reported none."""

    worker: Text = None
    state: Text = None
    step: Integer = None
    steps: Integer = None
    still_s: Number = None

    def _derived(self) -> dict[str, str]:
        if self.steps:
            return {"where": f", step {self.step} of {self.steps}"}
        return {"where": ", no step reported" if self.state == "training" else ""}


@event(
    "overweight",
    "round {round}: the update of {worker} claims {num_examples:example}, but counts as "
    "{limit:example} (limited by --max-examples, or by the numbers of examples that workers "
    "announced)",
    "odd",
)
class Overweight(RoundEvent):
    worker: Text = None
    num_examples: Integer = None
    limit: Integer = None


@event(
    "outlier",
    "round {round}: the norm of the update of {worker} is {norm:.3g}, but the median is "
    "{median:.3g}; check the worker's data, or reject such updates with --max-norm-ratio",
    "odd",
)
class Outlier(RoundEvent):
    worker: Text = None
    norm: Number = None
    median: Number = None


@event("committed", "round {round}: committed with {participants}", "good")
class Committed(RoundEvent):
    """A round's checkpoint is on disk; ``timings`` are in seconds."""

    participants: Names = None
    num_examples: Integer = None
    timings: Numbers = None


@event(
    "privacy", "round {round}: the privacy loss so far is epsilon {epsilon:.4g} at delta {delta:g}"
)
class Privacy(RoundEvent):
    epsilon: Number = None
    delta: Number = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEvent(RoundEvent):
    """An event with metrics; its sentence ends with what they were measured on."""

    metrics: Numbers = None

    def in_brief(self) -> str:
        """Return the sentence without what the metrics were measured on."""
        return self._filled(self.template.partition(" on ")[0])

    def _derived(self) -> dict[str, str]:
        items = (self.metrics or {}).items()
        metrics = ", ".join(f"{name} {decimal(value)}" for name, value in items)
        return {"more": metrics and f", {metrics}", "metrics": metrics or "?"}


@event("evaluated", "round {round}: loss {loss}{more} on {num_examples:held-out example}", "good")
class Evaluated(MeasuredEvent):
    num_examples: Integer = None
    loss: Number = None
    evaluators: Names = None

    def fields(self) -> dict[str, Any]:
        """Return the fields, followed by each metric whose name is not that of a field."""
        fields = RunEvent.fields(self)
        return {**fields, **(self.metrics or {}), **fields}

    def _derived(self) -> dict[str, str]:
        loss = {} if self.loss is None else {"loss": decimal(self.loss)}
        return MeasuredEvent._derived(self) | loss


@event(
    "personal",
    "round {round}: before averaging, the workers' own models reached {metrics} on held-out "
    "examples",
    "good",
)
class Personal(MeasuredEvent):
    """The means of the participants' evaluations of what they trained, before it was averaged."""


@event("tested", "round {round}: tested by the coordinator{more}", "good")
class Tested(MeasuredEvent):
    """The coordinator's own function has evaluated the model."""

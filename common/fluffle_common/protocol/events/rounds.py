"""Events of a round: its opening, what became of each update, its commit and evaluation."""

from __future__ import annotations

from typing import Any

from fluffle_common.protocol.events.base import (
    Names,
    Number,
    Numbers,
    RunEvent,
    Text,
    Whole,
    event,
)


@event("opened", "round {round}: opened for {asked}, {needed} updates needed")
class Opened(RunEvent):
    """A round is open: its work goes out to those ``asked``."""

    round: Whole = None
    asked: Names = None
    needed: Whole = None
    deadline_s: Number = None


@event("reopened", "{reason}; reopened for {asked}", "odd")
class Reopened(RunEvent):
    """A round is open again, after its deadline passed."""

    round: Whole = None
    asked: Names = None
    needed: Whole = None
    deadline_s: Number = None
    reason: Text = None


@event("closed", "{reason}; closed with the updates that have arrived", "odd")
class Closed(RunEvent):
    """A round was closed at its deadline with fewer updates than its quorum."""

    round: Whole = None
    reason: Text = None


@event("quorum", "round {round}: needs {needed} updates now instead of {was} ({reason})")
class Quorum(RunEvent):
    """The quorum of an open round has shrunk."""

    round: Whole = None
    needed: Whole = None
    was: Whole = None
    reason: Text = None


@event(
    "counted",
    "round {round}: update of {worker} counted, {num_examples} examples{stale} "
    "({updates}/{needed})",
)
class Counted(RunEvent):
    """An update is in the sum; ``updates`` are there so far.

    One that is ``staleness`` versions old counts with ``weight`` examples.
    """

    worker: Text = None
    round: Whole = None
    num_examples: Whole = None
    updates: Whole = None
    needed: Whole = None
    train_s: Number = None
    bytes: Whole = None
    staleness: Whole = None
    weight: Number = None

    def sentence(self) -> str:
        """See ``RunEvent``."""
        stale = ""
        if self.staleness:
            versions = "1 version" if self.staleness == 1 else f"{self.staleness} versions"
            stale = f", {versions} old, which weigh {self.weight or 0.0:.1f}"
        return self.words.format_map({**self._spoken(), "stale": stale})


@event("late", "round {round}: update of {worker} came late and was discarded", "odd")
class Late(RunEvent):
    """An update came after its round was committed."""

    worker: Text = None
    round: Whole = None
    num_examples: Whole = None


@event("duplicate", "round {round}: update of {worker} arrived again; it is already counted", "odd")
class Duplicate(RunEvent):
    """An update came again after its round was committed."""

    worker: Text = None
    round: Whole = None


@event("resend", "asking {worker} to send its update again: {reason}", "odd")
class Resend(RunEvent):
    """A worker is asked for its update again."""

    worker: Text = None
    reason: Text = None


@event("rejected", "rejected a message: {reason}", "bad")
class Rejected(RunEvent):
    """A message was put into the rejected queue; ``cause`` is one of ``errors.CAUSES``."""

    reason: Text = None
    cause: Text = None
    kind: Text = None
    worker: Text = None
    round: Whole = None
    num_examples: Whole = None


@event("failure", "round {round}: the task of {worker} failed: {reason}", "bad")
class Failure(RunEvent):
    """A worker's task failed; round 0 is the first weights."""

    worker: Text = None
    round: Whole = None
    reason: Text = None


@event(
    "stalled",
    "round {round}: {worker} has been {state} at step {step} of {steps} for "
    "{still_s:.0f} s without advancing; its heartbeats arrive (--stall-timeout)",
)
class Stalled(RunEvent):
    """A worker is alive and does not advance."""

    worker: Text = None
    round: Whole = None
    state: Text = None
    step: Whole = None
    steps: Whole = None
    still_s: Number = None


@event(
    "overweight",
    "round {round}: the update of {worker} claims {num_examples} examples and counts as "
    "{limit}: {worker} announced no more, or --max-examples allows no more",
)
class Overweight(RunEvent):
    """An update says more examples (``num_examples``) than count (``limit``)."""

    worker: Text = None
    round: Whole = None
    num_examples: Whole = None
    limit: Whole = None


@event(
    "outlier",
    "round {round}: the norm of the update of {worker} is {norm:.3g}, the median of the round "
    "is {median:.3g}; check the worker's data, or reject such updates with --max-norm-ratio",
)
class Outlier(RunEvent):
    """An update's norm is far outside the round's distribution."""

    round: Whole = None
    worker: Text = None
    norm: Number = None
    median: Number = None


@event("committed", "round {round}: committed with {participants}", "good")
class Committed(RunEvent):
    """A round's model is on disk; ``timings`` are in seconds."""

    round: Whole = None
    participants: Names = None
    num_examples: Whole = None
    timings: Numbers = None


@event("privacy", "round {round}: privacy spent so far: epsilon {epsilon:.4g} at delta {delta:g}")
class Privacy(RunEvent):
    """What all rounds up to this one cost of privacy, as (epsilon, delta)."""

    round: Whole = None
    epsilon: Number = None
    delta: Number = None


@event(
    "evaluated", "round {round}: loss {loss:.4f}{more} on {num_examples} held-out examples", "good"
)
class Evaluated(RunEvent):
    """The workers have evaluated a round's model."""

    round: Whole = None
    num_examples: Whole = None
    loss: Number = None
    evaluators: Names = None
    metrics: Numbers = None

    def fields(self) -> dict[str, Any]:
        """Return what is known of it; each metric stands beside the fields, too."""
        known = RunEvent.fields(self)
        return {**known, **(self.metrics or {}), **known}

    def sentence(self) -> str:
        """See ``RunEvent``."""
        return self.words.format_map({**self._spoken(), "more": _listed(self.metrics)})


@event("tested", "round {round}: tested by the coordinator{more}", "good")
class Tested(RunEvent):
    """The coordinator's own test of a round's model."""

    round: Whole = None
    metrics: Numbers = None

    def sentence(self) -> str:
        """See ``RunEvent``."""
        return self.words.format_map({**self._spoken(), "more": _listed(self.metrics)})


def _listed(metrics: Numbers) -> str:
    return "".join(f", {name} {value:.4f}" for name, value in (metrics or {}).items())

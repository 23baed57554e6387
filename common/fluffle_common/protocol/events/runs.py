"""Events of a run as a whole: start and end, the broker, the disk, and the workers."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from fluffle_common.protocol.events.base import (
    Doings,
    Integer,
    Names,
    Number,
    RunEvent,
    Text,
    event,
)

_THIS_MACHINE = frozenset({"127.0.0.1", "localhost", "::1"})


@event("started", "started run {run} in {folder}")
class Started(RunEvent):
    run: Text = None
    rounds: Integer = None
    folder: Text = None


@event("resumed", "continuing run {run} after round {round}")
class Resumed(RunEvent):
    run: Text = None
    rounds: Integer = None
    round: Integer = None


@event(
    "outdated",
    "{worker} has trained for round {ahead} of this run, but the run folder has only "
    "{round:round}: it is an old copy, or has lost a checkpoint, or another coordinator has "
    "continued a copy of it; all later rounds are trained again",
    "bad",
)
class Outdated(RunEvent):
    """A worker is in a later round of the run than the coordinator."""

    worker: Text = None
    ahead: Integer = None
    round: Integer = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerEvent(RunEvent):
    """An event about the connection to the broker; ``address`` appears in the log only."""

    address: Text = None


@event("connected", "connected to the broker{where}")
class Connected(BrokerEvent):
    """The coordinator's first connection to the broker, or any of a worker's."""

    def _derived(self) -> dict[str, str]:
        return {"where": f" at {self.address}" if self.address else ""}


@event("reconnected", "connected to the broker again")
class Reconnected(BrokerEvent):
    """The coordinator has connected to the broker again."""


@event("disconnected", "lost the connection to the broker ({reason}); reconnecting", "bad")
class Disconnected(BrokerEvent):
    reason: Text = None


@event("no_broker", "no broker at {address} ({reason}); trying again{remedy}", "bad")
class NoBroker(BrokerEvent):
    journalled = False
    reason: Text = None

    def _derived(self) -> dict[str, str]:
        local = (urlsplit(self.address or "").hostname or "") in _THIS_MACHINE
        start = (
            "start a broker with 'fluffle broker up', change to the folder in which you started "
            "it, or "
        )
        return {"remedy": f" ({start if local else ''}correct --url)"}


@event("standby", "another coordinator{by} holds {what}; waiting as a standby", "odd")
class Standby(RunEvent):
    what: Text = None
    holder: Text = None

    def _derived(self) -> dict[str, str]:
        return {"by": f" ({self.holder})" if self.holder else ""}

    def gist(self) -> object:
        """Return what the coordinator waits for."""
        return self.what


@event("note", "{what}")
class Note(RunEvent):
    what: Text = None


@event("unmeasured", "{what}", "odd")
class Unmeasured(RunEvent):
    """No model has the monitored metric."""

    what: Text = None


@event("slow", "{what} has been running for {running_s:g} s; the run waits for it", "odd")
class Slow(RunEvent):
    what: Text = None
    running_s: Number = None


@event(
    "blocked",
    "the broker accepts no messages for now ({reason}); outgoing messages are waiting",
    "odd",
)
class Blocked(RunEvent):
    reason: Text = None


@event("unblocked", "the broker accepts messages again")
class Unblocked(RunEvent):
    """The broker accepts messages again."""


@event(
    "no_journal",
    "this run has no journal, because the broker does not support streams; 'fluffle explain', "
    "'fluffle journal' and 'fluffle dashboard' cannot show this run, but everything else works",
)
class NoJournal(RunEvent):
    journalled = False


@event("repaired", "{what}", "odd")
class Repaired(RunEvent):
    """Something in the run folder was repaired."""

    what: Text = None


@event("disk", "cannot write to {folder} ({reason}); trying again every {pause_s:.0f} s", "bad")
class Disk(RunEvent):
    folder: Text = None
    reason: Text = None
    pause_s: Number = None


@event("gap", "{dropped:earlier event} could not be published, so the journal has a gap here")
class Gap(RunEvent):
    dropped: Integer = None


@event("waiting", "{reason}")
class Waiting(RunEvent):
    """The run is waiting; ``reason`` says for what, in words.

    ``what`` is ``workers``, ``first_weights``, ``updates``, ``evaluations`` or ``room`` (on the
    broker); in a worker's log, ``coordinator`` or ``connection``. In an open round, ``missing`` is
    what each worker without an update is doing, and ``short`` the number of workers missing for the
    quorum.
    """

    reason: Text = None
    what: Text = None
    round: Integer = None
    missing: Doings = None
    short: Integer = None

    def gist(self) -> object:
        """Return what the run waits for, without progress within a state and time waited."""
        if self.missing is None:
            return self.reason
        return self.round, self.short, [(d.worker, d.state, d.round) for d in self.missing]


@event(
    "untold",
    "could not tell the workers that the run has ended, because no broker answered for "
    "{waited_s:.0f} s; stop the workers by hand",
    "odd",
)
class Untold(RunEvent):
    waited_s: Number = None


@event("finished", "finished: {reason}", "good")
class Finished(RunEvent):
    """All rounds are done."""

    reason: Text = None


@event("stopped", "stopped: {reason}", "bad")
class Stopped(RunEvent):
    """The run has ended before its last round."""

    reason: Text = None


@event(
    "interrupted",
    "stopped; run the same command (without --fresh) to continue the run in {folder}",
    "odd",
)
class Interrupted(RunEvent):
    """The coordinator was asked to stop."""

    folder: Text = None


# --- workers -----------------------------------------------------------------------------------


@event("joined", "{worker} joined with {num_examples:example}", "good")
class Joined(RunEvent):
    """A worker was heard for the first time, or for the first time since it started or left."""

    worker: Text = None
    num_examples: Integer = None


@event("left", "{worker} left ({reason})", "odd")
class Left(RunEvent):
    """A worker has left on purpose."""

    worker: Text = None
    reason: Text = None


@event("gone", "{worker} is gone: no heartbeat for {silent_s:.0f} s", "bad")
class Gone(RunEvent):
    worker: Text = None
    silent_s: Number = None


@event("refused", "refused: {reason}", "bad")
class Refused(RunEvent):
    worker: Text = None
    reason: Text = None


@event("init", "asking {worker} for the first weights")
class Init(RunEvent):
    worker: Text = None


@event("first_weights", "received the first weights: {tensors:tensor}, {parameters:parameter}")
class FirstWeights(RunEvent):
    """The initial weights of the run are on disk."""

    tensors: Integer = None
    parameters: Integer = None


@event("frozen_sent", "sending the frozen tensors {digest:.12} to {workers}")
class FrozenSent(RunEvent):
    workers: Names = None
    digest: Text = None


@event(
    "frozen_differs",
    "the frozen tensors of {worker} and {other} differ; give both workers the same frozen tensors, "
    "or share the frozen tensors with share_frozen=True",
    "odd",
)
class FrozenDiffers(RunEvent):
    worker: Text = None
    other: Text = None


@event("classes", "the classes of the federation are {classes}, as announced by {worker}")
class Classes(RunEvent):
    worker: Text = None
    classes: Names = None

"""Events of a run as a whole: its beginning and its end, the broker, the disk, who takes part."""

from __future__ import annotations

from dataclasses import dataclass

from fluffle_common.protocol.events.base import (
    Doings,
    Names,
    Number,
    RunEvent,
    Text,
    Whole,
    event,
)


@event("started", "run {run} in {folder}")
class Started(RunEvent):
    """A coordinator has begun a run."""

    run: Text = None
    rounds: Whole = None
    folder: Text = None


@event("resumed", "going on with run {run} after round {round}")
class Resumed(RunEvent):
    """A coordinator goes on with a run; ``round`` is the last one committed."""

    run: Text = None
    rounds: Whole = None
    round: Whole = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OfTheBroker(RunEvent):
    """An event about the link to the broker; its ``address`` is for the log only."""

    address: Text = None


@event("connected", "connected to the broker")
class Connected(OfTheBroker):
    """There is a first link to the broker; a worker says so of each."""

    def sentence(self) -> str:
        """See ``RunEvent``."""
        return f"{self.words} at {self.address}" if self.address else self.words


@event("reconnected", "connected to the broker again")
class Reconnected(OfTheBroker):
    """The coordinator has a link again."""


@event("disconnected", "lost the broker ({reason}); connecting again", "bad")
class Disconnected(OfTheBroker):
    """The link to the broker is lost."""

    reason: Text = None


@event(
    "no_broker",
    "no broker at {address} ({reason}); trying again in {pause_s:.1f} s "
    "('fluffle broker up' starts one here)",
    "bad",
)
class NoBroker(OfTheBroker):
    """An attempt to reach the broker failed; the journal has ``disconnected`` and the next link."""

    journalled = False
    reason: Text = None
    pause_s: Number = None


@event("standby", "another coordinator holds {what}; waiting as a standby", "odd")
class Standby(RunEvent):
    """Another coordinator holds the run folder or the federation."""

    what: Text = None

    def gist(self) -> object:
        """Return what must change for this to be news."""
        return self.what


@event("note", "{what}")
class Note(RunEvent):
    """A word to the operator."""

    what: Text = None


@event(
    "blocked",
    "the broker accepts no messages for now ({reason}); messages to send are waiting",
)
class Blocked(RunEvent):
    """The broker has stopped taking messages."""

    reason: Text = None


@event("unblocked", "the broker accepts messages again")
class Unblocked(RunEvent):
    """The broker takes messages again."""


@event(
    "no_journal",
    "this run has no journal ({reason}); 'fluffle explain' and 'fluffle journal' cannot show "
    "it, everything else works",
)
class NoJournal(RunEvent):
    """The broker has no streams."""

    journalled = False
    reason: Text = None


@event("repaired", "{what}")
class Repaired(RunEvent):
    """Something in the run folder was put right."""

    what: Text = None


@event("disk", "cannot write to {folder} ({reason}); trying again every {pause_s:.0f} s", "bad")
class Disk(RunEvent):
    """The disk refuses what is to be written."""

    folder: Text = None
    reason: Text = None
    pause_s: Number = None


@event("gap", "{dropped} earlier events are missing here: they could not be sent for too long")
class Gap(RunEvent):
    """So many events before this one are not in the journal."""

    dropped: Whole = None


@event("waiting", "{reason}")
class Waiting(RunEvent):
    """What the run waits for; ``reason`` says it for people.

    ``what`` is ``workers``, ``first_weights``, ``updates``, ``evaluations`` or ``room`` (on the
    broker); in a worker's own log, ``coordinator``. In an open round, ``round`` is its number,
    ``missing`` says what each worker does that has not answered, and ``short`` how many workers
    there are too few for the quorum.
    """

    reason: Text = None
    what: Text = None
    round: Whole = None
    missing: Doings = None
    short: Whole = None

    def gist(self) -> object:
        """Return what must change for this to be news: not how far anyone is, or for how long."""
        if self.missing is None:
            return self.reason
        return self.round, self.short, [(one.worker, one.state, one.round) for one in self.missing]


@event(
    "untold",
    "could not tell the workers that the run has ended: no broker for {waited_s:.0f} s; stop "
    "the workers by hand",
)
class Untold(RunEvent):
    """The workers could not be told of the end."""

    waited_s: Number = None


@event("finished", "finished: {reason}", "good")
class Finished(RunEvent):
    """All rounds are done."""

    reason: Text = None


@event("stopped", "stopped: {reason}", "bad")
class Stopped(RunEvent):
    """The run has ended before all rounds were done."""

    reason: Text = None


@event(
    "interrupted",
    "stopped; everything is in {folder}; the same command (without --fresh) goes on from there",
    "odd",
)
class Interrupted(RunEvent):
    """The coordinator was asked to stop."""

    folder: Text = None


# --- who takes part ----------------------------------------------------------------------------


@event("joined", "{worker} joined with {num_examples} examples", "good")
class Joined(RunEvent):
    """A worker is here; it has just begun, or was not heard before."""

    worker: Text = None
    num_examples: Whole = None


@event("left", "{worker} left ({reason})", "odd")
class Left(RunEvent):
    """A worker said good-bye."""

    worker: Text = None
    reason: Text = None


@event("gone", "{worker} is gone: no heartbeat for {silent_s:.0f} s", "bad")
class Gone(RunEvent):
    """A worker has been silent for too long."""

    worker: Text = None
    silent_s: Number = None


@event("refused", "refused: {reason}", "bad")
class Refused(RunEvent):
    """A worker cannot take part."""

    worker: Text = None
    reason: Text = None


@event("init", "asking {worker} for the first weights")
class Init(RunEvent):
    """A worker was asked for the first weights."""

    worker: Text = None


@event("first_weights", "received the first weights: {tensors} tensors, {parameters:,} parameters")
class FirstWeights(RunEvent):
    """The weights that the run begins with are on disk."""

    tensors: Whole = None
    parameters: Whole = None


@event("classes", "the classes are {classes}: those of {worker}")
class Classes(RunEvent):
    """The federation's classes were decided on."""

    worker: Text = None
    classes: Names = None

"""What a run looks like to whoever watches it: one sentence an event, and what is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fluffle_common.cli.console import Console, warn
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.machine.transitions import wanted

_SENTENCES = {
    "connected": "connected to the broker{where}",
    "reconnected": "connected to the broker again",
    "disconnected": "lost the broker ({reason}); connecting again",
    "no_broker": "no broker at {address} ({reason}); trying again in {pause_s:.1f} s "
    "('fluffle broker up' starts one here)",
    "standby": "another coordinator has {what}; waiting as a standby",
    "note": "{what}",
    "blocked": "the broker takes no messages for now ({reason}); what there is to send waits",
    "unblocked": "the broker takes messages again",
    "no_journal": "this run has no journal: {reason}; 'fluffle explain' and 'fluffle journal' have "
    "nothing to tell of it, all else is as ever",
    "repaired": "{what}",
    "resumed": "going on with run {run} after round {round}",
    "started": "run {run} in {folder}",
    "init": "asking {worker} for the first weights",
    "first_weights": "first weights are there: {tensors} tensors, {parameters:,} parameters",
    "classes": "the classes are {classes}, as {worker} has them",
    "joined": "{worker} joined with {num_examples} examples",
    "left": "{worker} left ({reason})",
    "gone": "{worker} is gone: no heartbeat for {silent_s:.0f} s",
    "refused": "refused: {reason}",
    "failure": "round {round}: the task of {worker} failed: {reason}",
    "opened": "round {round}: opened for {asked}, {needed} updates needed",
    "reopened": "{reason}; opened again for {asked}",
    "closed": "{reason}; closed with what is there",
    "counted": "round {round}: update of {worker} counted, {num_examples} examples "
    "({updates}/{needed})",
    "late": "round {round}: update of {worker} came late and was discarded",
    "duplicate": "round {round}: update of {worker} came again, it is counted already",
    "resend": "asking {worker} for its update again: {reason}",
    "rejected": "rejected a message: {reason}",
    "committed": "round {round}: committed with {participants}",
    "evaluated": "round {round}: loss {loss:.4f}{more} on {num_examples} held-out examples",
    "disk": "cannot write to {folder} ({reason}); trying again every {pause_s:.0f} s",
    "waiting": "{reason}",
    "quorum": "round {round}: {needed} updates are needed now, not {was}: {reason}",
    "overweight": "round {round}: the update of {worker} says {num_examples} examples and counts "
    "with {limit}, as {worker} announced or --max-examples allows",
    "outlier": "round {round}: the norm of the update of {worker} is {norm:.3g}, the median of the "
    "round {median:.3g}: look at its data, or refuse such updates (--max-norm-ratio)",
    "stalled": "round {round}: {worker} has been {state} at step {step} of {steps} for "
    "{still_s:.0f} s without advancing; its heartbeats arrive (--stall-timeout)",
    "untold": "could not tell the workers that the run has ended: no broker for {waited_s:.0f} s; "
    "stop them by hand",
    "gap": "{dropped} events from before this one are lost: they could not be sent for too long",
    "finished": "finished: {reason}",
    "stopped": "stopped: {reason}",
    "interrupted": "stopped; everything is in {folder}; the same command (without --fresh) goes "
    "on from there",
}


class _Unknown:
    """What a sentence says of a field that is not there, whatever its format."""

    def __format__(self, _: str) -> str:
        return "?"


class _Words(dict[str, Any]):
    def __missing__(self, _: str) -> _Unknown:
        return _Unknown()


def sentence(what: str, fields: Mapping[str, Any]) -> str:
    """Say an event in words.

    Whatever ``fields`` has, there is a sentence: they may come out of the journal of another
    version, which knows other events or tells less of them.

    >>> sentence("counted", {"round": 7, "worker": "north", "num_examples": 80, "updates": 2})
    'round 7: update of north counted, 80 examples (2/?)'
    >>> sentence("eclipse", {"seen_by": ["north", "south"]})
    'eclipse: seen_by north, south'
    """
    words = _Words(
        {
            key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            for key, value in fields.items()
        }
    )
    if what not in _SENTENCES:
        told = ", ".join(f"{key} {value}" for key, value in words.items())
        return f"{what}: {told}" if told else what
    words["where"] = f" at {fields['address']}" if "address" in fields else ""
    try:
        if what == "evaluated":
            metrics = fields.get("metrics", {}).items()
            words["more"] = "".join(f", {name} {value:.4f}" for name, value in metrics)
        return _SENTENCES[what].format_map(words)
    except (AttributeError, TypeError, ValueError):  # a word where a number belongs
        return f"{what}: {dict(words)}"


class Watcher(Protocol):
    """Whoever is told what happens in a run. Neither call may wait or raise: rounds go on."""

    def tell(self, what: str, fields: Mapping[str, Any]) -> None:
        """Take note of one event; ``what`` is its name, ``fields`` is what is known of it."""

    def show(self, state: State, now: float) -> None:
        """Take note of where the run stands; called after every event of the round machine.

        Who keeps events only need not have it.
        """
        return


class Watchers(Watcher):
    """Tells several watchers the same, in the order in which they were given.

    A watcher that raises is a bug, which is reported once on stderr; the run and the other
    watchers go on, and that watcher is told the next event as before.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers
        self._shown = [one for one in watchers if type(one).show is not Watcher.show]
        self._reported: set[Watcher] = set()

    def tell(self, what: str, fields: Mapping[str, Any]) -> None:
        """See ``Watcher``."""
        for watcher in self._watchers:
            try:
                watcher.tell(what, fields)
            except Exception as wrong:
                self._report(watcher, f"the event '{what}'", wrong)

    def show(self, state: State, now: float) -> None:
        """See ``Watcher``."""
        for watcher in self._shown:
            try:
                watcher.show(state, now)
            except Exception as wrong:
                self._report(watcher, "where the run stands", wrong)

    def _report(self, watcher: Watcher, what: str, wrong: Exception) -> None:
        if watcher not in self._reported:
            self._reported.add(watcher)
            warn(f"{type(watcher).__name__} cannot show {what} ({wrong!r}); the run goes on")


class View(Watcher):
    """Turns what the run tells into lines and bars."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def tell(self, what: str, fields: Mapping[str, Any]) -> None:
        """Write one event."""
        self._console.line(what, lambda: sentence(what, fields), fields)

    def show(self, state: State, now: float) -> None:
        """Draw where the run stands."""
        if not self._console.draws:
            return  # this is called at every event: no sentences that nobody sees
        done = min(state.committed, state.rules.rounds)
        self._console.bar("rounds", done, state.rules.rounds)
        if state.phase is Phase.OPEN:
            self._console.bar(
                "updates", state.folded, state.needed, f"round {state.round}: {_who(state, now)}"
            )
        else:
            told = waiting_for(state, now) or f"round {state.round}: {state.phase}"
            self._console.bar("updates", 0, state.needed, told)


def waiting_for(state: State, now: float) -> str | None:
    """Say what the run waits for and who is missing; None where it waits for nobody."""
    if not state.link:
        return None
    if state.phase is Phase.WAITING:
        present = ", ".join(sorted(state.workers)) or "nobody"
        gate = wanted(state)
        if len(state.workers) < gate:
            missing = gate - len(state.workers)
            return (
                f"waiting for workers: {len(state.workers)} of {gate} are here ({present}), "
                f"{missing} missing"
            )
        return None if state.has_weights else f"waiting for first weights from {state.init_asked}"
    if state.phase is Phase.OPEN:
        left_s = max(0.0, state.opened_at + state.rules.deadline_s - now)
        return (
            f"round {state.round}: {state.folded} of {state.needed} updates, "
            f"{left_s:.0f} s to the deadline; {_who(state, now)}"
        )
    if state.phase is Phase.EVALUATING:
        missing_names = sorted(n for n in state.asked if n not in state.evaluations)
        told = ", ".join(missing_names) or "workers: nobody is here"
        return f"waiting for the evaluation by {told}"
    return None


def _who(state: State, now: float) -> str:
    """Say what each worker that has not answered is doing."""
    told = []
    for name in state.missing:
        worker = state.workers.get(name)
        if name in state.failed:
            told.append(f"{name} failed")
        elif worker is None:
            told.append(f"{name} is gone")
        elif state.busy(name):
            steps = f" {worker.step}/{worker.steps}" if worker.steps else ""
            told.append(f"{name} {worker.state}{steps}")
        elif worker.state != "idle":  # still at an earlier round, or at a message of this one
            told.append(f"{name} {worker.state} for round {worker.round}")
        else:
            heard_s = max(0.0, now - worker.last_seen)
            told.append(f"{name} idle (heard {heard_s:.0f} s ago)")
    short = state.needed - len(state.asked)
    if short > 0:
        told.append(f"{short} more worker{'s'[: short > 1]} needed")
    return ", ".join(told) or "all have answered"

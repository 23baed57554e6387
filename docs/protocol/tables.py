"""The normative tables of docs/protocol.md, generated from the code.

The tables of the worker show what ``fluffle_worker.machine.advance`` does for each state and event.
The coordinator's timers are the durations in its ``Rules``, with their defaults; only the
consequence of each is written here. The demands are those of ``fluffle conformance``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields

from fluffle_coordinator.cli.coordinator import coordinator
from fluffle_coordinator.conformance.examine import SCENARIOS
from fluffle_coordinator.machine.state import Rules
from fluffle_worker import machine as m
from fluffle_worker.machine import State, Work

NONE = "\N{EN DASH}"
FIT = Work("fit", "run", 3, "base")
NEWER = FIT._replace(round=4)

MESSAGES: dict[str, m.Event] = {
    "the same `fit` again": m.Asked(FIT),
    "its round, a higher `attempt`": m.Asked(FIT._replace(attempt=1)),
    "its round, another `base`": m.Asked(FIT._replace(base="another")),
    "a `fit` of a newer round": m.Asked(NEWER),
    "a `fit` of an older round": m.Asked(FIT._replace(round=2)),
    "the `evaluate` of its round": m.Asked(FIT._replace(kind="evaluate")),
    "an `evaluate` of an older round": m.Asked(FIT._replace(kind="evaluate", round=2)),
    "an `init_request`": m.Asked(Work("init", "run", 0)),
    "work of another run": m.Asked(FIT._replace(run="another", round=1)),
    "a `verdict` on it, `train_again`": m.Rejected(FIT.run, FIT.round, FIT.base),
    "a `stop` of its run": m.Stopped("done"),
}
STATES: dict[str, State] = {
    "idle": State(),
    "at work": State(doing=FIT),
    "sending, not confirmed": State(sending=FIT),
    "answered": State(answered=FIT),
}
OWN: dict[str, m.Event] = {
    "the work is done": m.Finished(FIT),
    "the task fails": m.Failed(FIT, "why"),
    "the work has been given up": m.Abandoned(FIT),
    "the answer is confirmed": m.Sent(FIT),
}
OWN_STATES: dict[str, State] = {
    "at work": State(doing=FIT),
    "at work, newer work waits": State(doing=FIT, next=NEWER),
    "sending": State(sending=FIT),
}


def does(state: State, event: m.Event) -> str:
    """Return the cell of a table: what a worker in a state does at an event."""
    after, effects = m.advance(state, event)
    actions = [words for effect in effects if (words := _words(effect, state))]
    if after.next is not None and after.next != state.next:
        actions.append("then begins this")
    if not effects and after != state:
        actions.append("keeps the answer")
    return ", ".join(actions) or "nothing"


def _words(effect: m.Effect, state: State) -> str | None:
    match effect:
        case m.Begin(work):
            return "begins the waiting work" if work == state.next else "begins it"
        case m.Abandon():
            return "abandons the work at its next step"
        case m.Send(work):
            return "sends the same answer again" if work == state.answered else "sends the answer"
        case m.Drop(work) if work == state.sending:
            return "stops sending its answer"
        case m.Drop(work) if work == state.answered:
            return "forgets its answer"
        case m.Drop():
            return None  # there is no answer yet
        case m.Report():
            return "sends `failure`"
        case m.Leave():
            return "leaves or waits for another run"


def worker() -> str:
    """Return the two tables of the worker."""
    return "\n".join(
        [
            *_table("what arrives", MESSAGES, STATES),
            "",
            *_table("what happens", OWN, OWN_STATES, impossible=_impossible),
        ]
    )


def _impossible(state: State, event: m.Event) -> bool:
    return isinstance(event, m.Sent) == (state.sending is None)


def _never(_: State, __: m.Event) -> bool:
    return False


def _table(
    corner: str,
    events: dict[str, m.Event],
    states: dict[str, State],
    impossible: Callable[[State, m.Event], bool] = _never,
) -> Iterator[str]:
    yield f"| {corner} | {' | '.join(states)} |"
    yield "|---" * (len(states) + 1) + "|"
    for name, event in events.items():
        cells = (NONE if impossible(s, event) else does(s, event) for s in states.values())
        yield f"| {name} | {' | '.join(cells)} |"


# For each field of ``Rules``: the option that sets it, and what happens when the time is up.
TIMERS: dict[str, tuple[str | None, str]] = {
    "wait_s": (
        "--wait-workers",
        "if there are too few workers, or no first weights, the run stops",
    ),
    "patience": (None, "a worker that missed so many heartbeats counts as gone"),
    "hearing_s": (
        None,
        "if nothing was heard, not even the coordinator's own echo, the time counts for no timer",
    ),
    "resend_s": (
        None,
        "a worker that reports `idle`, or `receiving` without progress, is sent its work again; "
        "one that reports that it has done the round, after 4 times as long",
    ),
    "grace_s": ("--grace", "after the quorum, the round is averaged without the missing updates"),
    "deadline_s": (
        "--deadline",
        "without a quorum, the round is reopened or closed, or the run stops (`--on-deadline`); "
        "without first weights, another worker is asked; without an evaluation of the last model, "
        "the run ends",
    ),
    "max_reopenings": (None, "a round reopened so often without a new update stops the run"),
    "max_round_s": ("--max-round", "a round open for so long, even with progress, stops the run"),
    "stall_s": (None, "a worker whose training makes no progress is reported as stalled"),
    "stall_timeout_s": ("--stall-timeout", "… and then counts as failed in this round"),
}


def timers() -> str:
    """Return the table of the coordinator's timers."""
    options = {option.opts[0]: option.default for option in coordinator.params}
    rows = ["| timer | option | default | what happens |", "|---|---|---|---|"]
    for name, (option, consequence) in TIMERS.items():
        default = next(field.default for field in fields(Rules) if field.name == name)
        assert default is not MISSING
        if option is not None and default is not None:
            assert options[option] == default, option
        rows.append(
            f"| {name.removesuffix('_s').replace('_', ' ')} | {f'`{option}`' if option else NONE} "
            f"| {_value(name, default)} | {consequence} |"
        )
    return "\n".join(rows)


def demands() -> str:
    """Return the table of what ``fluffle conformance`` demands."""
    rows = (f"| {scenario.name} | {scenario.demand} |" for scenario in SCENARIOS)
    return "\n".join(["| scenario | demand |", "|---|---|", *rows])


def forgotten() -> set[str]:
    """Return the durations of ``Rules`` that the table lacks."""
    return {field.name for field in fields(Rules) if field.name.endswith("_s")} - TIMERS.keys()


def _value(name: str, default: float | None) -> str:
    if default is None:
        return "none"
    if name.endswith("_s"):
        return f"{default:,g} s"
    return f"{default} {'heartbeats' if name == 'patience' else 'times'}"

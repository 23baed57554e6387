"""The normative tables of docs/protocol.md, generated from the code.

The tables of the worker come from calling ``fluffle_worker.machine.advance`` with each state and
event. The coordinator's timers and their defaults come from ``Rules``; only their consequences are
written here. The requirements are those of ``fluffle conformance``.
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
    "the same round, a higher `attempt`": m.Asked(FIT._replace(attempt=1)),
    "the same round, another `base`": m.Asked(FIT._replace(base="another")),
    "the same round, a higher `sequence`": m.Asked(FIT._replace(sequence=4)),
    "the `evaluate` of the same round": m.Asked(FIT._replace(kind="evaluate")),
    "a `fit` of a newer round": m.Asked(NEWER),
    "work of another run": m.Asked(FIT._replace(run="another", round=1)),
    "a `fit` of an older round": m.Asked(FIT._replace(round=2)),
    "an `evaluate` of an older round": m.Asked(FIT._replace(kind="evaluate", round=2)),
    "an `init_request`": m.Asked(Work("init", "run", 0)),
    "its `verdict`, with `train_again`": m.Rejected(FIT.run, FIT.round, FIT.base),
    "the `stop` of its run": m.Stopped("done"),
}
STATES: dict[str, State] = {
    "idle": State(),
    "at work": State(doing=FIT),
    "sending": State(sending=FIT),
    "answered": State(answered=FIT),
}
OWN: dict[str, m.Event] = {
    "the work is done": m.Finished(FIT),
    "the task fails": m.Failed(FIT, "why"),
    "the work was aborted": m.Abandoned(FIT),
    "the broker confirms the answer": m.Sent(FIT),
}
OWN_STATES: dict[str, State] = {
    "at work": State(doing=FIT),
    "at work, and newer work waits": State(doing=FIT, next=NEWER),
    "sending": State(sending=FIT),
}


def action(state: State, event: m.Event) -> str:
    """Return the cell of a table: what a worker in a state has to do at an event."""
    after, effects = m.advance(state, event)
    actions = [words for effect in effects if (words := _words(effect, state))]
    if after.next is not None and after.next != state.next:
        actions.append("then start it")
    if actions:
        return ", ".join(actions)
    if after.answered is not None and after != state:
        return "keep the answer"
    return "ignore it" if after == state else "become idle"


def _words(effect: m.Effect, state: State) -> str | None:
    match effect:
        case m.Begin(work):
            return "start the waiting work" if work == state.next else "start it"
        case m.Abandon():
            return "abort the work at its next step"
        case m.Send(work):
            return "send the same answer again" if work == state.answered else "send the answer"
        case m.Drop(work) if work == state.sending:
            return "stop sending the answer"
        case m.Drop(work) if work == state.answered:
            return "discard the answer"
        case m.Drop():
            return None  # there is no answer yet
        case m.Report():
            return "send a `failure`"
        case m.Leave():
            return "leave or wait for another run"


def worker() -> str:
    """Return the two tables of the worker."""
    return "\n".join(
        [
            *_table("message", MESSAGES, STATES),
            "",
            *_table("event", OWN, OWN_STATES, impossible=_impossible),
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
        cells = (NONE if impossible(s, event) else action(s, event) for s in states.values())
        yield f"| {name} | {' | '.join(cells)} |"


# For each field of ``Rules``: the option that sets it, and what happens when the time has passed.
TIMERS: dict[str, tuple[str | None, str]] = {
    "wait_s": (
        "--wait-workers",
        "if there are still too few workers or no first weights, the run stops",
    ),
    "patience": (None, "a worker that has missed this many heartbeats counts as gone"),
    "hearing_s": (
        None,
        "if the coordinator has heard nothing for this long, not even its own echo, its timers "
        "pause",
    ),
    "resend_s": (
        None,
        "if a worker still reports `idle`, or `receiving` without progress, its work is sent "
        "again; if the worker reports the round as done but its update is missing, its work is "
        "sent again after 4 times this time. The time doubles with each repetition",
    ),
    "grace_s": ("--grace", "after the quorum, the round closes without the missing updates"),
    "deadline_s": (
        "--deadline",
        "without a quorum, the round is reopened or closed, or the run stops (`--on-deadline`); "
        "without first weights, another worker is asked; without an evaluation of the last model, "
        "the run ends",
    ),
    "max_reopenings": (
        None,
        "if the round has been reopened this often in a row without progress, the run stops at "
        "the next deadline",
    ),
    "max_round_s": (
        "--max-round",
        "if a round has been open for this long, even with progress, the run stops; if it has its "
        "quorum, or enough updates for `--on-deadline close`, the round is closed instead",
    ),
    "stall_s": (
        None,
        "if a worker's steps do not advance for this long, it is reported as stalled",
    ),
    "stall_without_steps_s": (
        None,
        "if a worker trains or evaluates for this long without a step, it is reported as stalled",
    ),
    "stall_timeout_s": (
        "--stall-timeout",
        "if a worker's steps do not advance for this long, or it trains or evaluates for this long "
        "without a step, it counts as failed in this round",
    ),
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


def requirements() -> str:
    """Return the table of the requirements of ``fluffle conformance``."""
    rows = (f"| {scenario.name} | {scenario.requirement} |" for scenario in SCENARIOS)
    return "\n".join(["| scenario | requirement |", "|---|---|", *rows])


def missing_timers() -> set[str]:
    """Return the durations in ``Rules`` that are missing from the table."""
    return {field.name for field in fields(Rules) if field.name.endswith("_s")} - TIMERS.keys()


def _value(name: str, default: float | None) -> str:
    if default is None:
        return "none"
    if name.endswith("_s"):
        return f"{default:,g} s"
    return f"{default} {'heartbeats' if name == 'patience' else 'times'}"

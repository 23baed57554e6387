"""The normative tables of docs/protocol.md, made from the machines themselves.

What a worker does in each state is not written down a second time: the table is what
``fluffle_worker.machine.advance`` does. The coordinator's timers are the fields of its ``Rules``,
with their defaults; only what follows from each is said
here. The demands are those of ``fluffle conformance``.
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

MAIL: dict[str, m.Event] = {
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
    """Say in words what a worker does about an event in a state."""
    after, effects = m.advance(state, event)
    said = [words for effect in effects if (words := _words(effect, state))]
    if after.next is not None and after.next != state.next:
        said.append("then begins this")
    if not effects and after != state:
        said.append("keeps the answer")
    return ", ".join(said) or "nothing"


def _words(effect: m.Effect, state: State) -> str | None:
    match effect:
        case m.Begin(work):
            return "begins what waits" if work == state.next else "begins it"
        case m.Abandon():
            return "gives the work up at its next step"
        case m.Send(work):
            return "sends the same answer again" if work == state.answered else "sends the answer"
        case m.Drop(work) if work == state.sending:
            return "sends its answer no more"
        case m.Drop(work) if work == state.answered:
            return "forgets its answer"
        case m.Drop():
            return None  # there is none yet
        case m.Report():
            return "sends `failure`"
        case m.Leave():
            return "leaves or waits for another run"


def worker() -> str:
    """Return the two tables of the worker."""
    return "\n".join(
        [
            *_table("what comes", MAIL, STATES),
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


# What follows, and the option where there is one; a field of ``Rules`` for each.
TIMERS: dict[str, tuple[str | None, str]] = {
    "wait_s": ("--wait-workers", "too few workers, or no first weights: the run stops"),
    "patience": (None, "so many heartbeats of a worker did not come: it counts as gone"),
    "hearing_s": (None, "nobody was heard, not even the coordinator's echo: time stops to count"),
    "resend_s": (
        None,
        "a worker says `idle`, or is `receiving` without a step: its work is sent again; if it "
        "says that it has done the round, after 4 times as long",
    ),
    "grace_s": ("--grace", "since the quorum: the round is averaged without the others"),
    "deadline_s": (
        "--deadline",
        "no quorum: the round is reopened, closed or the run stopped (`--on-deadline`); no first "
        "weights: another worker is asked; no evaluation of the last model: the run ends without",
    ),
    "max_reopenings": (None, "reopened so often with nothing new: the run stops"),
    "max_round_s": ("--max-round", "a round open for so long, whoever advances: the run stops"),
    "stall_s": (None, "the steps of a worker do not advance: it is reported as standing still"),
    "stall_timeout_s": ("--stall-timeout", "… and then counts as failed in this round"),
}


def timers() -> str:
    """Return the table of the coordinator's timers."""
    options = {option.opts[0]: option.default for option in coordinator.params}
    rows = ["| timer | option | default | what happens |", "|---|---|---|---|"]
    for name, (option, follows) in TIMERS.items():
        default = next(one.default for one in fields(Rules) if one.name == name)
        assert default is not MISSING
        if option is not None and default is not None:
            assert options[option] == default, option
        rows.append(
            f"| {name.removesuffix('_s').replace('_', ' ')} | {f'`{option}`' if option else NONE} "
            f"| {_value(name, default)} | {follows} |"
        )
    return "\n".join(rows)


def demands() -> str:
    """Return the table of what ``fluffle conformance`` demands."""
    rows = (f"| {one.name} | {one.demand} |" for one in SCENARIOS)
    return "\n".join(["| scenario | demand |", "|---|---|", *rows])


def forgotten() -> set[str]:
    """Return the durations among the rules that are not in the table."""
    return {one.name for one in fields(Rules) if one.name.endswith("_s")} - TIMERS.keys()


def _value(name: str, default: float | None) -> str:
    if default is None:
        return "none"
    if name.endswith("_s"):
        return f"{default:,g} s"
    return f"{default} {'heartbeats' if name == 'patience' else 'times'}"

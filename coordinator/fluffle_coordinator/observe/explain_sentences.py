"""The explanation of a round in sentences, and as one object for programs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from fluffle_coordinator.observe.explain import Answer, Note, Round, Wait, clock, longest_wait
from fluffle_coordinator.observe.formatting import duration

_ENDED = {
    "finished": "The run has finished: {}.",
    "stopped": "The run has stopped: {}.",
    "interrupted": "The coordinator was told to stop; the same command {}.",
}
_CLOSING = {"fold_s": "adding up", "average_s": "averaging", "checkpoint_s": "the checkpoint"}
# A wait that is shorter is not worth a sentence.
_WORTH_SAYING_S = 0.001


def sentences(told: Round) -> list[str]:
    """Say what happened in a round, and what it waits for; one sentence a line."""
    if not told.number:
        return _before_the_first(told)
    if told.opened_at is None and told.committed_at is None:
        return [f"The opening of round {told.number} is not in the journal.", *_afterwards(told)]
    return [
        *_opening(told),
        *_answers(told),
        *_missing(told),
        *_notes(told),
        *(_standing(told) if told.is_open else _closing(told)),
        *_longest(told),
        *_afterwards(told),
    ]


def why_missing(told: Round, worker: str) -> str:
    """Say what is known of a worker that has not answered."""
    if worker in told.failures:
        return f"it failed: {told.failures[worker]}"
    if worker in told.absent:
        return f"it {told.absent[worker]}"
    joined = f", joined at {clock(told.joined[worker])}" if worker in told.joined else ""
    if not told.waits:
        return f"it was connected{joined}"
    doing = _last_said_of(told, worker)
    return f"connected{joined}{f', {doing}' if doing else ', no update yet'}"


def _last_said_of(told: Round, worker: str) -> str:
    """Return what the coordinator last said that a worker does."""
    if told.said_at is None or told.coordinated is False:
        return ""
    for part in told.waits_for.rpartition("; ")[2].split(", "):
        name, _, doing = part.partition(" ")
        if name == worker and doing and not doing.startswith(("idle", "is ")):
            return f"{doing} at {clock(told.said_at)}"
    return ""


def _before_the_first(told: Round) -> list[str]:
    """Say what a run that has opened no round waits for."""
    here = sorted(told.present)
    lines = [f"Run {told.run} has opened no round yet."]
    if here:
        are = "is" if len(here) == 1 else "are"
        lines.append(f"Connected {are} {_names(here)}.")
    lines += [f"{worker} {why}." for worker, why in told.absent.items()]
    lines += _notes(told)
    if told.coordinated is False:
        lines += _no_coordinator(told)
    elif told.waits_for and told.said_at is not None:
        lines.append(f"At {clock(told.said_at)} the coordinator said: {told.waits_for}.")
    return [*lines, *_afterwards(told)]


def as_dict(told: Round) -> dict[str, Any]:
    """Return an explanation as plain data; times are ISO 8601, durations in seconds."""
    wait = longest_wait(told)
    return {
        "run": told.run,
        "round": told.number,
        "open": told.is_open,
        "opened_at": _iso(told.opened_at),
        "asked": list(told.asked),
        "needed": told.needed,
        "answers": [
            {
                "worker": one.worker,
                "at": _iso(one.at),
                "num_examples": one.num_examples,
                "train_s": one.train_s,
            }
            for one in told.answers.values()
        ],
        "missing": [{"worker": w, "why": why_missing(told, w)} for w in told.missing],
        "deadline_at": _iso(told.deadline_at) if told.is_open else None,
        "left_s": told.left_s,
        "notes": [
            {"event": n.event, "at": _iso(n.at), "worker": n.worker, "reason": n.reason}
            for n in told.notes
        ],
        "longest_wait": wait
        and {"seconds": wait.seconds, "until": wait.until, "after": wait.after},
        "committed_at": _iso(told.committed_at),
        "participants": list(told.participants),
        "timings": told.timings,
        "loss": told.loss,
        "metrics": told.metrics,
        "ended": told.ended[0] if told.ended else None,
        "says": sentences(told),
    }


def _iso(at: datetime | None) -> str | None:
    return at.isoformat(timespec="milliseconds") if at else None


def _opening(told: Round) -> Iterator[str]:
    state = "is open" if told.is_open else "is committed"
    if told.opened_at is None:
        yield f"Round {told.number} of run {told.run} {state}; its opening is not in the journal."
        return
    needed = "" if told.needed is None else f", {_number(told.needed, 'update')} needed"
    day = told.opened_at.astimezone().strftime("%Y-%m-%d")
    yield (
        f"Round {told.number} of run {told.run} {state}: opened on {day} at "
        f"{clock(told.opened_at)} for {_names(told.asked)}{needed}."
    )
    if told.openings > 1:
        yield "A coordinator was lost or stopped while it was open, and opened it again."


def _answers(told: Round) -> Iterator[str]:
    if not told.answers:
        yield "No update is counted."
    for one in told.answers.values():
        yield _answer(told, one)


def _answer(told: Round, one: Answer) -> str:
    after = ""
    if told.opened_at is not None and one.at >= told.opened_at:
        after = f", {duration((one.at - told.opened_at).total_seconds())} after the opening"
    words = [
        _number(one.num_examples, "example") if one.num_examples is not None else "",
        f"{duration(one.train_s)} of training" if one.train_s is not None else "",
    ]
    more = ", ".join(filter(None, words))
    return f"{one.worker} answered at {clock(one.at)}{after}{f': {more}' if more else ''}."


def _missing(told: Round) -> Iterator[str]:
    for worker in told.missing:
        why = why_missing(told, worker)
        if told.waits:
            yield f"Still waiting for {worker}: {why}."
        elif worker in told.failures or worker in told.absent:
            yield f"{worker} did not answer: {why}."
        elif not any(note.worker == worker and note.event == "late" for note in told.notes):
            # What it sent since waits in the broker, for the coordinator that goes on.
            yield f"{worker} did not answer{' by then' if told.is_open else ''}."


def _notes(told: Round) -> Iterator[str]:
    for note in told.notes:
        if note.event != "failure" or note.worker not in told.failures:
            yield f"At {clock(note.at)} {_note(note)}."


def _note(note: Note) -> str:
    worker = note.worker or "somebody"
    match note.event:
        case "late":
            return f"the update of {worker} came late and was discarded"
        case "duplicate":
            return f"the update of {worker} came again; it was counted once"
        case "rejected":
            sender = f" of {note.worker}" if note.worker else ""
            return f"a message{sender} was rejected: {note.reason}"
        case "refused":
            return f"{worker} was refused: {note.reason}"
        case "resend":
            return f"{worker} was asked for its update again: {note.reason}"
        case "failure":
            return f"the task of {worker} failed: {note.reason}"
        case "reopened":
            return f"it was opened again: {note.reason}"
    return f"it was closed with what was there: {note.reason}"


def _standing(told: Round) -> Iterator[str]:
    """Say where an open round stands."""
    if told.ended is not None:
        return  # said at the end
    if told.coordinated is False:
        yield from _no_coordinator(told)
        return
    if told.restarted_at is not None:
        yield (
            f"A coordinator was started at {clock(told.restarted_at)} and opens it again as soon "
            "as enough workers are there."
        )
        return
    if told.needed is not None:
        lacking = told.needed - len(told.answers)
        more = f"{lacking} more needed" if lacking > 0 else "enough to close it"
        yield f"{_number(len(told.answers), 'update')} of {told.needed}: {more}."
    if told.unlinked_since is not None:
        yield (
            f"The coordinator lost the broker at {clock(told.unlinked_since)}; the time until it "
            "is back does not count."
        )
    yield _deadline(told)
    # Who is missing and what they do is said above.
    if told.said_at is not None and (
        "needed" in told.waits_for or not told.waits_for.startswith(f"round {told.number}:")
    ):
        yield f"At {clock(told.said_at)} the coordinator said: {told.waits_for}."


def _no_coordinator(told: Round) -> Iterator[str]:
    goes_on = "and opens the round again" if told.is_open else "and opens the next round"
    yield (
        "No coordinator is connected to the broker now: the same command that started it "
        f"(without --fresh) goes on with this run, {goes_on}."
    )


def _deadline(told: Round) -> str:
    if told.left_s is None or told.deadline_at is None:
        return "Its deadline is not in the journal."
    if told.left_s > 0:
        return f"{duration(told.left_s)} left until the deadline, at {clock(told.deadline_at)}."
    return (
        f"The deadline passed at {clock(told.deadline_at)} and the journal has nothing after it: "
        "the coordinator is not running, or cannot reach the broker."
    )


def _closing(told: Round) -> Iterator[str]:
    if told.committed_at is None:
        return
    after = ""
    if told.opened_at is not None:
        seconds = (told.committed_at - told.opened_at).total_seconds()
        after = f", {duration(max(0.0, seconds))} after the opening"
    examples = "" if told.num_examples is None else f", {_number(told.num_examples, 'example')}"
    at, names = clock(told.committed_at), _names(told.participants)
    yield f"Committed at {at}{after}, with {names}{examples}."
    steps = [
        f"{words} {duration(told.timings[name])}"
        for name, words in _CLOSING.items()
        if told.timings.get(name, -1.0) >= 0
    ]
    if steps:
        yield f"Of that, {', '.join(steps)}."
    if told.loss is not None:
        metrics = "".join(f", {name} {value:.4f}" for name, value in told.metrics.items())
        on = "" if told.evaluated_on is None else f" on {told.evaluated_on:.0f} held-out examples"
        yield f"Its model was evaluated: loss {told.loss:.4f}{metrics}{on}."


def _longest(told: Round) -> Iterator[str]:
    wait = longest_wait(told)
    if wait is None or wait.seconds < _WORTH_SAYING_S:
        return
    if told.waits and told.coordinated is False:
        return  # nobody waits
    lasted = duration(wait.seconds)
    since = f"after the update of {wait.after}" if wait.after else "after the opening"
    if wait.until == "commit":
        yield f"Closing it took longest: {lasted} {since}."
    elif wait.until:
        yield _waited_for(told, wait)
    elif told.missing:
        still = ", and still does" if told.waits else ""
        yield f"It waited longest for {_names(told.missing)}{still}: {lasted} {since}."


def _waited_for(told: Round, wait: Wait) -> str:
    """Say who answered last; everyone else's update was there before."""
    last = told.answers[wait.until]
    trained = "" if last.train_s is None else f" (it trained for {duration(last.train_s)})"
    if not wait.after:
        return f"It waited for {wait.until}{trained}: {duration(wait.seconds)} after the opening."
    later_s = (last.at - told.answers[wait.after].at).total_seconds()
    return (
        f"It waited longest for {wait.until}{trained}, the last to answer: "
        f"{duration(wait.seconds)} after the opening, {duration(later_s)} after {wait.after}."
    )


def _afterwards(told: Round) -> Iterator[str]:
    if told.ended is not None:
        outcome, reason = told.ended
        again = "opens this round again" if told.is_open else "goes on from there"
        yield _ENDED[outcome].format(
            again if outcome == "interrupted" else reason or "no reason is given"
        )
    elif told.committed_at is not None and told.coordinated is False:
        yield from _no_coordinator(told)
    elif told.committed_at is not None and told.waits_for and told.said_at is not None:
        yield f"At {clock(told.said_at)} the coordinator said: {told.waits_for}."


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) or "nobody"


def _number(count: float, thing: str) -> str:
    return f"{count:.0f} {thing}{'' if count == 1 else 's'}"

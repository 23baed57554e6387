"""The explanation of a round in sentences, and as one object for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import Failure, Late, Left, RunEvent
from fluffle_coordinator.observe.explain import Explanation, Wait, longest_wait, moment
from fluffle_coordinator.observe.round_view import Answer
from fluffle_coordinator.observe.worker_view import Departure

_CLOSING = {"fold_s": "adding up", "average_s": "averaging", "checkpoint_s": "the checkpoint"}
# A wait that is shorter is not worth a sentence.
_WORTH_SAYING_S = 0.001


def sentences(about: Explanation) -> list[str]:
    """Say what happened in a round, and what it waits for; one sentence a line."""
    this = about.round
    if not this.number:
        return _before_the_first(about)
    if this.opened_at is None and this.committed_at is None:
        return [
            f"The opening of round {this.number} is not in the journal.",
            *_afterwards(about),
        ]
    return [
        *_opening(about),
        *_answers(about),
        *_missing(about),
        *_notes(about),
        *(_standing(about) if about.is_open else _closing(about)),
        *_longest(about),
        *_afterwards(about),
    ]


def why_missing(about: Explanation, worker: str) -> str:
    """Say what is known of a worker that has not answered."""
    this = about.round
    if worker in this.failures:
        return f"it failed: {this.failures[worker]}"
    if (went := about.went(worker)) is not None:
        return f"it {_absence(*went)}"
    joined_at = this.joined.get(worker)
    joined = "" if joined_at is None else f", joined at {clock(joined_at)}"
    if not about.waits:
        return f"it was connected{joined}"
    doing = _doing(about, worker)
    return f"connected{joined}{f', {doing}' if doing else ', no update yet'}"


def _doing(about: Explanation, worker: str) -> str:
    """Return what a worker was last said to do; "" where that says nothing new."""
    known = about.doing(worker)
    if known is None or known[1].state in ("idle", "gone"):
        return ""
    return f"{known[1].sentence()} at {clock(known[0])}"


def _absence(at: float, event: Departure) -> str:
    if isinstance(event, Left):
        return f"left at {clock(at)}{f' ({event.reason})' if event.reason else ''}"
    heard = "" if event.silent_s is None else f" (no heartbeat for {event.silent_s:.0f} s)"
    return f"has been gone since {clock(at)}{heard}"


def _before_the_first(about: Explanation) -> list[str]:
    """Say what a run that has opened no round waits for."""
    here = sorted(about.view.workers.present)
    lines = [f"Run {about.run} has opened no round yet."]
    if here:
        are = "is" if len(here) == 1 else "are"
        lines.append(f"Connected {are} {_names(here)}.")
    lines += [f"{worker} {_absence(*how)}." for worker, how in about.view.workers.absent.items()]
    lines += _notes(about)
    if about.coordinated is False:
        lines += _no_coordinator(about)
    else:
        lines += _waiting(about)
    return [*lines, *_afterwards(about)]


def _waiting(about: Explanation) -> Iterator[str]:
    """Say what the coordinator waits for, but for who is missing and what they do."""
    if about.waiting is not None and about.waiting[1].reason:
        at, event = about.waiting
        yield f"At {clock(at)} the coordinator said: {event.reason}."


def as_dict(about: Explanation) -> dict[str, Any]:
    """Return an explanation as plain data; times are ISO 8601, durations in seconds."""
    this = about.round
    wait = longest_wait(about)
    return {
        "run": about.run,
        "round": this.number,
        "open": about.is_open,
        "opened_at": _iso(this.opened_at),
        "asked": list(this.asked),
        "needed": this.needed,
        "answers": [
            {
                "worker": one.worker,
                "at": _iso(one.at),
                "num_examples": one.num_examples,
                "train_s": one.train_s,
            }
            for one in about.round.answers.values()
        ],
        "missing": [{"worker": w, "why": why_missing(about, w)} for w in about.missing],
        "deadline_at": _iso(this.deadline_at) if about.is_open else None,
        "left_s": about.left_s,
        "notes": [
            {"event": n.event.name, "at": _iso(n.at), "worker": n.worker, "reason": n.reason}
            for n in this.notes
        ],
        "longest_wait": wait
        and {"seconds": wait.seconds, "until": wait.until, "after": wait.after},
        "committed_at": _iso(this.committed_at),
        "participants": list(this.participants),
        "timings": dict(this.timings),
        "loss": this.loss,
        "metrics": dict(this.metrics),
        "ended": about.view.ended[1].name if about.view.ended else None,
        "says": sentences(about),
    }


def _iso(at: float | None) -> str | None:
    time = None if at is None else moment(at)
    return time.isoformat(timespec="milliseconds") if time else None


def clock(at: float) -> str:
    """Return the local time of day."""
    return _local(at, "%H:%M:%S")


def _local(at: float, form: str) -> str:
    time = moment(at)
    return time.astimezone().strftime(form) if time else "?"


def _opening(about: Explanation) -> Iterator[str]:
    this = about.round
    state = "is open" if about.is_open else "is committed"
    if this.opened_at is None:
        yield f"Round {this.number} of run {about.run} {state}; its opening is not in the journal."
        return
    needed = "" if this.needed is None else f", {_number(this.needed, 'update')} needed"
    day = _local(this.opened_at, "%Y-%m-%d")
    yield (
        f"Round {this.number} of run {about.run} {state}: opened on {day} at "
        f"{clock(this.opened_at)} for {_names(this.asked)}{needed}."
    )
    if this.openings > 1:
        yield "A coordinator was lost or stopped while it was open, and opened it again."


def _answers(about: Explanation) -> Iterator[str]:
    if not about.round.answers:
        yield "No update is counted."
    for one in about.round.answers.values():
        yield _answer(about, one)


def _answer(about: Explanation, one: Answer) -> str:
    this = about.round
    after = ""
    if this.opened_at is not None and one.at >= this.opened_at:
        after = f", {duration(one.at - this.opened_at)} after the opening"
    words = [
        _number(one.num_examples, "example") if one.num_examples is not None else "",
        f"{duration(one.train_s)} of training" if one.train_s is not None else "",
        f"{_number(one.staleness, 'version')} behind" if one.staleness else "",
    ]
    more = ", ".join(filter(None, words))
    return f"{one.worker} answered at {clock(one.at)}{after}{f': {more}' if more else ''}."


def _missing(about: Explanation) -> Iterator[str]:
    this = about.round
    for worker in about.missing:
        why = why_missing(about, worker)
        if about.waits:
            yield f"Still waiting for {worker}: {why}."
        elif worker in this.failures or about.went(worker) is not None:
            yield f"{worker} did not answer: {why}."
        elif not any(note.worker == worker and isinstance(note.event, Late) for note in this.notes):
            # What it sent since waits in the broker, for the coordinator that goes on.
            by_then = " by then" if about.is_open else ""
            # Where work outlives its round, it may well have answered in the one before.
            yield (
                f"No update of {worker} is in it{by_then}."
                if this.has_work_of_others
                else f"{worker} did not answer{by_then}."
            )


def _notes(about: Explanation) -> Iterator[str]:
    this = about.round
    for note in this.notes:
        if not isinstance(note.event, Failure) or note.worker not in this.failures:
            said = note.event.sentence().removeprefix(f"round {this.number}: ")
            sender = note.worker and note.worker not in said
            yield f"At {clock(note.at)}: {said}{f' ({note.worker})' if sender else ''}."


def _standing(about: Explanation) -> Iterator[str]:
    """Say where an open round stands."""
    this = about.round
    if about.view.ended is not None:
        return  # said at the end
    if about.coordinated is False:
        yield from _no_coordinator(about)
        return
    if this.restarted_at is not None:
        yield (
            f"A coordinator was started at {clock(this.restarted_at)} and opens it again as soon "
            "as enough workers are there."
        )
        return
    if this.needed is not None:
        lacking = this.needed - len(about.round.answers)
        more = f"{lacking} more needed" if lacking > 0 else "enough to close it"
        yield f"{_number(len(about.round.answers), 'update')} of {this.needed}: {more}."
    if about.view.unlinked_since is not None:
        lost = clock(about.view.unlinked_since)
        yield (
            f"The coordinator lost the broker at {lost}; the time until it is back does not count."
        )
    yield _deadline(about)
    yield from _waiting(about)


def _no_coordinator(about: Explanation) -> Iterator[str]:
    goes_on = "and opens the round again" if about.is_open else "and opens the next round"
    yield (
        "No coordinator is connected to the broker now: the same command that started it "
        f"(without --fresh) goes on with this run, {goes_on}."
    )


def _deadline(about: Explanation) -> str:
    this = about.round
    if about.left_s is None or this.deadline_at is None:
        return "Its deadline is not in the journal."
    if about.left_s > 0:
        return f"{duration(about.left_s)} left until the deadline, at {clock(this.deadline_at)}."
    return (
        f"The deadline passed at {clock(this.deadline_at)} and the journal has nothing after it: "
        "the coordinator is not running, or cannot reach the broker."
    )


def _closing(about: Explanation) -> Iterator[str]:
    this = about.round
    if this.committed_at is None:
        return
    after = ""
    if this.opened_at is not None:
        seconds = this.committed_at - this.opened_at
        after = f", {duration(max(0.0, seconds))} after the opening"
    examples = "" if this.num_examples is None else f", {_number(this.num_examples, 'example')}"
    at, names = clock(this.committed_at), _names(this.participants)
    yield f"Committed at {at}{after}, with {names}{examples}."
    steps = [
        f"{words} {duration(this.timings[name])}"
        for name, words in _CLOSING.items()
        if this.timings.get(name, -1.0) >= 0
    ]
    if steps:
        yield f"Of that, {', '.join(steps)}."
    if this.loss is not None:
        metrics = "".join(f", {name} {value:.4f}" for name, value in this.metrics.items())
        on = "" if this.evaluated_on is None else f" on {this.evaluated_on:.0f} held-out examples"
        yield f"Its model was evaluated: loss {this.loss:.4f}{metrics}{on}."


def _longest(about: Explanation) -> Iterator[str]:
    wait = longest_wait(about)
    if wait is None or wait.seconds < _WORTH_SAYING_S:
        return
    if about.waits and about.coordinated is False:
        return  # nobody waits
    lasted = duration(wait.seconds)
    since = f"since {wait.after} answered" if wait.after else "since the opening"
    if wait.until == "commit":
        after = f"{wait.after} answered" if wait.after else "the opening"
        yield f"The longest wait was for the commit: it came {lasted} after {after}."
    elif wait.until:
        yield _waited_for(about, wait)
    elif about.missing and about.waits:
        yield f"The longest wait is for {_names(about.missing)}: {lasted} so far, {since}."
    elif about.missing:
        yield f"The longest wait was for {_names(about.missing)}: {lasted} {since}."


def _waited_for(about: Explanation, wait: Wait) -> str:
    """Say who answered last; everyone else's update was there before."""
    last = wait.last[-1]
    trained = "" if last.train_s is None else f"trained for {duration(last.train_s)} and "
    after = ""
    if wait.after:
        after = f", {duration(last.at - wait.last[0].at)} after {wait.after}"
    return (
        f"The longest wait was for {wait.until}: it {trained}answered {duration(wait.seconds)} "
        f"after the opening{after}."
    )


def _afterwards(about: Explanation) -> Iterator[str]:
    if about.view.ended is not None:
        yield _ending(about, about.view.ended[1])
    elif about.round.committed_at is not None and about.coordinated is False:
        yield from _no_coordinator(about)
    elif about.round.committed_at is not None:
        yield from _waiting(about)


def _ending(about: Explanation, event: RunEvent) -> str:
    match event:
        case run_events.Finished(reason=reason):
            return f"The run has finished: {reason or 'no reason is given'}."
        case run_events.Stopped(reason=reason):
            return f"The run has stopped: {reason or 'no reason is given'}."
    again = "opens this round again" if about.is_open else "goes on from there"
    return f"The coordinator was told to stop; the same command {again}."


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) or "nobody"


def _number(count: float, thing: str) -> str:
    return f"{count:.0f} {thing}{'' if count == 1 else 's'}"


def duration(value: float) -> str:
    """Return a duration in seconds, in the unit that suits it.

    >>> duration(0.0123), duration(3.21), duration(125), duration(7260), duration(0)
    ('12 ms', '3.2 s', '2 min 5 s', '2 h 1 min', '0 s')
    """
    if value == 0:
        return "0 s"
    if value < 1:
        return f"{value * 1000:.2g} ms" if value < 0.01 else f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.3g} s" if value >= 10 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"

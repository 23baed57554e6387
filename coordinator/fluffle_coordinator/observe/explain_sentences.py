"""Renders the explanation of a round as sentences, and as plain data for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fluffle_common.plural import listed, plural
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import Failure, Left, RunEvent, decimal
from fluffle_common.protocol.metric_names import PERSONAL_PREFIX, TEST_PREFIX
from fluffle_coordinator.observe.explain import Explanation, longest_wait
from fluffle_coordinator.observe.round_view import Note, RoundView
from fluffle_coordinator.observe.times import clock, duration, iso, local
from fluffle_coordinator.observe.worker_view import Departure

_CLOSING = {"fold_s": "adding up", "average_s": "averaging", "checkpoint_s": "checkpoint"}
_REOPENS = "opens the round again and counts the updates waiting in the queue"
_SHORTEST_WAIT_S = 0.001  # shorter waits get no sentence
_MOST_SENTENCES = 25  # about the answers, and about the missing workers; the JSON has all


def sentences(explanation: Explanation) -> list[str]:
    """Return what happened in a round and what it waits for, as a list of sentences."""
    this = explanation.round
    if not this.number:
        return list(_before_the_first(explanation))
    if this.opened_at is None and this.committed_at is None:
        return [
            f"The opening of round {this.number} is not in the journal.",
            *_afterwards(explanation),
        ]
    return [
        *_opening(explanation),
        *_answers(explanation),
        *_missing(explanation),
        *_notes(explanation),
        *(_progress(explanation) if this.is_open else _closing(explanation)),
        *_longest(explanation),
        *_afterwards(explanation),
    ]


def why_missing(explanation: Explanation, worker: str) -> str:
    """Return what is known about a worker that has not answered, as a part of a sentence."""
    this = explanation.round
    if worker in this.failures:
        return f"it failed ({this.failures[worker]})"
    if (departed := explanation.departed(worker)) is not None:
        return f"it {_absence(*departed)}"
    if (rejection := _rejection(explanation, worker)) is not None:
        doing = _doing(explanation, worker)
        since = "" if doing.startswith("failed") else doing
        rejected = f"its update was rejected at {clock(rejection.at)} ({rejection.reason})"
        return f"{rejected}; {since}" if since else rejected
    if this.restarted_at is not None and worker not in explanation.view.workers.present:
        return f"not heard from since the coordinator's restart at {clock(this.restarted_at)}"
    joined_at = this.joined.get(worker)
    joined = "" if joined_at is None else f", joined at {clock(joined_at)}"
    if not explanation.waits:
        return f"it was connected{joined}"
    if explanation.has_sent(worker):
        return "its update has arrived and is being added"
    doing = _doing(explanation, worker)
    return f"connected{joined}{f', {doing}' if doing else ', no update yet'}"


def _rejection(explanation: Explanation, worker: str) -> Note | None:
    """Return the rejection of a worker's update, if that is what is known of it last."""
    this = explanation.round
    rejection = this.rejections.get(worker)
    if rejection is None or worker in this.failures or explanation.departed(worker) is not None:
        return None
    return rejection if worker in this.asked or worker in this.joined else None


def _doing(explanation: Explanation, worker: str) -> str:
    """Return what a worker was last reported to do; "" if that adds nothing."""
    at, doing = explanation.doings.get(worker, (0.0, None))
    if doing is None or doing.state in ("idle", "gone"):
        return ""
    return f"{doing.sentence()} at {clock(at)}"


def _absence(at: float, event: Departure) -> str:
    if isinstance(event, Left):
        return f"left at {clock(at)}{f' ({event.reason})' if event.reason else ''}"
    heard = "" if event.silent_s is None else f" (no heartbeat for {event.silent_s:.0f} s)"
    return f"has been gone since {clock(at)}{heard}"


def _before_the_first(explanation: Explanation) -> Iterator[str]:
    """Yield the sentences about a run that has opened no round."""
    workers = explanation.view.workers
    yield f"Run {explanation.run} has opened no round yet."
    if workers.present:
        yield f"Connected workers: {_names(sorted(workers.present))}."
    for worker, how in workers.departed.items():
        yield f"{worker} {_absence(*how)}."
    yield from _notes(explanation)
    if explanation.coordinated is False:
        yield _no_coordinator(explanation)
    else:
        yield from _waiting(explanation)
    yield from _afterwards(explanation)


def _waiting(explanation: Explanation) -> Iterator[str]:
    """Yield what the coordinator waits for, apart from the missing workers."""
    if explanation.waiting is not None and explanation.waiting[1].reason:
        at, event = explanation.waiting
        yield f'At {clock(at)} the coordinator reported "{event.reason}".'


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as plain data, with times in ISO 8601 and durations in seconds."""
    this = explanation.round
    wait = longest_wait(explanation)
    return {
        "run": explanation.run,
        "round": this.number,
        "open": this.is_open and not this.is_suspended,
        "opened_at": iso(this.opened_at),
        "asked": list(this.asked),
        "needed": this.needed,
        "answers": [
            {
                "worker": update.worker,
                "at": iso(at),
                "num_examples": update.num_examples,
                "train_s": update.train_s,
            }
            for at, update in this.answers.values()
        ],
        "missing": [{"worker": w, "why": why_missing(explanation, w)} for w in explanation.missing],
        "deadline_at": iso(this.deadline_at) if this.is_open else None,
        "left_s": explanation.left_s,
        "notes": [
            {
                "event": n.event.name,
                "at": iso(n.at),
                "worker": n.worker,
                "reason": n.reason,
                "unlisted": n.unlisted,
            }
            for n in this.notes
        ],
        "longest_wait": wait and wait._asdict(),
        "committed_at": iso(this.committed_at),
        "participants": list(this.participants),
        "timings": dict(this.timings),
        "loss": this.loss,
        "metrics": dict(this.metrics),
        "ended": explanation.view.ended[1].name if explanation.view.ended else None,
        "says": sentences(explanation),
    }


def _opening(explanation: Explanation) -> Iterator[str]:
    this = explanation.round
    open_state = "is open" if explanation.waits else "was not closed"  # because the run ended
    state = open_state if this.is_open else "is committed"
    if this.opened_at is None:
        yield (
            f"Round {this.number} of run {explanation.run} {state}; its opening is not in the "
            "journal."
        )
        return
    needed = "" if this.needed is None else f"; {plural(this.needed, 'update')} needed"
    if this.is_suspended:
        state, needed = "is not open now", ""  # a restarted coordinator may have another quorum
    day = local(this.opened_at, "%Y-%m-%d")
    yield (
        f"Round {this.number} of run {explanation.run} {state}: opened on {day} at "
        f"{clock(this.opened_at)} for {_names(this.asked)}{needed}."
    )
    if this.openings > 1:
        yield (
            "A coordinator was lost or stopped while the round was open; later, the round was "
            "opened again."
        )


def _answers(explanation: Explanation) -> Iterator[str]:
    this = explanation.round
    if not this.answers:
        yield f"No update of round {this.number} has been counted."
    longest_s = math.inf if explanation.lasted_s is None else explanation.lasted_s
    answers = list(this.answers.values())
    if unlisted := max(0, len(answers) - _MOST_SENTENCES):
        yield f"{plural(unlisted, 'earlier answer')}: see 'fluffle journal --round {this.number}'."
    for at, update in answers[unlisted:]:
        after = ""
        after_s = 0.0 if this.opened_at is None else at - this.opened_at
        if this.opened_at is not None and 0 <= after_s <= longest_s:
            after = f", {duration(after_s)} after the opening"
        elif after_s < 0 and this.openings > 1:
            after = ", before the round was opened again"
        words = [
            plural(update.num_examples, "example") if update.num_examples is not None else "",
            f"{duration(update.train_s)} of training" if update.train_s is not None else "",
            f"{plural(update.staleness, 'version')} behind" if update.staleness else "",
        ]
        more = ", ".join(filter(None, words))
        yield f"{update.worker} answered at {clock(at)}{after}{f': {more}' if more else ''}."


def _missing(explanation: Explanation) -> Iterator[str]:
    this = explanation.round
    for worker in explanation.missing[:_MOST_SENTENCES]:
        why = why_missing(explanation, worker)
        if explanation.waits:
            yield f"Still waiting for {worker}: {why}."
        elif worker in this.failures or explanation.departed(worker) is not None:
            yield f"{worker} did not answer: {why}."
        elif _rejection(explanation, worker) is not None:
            yield f"No update of {worker} was counted: {why}."
        elif worker not in this.came_late:
            yield f"Round {this.number} has no update of {worker}."
    if (unlisted := len(explanation.missing) - _MOST_SENTENCES) > 0:
        yield f"{plural(unlisted, 'more worker')} without an update: see 'fluffle explain --json'."
    if explanation.short:
        yield f"Still waiting for {plural(explanation.short, 'more worker')} to join."


def _notes(explanation: Explanation) -> Iterator[str]:
    this = explanation.round
    for note in this.notes:
        worker = note.worker or ""
        is_said = note == _rejection(explanation, worker) or (
            isinstance(note.event, Failure) and worker in this.failures
        )
        if not is_said:
            sentence = note.event.sentence().removeprefix(f"round {this.number}: ")
            sender = "" if not worker or worker in sentence else f" ({worker})"
            yield f"At {clock(note.at)}: {sentence}{sender}{_unlisted(note)}."


def _unlisted(note: Note) -> str:
    if not note.unlisted:
        return ""
    return f" ({plural(note.unlisted, 'similar event')} before it: see 'fluffle journal')"


def _progress(explanation: Explanation) -> Iterator[str]:
    """Yield the progress of an open round."""
    this, unlinked_since = explanation.round, explanation.view.unlinked_since
    if explanation.view.ended is not None:
        return  # _afterwards reports the end
    if explanation.coordinated is False:
        yield _no_coordinator(explanation)
        return
    if this.restarted_at is not None:
        yield (
            f"A coordinator was started at {clock(this.restarted_at)} and opens the round again "
            "as soon as enough workers are connected."
        )
        yield from _waiting(explanation)
        return
    if this.needed is not None:
        lacking = this.needed - len(this.answers)
        more = f"; {lacking} more needed" if lacking > 0 else ", enough to close the round"
        yield f"Round {this.number} has {len(this.answers)} of {this.needed} updates{more}."
    if unlinked_since is not None:
        yield (
            f"The coordinator lost the connection to the broker at {clock(unlinked_since)}; the "
            "time without a connection does not count towards the deadline."
        )
    if explanation.view.full_disk is not None:
        at, disk = explanation.view.full_disk
        yield (
            f"At {clock(at)}: {disk.sentence()}. Until the write succeeds, the deadline does not "
            "apply."
        )
    else:
        yield _deadline(explanation)
    yield from _waiting(explanation)


def _no_coordinator(explanation: Explanation) -> str:
    opens = f", {_REOPENS}" if explanation.round.is_open else " and opens the next round"
    return (
        "No coordinator is connected to the broker now. A coordinator that you start with the "
        f"same command (without --fresh) continues this run{opens}. If it only waits as a standby, "
        "the earlier coordinator is suspended, or cannot reach the broker: continue or end the "
        "process that the standby names."
    )


def _deadline(explanation: Explanation) -> str:
    this = explanation.round
    left_s = explanation.left_s
    if left_s is None or this.deadline_at is None:
        return f"The deadline of round {this.number} is not in the journal."
    if left_s > 0:
        return f"{duration(left_s)} left until the deadline, at {clock(this.deadline_at)}."
    passed = f"The deadline passed at {clock(this.deadline_at)}"
    if explanation.view.waiting is not None and explanation.view.waiting[0] > this.deadline_at:
        return f"{passed}; the round stays open while workers advance or an update is being added."
    if explanation.coordinated:
        return f"{passed}; the coordinator is connected, but has not yet reported what it is doing."
    return (
        f"{passed}, but the journal has no later event; the coordinator is not running, is "
        "suspended, or cannot reach the broker."
    )


def _closing(explanation: Explanation) -> Iterator[str]:
    this = explanation.round
    if this.committed_at is None:
        return
    after = ""
    if (lasted_s := explanation.lasted_s) is not None:
        after = f", {duration(lasted_s)} after the opening"
    examples = "" if this.num_examples is None else f", {plural(this.num_examples, 'example')}"
    at, names = clock(this.committed_at), _names(this.participants)
    yield f"Round {this.number} was committed at {at}{after}, with {names}{examples}."
    steps = [
        f"{words} {duration(this.timings[name])}"
        for name, words in _CLOSING.items()
        if this.timings.get(name, -1.0) >= 0
    ]
    if steps:
        yield f"Time spent in the coordinator: {', '.join(steps)}."
    yield from _metrics(this)


def _metrics(this: RoundView) -> Iterator[str]:
    """Yield what was measured, apart by who measured it, and on which model."""
    by_prefix: dict[str, list[str]] = {PERSONAL_PREFIX: [], TEST_PREFIX: [], "": []}
    for name, value in this.metrics.items():
        prefix = next(one for one in by_prefix if name.startswith(one))
        by_prefix[prefix].append(f"{name} {decimal(value)}")
    personal, tested, evaluated = map(", ".join, by_prefix.values())
    if personal:
        yield f"Before averaging, the workers' own models reached {personal}."
    if this.loss is not None:
        metrics = f", {evaluated}" if evaluated else ""
        on = ""
        if this.evaluated_on is not None:
            on = f" on {plural(this.evaluated_on, 'held-out example')}"
        model = f"The model of round {this.number}"
        yield f"{model} was evaluated: loss {decimal(this.loss)}{metrics}{on}."
    if tested:
        yield f"The coordinator's own test of the model gave {tested}."


def _longest(explanation: Explanation) -> Iterator[str]:
    wait = longest_wait(explanation)
    if wait is None or wait.seconds < _SHORTEST_WAIT_S:
        return
    if explanation.waits and explanation.coordinated is False:
        return  # no coordinator is there to wait
    lasted, missing = duration(wait.seconds), _names(explanation.missing)
    since = f"since {wait.after} answered" if wait.after else "since the opening"
    if wait.until == "commit":
        after = f"{wait.after} answered" if wait.after else "the opening"
        yield f"The longest wait was for the commit: it came {lasted} after {after}."
    elif wait.until:
        *before, (at, last) = explanation.counted
        trained = "" if last.train_s is None else f"trained for {duration(last.train_s)} and "
        after = ""
        if wait.after and (since_s := at - before[-1][0]) <= wait.seconds:
            after = f", {duration(since_s)} after {wait.after}"
        yield (
            f"The longest wait was for {wait.until}: it {trained}answered {lasted} after the "
            f"opening{after}."
        )
    elif explanation.missing and explanation.waits:
        yield f"The longest wait is for {missing}: {lasted} so far, {since}."
    elif explanation.missing:
        yield f"The longest wait was for {missing}: {lasted} {since}."


def _afterwards(explanation: Explanation) -> Iterator[str]:
    if explanation.view.ended is not None:
        yield _ending(explanation, *explanation.view.ended)
    elif explanation.round.committed_at is not None and explanation.coordinated is False:
        yield _no_coordinator(explanation)
    elif explanation.round.committed_at is not None:
        yield from _waiting(explanation)


def _ending(explanation: Explanation, at: float, event: RunEvent) -> str:
    match event:
        case run_events.Finished(reason=reason):
            return f"The run has finished: {reason or 'no reason is given'}."
        case run_events.Stopped(reason=reason):
            return f"The run has stopped: {reason or 'no reason is given'}."
    told = f"The coordinator was told to stop at {clock(at)}; the same coordinator command"
    if explanation.round.is_open:
        return f"{told} {_REOPENS}."
    return f"{told} continues the run."


def _names(names: tuple[str, ...] | list[str]) -> str:
    return listed(names) or "nobody"

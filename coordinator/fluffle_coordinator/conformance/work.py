"""Scenarios of work: how a worker answers it, once, again, and when newer work arrives."""

from __future__ import annotations

from fluffle_common.protocol.messages import (
    Evaluation,
    Failure,
    Heartbeat,
    Hello,
    Plan,
    Update,
    Verdict,
)
from fluffle_common.tensors.frozen import frozen_of
from fluffle_common.tensors.groups import FROZEN, select_tensors
from fluffle_coordinator.conformance.listener import SentFit
from fluffle_coordinator.conformance.probe import Probe, fresh_name
from fluffle_coordinator.conformance.received import (
    ReceivedUpdate,
    Skipped,
    Unmet,
    same_answer,
    signs_of_life,
)
from fluffle_coordinator.conformance.scenario import requires

_SEQUENCES_AHEAD = 1000  # of the round, as in an asynchronous run


@requires(
    "Work",
    "a fit is answered with an update of the same run, round and base; the update's deltas "
    "(trained - received) are finite and have the names, shapes and dtypes of the fit",
    needed=True,
)
async def fit(probe: Probe) -> str:
    update, _ = await probe.update(await probe.ask(probe.next_fit()))
    return f"{update.num_examples:,} examples, {update.seconds:.2f} s of training"


@requires(
    "Work",
    "if a fit sets 'evaluate', a worker with held-out data first sends an evaluation (with round - "
    "1 and the fit's base), then the update",
)
async def evaluation_before_the_update(probe: Probe) -> str:
    sent = await probe.ask(probe.next_fit(evaluate=True))
    await probe.update(sent)
    await probe.evaluation()  # by then, a late evaluation has arrived
    answers = [
        each.message
        for each in probe.messages[sent.since :]
        if isinstance(each.message, Update | Evaluation) and each.message.base == sent.fit.base
    ]
    evaluation = next((each for each in answers if isinstance(each, Evaluation)), None)
    if evaluation is None:
        return "an update without an evaluation, as if the worker had no held-out data"
    if evaluation.round != sent.fit.round - 1:
        raise Unmet(
            f"the worker sent an evaluation of round {evaluation.round}; expected round "
            f"{sent.fit.round - 1}"
        )
    if isinstance(answers[0], Update):
        raise Unmet(
            "the worker sent its evaluation after the update; expected the evaluation first"
        )
    return f"loss {evaluation.loss:.4g} on {evaluation.num_examples:,} examples, then the update"


@requires("Work", "an idle worker reports the run and the round of its last work")
async def last_work(probe: Probe) -> str:
    update, _ = await probe.update(await probe.ask(probe.next_fit()))
    beat = await probe.idle()
    if (beat.run, beat.round) != (update.run, update.round):
        raise Unmet(
            f"the worker's heartbeat reports run {beat.run}, round {beat.round}, but its last "
            f"update was for round {update.round}"
        )
    if beat.base not in (None, update.base):
        raise Unmet(
            f"the worker's heartbeat says that it trained from {beat.base}, but its last update "
            f"says {update.base}"
        )
    return f"idle after round {beat.round}"


@requires("Work", "if a fit is repeated after its update, the worker sends that update again")
async def same_fit_again(probe: Probe) -> str:
    sent = await probe.ask(probe.next_fit())
    first = await probe.update(sent)
    await probe.idle()
    again = await probe.update(await probe.ask(sent.fit))
    if not same_answer(first, again):
        raise Unmet(
            "the worker trained again instead of sending the same update "
            f"({_difference(first, again)})"
        )
    return "the same update again"


@requires("Work", "a worker ignores a repeated fit while it trains for that fit")
async def same_fit_while_at_work(probe: Probe) -> str:
    sent = await probe.ask(probe.next_fit())
    await probe.send(sent.fit)
    await probe.update(sent, crossed=True)
    await probe.evaluation()
    updates = probe.updates_of(sent)
    for other in updates[1:]:
        if not same_answer(updates[0], other):
            raise Unmet(f"the worker trained twice ({_difference(updates[0], other)})")
    return "one update" if len(updates) == 1 else f"the same update {len(updates)} times"


@requires("Work", "a worker answers a fit that arrives before its last update is confirmed")
async def next_fit_at_once(probe: Probe) -> str:
    for _ in range(3):
        await probe.update(await probe.ask(probe.next_fit()))
    return "updates of 3 rounds without a pause"


@requires("Work", "a fit for a newer round replaces older work and is answered")
async def newer_fit(probe: Probe) -> str:
    older = await probe.ask(probe.next_fit())
    newer = await probe.ask(probe.next_fit())
    await probe.update(newer)
    return "an update of the newer round" + _and_also(probe, older, "of the older round")


@requires(
    "Work", "a worker accepts or ignores a fit for an older round, but always answers the newer fit"
)
async def older_fit(probe: Probe) -> str:
    newer = await probe.ask(probe.next_fit(round=probe.round + 2))
    older = await probe.ask(probe.next_fit(round=newer.fit.round - 1))
    await probe.until(
        lambda: probe.updates_of(newer) or probe.updates_of(older) or None,
        f"update of round {newer.fit.round} or {older.fit.round}",
    )
    if probe.updates_of(newer):
        await probe.update(newer, crossed=True)
        return "an update of the newer round" + _and_also(probe, older, "of the older round")
    await probe.update(older, crossed=True)
    await probe.update(await probe.ask(newer.fit))
    return "an update of the older round; an update of the newer round after a repeated fit"


@requires("Work", "a fit for the same round with another base is new work and is trained")
async def another_base(probe: Probe) -> str:
    first = await probe.ask(probe.next_fit())
    other = await probe.ask(first.fit.model_copy(update={"base": fresh_name()}))
    await probe.update(other)
    return "an update from the new base" + _and_also(probe, first, "from the old base")


@requires(
    "Work",
    "an update has the sequence of its fit, or no sequence if the fit has no sequence; a fit for "
    "the same round and base with a higher sequence is new work and is trained",
)
async def ticket(probe: Probe) -> str:
    without = probe.next_fit(sequence=None)
    sequence = probe.round + _SEQUENCES_AHEAD
    first = probe.next_fit(sequence=sequence)
    second = first.model_copy(update={"sequence": sequence + 1})
    for work in (without, first, second):
        update, _ = await probe.update(await probe.ask(work))
        if update.sequence != work.sequence:
            raise Unmet(
                f"the 'fit' message has {_sequence(work.sequence)}, but the worker's update has "
                f"{_sequence(update.sequence)}; expected the same"
            )
    return "an update without a sequence, and two of the same round with theirs"


def _sequence(number: int | None) -> str:
    return "no sequence" if number is None else f"the sequence {number}"


@requires(
    "Work",
    "an update has only the tensors that match the plan's field 'train'; if no tensor matches, the "
    "worker sends a failure",
)
async def part_of_the_model(probe: Probe) -> str:
    nothing = await probe.ask(probe.next_fit(plan=Plan(train=("conformance/none",))))
    await _failure_or_update(probe, nothing)
    if probe.updates_of(nothing):
        raise Unmet(
            "the worker sent an update although the plan's field 'train' matches no tensor; "
            "expected a failure"
        )
    patterns = [f"{name}*" for name in probe.weights]
    parts = {each: select_tensors(probe.weights, [each]) for each in patterns}
    pattern = min(parts, key=lambda each: len(parts[each]))
    if len(parts[pattern]) == len(probe.weights):
        return "a failure; the model cannot be divided"
    await probe.update(await probe.ask(probe.next_fit(plan=Plan(train=(pattern,)))))
    return f"a failure, and an update with {len(parts[pattern])} of {len(probe.weights)} tensors"


@requires(
    "Extra tensors",
    "if the plan asks for extra tensors, the update has them, or the worker sends a failure",
)
async def extra_tensors(probe: Probe) -> str:
    sent = await probe.ask(probe.next_fit(plan=Plan(extra={"conformance": ()})))
    if failure := await _failure_or_update(probe, sent):
        return f"a failure ({failure.reason})"
    await probe.update(sent)
    return "an update with the extra tensor"


async def _failure_or_update(probe: Probe, sent: SentFit) -> Failure | None:
    """Wait for the answer to a fit; return the failure, or None if an update came."""
    await probe.until(
        lambda: probe.failure_of(sent) or probe.updates_of(sent) or None,
        f"failure or update of round {sent.fit.round}",
    )
    return probe.failure_of(sent)


@requires(
    "What becomes of an update",
    "after a verdict with train_again and a fit with the next attempt, the worker trains again",
)
async def rejected_update(probe: Probe) -> str:
    sent = await probe.ask(probe.next_fit())
    rejected = await probe.update(sent)
    verdict = Verdict(
        **probe.of_run(),
        round=sent.fit.round,
        base=sent.fit.base,
        outcome="rejected",
        cause="norm",
        reason="the conformance check tests a verdict",
        train_again=True,
    )
    await probe.send(verdict)
    second = await probe.update(await probe.ask(sent.fit.model_copy(update={"attempt": 1})))
    if same_answer(rejected, second):
        raise Unmet("the worker sent the rejected update again; expected newly trained tensors")
    return f"another update, after {second.update.seconds:.2f} s of training"


@requires(
    "Work",
    "an evaluate is answered with an evaluation of the same round and base, even without held-out "
    "data",
)
async def evaluate(probe: Probe) -> str:
    number = probe.round
    evaluation = await probe.evaluation()
    if evaluation.round != number:
        raise Unmet(
            f"the worker sent an evaluation of round {evaluation.round}; expected round {number}"
        )
    if not evaluation.num_examples:
        return "an evaluation without held-out data"
    return f"loss {evaluation.loss:.4g} on {evaluation.num_examples:,} examples"


@requires("Work", "a worker answers an evaluate while it trains for a fit of the same round")
async def evaluate_during_training(probe: Probe) -> str:
    await probe.ask(probe.next_fit())
    await probe.evaluation()
    await probe.update(await probe.ask(probe.next_fit()))
    return "an evaluation, then an update of the next round"


@requires(
    "Frozen tensors",
    "a worker with the feature 'frozen' waits in the state 'receiving' until it has a fit's frozen "
    "tensors; the worker keeps received frozen tensors, lists their digest, and uses them again",
)
async def frozen_tensors(probe: Probe) -> str:
    if FROZEN not in _last_sign(probe).features:
        raise Skipped("the worker does not list the feature 'frozen' in its heartbeats")
    if not probe.frozen:
        raise Skipped("the worker's first_weights message had no tensors in the group 'frozen'")
    other = frozen_of({name: old + old.dtype.type(1) for name, old in probe.frozen.items()})
    needs = {"frozen": other.digest, "critical": (FROZEN,)}

    sent = await probe.ask(probe.next_fit(**needs))
    await probe.read_by_now()
    state = _last_sign(probe).state
    if probe.updates_of(sent) or state != "receiving":
        raise Unmet(
            f"the worker is in the state '{state}' after a 'fit' message without the frozen "
            "tensors that this fit needs; expected the state 'receiving'"
        )

    await probe.update(await probe.ask(sent.fit, beside={FROZEN: other.tensors}))
    if other.digest not in (await probe.idle()).frozen:
        raise Unmet(
            "the worker's heartbeat does not list the digest of the frozen tensors that the "
            "worker received"
        )

    await probe.update(await probe.ask(probe.next_fit(**needs)))
    return f"{len(probe.frozen)} frozen tensors, sent once for two rounds"


def _last_sign(probe: Probe) -> Hello | Heartbeat:
    """Return the worker's last hello or heartbeat."""
    _, sign = signs_of_life(probe.messages)[-1]
    return sign


def _difference(one: ReceivedUpdate, other: ReceivedUpdate) -> str:
    if one.update.seconds != other.update.seconds:
        return f"{one.update.seconds:.6f} s of training, then {other.update.seconds:.6f} s"
    return "the two updates differ"


def _and_also(probe: Probe, sent: SentFit, what: str) -> str:
    return f", and one {what}" if probe.updates_of(sent) else ""

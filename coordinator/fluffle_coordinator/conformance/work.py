"""Scenarios of work: what a worker answers, once, again, and when newer work comes."""

from __future__ import annotations

from fluffle_common.protocol.messages import Evaluation, Update, Verdict
from fluffle_coordinator.conformance.findings import Taken, Unmet, same_answer
from fluffle_coordinator.conformance.greeting import last_work
from fluffle_coordinator.conformance.listener import Asked
from fluffle_coordinator.conformance.probe import Probe, a_name
from fluffle_coordinator.conformance.scenario import FROM_COORDINATOR, LIFE, OUTCOME, demands


@demands(
    LIFE,
    "a fit is answered with an update of its run, round and base: trained - received, in the "
    "names, shapes and dtypes of the fit, and finite",
    needed=True,
)
async def fit(probe: Probe) -> str:
    """Play one round."""
    update, _ = await probe.update(await probe.ask(probe.next_fit()))
    return f"{update.num_examples:,} examples, {update.seconds:.2f} s of training"


@demands(
    LIFE,
    "a fit with evaluate true is answered with an evaluation of round - 1 and the same base, "
    "before the update; without held-out data, with none",
)
async def evaluation_before_the_update(probe: Probe) -> str:
    """Ask for both, and see in which order they come."""
    asked = await probe.ask(probe.next_fit(evaluate=True))
    await probe.update(asked)
    await probe.evaluation()  # whatever came late is here by then
    came = [one.message for one in probe.answers[asked.since :]]
    at_update = next(n for n, one in enumerate(came) if isinstance(one, Update))
    found = [
        (n, one)
        for n, one in enumerate(came)
        if isinstance(one, Evaluation) and one.base == asked.fit.base
    ]
    if not found:
        return "an update without an evaluation: there is no held-out data"
    number, evaluation = found[0]
    if evaluation.round != asked.fit.round - 1:
        raise Unmet(f"an evaluation of round {evaluation.round}, not of {asked.fit.round - 1}")
    if number > at_update:
        raise Unmet("the evaluation came after the update")
    return f"loss {evaluation.loss:.4g} on {evaluation.num_examples:,} examples, then the update"


@demands(LIFE, "a fit that was answered is answered with the same update when it comes again")
async def same_fit_again(probe: Probe) -> str:
    """Send the same bytes twice, the second time after the answer."""
    asked = await probe.ask(probe.next_fit())
    first = await probe.update(asked)
    await probe.idle()
    again = await probe.update(await probe.ask(asked.fit))
    if not same_answer(first, again):
        raise Unmet(f"it trained again: {_difference(first, again)}")
    return "the same update"


@demands(LIFE, "a fit for a round that is at work already is passed over")
async def same_fit_while_at_work(probe: Probe) -> str:
    """Send the same bytes twice, at once."""
    asked = await probe.ask(probe.next_fit())
    await probe.send(asked.fit, probe.weights)
    await probe.update(asked, crossed=True)
    await probe.evaluation()
    updates = probe.updates_of(asked)
    for other in updates[1:]:
        if not same_answer(updates[0], other):
            raise Unmet(f"it trained twice: {_difference(updates[0], other)}")
    return f"{len(updates)} update{'s, the same' if len(updates) > 1 else ''}"


@demands(LIFE, "the next fit is answered also if it comes before the last update is confirmed")
async def next_fit_at_once(probe: Probe) -> str:
    """Play rounds without a pause between them."""
    for _ in range(3):
        await probe.update(await probe.ask(probe.next_fit()))
    return "3 rounds without a pause"


@demands(LIFE, "a fit for a newer round ends the older work, and is answered")
async def newer_fit(probe: Probe) -> str:
    """Ask for the next round while it trains."""
    older = await probe.ask(probe.next_fit())
    newer = await probe.ask(probe.next_fit())
    await probe.update(newer)
    return "the newer round" + _and_also(probe, older, "the older one")


@demands(
    LIFE,
    "an older fit is taken or passed over; if it is passed over, the newer one is still answered",
)
async def older_fit(probe: Probe) -> str:
    """Go back two rounds while it trains."""
    newer = await probe.ask(probe.next_fit(round=probe.round + 2))
    older = await probe.ask(probe.next_fit(round=newer.fit.round - 1))
    await probe.until(
        lambda: probe.updates_of(newer) or probe.updates_of(older) or None,
        f"update of round {newer.fit.round} or {older.fit.round}",
    )
    if probe.updates_of(newer):
        await probe.update(newer, crossed=True)
        return "the newer round" + _and_also(probe, older, "the older one")
    await probe.update(older, crossed=True)
    await probe.update(await probe.ask(newer.fit))
    return "the older round, and the newer one when it came again"


@demands(LIFE, "the same round with another base is other work, and trained anew")
async def another_base(probe: Probe) -> str:
    """Send the weights of the round under another name while it trains."""
    first = await probe.ask(probe.next_fit())
    other = await probe.ask(first.fit.model_copy(update={"base": a_name()}))
    await probe.update(other)
    return "the round from its new base" + _and_also(probe, first, "from the old one")


@demands(
    OUTCOME,
    "after a verdict with train_again, and a fit of the next attempt, the round is trained anew",
)
async def rejected_update(probe: Probe) -> str:
    """Reject an update, and ask for the round again."""
    asked = await probe.ask(probe.next_fit())
    rejected = await probe.update(asked)
    of = rejected.update
    verdict = Verdict(
        federation=probe.topology.federation,
        run=probe.run,
        round=of.round,
        base=of.base,
        outcome="rejected",
        cause="norm",
        reason="a trial of what follows from a verdict",
        train_again=True,
    )
    await probe.send(verdict)
    anew = await probe.update(await probe.ask(asked.fit.model_copy(update={"attempt": 1})))
    if same_answer(rejected, anew):
        raise Unmet("the update that was rejected, once more, byte for byte")
    return f"another update, after {anew.update.seconds:.2f} s of training"


@demands(
    FROM_COORDINATOR, "an evaluate is answered with its round and base, also without held-out data"
)
async def evaluate(probe: Probe) -> str:
    """Have the weights evaluated."""
    asked_of = probe.round
    evaluation = await probe.evaluation()
    if evaluation.round != asked_of:
        raise Unmet(f"an evaluation of round {evaluation.round}, not of {asked_of}")
    if not evaluation.num_examples:
        return "no held-out data"
    return f"loss {evaluation.loss:.4g} on {evaluation.num_examples:,} examples"


@demands(LIFE, "an evaluate is newer than the fit of its round: it is answered during training too")
async def evaluate_during_training(probe: Probe) -> str:
    """Have the weights evaluated while it trains, then go on."""
    await probe.ask(probe.next_fit())
    await probe.evaluation()
    await probe.update(await probe.ask(probe.next_fit()))
    return "an evaluation, and then the next round"


def _difference(one: Taken, other: Taken) -> str:
    if one.update.seconds != other.update.seconds:
        return f"{one.update.seconds:.6f} s of training, then {other.update.seconds:.6f} s"
    return "the two updates differ"


def _and_also(probe: Probe, asked: Asked, what: str) -> str:
    return f"; {what} too" if probe.updates_of(asked) else ""


WORK = (
    fit,
    evaluation_before_the_update,
    last_work,
    same_fit_again,
    same_fit_while_at_work,
    next_fit_at_once,
    newer_fit,
    older_fit,
    another_base,
    rejected_update,
    evaluate,
    evaluate_during_training,
)

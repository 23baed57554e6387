"""The evaluations of each round's model.

A worker evaluates the model that it is about to train, so the evaluation of a round's model arrives
during the next round. Only the last model needs work of its own; see ``machine.finishing``.
"""

from __future__ import annotations

from dataclasses import replace

from fluffle_coordinator.machine.effects import Effects, RecordEvaluation
from fluffle_coordinator.machine.events import EvaluationArrived
from fluffle_coordinator.machine.state import State


def evaluation_arrived(state: State, event: EvaluationArrived, out: Effects) -> State:
    """Take in a worker's evaluation; ignore it if that model's line is already written."""
    if event.run != state.run:
        return state
    number, evaluated = event.round, event.evaluated
    if state.selects and evaluated.num_examples and event.base == state.base_of(number + 1):
        found = {**evaluated.metrics, "loss": evaluated.loss}
        state = state.replace(evaluation=state.evaluation.insert(event.worker, found))
    if (limit := state.rules.max_examples) is not None:
        evaluated = replace(evaluated, num_examples=min(evaluated.num_examples, limit))
    if number in state.unevaluated and event.base == state.base_of(number + 1):
        # No worker that began with this older version was done in time; the first one since is.
        out.append(RecordEvaluation(number, {event.worker: evaluated}))
        return state.replace(unevaluated=state.unevaluated - {number})
    if (number, event.base) != (state.round - 1, state.base) or not state.evaluate_pending:
        return state
    evaluations = state.evaluations.insert(event.worker, evaluated)
    return state.replace_for(event.worker, evaluations=evaluations)


def record_evaluation(state: State, out: Effects, *, partial: bool = False) -> State:
    """Record the evaluation of the last committed model once all expected workers have sent theirs.

    If ``partial``, record what has arrived.
    """
    if not state.evaluate_pending or not state.evaluations:
        return state
    # A worker's evaluation arrives before its update, if it sends one at all.
    if not partial and (state.tally.unevaluated or not state.tally.expected):
        return state
    out.append(RecordEvaluation(state.round - 1, state.evaluations))
    return state.replace(evaluate_pending=False)

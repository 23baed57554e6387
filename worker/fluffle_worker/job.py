"""Doing one work: what runs in the training thread, from the message to its answer."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import (
    Evaluate,
    Evaluation,
    FirstWeights,
    Fit,
    InitRequest,
    Plan,
    Update,
)
from fluffle_common.tensors.codecs.base import (
    BrokenCodec,
    Codec,
    CodecError,
    UnknownCodec,
)
from fluffle_common.tensors.codecs.registry import CODECS, Registry
from fluffle_common.tensors.compression import compress
from fluffle_common.tensors.groups import ExtraForm, check_extra, forms_of, select_tensors
from fluffle_common.tensors.layout import Signature, layout_for, signature_of
from fluffle_common.tensors.weights import Weights, check_finite, delta
from fluffle_worker.error_feedback import Residual
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.machine import Work
from fluffle_worker.results import Results, arrays, copied, lent
from fluffle_worker.signature import UNKNOWN, check_signature, difference
from fluffle_worker.task import EvalResult, Progress, RoundPlan, Task, TrainResult
from fluffle_worker.user_code import one_line


class NotWanted(Exception):
    """Raised in the training thread by ``progress``, to end work that nobody wants any more."""


@dataclass(eq=False)
class Job:
    """A work with its input, and its answer when there is one.

    ``broadcast`` came beside the weights; ``extra`` goes beside the answer's tensors; ``residual``
    is what the answer leaves unsent.
    """

    work: Work
    message: Fit | Evaluate | InitRequest
    weights: Weights
    broadcast: Weights = field(default_factory=dict)
    wanted: bool = True
    evaluation: Evaluation | None = None
    evaluation_sent: bool = False
    answer: tuple[Update | FirstWeights, Weights] | None = None
    extra: Weights = field(default_factory=dict)
    residual: Residual = field(default_factory=Residual)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)


def execute(
    job: Job,
    task: Task,
    sender: Mapping[str, str],
    *,
    evaluated: Callable[[], object],
    progress: Callable[[int, int, float | None], object],
    residual: Callable[[], Residual] = Residual,
    results: Results | None = None,
    form: Signature = UNKNOWN,
    codecs: Registry = CODECS,
) -> None:
    """Do a work and put its answer into the job; blocks, and runs the user's code.

    Args:
        job: what is asked, and where the answer goes.
        task: the model and the data.
        sender: the fields ``federation`` and ``worker`` of the answer.
        evaluated: called when the evaluation is there and training begins.
        progress: told of each step.
        residual: what the last update that was sent left unsent; asked for after the training.
        results: takes what the task returns.
        form: what the task's own model is made of.
        codecs: those that updates may be encoded by.

    Raises:
        NotWanted: where nobody wants the work any more, at its next step.
        TaskError: where what the task returns is of no use, or the model is not the task's.
        BaseException: whatever the task raises.
    """
    results = results or Results()
    message = job.message
    ids: dict[str, Any] = {**sender, "run": job.work.run}
    if isinstance(message, InitRequest):
        job.answer = FirstWeights(**ids), _first_weights(task, message.seed)
        return
    differs = difference(layout_for(job.weights).signature, form)
    if differs:
        raise TaskError(differs)
    ids["base"] = message.base
    job.evaluation = _evaluated(job.weights, message, task, ids, results)
    if isinstance(message, Evaluate):
        return
    if job.evaluation is not None:
        evaluated()

    def step(number: int, steps: int, loss: float | None = None) -> None:
        if not job.wanted:
            raise NotWanted
        progress(*results.step(number, steps, loss))

    codec = _codec_of(message.plan, codecs)
    update, learnt = _trained(job, message, task, ids, step=step, results=results)
    if codec is None:
        job.answer, job.residual = (update, learnt), Residual(job.work)
    else:
        seed = _plan_of(message).seed
        job.answer, left = _encoded(update, learnt, codec, residual().before(job.work), seed)
        job.residual = Residual(job.work, left)
    job.weights, job.broadcast = {}, {}  # the answer is kept for a while, these need not be


def _evaluated(
    weights: Weights,
    message: Fit | Evaluate,
    task: Task,
    ids: dict[str, Any],
    results: Results,
) -> Evaluation | None:
    """Evaluate, if that is asked for; return what is to be said of it."""
    number = message.round
    if isinstance(message, Fit):
        number -= 1  # of the model that was received
        if not message.evaluate:
            return None
    found = results.evaluated(lambda: task.evaluate(lent(weights, task)))
    if found is None and isinstance(message, Evaluate):
        found = EvalResult(0.0, 0)  # an answer, too, so that nobody waits for another
    return None if found is None else _evaluation(ids, number, found)


def _trained(
    job: Job, fit: Fit, task: Task, ids: dict[str, Any], *, step: Progress, results: Results
) -> tuple[Update, Weights]:
    """Train; return the update, yet without its tensors, and what was learnt."""
    rule = getattr(task, "local_rule", None)
    if isinstance(rule, BoundRule):
        rule.of_round(job.work.run, fit.sequence or fit.round, job.broadcast)
    began = time.monotonic()
    trained = results.trained(task.train(lent(job.weights, task), _plan_of(fit), step))
    seconds = time.monotonic() - began
    try:
        learnt = delta(trained.weights, job.weights)
    except ValueError as wrong:
        raise TaskError(f"train() returned other weights than it was given: {wrong}") from None
    learnt = _chosen(learnt, fit.plan)
    sent = rule.sent if isinstance(rule, BoundRule) else {}
    job.extra = _extra(fit.plan.extra, {**sent, **trained.extra}, job.weights)
    return _update(ids, fit, trained, seconds), learnt


def _chosen(learnt: Weights, plan: Plan) -> Weights:
    """Return what is sent of a delta; what else the training changed stays here.

    Raises:
        TaskError: if that is nothing.
    """
    found = select_tensors(learnt, plan.train)
    if not found:
        names = ", ".join(plan.train or ())
        raise TaskError(
            f"the federation trains the tensors {names[:200]}, and this task's model has none of "
            "them; its names are in 'fluffle peek' and in every checkpoint"
        )
    return found


def _extra(wanted: ExtraForm | None, found: Weights, model: Weights) -> Weights:
    """Return what is sent beside a delta: what was asked for, and nothing if nothing was.

    Raises:
        TaskError: if it is not there, or is not what was asked for.
    """
    if wanted is None:
        return {}
    if not found:
        raise TaskError(
            "the federation's strategy asks for extra tensors, and this worker's training makes "
            "none; add the strategy's own rule by --local-rule"
        )
    try:
        check_extra(forms_of(found), wanted, model)
        check_finite(found)
    except ValueError as wrong:
        raise TaskError(f"not what the federation's strategy asks for: {wrong}") from None
    return found


def _codec_of(plan: Plan, codecs: Registry) -> Codec | None:
    """Return the codec that the plan asks for; None for plain updates.

    Raises:
        TaskError: if this worker does not have it, or it does not take these settings.
    """
    if plan.compress is None:
        return None
    name = plan.compress.kind
    try:
        return codecs.parse(str(plan.compress))
    except BrokenCodec as why:
        raise TaskError(str(why)) from why.__cause__
    except UnknownCodec:
        raise TaskError(
            f"the federation encodes its updates with the codec '{name}', which this worker does "
            "not have; get its file from whoever runs the coordinator and add --codec "
            "path.py:name, or install the package that brings it"
        ) from None
    except Exception as why:
        raise TaskError(f"the codec '{name}' refuses '{plan.compress}': {one_line(why)}") from why


def _encoded(
    update: Update, learnt: Weights, codec: Codec, before: Weights, seed: int
) -> tuple[tuple[Update, Weights], Weights]:
    """Return the update with its tensors encoded, and what that leaves unsent.

    Raises:
        TaskError: if the codec's own code fails.
    """
    rng = np.random.default_rng([seed, zlib.crc32(update.worker.encode())])
    try:
        tensors, left = compress(learnt, codec, before, rng)
    except CodecError as wrong:
        raise TaskError(f"{wrong}; no update is sent") from wrong.__cause__
    return (update.model_copy(update={"encoding": codec.name}), tensors), left


def _first_weights(task: Task, seed: int) -> Weights:
    """Make the first weights; they are kept for a while, so the task is to hold none of them."""
    made = arrays(task.init(seed), "init()")
    check_signature(signature_of(made))
    return made if getattr(task, "only_reads", False) else copied(made)


def _plan_of(message: Fit) -> RoundPlan:
    """Give each piece of work a seed of its own, the same whenever it is done again.

    The task may do with the plan's ``config`` what it likes.
    """
    ticket = message.sequence or message.round
    seed = (message.plan.seed * 1_000_003 + ticket) % 2**63
    own = {"seed": seed, "config": dict(message.plan.config)}
    at = {"run": message.run, "round": message.round, "sequence": ticket}
    return RoundPlan(**{**dict(message.plan), **own, **at})


def _evaluation(ids: dict[str, Any], number: int, found: EvalResult) -> Evaluation:
    return Evaluation(
        **ids,
        round=number,
        num_examples=found.num_examples,
        loss=found.loss,
        metrics=dict(found.metrics),
    )


def _update(ids: dict[str, Any], fit: Fit, trained: TrainResult, seconds: float) -> Update:
    return Update(
        **ids,
        round=fit.round,
        sequence=fit.sequence,
        num_examples=trained.num_examples,
        seconds=seconds,
        metrics=dict(trained.metrics),
    )

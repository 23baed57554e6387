"""One job in the training thread: from a decoded message to the answer that is sent."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
from fluffle_common.tensors.codecs.base import Codec, CodecError, UnknownCodec
from fluffle_common.tensors.codecs.registry import CODECS, Registry
from fluffle_common.tensors.compression import compress
from fluffle_common.tensors.groups import (
    EXTRA,
    FROZEN,
    ExtraForm,
    Groups,
    check_extra,
    select_tensors,
    tensors_of_model,
)
from fluffle_common.tensors.layout import Signature, layout_for, signature_of
from fluffle_common.tensors.weights import Weights, check_finite, delta
from fluffle_common.user_errors import one_line
from fluffle_worker.error_feedback import Residual
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.machine import Work
from fluffle_worker.results import Results, arrays, copied, lent
from fluffle_worker.signature import UNKNOWN, check_signature, difference
from fluffle_worker.task import EvalResult, Progress, RoundPlan, Task, statistics_of

_SHOW_EVERY_S = 0.05  # the least time between two steps of a training that are passed on


class NotWanted(Exception):
    """Raised to stop training, or sending an answer, that newer work has made obsolete."""


@dataclass(eq=False)
class Job:
    """A piece of work with its input and, once there is one, its answer."""

    message: Fit | Evaluate | InitRequest
    weights: Weights = field(default_factory=dict)  # as received; empty once the answer exists
    broadcast: Weights = field(default_factory=dict)  # the strategy's, which came with them
    wanted: bool = True  # False once it is obsolete; training then stops at its next step
    evaluation: Evaluation | None = None  # to send
    evaluation_sent: bool = False  # confirmed by the broker
    answer: tuple[Update | FirstWeights, Weights] | None = None  # the message and its tensors
    others: Groups = field(default_factory=dict)  # the answer's tensors of other groups
    residual: Residual = field(default_factory=Residual)  # what the codec left out of the answer
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while parts of it are sent

    @cached_property
    def work(self) -> Work:
        """The identity of the requested work."""
        match self.message:
            case InitRequest(run=run):
                return Work("init", run, 0)
            case Fit(run=run, round=number, base=base, attempt=attempt, sequence=sequence):
                return Work("fit", run, number, base, attempt, sequence or number)
            case Evaluate(run=run, round=number, base=base):
                return Work("evaluate", run, number, base)

    def release(self) -> None:
        """Free the memory of what was received: the answer may be kept for long."""
        self.weights, self.broadcast = {}, {}


@dataclass(frozen=True)
class Executor:
    """Runs the code of a task for jobs.

    ``sender`` is the fields ``federation`` and ``worker`` of the answers. ``signature`` is that
    of the task's model.
    """

    task: Task
    sender: Mapping[str, str]
    frozen: FrozenTensors
    signature: Signature = UNKNOWN
    results: Results = field(default_factory=Results)
    codecs: Registry = CODECS

    def execute(
        self,
        job: Job,
        *,
        evaluated: Callable[[], object],
        progress: Callable[[int, int, float | None], object],
        residual: Callable[[], Residual] = Residual,
    ) -> None:
        """Run the task's code for a job and store the answer in the job; blocks.

        ``evaluated`` is called when ``job.evaluation`` is set and training begins, and ``progress``
        with the step, steps and loss after the first and the last step, and after those between
        them that are not too close together. ``residual`` is called after the training, and returns
        the residual of the last update sent.

        Raises:
            NotWanted: at the next step, once the work is obsolete.
            TaskError: if the federation's model is not the task's, or the task's result is
                unusable.
            BaseException: whatever the task raises.
        """
        message = job.message
        ids: dict[str, Any] = {**self.sender, "run": job.work.run}
        if isinstance(message, InitRequest):
            ids["statistics"] = statistics_of(self.task)
            job.answer = FirstWeights(**ids), _first_weights(self.task, message.seed)
            job.others = {FROZEN: self.frozen.to_share()}
            return
        if mismatch := difference(layout_for(job.weights).signature, self.signature):
            raise TaskError(mismatch)
        self.frozen.use(message.frozen)
        ids["base"] = message.base
        if (rule := _rule_of(self.task)) is not None:
            rule.of_work((job.work.run, job.work.round, job.work.sequence), job.broadcast)
        job.evaluation = self._evaluate(job.weights, message, ids)
        if isinstance(message, Evaluate):
            job.release()
            return
        if job.evaluation is not None:
            evaluated()

        report, finish = _thinned(job, self.results, progress)
        codec, plan = _codec_of(message.plan, self.codecs), _plan_of(message, job.work)
        update, change = self._train(job, message, plan, report, ids)
        finish()
        if codec is None:
            job.answer = update, change
        else:
            before = residual().before(job.work)
            job.answer, left_out = self._encode(update, change, codec, before, plan.seed)
            job.residual = Residual(job.work, left_out)
        job.release()

    def _evaluate(
        self, weights: Weights, message: Fit | Evaluate, ids: dict[str, Any]
    ) -> Evaluation | None:
        """Evaluate if the message asks for it; return the message to send, or None."""
        number = message.round
        if isinstance(message, Fit):
            number -= 1  # the received model is the previous round's
            if not message.evaluate:
                return None
        result = self.results.evaluated(lambda: self.task.evaluate(lent(weights, self.task)))
        if result is None:
            if isinstance(message, Fit):
                return None
            result = EvalResult(0.0, 0)  # tells the coordinator not to wait
        return Evaluation(
            **ids,
            round=number,
            num_examples=result.num_examples,
            loss=result.loss,
            metrics=dict(result.metrics),
        )

    def _train(
        self, job: Job, fit: Fit, plan: RoundPlan, progress: Progress, ids: dict[str, Any]
    ) -> tuple[Update, Weights]:
        """Train; return the update's header and the delta."""
        began = time.monotonic()
        returned = self.task.train(lent(job.weights, self.task), plan, progress)
        trained = self.results.trained(returned)
        seconds = time.monotonic() - began
        try:
            change = delta(trained.weights, job.weights)
        except ValueError as wrong:
            raise TaskError(
                f"train() returned weights that do not match the received weights: {wrong}"
            ) from None
        change = _planned(change, fit.plan)
        rule = _rule_of(self.task)
        if rule is not None:
            names = change.keys() & statistics_of(self.task)
            rule.check_statistics(name for name in names if np.any(change[name]))
        of_rule = rule.sent if rule is not None else {}
        job.others = {EXTRA: _extra(fit.plan.extra, {**of_rule, **trained.extra}, job.weights)}
        update = Update(
            **ids,
            round=fit.round,
            sequence=fit.sequence,
            num_examples=trained.num_examples,
            seconds=seconds,
            metrics=dict(trained.metrics),
        )
        return update, change

    def _encode(
        self, update: Update, change: Weights, codec: Codec, before: Weights, seed: int
    ) -> tuple[tuple[Update, Weights], Weights]:
        """Return the update with its tensors encoded, and the tensors of the new residual."""
        rng = np.random.default_rng([seed, zlib.crc32(update.worker.encode())])
        try:
            tensors, left_out = compress(
                change, codec, before, rng, lambda fault: self.results.once("codec", fault)
            )
        except CodecError as wrong:
            raise TaskError(
                f"{wrong}; this worker sends no update in this round"
            ) from wrong.__cause__
        return (update.model_copy(update={"encoding": codec.name}), tensors), left_out


def _thinned(
    job: Job, results: Results, show: Callable[[int, int, float | None], object]
) -> tuple[Progress, Callable[[], None]]:
    """Return ``progress`` for a training, and what passes on its latest step at the end.

    It passes on the first step, and few of those after it: a task may report 100,000 steps per
    second, and to pass one on takes as long as a hundred calls.
    """
    next_at = 0.0
    skipped: tuple[Any, Any, Any] | None = None

    def progress(step: int, steps: int, loss: float | None = None) -> None:
        nonlocal next_at, skipped
        if not job.wanted:
            raise NotWanted
        skipped = step, steps, loss
        if (now := time.monotonic()) >= next_at:
            next_at = now + _SHOW_EVERY_S
            finish()

    def finish() -> None:
        nonlocal skipped
        if skipped is not None:
            show(*results.step(*skipped))
            skipped = None

    progress.__qualname__ = "progress"  # as the task's author knows it, for Python's TypeError
    return progress, finish


def _rule_of(task: Task) -> BoundRule | None:
    return getattr(task, "local_rule", None)  # whatever else it is, ``check_task`` refuses


def _planned(change: Weights, plan: Plan) -> Weights:
    """Return the part of a delta that the plan asks for."""
    planned = select_tensors(change, plan.train)
    if not planned:
        names = ", ".join(plan.train or ())
        raise TaskError(
            f"the coordinator's --train selects the tensors {names[:200]}, but this task's model "
            f"has none of these tensors; correct --train {tensors_of_model(change)}"
        )
    return planned


def _extra(wanted: ExtraForm | None, extra: Weights, model: Weights) -> Weights:
    """Return the extra tensors to send: empty unless the strategy asks for some."""
    if wanted is None:
        return {}
    if not extra:
        raise TaskError(
            "the federation's strategy requires extra tensors, but this worker's training returns "
            "no extra tensors; add the strategy's local rule with --local-rule"
        )
    try:
        check_extra(extra, wanted, model)
        check_finite(extra)
    except ValueError as wrong:
        raise TaskError(
            f"this worker's extra tensors do not match the strategy's requirements: {wrong}"
        ) from None
    return extra


def _codec_of(plan: Plan, codecs: Registry) -> Codec | None:
    """Return the codec that the plan names, or None if updates are not encoded."""
    if plan.compress is None:
        return None
    name = plan.compress.kind
    try:
        return codecs.parse(str(plan.compress))
    except CodecError as why:
        raise TaskError(str(why)) from why.__cause__
    except UnknownCodec:
        raise TaskError(
            f"the federation encodes its updates with the codec '{name}', which this worker does "
            "not have; install the codec's package, or add the codec's file with --codec "
            "path.py:name"
        ) from None
    except Exception as why:
        raise TaskError(
            f"the codec '{name}' rejects the coordinator's --compress {plan.compress}: "
            f"{one_line(why)}"
        ) from why


def _first_weights(task: Task, seed: int) -> Weights:
    """Return the task's initial weights, copied unless the task only reads: the answer is kept."""
    weights = arrays(task.init(seed), "init()")
    check_signature(signature_of(weights))
    return weights if getattr(task, "only_reads", False) else copied(weights)


def _plan_of(message: Fit, work: Work) -> RoundPlan:
    """Return the plan for the task, with a seed that depends on the run's seed and the ticket.

    The plan gets a copy of ``config``, so the task may modify it.
    """
    fields = vars(message.plan) | {"run": work.run, "round": work.round, "sequence": work.sequence}
    fields["seed"] = (message.plan.seed * 1_000_003 + work.sequence) % 2**63
    fields["config"] = dict(message.plan.config)
    return RoundPlan(**fields)

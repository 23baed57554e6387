"""Doing one work: what runs in the training thread, from the message to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fluffle_common.compression import compress, encoding_of
from fluffle_common.messages import (
    Evaluate,
    Evaluation,
    FirstWeights,
    Fit,
    InitRequest,
    Plan,
    Update,
)
from fluffle_common.weights import Weights, apart, delta
from fluffle_worker.feedback import Residual
from fluffle_worker.session import Work
from fluffle_worker.task import EvalResult, Task, TrainResult


class NotWanted(Exception):
    """Raised in the training thread by ``progress``, to end work that nobody wants any more."""


@dataclass(eq=False)
class Job:
    """A work with its input, and its answer when there is one.

    ``residual`` is what the answer leaves unsent.
    """

    work: Work
    message: Fit | Evaluate | InitRequest
    weights: Weights
    wanted: bool = True
    evaluation: Evaluation | None = None
    evaluation_sent: bool = False
    answer: tuple[Update | FirstWeights, Weights] | None = None
    residual: Residual = field(default_factory=Residual)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)


def do(
    job: Job,
    task: Task,
    sender: Mapping[str, str],
    *,
    evaluated: Callable[[], object],
    progress: Callable[[int, int, float | None], object],
    residual: Callable[[], Residual] = Residual,
) -> None:
    """Do a work and put its answer into the job; blocks, and runs the user's code.

    Args:
        job: what is asked, and where the answer goes.
        task: the model and the data.
        sender: the fields ``federation`` and ``worker`` of the answer.
        evaluated: called when the evaluation is there and training begins.
        progress: told of each step.
        residual: what the last update that was sent left unsent; asked for after the training.

    Raises:
        NotWanted: where nobody wants the work any more, at its next step.
        Exception: whatever the task raises.
    """
    message = job.message
    ids: dict[str, Any] = {**sender, "run": job.work.run}
    if isinstance(message, InitRequest):
        job.answer = FirstWeights(**ids), task.init(message.seed)
        return
    ids["base"] = message.base
    if isinstance(message, Evaluate):
        # Where nothing is held out, that is the answer, so that nobody waits for another.
        found = task.evaluate(apart(job.weights)) or EvalResult(0.0, 0)
        job.evaluation = _evaluation(ids, message.round, found)
        return
    if message.evaluate and (first := task.evaluate(apart(job.weights))) is not None:
        job.evaluation = _evaluation(ids, message.round - 1, first)
        evaluated()

    def step(number: int, steps: int, loss: float | None = None) -> None:
        if not job.wanted:
            raise NotWanted
        progress(number, steps, loss)

    began = time.monotonic()
    trained = task.train(apart(job.weights), _seeded(message), step)
    seconds = time.monotonic() - began
    update = _update(ids, message.round, trained, seconds)
    learnt = delta(trained.weights, job.weights)
    how = message.plan.compress
    if how is None:
        job.answer, job.residual = (update, learnt), Residual(job.work)
    else:
        tensors, left = compress(learnt, how, residual().before(job.work))
        update = update.model_copy(update={"encoding": encoding_of(how)})
        job.answer, job.residual = (update, tensors), Residual(job.work, left)
    job.weights = {}  # the answer is kept for a while, these need not be


def _seeded(message: Fit) -> Plan:
    """Give each round a seed of its own, the same whenever the round is trained again."""
    seed = (message.plan.seed * 1_000_003 + message.round) % 2**63
    return message.plan.model_copy(update={"seed": seed})


def _evaluation(ids: dict[str, Any], number: int, found: EvalResult) -> Evaluation:
    return Evaluation(
        **ids,
        round=number,
        num_examples=found.num_examples,
        loss=float(found.loss),
        metrics={name: float(value) for name, value in found.metrics.items()},
    )


def _update(ids: dict[str, Any], number: int, trained: TrainResult, seconds: float) -> Update:
    return Update(
        **ids,
        round=number,
        num_examples=trained.num_examples,
        seconds=seconds,
        metrics={name: float(value) for name, value in trained.metrics.items()},
    )

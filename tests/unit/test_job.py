"""A job's answer: the delta, its encoding and the residual."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fluffle_common.protocol.messages import Compression, Evaluate, Fit, Plan, Update
from fluffle_common.tensors.compression import decompress
from fluffle_worker.error_feedback import Residual
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.job import Executor, Job
from fluffle_worker.machine import Work
from fluffle_worker.task import EvalResult, TrainResult

COUNT = 2000
SMALL = {"w": np.full(COUNT, 0.25, np.float32)}


class InPlace:
    """A task that stores trained tensors in the mapping that it received."""

    num_examples = 5

    def train(self, weights, plan, progress):
        weights["w"] = weights["w"] + 1
        return TrainResult(weights, self.num_examples)

    def evaluate(self, weights):
        weights.clear()
        return EvalResult(0.0, 1)


class Steps:
    """A task whose training always adds the same delta."""

    num_examples = 5

    def __init__(self) -> None:
        self.delta = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)

    def init(self, seed):
        return {"w": np.zeros(COUNT, np.float32)}

    def train(self, weights, plan, progress):
        return TrainResult({"w": weights["w"] + self.delta}, self.num_examples)

    def evaluate(self, weights):
        return EvalResult(0.0, 1)


def executed(job: Job, task: Any, **options: Any) -> None:
    executor = Executor(task, {"federation": "f", "worker": "w"}, FrozenTensors(task))
    executor.execute(job, evaluated=lambda: None, progress=lambda *_: None, **options)


def answered(how: str | None, number: int = 1, residual: Residual | None = None) -> Job:
    ids = {"federation": "f", "run": "r", "round": number, "base": "b"}
    fit = Fit(**ids, evaluate=False, plan=Plan(compress=how and Compression.parse(how)))
    job = Job(fit, {"w": np.zeros(COUNT, np.float32)})
    executed(job, Steps(), residual=lambda: residual or Residual())
    return job


def test_what_comes_of_weights_names_them():
    ids = {"federation": "f", "run": "r", "round": 3, "base": "b7"}
    for message in (Fit(**ids, evaluate=True, plan=Plan()), Evaluate(**ids)):
        job = Job(message, {"w": np.zeros(COUNT, np.float32)})
        executed(job, Steps())
        assert job.evaluation is not None
        assert job.evaluation.base == "b7"
        if isinstance(message, Fit):
            assert job.answer is not None
            assert job.answer[0].base == "b7"


def test_a_task_may_do_with_the_mapping_what_it_likes():
    fit = Fit(federation="f", run="r", round=1, base="b", evaluate=True, plan=Plan())
    job = Job(fit, {"w": np.zeros(3, np.float32)})
    executed(job, InPlace())
    assert job.answer is not None
    assert job.answer[1]["w"].tolist() == [1, 1, 1]


def learnt(job: Job) -> np.ndarray:
    assert job.answer is not None
    message, tensors = job.answer
    assert isinstance(message, Update)
    return decompress(tensors, message.encoding, SMALL)["w"]


def test_a_plan_that_wants_no_encoding_gets_the_delta_and_nothing_is_carried():
    job = answered(None, 2, Residual(Work("fit", "r", 1), SMALL))
    assert job.answer is not None
    assert job.answer[0].encoding is None
    assert np.array_equal(job.answer[1]["w"], Steps().delta)
    assert job.residual == Residual()


@pytest.mark.parametrize(
    ("how", "encoding"), [("bf16", "bf16"), ("f16", "f16"), ("int8", "int8"), ("topk:0.1", "topk")]
)
def test_the_update_says_how_it_is_encoded(how, encoding):
    job = answered(how)
    assert job.answer is not None
    assert job.answer[0].encoding == encoding
    left = job.residual.tensors.get("w", np.zeros(COUNT))
    np.testing.assert_allclose(learnt(job) + left, Steps().delta, atol=0.02)


def test_what_is_left_goes_into_the_next_round_once():
    first = answered("topk:0.1", 1)
    second = answered("topk:0.1", 2, first.residual)
    delta = Steps().delta
    np.testing.assert_allclose(
        learnt(first) + learnt(second) + second.residual.tensors["w"], 2 * delta, atol=1e-5
    )
    # Trained again, as when its answer was not sent, it is the same update.
    again = answered("topk:0.1", 2, first.residual)
    assert np.array_equal(learnt(again), learnt(second))


@pytest.mark.parametrize("left_by", [Work("fit", "r", n, sequence=n) for n in (2, 3)] + [None])
def test_what_is_in_an_update_already_goes_into_no_other(left_by):
    assert np.array_equal(
        learnt(answered("int8", 2, Residual(left_by, SMALL))), learnt(answered("int8", 2))
    )


def test_another_run_begins_with_nothing_left_over():
    residual = Residual(Work("fit", "earlier", 1), SMALL)
    assert residual.before(Work("fit", "r", 2)) == {}
    assert residual.before(Work("fit", "earlier", 2)) is SMALL

"""Conversion of the odd values that tasks return, and the errors for unusable ones."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Evaluate, Fit, InitRequest, Plan
from fluffle_common.tensors.layout import layout_for
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.storage.round_stats import average_evaluations
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.job import Executor, Job, NotWanted
from fluffle_worker.results import Results
from fluffle_worker.signature import signature_of_task
from fluffle_worker.task import EvalResult, TrainResult

NAN, INF = float("nan"), float("inf")
IDS: dict[str, Any] = {"federation": "f", "run": "r", "base": "b"}
SENDER = {"federation": "f", "worker": "w"}


def received() -> Any:
    """Return weights as decoded from a message: read-only views of bytes."""
    weights = {"w": np.zeros(4, np.float32), "b": np.zeros((), np.float32)}
    layout = layout_for(weights)
    return layout.over(bytes(layout.nbytes))


class Odd:
    """A task that returns the given results."""

    num_examples = 5

    def __init__(self, *, metrics: Any = None, count: Any = 5, loss: Any = 1.0, **more: Any):
        self.metrics, self.count, self.loss = metrics, count, loss
        self.step, self.more = more.pop("step", None), more

    def init(self, seed):
        return {"w": np.zeros(4, np.float32), "b": np.zeros((), np.float32)}

    def train(self, weights, plan, progress):
        if self.step is not None:
            progress(*self.step)
        if "trained" in self.more:
            return self.more["trained"]
        new = {name: tensor + tensor.dtype.type(1) for name, tensor in weights.items()}
        extra = self.more.get("extra", {})
        return TrainResult(self.more.get("new", new), self.count, self.metrics, extra)

    def evaluate(self, weights):
        if "raises" in self.more:
            raise self.more["raises"]
        if "evaluated" in self.more:
            return self.more["evaluated"]
        return EvalResult(self.loss, self.count, self.metrics)


class Unarrayable:
    """An object that NumPy cannot convert."""

    def __array__(self, *_, **__):
        raise TypeError


class Late(Mapping[str, Any]):
    """Metrics or an evaluation, computed only when somebody asks."""

    loss, num_examples = 1.0, 5

    def __getitem__(self, name):
        raise RuntimeError("no score")

    def __iter__(self):
        return iter(["auc"])

    def __len__(self):
        return 1

    @property
    def metrics(self):
        raise ValueError("no score")


class LateLoss(Late):
    """An evaluation whose loss is computed only when somebody asks."""

    @property
    def loss(self):
        raise RuntimeError("no loss")


class UnprintableError(Exception):
    """An error that cannot be printed."""

    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


class UnprintableLoss(Late):
    """An evaluation whose loss fails with an error that cannot be printed, as it cannot itself."""

    @property
    def loss(self):
        raise UnprintableError

    def __repr__(self):
        raise UnprintableError


class Leaving(Late):
    """An evaluation whose loss ends the process."""

    @property
    def loss(self):
        raise SystemExit


class Unnamed:
    """A metric's name that cannot be printed."""

    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


def executed(job: Job, task: Any, **fields: Any) -> None:
    executor = Executor(task, SENDER, FrozenTensors(task), **fields)
    executor.execute(job, evaluated=lambda: None, progress=lambda *_: None)


class Seen:
    """An executed job and the reports about it."""

    def __init__(self, task: Any, message: Any = None, *, results: Results | None = None) -> None:
        self.reports: list[str] = []
        self.traces: list[str] = []
        self.steps: list[tuple[int, int, float | None]] = []
        message = message or Fit(**IDS, round=3, evaluate=True, plan=Plan())
        self.job = Job(message, received())
        results = results or Results(self.reports.append, self.traces.append)
        Executor(task, SENDER, FrozenTensors(task), results=results).execute(
            self.job,
            evaluated=lambda: None,
            progress=lambda *arguments: self.steps.append(arguments),
        )

    @property
    def evaluation(self) -> Any:
        return self.job.evaluation

    @property
    def update(self) -> Any:
        assert self.job.answer is not None
        return self.job.answer[0]

    @property
    def delta(self) -> list[float]:
        assert self.job.answer is not None
        return self.job.answer[1]["w"].tolist()


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [np.float32(0.5), np.array(0.5), np.array([0.5]), jnp.asarray(0.5), 0.5],
    ids=["scalar", "array", "of-one", "jax", "float"],
)
def test_numbers_of_any_framework_are_metrics(number):
    seen = Seen(Odd(metrics={"loss": number, "whole": np.int64(3)}, loss=number))
    assert seen.update.metrics == {"loss": 0.5, "whole": 3.0}
    assert seen.evaluation.loss == 0.5
    assert seen.reports == []


@pytest.mark.parametrize("count", [np.int64(7), np.array(7), jnp.asarray(7), 7.0])
def test_counts_of_any_framework_are_counts(count):
    seen = Seen(Odd(count=count))
    assert (seen.update.num_examples, seen.evaluation.num_examples) == (7, 7)


@pytest.mark.parametrize(
    "value", [NAN, INF, None, "0.5", [1, 2], np.zeros(3), 1j, 10**400, np.ma.masked]
)
def test_a_metric_that_is_no_number_is_left_out_and_named_once(value):
    reports: list[str] = []
    results = Results(reports.append)
    for _ in range(3):
        seen = Seen(Odd(metrics={"auc": value, "accuracy": 0.5}), results=results)
        assert seen.update.metrics == seen.evaluation.metrics == {"accuracy": 0.5}
        assert seen.delta == [1, 1, 1, 1]
    assert [one[:16] for one in reports] == ["the metric 'auc'"] * 2  # of evaluate, and of train
    assert "evaluate()" in reports[0]
    assert "train()" in reports[1]


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_a_metric_without_a_name_is_left_out_and_reported_once(name):
    reports: list[str] = []
    results = Results(reports.append)
    for _ in range(3):
        seen = Seen(Odd(metrics={name: 0.25, "accuracy": 0.5}), results=results)
        assert seen.update.metrics == seen.evaluation.metrics == {"accuracy": 0.5}
    what = f"returned a metric with the empty name {name!r}, which is omitted"
    assert reports == [f"evaluate() {what}", f"train() {what}"]


def test_a_metric_that_no_float_can_hold_is_too_large():
    assert "0000, which is too large" in Seen(Odd(metrics={"auc": 10**400})).reports[0]


@pytest.mark.parametrize("given", [{"metrics": Late()}, {"evaluated": Late()}])
def test_metrics_that_fail_when_asked_for_are_left_out_and_named_once(given):
    reports: list[str] = []
    results = Results(reports.append)
    for _ in range(3):
        seen = Seen(Odd(**given), results=results)
        assert seen.delta == [1, 1, 1, 1]
        assert (seen.evaluation.loss, seen.evaluation.metrics) == (1.0, {})
    assert reports[0].startswith("the metrics of evaluate() are omitted: expected a mapping")
    assert "Error: no score (test_results.py:" in reports[0]
    assert len(reports) == (2 if "metrics" in given else 1)  # of train, too


def test_a_metric_whose_name_cannot_be_printed_costs_no_other():
    assert Seen(Odd(metrics={Unnamed(): 1.0, "loss": 0.5})).update.metrics["loss"] == 0.5


def test_of_too_many_metrics_the_first_stay_loss_and_accuracy_among_them():
    many = {f"class_{number:03}": 0.1 for number in range(100)} | {"accuracy": 0.5, "loss": 1.0}
    seen = Seen(Odd(metrics=many))
    names = ["accuracy", "loss", *(f"class_{number:03}" for number in range(62))]
    assert list(seen.update.metrics) == names
    assert "102 metrics; at most 64 can be sent, so the last 38 are omitted" in seen.reports[0]


def test_names_of_metrics_that_are_too_long_stay_apart():
    long = {"x" * 70 + "a": 1.0, "x" * 70 + "b": 2.0, "\udc80": 3.0, 7: 4.0}
    metrics = Seen(Odd(metrics=long)).update.metrics
    assert list(metrics.values()) == [1.0, 2.0, 3.0, 4.0]
    assert all(len(name) <= 64 for name in metrics)
    assert "7" in metrics


@pytest.mark.parametrize("metrics", [None, 3, [1.0], "loss"])
def test_metrics_that_are_no_mapping_are_none(metrics):
    assert Seen(Odd(metrics=metrics)).update.metrics == {}


@pytest.mark.parametrize(
    ("step", "shown"),
    [
        ((np.int64(2), np.int64(5), NAN), (2, 5, None)),
        ((jnp.asarray(2), 5, jnp.asarray(0.5)), (2, 5, 0.5)),
        ((2, None, "high"), (2, 0, None)),
        ((-1, 5), (0, 5, None)),
        ((2, 2**64), (2, 2**63 - 1, None)),
    ],
)
def test_a_step_is_shown_as_far_as_it_is_known(step, shown):
    (arguments,) = Seen(Odd(step=step)).steps
    assert arguments == shown
    assert all(type(one) in (int, float, type(None)) for one in arguments)


def test_of_many_steps_few_are_shown_among_them_the_first_and_the_last():
    class Quick(Odd):
        def train(self, weights, plan, progress):
            for number in range(1, 10_001):
                progress(number, 10_000, Fraction(number))
            return super().train(weights, plan, progress)

    steps = Seen(Quick()).steps
    assert steps[0] == (1, 10_000, 1.0)
    assert steps[-1] == (10_000, 10_000, 10_000.0)
    assert len(steps) < 1000


def test_losses_of_steps_that_are_no_numbers_are_named_once():
    reports: list[str] = []
    results = Results(reports.append)
    assert results.step(1, 3, None) == (1, 3, None)
    assert not reports
    for number in range(3):
        assert results.step(number, 3, np.arange(number, number + 2.0)) == (number, 3, None)
    assert len(reports) == 1


# --- what an update needs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ({"count": 0}, "num_examples 0; expected the number"),
        ({"count": -3}, "num_examples -3; expected the number"),
        ({"count": None}, "num_examples None; expected a whole number"),
        ({"count": 2.5}, "num_examples 2.5; expected a whole number"),
        ({"count": 10**13}, "used for training, from 1 to 1000000000000"),
        ({"count": 10**400}, "00000...00000"),
        ({"count": 10**5000}, "num_examples an unprintable int; expected the number"),
        ({"step": (1,)}, "progress() missing 1 required positional argument: 'steps'"),
        ({"new": {"k" * 300: Unarrayable()}}, f"tensor '{'k' * 60}' as a Unarrayable"),
        ({"trained": None}, "train() returned None; expected TrainResult"),
        ({"trained": ({}, 5)}, "train() returned ({}, 5); expected"),
        ({"new": None}, "train() returned None as the weights"),
        ({"new": {"w": None}}, "returned tensor 'w' as None; expected an unmasked array"),
        ({"new": {"w": np.ma.masked_less([1.0, 2.0], 2)}}, "expected an unmasked array of numbers"),
        ({"extra": np.zeros(3)}, "train() returned array([0., 0., 0.]) as the extra tensors"),
        ({"new": {"w": np.zeros(4, np.float32)}}, "missing b"),
        ({"new": {0: np.zeros(4, np.float32), "c": 1.0}}, "missing b, w; unknown 0, c"),
        ({"new": {"w": np.zeros(4), "b": np.zeros(())}}, "is float64; expected float32"),
    ],
)
def test_a_training_without_an_update_fails_with_its_reason(returned, named):
    with pytest.raises((TaskError, TypeError)) as failed:
        Seen(Odd(**returned))
    assert len(str(failed.value)) < 200
    assert named in str(failed.value)
    assert "\n" not in str(failed.value)


def test_arrays_of_another_framework_are_arrays():
    new = {"w": jnp.ones(4, jnp.float32), "b": 1.5}
    assert Seen(Odd(new={**new, "b": np.float32(1.5)})).delta == [1, 1, 1, 1]


# --- the evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [ValueError("only one class"), SystemExit(1), MemoryError()])
def test_an_evaluation_that_fails_costs_no_training_and_is_said_once(raised):
    reports: list[str] = []
    traces: list[str] = []
    results = Results(reports.append, traces.append)
    for _ in range(3):
        seen = Seen(Odd(raises=raised), results=results)
        assert seen.delta == [1, 1, 1, 1]
        assert (seen.evaluation.num_examples, seen.evaluation.round) == (0, 2)
    (one,), (trace,) = reports, traces
    assert one.startswith("evaluate() failed, so this worker trains without evaluation: ")
    assert "(test_results.py:" in one
    assert "raise self.more" in trace


@pytest.mark.parametrize(
    "returned",
    [
        {"loss": NAN},
        {"loss": None},
        {"loss": np.ma.masked},  # the mean of no examples
        {"evaluated": 0.5},
        {"evaluated": LateLoss()},
        {"evaluated": UnprintableLoss()},
        {"evaluated": Leaving()},
        {"evaluated": EvalResult(1.0, None)},
        {"evaluated": EvalResult(1.0, -5)},
        {"evaluated": EvalResult(1.0, 10**400)},
        {"evaluated": EvalResult(1.0, 10**5000)},
    ],
)
def test_an_evaluation_without_a_loss_is_none(returned):
    seen = Seen(Odd(**returned))
    assert (seen.evaluation.num_examples, seen.evaluation.loss) == (0, 0.0)
    assert seen.delta == [1, 1, 1, 1]
    assert len(seen.reports) == 1


def test_evaluations_that_differ_in_each_round_are_named_once():
    reports: list[str] = []
    traces: list[str] = []
    results = Results(reports.append, traces.append)
    for number in range(3):
        Seen(Odd(raises=ValueError(f"batch {number}")), results=results)
        Seen(Odd(evaluated=[number]), results=results)
        Seen(Odd(loss=[number]), results=results)
    assert (len(reports), len(traces)) == (2, 1)


def test_the_last_evaluation_is_answered_even_where_it_fails():
    seen = Seen(Odd(raises=ValueError("no")), Evaluate(**IDS, round=3))
    assert (seen.evaluation.num_examples, seen.evaluation.round) == (0, 3)


def test_a_worker_without_held_out_data_says_nothing_before_it_trains():
    assert Seen(Odd(evaluated=None)).evaluation is None


# --- whose the arrays are ----------------------------------------------------------------------


def through_the_pointer(weights):
    """Write through a read-only view, as ``torch.from_numpy`` allows."""
    tensor = weights["w"]
    into = (ctypes.c_float * tensor.size).from_address(tensor.ctypes.data)
    own = np.ctypeslib.as_array(into)
    own += 1
    return {**weights, "w": own}


def in_place(weights):
    weights["w"] += 1
    weights["b"][...] = 1
    return weights


class Writes(Odd):
    """A task that modifies the weights that it receives, also when it evaluates."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self._write = write

    def train(self, weights, plan, progress):
        return TrainResult(self._write(weights), 5)

    def evaluate(self, weights):
        self._write(weights)
        return EvalResult(0.0, 1)


@pytest.mark.parametrize("write", [through_the_pointer, in_place])
@pytest.mark.parametrize("plain", [False, True])
def test_a_task_that_writes_to_what_it_got_learns_what_it_learnt(write, plain):
    fit = Fit(**IDS, round=1, evaluate=True, plan=Plan())
    weights = received()
    job = Job(fit, dict(weights) if plain else weights)
    executed(job, Writes(write))
    assert job.answer is not None
    assert job.answer[1]["w"].tolist() == [1, 1, 1, 1]
    assert weights["w"].tolist() == [0, 0, 0, 0]


def test_a_task_that_only_reads_gets_views():
    got = []

    class Reads(Odd):
        only_reads = True

        def train(self, weights, plan, progress):
            got.append(weights["w"])
            return super().train(weights, plan, progress)

    seen = Seen(Reads())
    assert not got[0].flags.writeable
    assert seen.delta == [1, 1, 1, 1]


def test_first_weights_are_not_those_that_the_task_goes_on_with():
    kept = {"w": np.zeros(4, np.float32)}

    class Keeps(Odd):
        def init(self, seed):
            return kept

    ask = InitRequest(federation="f", run="r", seed=1)
    job = Job(ask)
    executed(job, Keeps())
    kept["w"] += 1
    assert job.answer is not None
    assert job.answer[1]["w"].tolist() == [0, 0, 0, 0]


def test_a_task_may_change_the_configuration_that_it_is_given():
    class Pops(Odd):
        def train(self, weights, plan, progress):
            plan.config.pop("rate")
            return super().train(weights, plan, progress)

    fit = Fit(**IDS, round=1, evaluate=False, plan=Plan(config={"rate": 1}))
    for _ in range(2):  # as when it is asked again
        Seen(Pops(), fit)
    assert fit.plan.config == {"rate": 1}


# --- the model ---------------------------------------------------------------------------------


class Wide(Odd):
    def init(self, seed):
        return {"w": np.zeros(4), "b": np.zeros(())}

    def train(self, weights, plan, progress):
        raise AssertionError("it is not to be trained")

    evaluate = train


def test_a_model_that_is_not_the_task_s_is_refused_before_anything_is_done_with_it():
    fit = Fit(**IDS, round=1, evaluate=True, plan=Plan())
    job = Job(fit, received())
    with pytest.raises(TaskError) as failed:
        executed(job, Wide(), signature=signature_of_task(Wide()))
    assert str(failed.value) == (
        "the federation's model differs from this task's model: tensor 'w' is float32 of shape "
        "(4,) in the federation, but float64 of shape (4,) in this task; with JAX, set "
        "JAX_ENABLE_X64 for all workers or for no worker"
    )


def test_work_that_nobody_wants_ends_at_its_next_step():
    fit = Fit(**IDS, round=1, evaluate=False, plan=Plan())
    job = Job(fit, received(), wanted=False)
    with pytest.raises(NotWanted):
        executed(job, Odd(step=(1, 2)))


# --- the history -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["round", "event", "late", "num_examples", "loss", "evaluators", "run", "time"]
)
def test_no_metric_takes_the_place_of_a_field_of_the_history(name):
    one = rs.Evaluated(2, 1.0, {name: 9.0, f"metric/{name}": 8.0, "accuracy": 0.5})
    line = {"event": "evaluated", "round": 1, "run": "r", **average_evaluations({"a": one})}
    assert (line["event"], line["round"], line["run"]) == ("evaluated", 1, "r")
    assert (line["num_examples"], line["loss"], line["evaluators"]) == (2, 1.0, ["a"])
    assert line["accuracy"] == 0.5
    assert (line[f"metric/{name}"], line[f"metric/metric/{name}"]) == (9.0, 8.0)
    json.dumps(line)


def test_a_result_of_the_right_attributes_will_do():
    trained = SimpleNamespace(
        weights={"w": np.ones(4, np.float32), "b": np.float32(1)}, num_examples=3
    )
    assert Seen(Odd(trained=trained)).update.num_examples == 3

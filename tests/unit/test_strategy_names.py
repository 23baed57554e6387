"""Strategies by name: joining parts, reading arguments, and errors in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fluffle_common.arguments import within
from fluffle_common.errors import MalformedMessage, UsageError
from fluffle_common.protocol.messages import Update
from fluffle_coordinator.cli.strategies import strategies
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.fedavg import FEDAVG
from fluffle_coordinator.strategy.names import PARTS, named_strategy
from fluffle_coordinator.strategy.update_checks import check_metrics
from fluffle_coordinator.user_code.strategy_loading import load_strategy

ALGORITHMS = Path(__file__).parents[2] / "docs" / "algorithms.md"


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("fedavg", "fedavg"),
        ("fedavg+fedyogi:0.5", "fedyogi:lr=0.5,beta1=0.9,beta2=0.99,tau=0.001"),
        ("fedadagrad:tau=1e-9", "fedadagrad:lr=0.1,tau=1e-09"),
        ("trimmed:0.1", "trimmed:fraction=0.1"),
        ("krum", "krum:f=1"),
        ("scaffold", "scaffold"),
        ("scaffold:10", "scaffold:workers=10"),
        ("multikrum:f=2,m=3", "multikrum:f=2,m=3"),
        ("multikrum:2, m=3", "multikrum:f=2,m=3"),
        ("fedavgm:lr=1e+3", "fedavgm:lr=1000.0,momentum=0.9"),
        ("fedadagrad + median + clip:2 + clip:1",
         "clip:norm=2.0+clip:norm=1.0+median+fedadagrad:lr=0.1,tau=0.001"),
        ("optax:adamw,learning_rate=0.1", "optax:optimizer=adamw,learning_rate=0.1"),
    ],
)  # fmt: skip
def test_the_full_name_has_every_argument_and_gives_the_same_strategy(text, full):
    named = load_strategy(text)
    assert (named.name, named.file, named.ours) == (full, None, True)
    assert load_strategy(full).name == full


def test_fedavg_has_one_name_and_is_one_object():
    assert named_strategy("fedavg") is load_strategy("fedavg") is FEDAVG
    assert named_strategy("clip:9").name == "clip:norm=9.0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedadm", "unknown strategy 'fedadm' .*did you mean 'fedadam'"),
        ("fedadm:lr=0.1", "unknown strategy 'fedadm:lr=0.1' .*did you mean 'fedadam'"),
        ("trimed:0.2", "did you mean 'trimmed'"),
        ("median+fedadm", "unknown part 'fedadm'; did you mean 'fedadam'"),
        ("fedadam:beta=1", "fedadam: unknown argument 'beta'; did you mean 'beta[12]'"),
        (
            "fedadam:lr=0",
            "fedadam: lr=0 is out of range; expected a number above 0 and below 1e\\+06",
        ),
        ("fedadam:lr=1e39", "fedadam: lr=1e\\+39 is out of range"),
        ("fedavgm:lr=1e6", "fedavgm: lr=1e\\+06 is out of range"),
        ("fedadam:lr=nan", "lr='nan' is not valid; expected a number"),
        ("fedadam:lr=inf", "lr='inf' is not valid"),
        ("fedadam:beta2=1", "beta2=1 is out of range; expected a number of at least 0 and below 1"),
        ("fedadam:0.1,0.9", "unknown argument '0.9'"),
        ("fedadam:lr=1,lr=2", "'lr' is given twice"),
        ("fedadam:bias_correction=perhaps", "expected true or false"),
        ("trimmed:0.5", "fraction=0.5 is out of range; expected a number above 0 and below 0.5"),
        ("krum:f=1.5", "f='1.5' is not valid; expected a whole number"),
        ("krum:f=-1", "f=-1 is out of range"),
        (
            "krum:f=99999999999",
            "f=1e\\+11 is out of range; expected a number of at least 0 and at most",
        ),
        ("multikrum:m=99999999999", "m=1e\\+11 is out of range"),
        ("krum:f=99999999999999999999", "f='9{20}' is not valid; expected a whole number"),
        (f"rfa:{'9' * 5000}", "iterations='9{60}' is not valid; expected a whole number"),
        ("qfedavg:q=11", "q=11 is out of range; expected a number of at least 0 and at most 10"),
        ("median:3", "median: no arguments are accepted, but '3' is given"),
        ("clip", "clip: the argument 'norm' is missing \\(write norm="),
        ("median+krum", "more than one mean: median and krum:f=1; give only one"),
        ("scaffold+median", "scaffold is a complete strategy and cannot be combined"),
        ("scaffold+scaffold:2", "more than one whole strategy: scaffold and scaffold:workers=2"),
        ("scaffold:0", "workers=0 is out of range"),
        ("fedadam+fedyogi", "more than one server step: .*; give only one"),
        ("optax:adamm,learning_rate=1", "unknown optax optimizer 'adamm'; did you mean 'adam'?"),
        ("optax:adam,rate=1", "optax.adam cannot be used with rate=1: .*'rate'"),
        ("optax:adam,learning_rate=x", "optax.adam cannot be used with learning_rate=x: "),
        ("optax:sgd,learning_rate=0.1,momentum=y", "optax.sgd cannot be used with .*momentum=y: "),
        ("optax:tree", "optax.tree cannot be used with no arguments: "),
        (
            "optax:constant_schedule,value=1",
            "is not an optimizer; give an optimizer, such as adamw",
        ),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name, message):
    with pytest.raises(UsageError, match=message) as wrong:
        load_strategy(name)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_calls_from_code_check_their_ranges_too(value):
    with pytest.raises(ValueError, match="out of range"):
        within("x", value, 0)


def test_a_file_may_have_the_name_of_a_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("median.py").write_text(
        "from fluffle_coordinator.strategy.fedavg import fedavg as median\n"
    )
    assert load_strategy("median.py:median").name == "median.py:median"


ARGUMENTS = {"clip": ":1", "dp": ":clip=99,noise=0.01,workers=5", "optax": ":sgd,learning_rate=0.1"}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_makes_a_finite_step_and_keeps_shapes_and_dtypes(name):
    strategy = named_strategy(name + ARGUMENTS.get(name, "")).strategy
    weights = {"w": np.ones((2, 2), np.float32), "n": np.array(3, np.int8)}
    state = strategy.init(weights)
    for place in range(5):
        delta = {"w": np.full((2, 2), 1 + place / 10, np.float32), "n": np.array(place)}
        metrics = {"loss": 0.5, "steps": 3.0}
        one = Contribution(worker=f"w{place}", num_examples=2, delta=delta, metrics=metrics)
        state = strategy.fold(state, one)
    new, state = strategy.finish(state, weights)
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {
        n: (t.shape, t.dtype) for n, t in weights.items()
    }
    assert (new["w"] > 1).all()
    assert np.isfinite(new["w"]).all()


def test_a_control_variate_beyond_float32_is_saturated():
    strategy, weights = named_strategy("scaffold").strategy, {"w": np.zeros(2, np.float32)}
    extra = {"w": np.array([1e300, -1.7e308])}
    state = strategy.init(weights)
    for _ in range(2):
        for worker in "ab":
            delta = {"w": np.ones(2, np.float32)}
            one = Contribution(worker=worker, num_examples=1, delta=delta, extra=extra)
            state = strategy.fold(state, one)
        _, state = strategy.finish(state, weights)
    end = np.finfo(np.float32).max
    assert strategy.broadcast(state)["w"].tolist() == [end, -end]


def test_an_update_without_a_needed_metric_is_rejected():
    update = Update.model_construct(metrics={"loss": 1.0})
    check_metrics(update, named_strategy("qfedavg").strategy.needs)
    with pytest.raises(MalformedMessage, match="no metric 'steps', which the strategy"):
        check_metrics(update, named_strategy("fednova").strategy.needs)


@pytest.mark.parametrize(
    ("name", "metric", "value", "low"),
    [
        ("qfedavg", "loss", -1.0, 0),
        ("qfedavg", "loss", 1e300, 0),
        ("fednova", "steps", -3.0, 1),
        ("fednova", "steps", 0.0, 1),
        ("fednova", "steps", 1e-300, 1),
        ("clip:1+fednova+fedadam", "steps", 1e300, 1),
    ],
)
def test_an_update_with_a_needed_metric_out_of_range_is_rejected(name, metric, value, low):
    needs = named_strategy(name).strategy.needs
    check_metrics(Update.model_construct(metrics={metric: float(low)}), needs)
    reason = (
        f"{metric}={value:g} is out of range; expected a number of at least {low} and at most 1e+10"
    )
    with pytest.raises(MalformedMessage, match=re.escape(reason)):
        check_metrics(Update.model_construct(metrics={metric: value}), needs)


def test_the_command_and_the_document_list_every_part():
    shown = CliRunner().invoke(strategies, [], env={"COLUMNS": "140"})
    assert shown.exit_code == 0
    document = ALGORITHMS.read_text()
    for name, part in PARTS.items():
        assert part.about in shown.output
        assert f"`{name}" in document
    assert "lr=0.01, beta1=0.9" in shown.output

"""Tensors that are not parameters: what strategies do with them, and how a model's form says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluffle_common.errors import TaskError
from fluffle_common.protocol.model_form import model_form
from fluffle_common.tensors.groups import check_statistics
from fluffle_coordinator.strategy.base import Contribution, NamedStrategy, Strategy, with_statistics
from fluffle_coordinator.strategy.dp_fedavg import dp_fedavg
from fluffle_coordinator.strategy.names import named_strategy
from fluffle_coordinator.strategy.pipeline import Server, pipeline, replace
from fluffle_coordinator.strategy.weighted import apply_delta, weighted
from fluffle_coordinator.user_code.guarded_strategy import GuardedStrategy

STATISTICS = frozenset({"norm/mean", "norm/var", "norm/count"})
DOCS = Path(__file__).parents[2] / "docs" / "strategies.md"
VAR = frozenset({"var"})
EXAMPLES = (10, 30, 60)
STEPS = (1.0, 10.0, 2.0)


def model() -> dict[str, Any]:
    """Return a model whose parameters and statistics alternate."""
    return {
        "kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
        "norm/count": np.array(7),
        "norm/mean": np.zeros(3, np.float32),
        "norm/scale": np.ones(3, np.float32),
        "norm/var": np.full(3, 40.0, np.float32),
    }


def updates(base: dict[str, Any], seed: int) -> list[Contribution]:
    """Return three updates that move the variances far down in the first round, to about 1."""
    rng = np.random.default_rng(seed)
    found = []
    for number, (examples, steps) in enumerate(zip(EXAMPLES, STEPS, strict=True)):
        delta = {n: rng.normal(size=w.shape).astype(np.float32) for n, w in base.items()}
        delta["norm/var"] = rng.uniform(0.5, 1.5, 3).astype(np.float32) - base["norm/var"]
        delta["norm/count"] = np.array(number + 3)
        metrics = {"loss": 0.5 + number, "steps": steps}
        found.append(
            Contribution(worker=f"w{number}", num_examples=examples, delta=delta, metrics=metrics)
        )
    return found


def without(tensors: dict[str, Any], names: frozenset[str] = STATISTICS) -> dict[str, Any]:
    return {name: one for name, one in tensors.items() if name not in names}


def rounds_of(strategy: Strategy[Any], base: Any, chosen: Any, *, saved_after: int = 0) -> Any:
    """Return the models of four rounds from the chosen tensors of the updates."""
    weights, models = chosen(base), []
    state = strategy.init(weights)
    current = dict(base)
    for number in range(1, 5):
        for one in updates(current, number):
            part = Contribution(
                worker=one.worker,
                num_examples=one.num_examples,
                delta=chosen(one.delta),
                metrics=one.metrics,
            )
            state = strategy.fold(state, part)
        new, state = strategy.finish(state, weights)
        weights = {name: np.array(tensor) for name, tensor in new.items()}
        current = {**current, **weights}
        models.append(weights)
        if number == saved_after:
            dumped = {n: np.array(t) for n, t in strategy.dump(state).items()}
            state = strategy.load(dumped, weights)
    return models


def averages(base: Any) -> list[dict[str, Any]]:
    """Return the statistics after each round: the means by examples, in float64."""
    models, current = [], dict(base)
    for number in range(1, 5):
        found = updates(current, number)
        for name in STATISTICS:
            total = sum(
                n * one.delta[name].astype(float) for n, one in zip(EXAMPLES, found, strict=True)
            )
            mean = current[name] + total / sum(EXAMPLES)
            current[name] = (np.rint(mean) if name == "norm/count" else mean).astype(
                base[name].dtype
            )
        models.append({name: current[name] for name in STATISTICS})
    return models


STEPPED = (
    "fedavg",
    "fedavgm",
    "fedavgm:lr=0.5,momentum=0.5",
    "fedadam:lr=0.1",
    "fedyogi:lr=0.1",
    "fedadagrad:lr=0.5",
    "optax:adamw,learning_rate=0.1,weight_decay=0.1",
    "clip:0.5",
    "clip:0.5+fedavgm",
    "fednova",
    "fednova+fedavgm",
    "qfedavg:q=1,lr=0.1",
)


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("saved_after", [0, 2])
def test_they_become_the_mean_by_examples_whatever_the_parameters_do(name, saved_after):
    if name.startswith("optax"):
        pytest.importorskip("optax")
    base, strategy = model(), named_strategy(name).strategy
    knowing = with_statistics(strategy, STATISTICS)
    found = rounds_of(knowing, base, dict, saved_after=saved_after)
    alone = rounds_of(strategy, base, without)
    for after, expected, parameters in zip(found, averages(base), alone, strict=True):
        assert list(after) == list(base)
        for tensor, one in expected.items():
            np.testing.assert_allclose(after[tensor], one, rtol=2e-6, atol=1e-6, err_msg=tensor)
        assert (after["norm/var"] > 0).all()
        for tensor, one in parameters.items():
            np.testing.assert_array_equal(after[tensor], one, err_msg=tensor)


@pytest.mark.parametrize("name", ["median", "trimmed:0.4", "krum:0", "rfa"])
def test_a_robust_mean_is_theirs_too_and_only_the_server_step_leaves_them_out(name):
    base = model()
    plain = named_strategy(name).strategy
    stepped = with_statistics(named_strategy(f"{name}+fedavgm:lr=0.5").strategy, STATISTICS)
    expected, found = (rounds_of(strategy, base, dict)[0] for strategy in (plain, stepped))
    for tensor in base:
        moved = (found[tensor] - base[tensor], expected[tensor] - base[tensor])
        if tensor in STATISTICS:
            np.testing.assert_array_equal(*moved, err_msg=tensor)
        else:
            np.testing.assert_allclose(moved[0], 0.5 * moved[1], rtol=1e-5, err_msg=tensor)


def test_a_private_mean_clips_them_with_the_parameters_and_adds_its_noise_to_them(monkeypatch):
    drawn = []

    def counted(size: int) -> Any:
        drawn.append(size)
        return np.full(size, 2.0)

    monkeypatch.setattr("fluffle_coordinator.strategy.dp_fedavg.gaussian", counted)
    mean = dp_fedavg(clip=1.0, noise=0.25, workers=2)
    strategy = with_statistics(pipeline(mean=mean, server=replace()), VAR)
    base = {"w": np.zeros(2), "var": np.zeros(3)}
    delta = {"w": np.array([3.0, 0.0]), "var": np.array([0.0, 4.0, 0.0])}
    one = Contribution(worker="a", num_examples=1, delta=delta)
    new, _ = strategy.finish(strategy.fold(strategy.init(base), one), base)
    assert sum(drawn) == 5, "every value gets noise, also those that are not parameters"
    np.testing.assert_allclose(new["w"], np.array([0.6, 0.0]) / 2 + 0.25, rtol=1e-4)
    np.testing.assert_allclose(new["var"], np.array([0.0, 0.8, 0.0]) / 2 + 0.25, rtol=1e-4)


def test_the_transforms_of_a_user_get_every_tensor_and_a_server_step_the_parameters():
    seen: dict[str, set[str]] = {}

    def transform(one: Contribution) -> Contribution:
        seen["transform"] = set(one.delta)
        return one

    class Spy(Server[None]):
        def init(self, weights: Any) -> None:
            seen["begun"] = set(weights)

        def step(self, state: Any, weights: Any, delta: Any) -> Any:
            seen["weights"], seen["delta"] = set(weights), set(delta)
            return apply_delta(weights, delta), state

    base = {"w": np.zeros(2), "var": np.ones(2)}
    strategy = pipeline(transform, mean=weighted(), server=Spy())
    strategy = with_statistics(strategy, VAR)
    one = Contribution(worker="a", num_examples=1, delta={"w": np.ones(2), "var": np.ones(2)})
    new, _ = strategy.finish(strategy.fold(strategy.init(base), one), base)
    assert seen.pop("transform") == {"w", "var"}
    assert seen == {"begun": {"w"}, "weights": {"w"}, "delta": {"w"}}
    assert new["var"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("stepped", "reason"),
    [
        ({"w": np.zeros(1)}, "shape"),
        ({"w": np.zeros(2, np.float32)}, "float32"),
        ({}, "w"),
        ({"w": np.zeros(2), "var": np.zeros(2)}, "var"),
    ],
)
def test_a_server_step_with_other_tensors_than_the_parameters_is_an_error(stepped, reason):
    class Wrong(Server[None]):
        def init(self, weights: Any) -> None:
            pass

        def step(self, state: Any, weights: Any, delta: Any) -> Any:
            return stepped, state

    base = {"w": np.zeros(2), "var": np.ones(2)}
    strategy = with_statistics(pipeline(mean=weighted(), server=Wrong()), VAR)
    one = Contribution(worker="a", num_examples=1, delta={"w": np.ones(2), "var": np.ones(2)})
    state = strategy.fold(strategy.init(base), one)
    with pytest.raises(ValueError, match=reason):
        strategy.finish(state, base)


def test_a_model_of_statistics_alone_takes_no_step():
    base = {"var": np.ones(2, np.float32)}
    for name in ("fedavgm", "fedadam", "clip:1+fedavgm", "fednova"):
        strategy = with_statistics(named_strategy(name).strategy, frozenset(base))
        delta = {"var": np.full(2, 3.0, np.float32)}
        one = Contribution(worker="a", num_examples=1, delta=delta, metrics={"steps": 4.0})
        new, state = strategy.finish(strategy.fold(strategy.init(base), one), base)
        assert new["var"].tolist() == [4.0, 4.0]
        strategy.load(strategy.dump(state), new)


def test_the_transform_of_the_docs_halves_the_parameters_only():
    (code,) = re.findall(r"```python\n([^`]*class Halved.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    strategy = pipeline(names["Halved"](), mean=weighted(), server=replace())
    base = {"w": np.zeros(2), "var": np.zeros(2)}
    one = Contribution(worker="a", num_examples=1, delta={"w": np.ones(2), "var": np.ones(2)})
    for knowing, var in ((strategy, 0.5), (with_statistics(strategy, VAR), 1.0)):
        new, _ = knowing.finish(knowing.fold(knowing.init(base), one), base)
        assert (new["w"].tolist(), new["var"].tolist()) == ([0.5, 0.5], [var, var])


class Own:
    """A strategy that inherits nothing."""

    def fold(self, state: Any, one: Contribution) -> Any:
        return state


def test_a_strategy_without_the_method_is_used_as_it_is():
    for own in (Own(), named_strategy("scaffold").strategy):
        named = NamedStrategy("own", own)
        assert GuardedStrategy(named, 1).with_statistics(VAR).named.strategy is own
    momentum = named_strategy("fedavgm").strategy
    assert with_statistics(momentum, frozenset()) is momentum


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda names: None, r"returned no strategy \(the value is of type NoneType\)"),
        (lambda names: 1 / 0, "division by zero"),
    ],
)
def test_a_method_that_fails_is_an_error_of_the_strategy(made, reason):
    own = Own()
    own.with_statistics = made  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=rf"strategy own failed in round 1, in with_stat.*{reason}"):
        GuardedStrategy(NamedStrategy("own", own), 1).with_statistics(VAR)


def test_they_belong_to_the_form_of_a_model():
    base = {"w": np.zeros(2), "mean": np.zeros(3)}
    alone, some = model_form(base), model_form(base, statistics=("mean",))
    assert some.digest not in (alone.digest, model_form(base, statistics=("w",)).digest)
    assert model_form(base, statistics=()) == alone
    assert some.summary == "2 tensors, 5 parameters: float64 2; statistics: 1 tensor"


def test_a_name_that_the_model_lacks_is_named():
    check_statistics(("mean",), ["w", "mean"])
    with pytest.raises(
        ValueError, match=r"include 'var', which is not a tensor .*\(tensors of the .*w"
    ):
        check_statistics(("mean", "var"), ["w", "mean"])

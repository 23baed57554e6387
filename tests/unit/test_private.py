"""Central privacy: the accountant beside published figures, clipping, noise, and the budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import UsageError
from fluffle_coordinator.machine.state import Rules
from fluffle_coordinator.service.strategy_loading import load_strategy, rules_for
from fluffle_coordinator.strategy import private as module
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.names import named_strategy
from fluffle_coordinator.strategy.private import epsilon, gaussian


def finish(name, deltas):
    mean, base = named_strategy(name).strategy.mean, {"w": np.zeros_like(deltas[0])}
    state = mean.init(base)
    for place, delta in enumerate(deltas):
        one = Contribution(worker=f"w{place}", num_examples=10**place, delta={"w": delta})
        state = mean.fold(state, one)
    return mean.finish(state, base)[0]["w"]


# What dp-accounting 0.6.0 has for the Gaussian mechanism, by its PLD accountant, which rounds up.
@pytest.mark.parametrize(
    ("noise", "rounds", "delta", "pld"),
    [
        (1.0, 1, 1e-5, 4.37717810002493),
        (4.0, 10, 1e-5, 3.341409471859205),
        (8.0, 100, 1e-6, 6.312060191411408),
        (10.0, 300, 1e-5, 8.385418926834001),
    ],
)
def test_epsilon_is_that_of_dp_accounting(noise, rounds, delta, pld):
    assert epsilon(noise, rounds, delta) == pytest.approx(pld, rel=2e-4)
    assert epsilon(noise, rounds, delta) <= pld * (1 + 1e-6)


@given(
    noise=st.floats(0.3, 100),
    rounds=st.integers(1, 10**4),
    delta=st.floats(1e-12, 0.1),
)
def test_epsilon_is_the_least_that_its_delta_allows_and_grows(noise, rounds, delta):
    found = epsilon(noise, rounds, delta)
    mu = math.sqrt(rounds) / noise
    assert module._delta(found, mu) <= delta * (1 + 1e-6)
    if found > 1e-6:
        assert module._delta(found * (1 - 1e-6), mu) > delta * (1 - 1e-6)
    assert epsilon(noise, rounds + 1, delta) >= found >= epsilon(2 * noise, rounds, delta)


def test_the_tails_of_the_normal_distribution_meet():
    left, right = module._log_normal(-30 - 1e-9), module._log_normal(-30 + 1e-9)
    assert left == pytest.approx(right, abs=1e-5)


def test_updates_are_clipped_count_the_same_and_are_divided_by_a_fixed_number(monkeypatch):
    monkeypatch.setattr(module, "gaussian", np.zeros)
    deltas = [np.array([3.0, 4.0]), np.array([0.0, -0.5]), np.zeros(2)]
    found = finish("dp:clip=1,noise=1,workers=10", deltas)
    np.testing.assert_allclose(found, [0.06, 0.03], rtol=1e-4)
    large = finish("dp:clip=2,noise=1,workers=1", [np.full(10**5, 1e30, np.float32)])
    assert 1.9999 < np.linalg.norm(large) <= 2.0


def test_the_noise_is_that_of_the_name_and_another_one_each_time():
    zeros = [np.zeros(10**5)] * 3
    name = "dp:clip=2,noise=0.5,workers=4"
    one, other = finish(name, zeros), finish(name, zeros)
    for found in (one, other):
        assert found.std() == pytest.approx(0.5 * 2 / 4, rel=0.03)
        assert abs(found.mean()) < 0.01
    assert np.corrcoef(one, other)[0, 1] == pytest.approx(0, abs=0.03)


def test_gaussian_values_are_distributed_as_they_should_be():
    found = gaussian(400_001)
    assert found.shape == (400_001,)
    for bound in (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0):
        expected = math.erfc(-bound / math.sqrt(2)) / 2
        assert (found < bound).mean() == pytest.approx(expected, abs=0.006)  # 7 sigma
    assert np.isfinite(found).all()


def test_the_budget_bounds_the_rounds():
    strategy = load_strategy("dp:clip=1,noise=4,workers=10,budget=3")
    most = strategy.strategy.needs.max_rounds
    assert epsilon(4, most, 1e-5) <= 3 < epsilon(4, most + 1, 1e-5)
    assert rules_for(strategy, Rules(rounds=1000)).rounds == most
    assert rules_for(strategy, Rules(rounds=2)).rounds == 2
    assert strategy.name == "dp:clip=1.0,noise=4.0,workers=10,delta=1e-05,budget=3.0"
    assert load_strategy("dp:1,noise=4,workers=10").strategy.needs.max_rounds is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dp:clip=1,noise=1", "dp: 'workers' is missing"),
        ("dp:clip=1,noise=0,workers=2", "noise=0 is out of range"),
        ("dp:clip=1,noise=1,workers=2,delta=1", "delta=1 is out of range"),
        ("dp:clip=1,noise=1,workers=2,budget=1", "budget=1 allows no round: one costs .* of 4.38"),
    ],
)
def test_what_gives_no_privacy_is_refused(name, told):
    with pytest.raises(UsageError, match=told):
        load_strategy(name)

"""Central differential privacy: published figures of epsilon, clipping, noise and the budget."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.cli.coordinator import coordinator
from fluffle_coordinator.machine.selection import POISSON, parse_selection
from fluffle_coordinator.machine.state import Quorum, Rules
from fluffle_coordinator.storage.run_store import sampling_secret
from fluffle_coordinator.strategy import accountant as accounting
from fluffle_coordinator.strategy import dp_fedavg as module
from fluffle_coordinator.strategy.accountant import accountant, epsilon, noise_within
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.dp_fedavg import gaussian
from fluffle_coordinator.strategy.names import named_strategy
from fluffle_coordinator.user_code.strategy_loading import (
    load_strategy,
    rules_for,
    uncounted_sampling,
)


def finish(name, deltas):
    mean, base = named_strategy(name).strategy.mean, {"w": np.zeros_like(deltas[0])}
    state = mean.init(base)
    for place, delta in enumerate(deltas):
        one = Contribution(worker=f"w{place}", num_examples=10**place, delta={"w": delta})
        state = mean.fold(state, one)
    return mean.finish(state, base)[0]["w"]


# From the PLD accountant of dp-accounting 0.6.0, which rounds up, for the Gaussian mechanism.
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


@pytest.mark.parametrize(("rounds", "rate", "method"), [(1, None, None), (50, 0.1, "rdp")])
def test_the_noise_for_a_budget_is_the_smallest_that_allows_the_rounds(rounds, rate, method):
    noise = noise_within(3, rounds, 1e-6, rate, method)
    assert accountant(noise, 1e-6, rate, method).rounds_within(3) >= rounds
    less = accountant(noise - 0.001, 1e-6, rate, method)
    assert less.epsilon(rounds) > 3


def test_a_budget_that_no_noise_keeps_is_refused():
    with pytest.raises(ValueError, match="no noise below 1,000 keeps epsilon within 1e-09 for 9"):
        noise_within(1e-9, 9, delta=1e-12)
    with pytest.raises(ValueError, match="budget"):
        noise_within(0, 9)


@given(
    noise=st.floats(0.3, 100),
    rounds=st.integers(1, 10**4),
    delta=st.floats(1e-12, 0.1),
)
def test_epsilon_is_the_smallest_that_delta_allows_and_grows(noise, rounds, delta):
    result = epsilon(noise, rounds, delta)
    mu = math.sqrt(rounds) / noise
    assert accounting._delta(result, mu) <= delta * (1 + 1e-6)
    if result > 1e-6:
        assert accounting._delta(result * (1 - 1e-6), mu) > delta * (1 - 1e-6)
    assert epsilon(noise, rounds + 1, delta) >= result >= epsilon(2 * noise, rounds, delta)


@pytest.mark.parametrize("noise", [1e-9, 1e-12, 1e-100])
def test_with_hardly_any_noise_epsilon_is_huge_but_does_not_overflow(noise):
    assert epsilon(noise, 2, 1e-5) == pytest.approx(1 / noise**2, rel=1e-6)


def test_the_tails_of_the_normal_distribution_meet():
    left, right = accounting._log_normal(-30 - 1e-9), accounting._log_normal(-30 + 1e-9)
    assert left == pytest.approx(right, abs=1e-5)


def test_updates_are_clipped_and_divided_by_a_fixed_number_with_equal_weights(monkeypatch):
    monkeypatch.setattr(module, "gaussian", np.zeros)
    deltas = [np.array([3.0, 4.0]), np.array([0.0, -0.5]), np.zeros(2)]
    result = finish("dp:clip=1,noise=1,workers=10", deltas)
    np.testing.assert_allclose(result, [0.06, 0.03], rtol=1e-4)
    large = finish("dp:clip=2,noise=1,workers=1", [np.full(10**5, 1e30, np.float32)])
    assert 1.9999 < np.linalg.norm(large) <= 2.0


def test_the_noise_has_its_scale_and_differs_each_time():
    zeros = [np.zeros(10**5)] * 3
    name = "dp:clip=2,noise=0.5,workers=4"
    one, other = finish(name, zeros), finish(name, zeros)
    for result in (one, other):
        assert result.std() == pytest.approx(0.5 * 2 / 4, rel=0.03)
        assert abs(result.mean()) < 0.01
    assert np.corrcoef(one, other)[0, 1] == pytest.approx(0, abs=0.03)


def test_gaussian_values_are_standard_normal():
    result = gaussian(400_001)
    assert result.shape == (400_001,)
    for bound in (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0):
        expected = math.erfc(-bound / math.sqrt(2)) / 2
        assert (result < bound).mean() == pytest.approx(expected, abs=0.006)  # 7 sigma
    assert np.isfinite(result).all()


def test_the_budget_bounds_the_rounds():
    strategy = load_strategy("dp:clip=1,noise=4,workers=10,budget=3")
    most = strategy.strategy.needs.max_rounds
    assert epsilon(4, most, 1e-5) <= 3 < epsilon(4, most + 1, 1e-5)
    assert rules_for(strategy, Rules(rounds=1000)).rounds == most
    assert rules_for(strategy, Rules(rounds=2)).rounds == 2
    assert strategy.name == "dp:clip=1.0,noise=4.0,workers=10,delta=1e-05,budget=3.0"
    assert load_strategy("dp:1,noise=4,workers=10").strategy.needs.max_rounds is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dp:clip=1,noise=1", "dp: the argument 'workers' is missing"),
        ("dp:clip=1,noise=0,workers=2", "noise=0 is out of range"),
        ("dp:clip=1,noise=1,workers=2,delta=1", "delta=1 is out of range"),
        (
            "dp:clip=1,noise=1,workers=2,budget=1",
            "budget=1 is too small for one round, which costs .* of 4.38",
        ),
    ],
)
def test_arguments_without_privacy_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        load_strategy(name)


# --- sampling ----------------------------------------------------------------------------------

# From dp-accounting 0.6.0, with delta = 1e-5: the example of Abadi et al., "Deep Learning with
# Differential Privacy", CCS 2016, section 4 (1.26 in the paper, with its moments accountant); the
# MNIST tutorial of TensorFlow Privacy (60 epochs in batches of 256); and rounds of a tenth.
TEXTBOOK = [
    (4.0, 0.01, 10_000, 0.9469993068921693, 1.0354900660362436),
    (1.1, 256 / 60_000, 14_063, 2.381778812581723, 2.596655529521983),
    (1.0, 0.1, 100, 7.04660287720805, 7.903850223578231),
]
SAMPLED = "dp:clip=1,noise=1.1,workers=10,rate=0.01"


@pytest.mark.parametrize(("noise", "rate", "rounds", "pld", "rdp"), TEXTBOOK)
def test_epsilon_of_a_textbook_setting_is_the_published_one(noise, rate, rounds, pld, rdp):
    pytest.importorskip("dp_accounting")
    for method, figure in (("pld", pld), ("rdp", rdp)):
        result = accountant(noise, 1e-5, rate, method).epsilon(rounds)
        assert result == pytest.approx(figure, rel=1e-6)


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_epsilon_equals_dp_accounting(method):
    library = pytest.importorskip("dp_accounting")
    event = library.SelfComposedDpEvent(
        library.PoissonSampledDpEvent(0.02, library.GaussianDpEvent(1.5)), 200
    )
    theirs = {"pld": library.pld.PLDAccountant, "rdp": library.rdp.RdpAccountant}[method]()
    figure = theirs.compose(event).get_epsilon(1e-6)
    assert accountant(1.5, 1e-6, 0.02, method).epsilon(200) == pytest.approx(figure, rel=1e-6)


def test_without_sampling_the_accountants_agree():
    pytest.importorskip("dp_accounting")
    exact, pld, rdp = (accountant(4, 1e-5, None, m).epsilon(10) for m in ("exact", "pld", "rdp"))
    assert exact <= pld <= rdp
    assert pld == pytest.approx(exact, rel=2e-4)


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_sampling_costs_less_and_the_budget_bounds_its_rounds(method):
    pytest.importorskip("dp_accounting")
    name = f"dp:clip=1,noise=4,workers=10,rate=0.1,accountant={method},budget=1"
    strategy = load_strategy(name).strategy
    most = strategy.needs.max_rounds
    assert strategy.spent(most)["epsilon"] <= 1 < strategy.spent(most + 1)["epsilon"]
    assert most > 10 * accountant(4, 1e-5).rounds_within(1)


def test_without_the_package_only_sampling_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    load_strategy("dp:clip=1,noise=4,workers=10,budget=3")
    with pytest.raises(
        UsageError, match=r"need the package dp-accounting; run pip install 'fluffle\[privacy\]'"
    ):
        load_strategy(SAMPLED)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that dp-accounting is installed, for tests that compute no epsilon."""
    monkeypatch.setattr(accounting, "_library", lambda _: None)


@pytest.mark.usefixtures("installed")
def test_a_rate_decides_who_is_asked():
    strategy = load_strategy(SAMPLED)
    asked = Rules(rounds=1, selection=POISSON, fraction=0.01)
    for rules in (Rules(rounds=1), Rules(rounds=1, least=5), asked):
        result = rules_for(strategy, rules)
        assert (result.selection, result.fraction, result.least) == (POISSON, 0.01, 1)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("rules", "option"),
    [
        ({"fraction": 0.1}, "--fraction 0.1"),
        ({"sample": 3}, "--sample 3"),
        ({"over_provision": 1.5}, "--over-provision 1.5"),
        ({"quorum": Quorum(number=2)}, "--quorum 2"),
        ({"quorum": Quorum(fraction=0.5)}, "--quorum 0.5"),
        ({"selection": parse_selection("round-robin")}, "--select round-robin"),
    ],
)
def test_options_that_make_chances_depend_on_others_are_refused(rules, option):
    with pytest.raises(UsageError, match=f"{option} conflicts with .* probability 0.01 and waits"):
        rules_for(load_strategy(SAMPLED), Rules(rounds=1, **rules))


def test_a_bound_that_follows_from_other_updates_is_refused():
    with pytest.raises(UsageError, match="--max-norm-ratio conflicts with"):
        rules_for(load_strategy("dp:1,noise=4,workers=2"), Rules(rounds=1, max_norm_ratio=3.0))


@pytest.mark.usefixtures("installed")
def test_uncounted_sampling_is_reported():
    plain, sampling = load_strategy("dp:1,noise=4,workers=2"), Rules(rounds=1, fraction=0.5)
    message = uncounted_sampling(plain, sampling)
    assert "give rate=… to the strategy dp:clip=1.0" in message
    assert not uncounted_sampling(plain, Rules(rounds=1))
    assert not uncounted_sampling(load_strategy("fedavg"), sampling)
    counted = load_strategy(SAMPLED)
    assert not uncounted_sampling(counted, rules_for(counted, Rules(rounds=1)))


def test_private_updates_are_not_archived():
    flags = ["--federation", "f", "--strategy", "dp:1,noise=4,workers=2", "--keep-updates"]
    with pytest.raises(UsageError, match="--keep-updates conflicts with the strategy dp"):
        CliRunner().invoke(coordinator, flags, catch_exceptions=False)


def test_a_round_without_updates_is_noise_alone():
    strategy = named_strategy("dp:clip=2,noise=0.5,workers=4").strategy
    base = {"w": np.full(10**5, 3.0), "b": np.full(2, 3.0)}
    state = strategy.init(base)
    for _ in range(2):
        result, state = strategy.finish(state, base)
        assert np.std(result["w"]) == pytest.approx(0.5 * 2 / 4, rel=0.03)
        assert np.mean(result["w"]) == pytest.approx(3.0, abs=0.01)


def test_a_run_keeps_its_own_secret(tmp_path):
    first = sampling_secret(tmp_path)
    assert sampling_secret(tmp_path) == first
    assert (tmp_path / "sampling.secret").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").mkdir()
    assert sampling_secret(tmp_path / "other") != first
    assert str(first) not in repr(Rules(rounds=1, secret=first))
    (tmp_path / "sampling.secret").write_text("")
    with pytest.raises(
        RunError, match=r"sampling.secret, which determines the selected workers, cannot be used"
    ):
        sampling_secret(tmp_path)


# --- adaptive clipping -------------------------------------------------------------------------


def test_the_norm_follows_the_quantile_of_the_updates(monkeypatch):
    """Andrew et al. 2021, algorithm 1, computed by hand."""
    monkeypatch.setattr(module, "gaussian", np.ones)
    strategy = named_strategy("dp:clip=1,noise=0.5,workers=4,quantile=0.75,count_noise=2").strategy
    base = {"w": np.zeros(2)}
    state, norm = strategy.init(base), 1.0
    for norms in ([0.5, 1.5, 3.0], [], [0.1, 0.1, 0.1, 0.1]):
        for size in norms:
            one = Contribution(worker="a", num_examples=9, delta={"w": np.array([size, 0.0])})
            state = strategy.fold(state, one)
        result, state = strategy.finish(state, base)
        noise = (0.5**-2 - 4.0**-2) ** -0.5  # the noise on the sum by theorem 1
        expected = sum(min(size, norm) for size in norms) + noise * norm
        np.testing.assert_allclose(result["w"][0], expected / 4, rtol=1e-4)
        part = 0.5 + (sum(0.5 if size <= norm else -0.5 for size in norms) + 2.0) / 4
        norm *= math.exp(-0.2 * (part - 0.75))
        assert strategy.dump(state)["mean/clip"] == pytest.approx(norm, rel=1e-12)


def test_the_norm_finds_the_quantile():
    strategy = named_strategy("dp:clip=100,noise=0.1,workers=200,quantile=0.25").strategy
    base, norms = {"w": np.zeros(1)}, np.linspace(0.01, 1, 200)
    state = strategy.init(base)
    for _ in range(120):
        for size in norms:
            one = Contribution(worker="a", num_examples=1, delta={"w": np.array([size])})
            state = strategy.fold(state, one)
        state = strategy.finish(state, base)[1]
    assert 0.15 < float(strategy.dump(state)["mean/clip"]) < 0.4


def test_states_of_the_mean_and_of_the_server_step_are_saved_apart():
    strategy = named_strategy("dp:clip=1,noise=1,workers=2,quantile=0.5+fedavgm").strategy
    base = {"mean/clip": np.zeros(3, np.float32)}
    state = strategy.finish(strategy.init(base), base)[1]
    saved = strategy.dump(state)
    assert saved.keys() == {"mean/clip", "server/mean/clip"}
    again = strategy.dump(strategy.load(saved, base))
    assert {n: t.tobytes() for n, t in again.items()} == {n: t.tobytes() for n, t in saved.items()}


def test_no_noise_on_the_count_overflows_the_clipping_norm():
    text = "dp:clip=1,noise=2,workers=1,quantile=0.5,count_noise=1e9"
    mean = named_strategy(text).strategy.mean
    norms = {mean.quantile.next(1.0, 0.0, 1.0) for _ in range(20)}
    assert norms == {1e-100, 1e100}


def test_the_count_has_its_share_of_the_noise():
    spent = [
        named_strategy(f"dp:clip=1,noise=2,workers=100{more}").strategy.spent(7)
        for more in ("", ",quantile=0.5", ",quantile=0.5,count_noise=1.1")
    ]
    assert spent[0] == spent[1] == spent[2]
    means = [
        named_strategy(f"dp:clip=1,noise=2,workers={of},quantile=0.5").strategy.mean
        for of in (10, 100)
    ]
    assert [mean.quantile.noise for mean in means] == [2.0, 5.0]
    for mean in means:
        together = (mean.noise**-2 + (2 * mean.quantile.noise) ** -2) ** -0.5
        assert together == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("rate=1", "rate=1 is out of range"),
        ("accountant=pdl", "unknown accountant 'pdl'; did you mean 'pld'"),
        ("rate=0.5,accountant=exact", "accountant=exact does not support sampling"),
        ("quantile=0", "quantile=0 is out of range"),
        ("count_noise=1", "count_noise= has no effect without quantile="),
        (
            "quantile=0.5,count_noise=0.5",
            "count_noise=0.5 is too low: .* more than noise=1 allows; .* 0.5,",
        ),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(more, message):
    with pytest.raises(UsageError, match=message):
        load_strategy(f"dp:clip=1,noise=1,workers=2,{more}")

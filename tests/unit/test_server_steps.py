"""Server steps: published numbers, integers, the ends of dtypes, and resuming bit for bit."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.names import named_strategy

STATEFUL = [
    "fedavgm:lr=0.5",
    "fedadagrad",
    "fedadam",
    "fedadam:bias_correction=true",
    "fedyogi",
    "clip:3+median+fedadam:lr=0.1",
    "optax:adam,learning_rate=0.1",
    "optax:adagrad,learning_rate=0.1",
    "optax:noisy_sgd,learning_rate=0.1,key=7",  # its state has a random key
    "optax:optimistic_adam_v2,learning_rate=0.1",  # its state has a bool
]
ADAPTIVE = "lr={},beta1=0.9,beta2=0.99,tau=0.001"


def round_of(strategy, state, weights, deltas):
    for place, (delta, num_examples) in enumerate(deltas):
        one = Contribution(worker=f"w{place}", num_examples=num_examples, delta=delta)
        state = strategy.fold(state, one)
    return strategy.finish(state, weights)


def two_rounds(name, dtype="float64"):
    """Return the first element after each of two rounds in which workers send the same weights."""
    strategy, weights = named_strategy(name).strategy, {"w": np.zeros(3, dtype)}
    state, firsts = strategy.init(weights), []
    for _ in range(2):
        replies = [(np.array([1, 2, 3], dtype), 1), (np.array([4, 4, 8], dtype), 3)]
        deltas = [({"w": reply - weights["w"]}, n) for reply, n in replies]
        weights, state = round_of(strategy, state, weights, deltas)
        firsts.append(float(weights["w"][0]))
    return firsts


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedavg", (3.25, 3.25)),
        ("fedavgm:lr=0.5,momentum=0.9", (1.625, 3.9)),
        ("fedavgm:lr=1,momentum=0", (3.25, 3.25)),
        ("fedadagrad:lr=0.1,tau=0.001", (0.09996924, 0.16955155)),
        (f"fedyogi:{ADAPTIVE.format(0.01)}", (0.00996933, 0.02337404)),
        (f"fedadam:{ADAPTIVE.format(0.1)}", (0.09969325, 0.23396705)),
        (f"fedadam:{ADAPTIVE.format(0.1)},bias_correction=true", (0.09969325, 0.19938615)),
        ("optax:sgd,learning_rate=0.5,momentum=0.9", (1.625, 3.9)),
    ],
)
def test_two_rounds_give_the_published_numbers(name, expected, dtype):
    tolerance = 1e-8 if dtype == "float64" and not name.startswith("optax") else 5e-7
    np.testing.assert_allclose(two_rounds(name, dtype), expected, rtol=0, atol=tolerance)


def test_our_adam_with_its_bias_corrected_is_optax_s():
    ours = two_rounds("fedadam:lr=0.1,beta1=0.9,beta2=0.99,tau=1e-9,bias_correction=true")
    theirs = two_rounds("optax:adam,learning_rate=0.1,b1=0.9,b2=0.99,eps=0")
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


MODEL = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "d": np.array([1.0, 2.0]),
    "b": np.array([1, 2], "bfloat16"),
    "s": np.array(0.5, np.float32),
    "n": np.array([10, 20], np.int32),
    "none": np.zeros((0, 2), np.float32),
}


def deltas(seed, count=3):
    numbers = np.random.default_rng(seed)
    return [
        (
            {
                name: numbers.integers(-9, 9, one.shape)
                if one.dtype.kind == "i"
                else np.asarray(numbers.normal(size=one.shape), one.dtype)
                for name, one in MODEL.items()
            },
            int(numbers.integers(1, 50)),
        )
        for _ in range(count)
    ]


def bits(tensors):
    return {name: (one.dtype, one.shape, one.tobytes()) for name, one in tensors.items()}


@pytest.mark.parametrize("name", STATEFUL)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 999), at=st.integers(1, 3))
def test_a_run_resumed_from_its_dump_continues_bit_by_bit(name, seed, at):
    strategy = named_strategy(name).strategy
    whole = resumed = MODEL
    state, again = strategy.init(MODEL), strategy.init(MODEL)
    for number in range(1, 5):
        updates = deltas(seed + number)
        whole, state = round_of(strategy, state, whole, updates)
        resumed, again = round_of(strategy, again, resumed, updates)
        if number == at:
            saved = {name: np.array(one) for name, one in strategy.dump(again).items()}
            again = named_strategy(name).strategy.load(saved, resumed)
    assert bits(whole) == bits(resumed)
    assert bits(strategy.dump(state)) == bits(strategy.dump(again))
    assert bits(whole) != bits(MODEL)


@pytest.mark.parametrize("name", ["fedavgm:lr=0.1", "fedadam", "optax:sgd,learning_rate=0.1"])
def test_integer_tensors_take_the_mean_itself(name):
    strategy = named_strategy(name).strategy
    weights, state = {"n": np.array([10, 20]), "w": np.zeros(1)}, None
    state = strategy.init(weights)
    delta = {"n": np.array([4, -6]), "w": np.ones(1)}
    weights, state = round_of(strategy, state, weights, [(delta, 1)])
    assert weights["n"].tolist() == [14, 14]
    assert not any("n" == name.rpartition("/")[2] for name in strategy.dump(state))


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad:lr=100", "fedadam", "fedyogi"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_updates_make_a_finite_model_and_a_finite_state(name, dtype):
    strategy, end = named_strategy(name).strategy, np.finfo(dtype).max
    weights = {"w": np.zeros(2, dtype)}
    state = strategy.init(weights)
    for sign in (1, 1, -1):
        delta = {"w": np.array([sign * end, 1e-300], dtype)}
        weights, state = round_of(strategy, state, weights, [(delta, 1)])
        for one in (*weights.values(), *strategy.dump(state).values()):
            assert np.isfinite(one).all()


def test_a_delta_beyond_float32_makes_a_finite_step_of_optax():
    strategy = named_strategy("optax:adam,learning_rate=0.1").strategy
    weights = {"w": np.zeros(2)}
    weights, _ = round_of(
        strategy, strategy.init(weights), weights, [({"w": np.array([1e39, 1.0])}, 1)]
    )
    assert np.isfinite(weights["w"]).all()


def test_the_state_is_float32_unless_the_tensor_is_float64():
    strategy = named_strategy("fedadam").strategy
    saved = strategy.dump(strategy.init(MODEL))
    assert {name: str(one.dtype) for name, one in saved.items()} == {
        "steps": "int64",
        **{f"{moment}/{name}": "float32" for moment in ("first", "second") for name in "wbs"},
        **{f"{moment}/none": "float32" for moment in ("first", "second")},
        **{f"{moment}/d": "float64" for moment in ("first", "second")},
    }


def test_a_step_does_not_change_the_previous_state():
    """The previous state may still be being written to disk."""
    strategy = named_strategy("fedavgm").strategy
    weights = {"w": np.zeros(2, np.float32)}
    update = [({"w": np.ones(2, np.float32)}, 1)]
    weights, state = round_of(strategy, strategy.init(weights), weights, update)
    before = strategy.dump(state)["w"]
    round_of(strategy, state, weights, update)
    assert before.tolist() == [1.0, 1.0]


def test_without_optax_the_error_names_the_remedy(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        ValueError,
        match=r"optax: server steps from optax need optax and JAX; run pip install 'fluffle\[",
    ):
        named_strategy("optax:adam,learning_rate=0.1")


def test_if_optax_is_installed_but_broken_the_error_names_the_cause(monkeypatch):
    def broken(_):
        raise ImportError("libx.so: cannot open\nshared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    cause = r"and JAX \(libx.so: cannot open shared object file\); run pip install 'fluffle\["
    with pytest.raises(ValueError, match=cause):
        named_strategy("optax:adam,learning_rate=0.1")

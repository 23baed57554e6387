"""Federated averaging: compared with NumPy, in any order, and at the ends of every dtype."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fluffle_common.tensors.weights import FLOATS, INTEGERS, Weights, check_delta, delta
from fluffle_coordinator.strategy import blocks
from fluffle_coordinator.strategy import weighted as strategy
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.fedavg import fedavg

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def fold(state, update, num_examples):
    """Fold an update."""
    one = Contribution(worker="a", num_examples=num_examples, delta=update)
    return fedavg.fold(state, one)


def average(base: Weights, updates: Sequence[tuple[Weights, int]]) -> dict[str, np.ndarray]:
    """Return the average of (delta, num_examples) pairs, folded one by one as in a coordinator."""
    state = fedavg.init(base)
    for update, num_examples in updates:
        check_delta(update, base)
        state = fold(state, update, num_examples)
    return fedavg.finish(state, base)[0]


def average_of(base: Weights, trained: Sequence[tuple[Weights, int]]) -> dict[str, np.ndarray]:
    return average(base, [(delta(weights, base), n) for weights, n in trained])


counts = st.integers(1, 10**6)
values = st.floats(-1e3, 1e3, width=32)


@st.composite
def rounds(draw: st.DrawFn, dtype: str = "float32") -> tuple[np.ndarray, list]:
    shape = draw(SHAPES)
    arrays = hnp.arrays(dtype, shape, elements=values)
    return draw(arrays), draw(st.lists(st.tuples(arrays, counts), min_size=1, max_size=6))


@given(rounds())
def test_the_average_is_numpys_weighted_average(drawn):
    """Within 1e-7 of the largest magnitude: half a unit in the last place of float32 is 6e-8."""
    base, updates = drawn
    got = average({"w": base}, [({"w": values}, n) for values, n in updates])["w"]
    total = sum(n for _, n in updates)
    expected = base.astype(np.float64) + sum(n * v.astype(np.float64) for v, n in updates) / total
    assert got.dtype == np.float32
    assert got.shape == base.shape
    scale = max(float(np.abs(a).max(initial=0)) for a in (base, *(v for v, _ in updates)))
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-14 * scale + 1e-45)


@given(rounds())
def test_the_average_of_deltas_is_that_of_the_trained_weights(drawn):
    """Deltas cost one more rounding of each to float32, and no more."""
    base, trained = drawn
    got = average_of({"w": base}, [({"w": weights}, n) for weights, n in trained])["w"]
    total = sum(n for _, n in trained)
    expected = sum(n * v.astype(np.float64) for v, n in trained) / total
    scale = max(float(np.abs(a).max(initial=0)) for a in (base, *(v for v, _ in trained)))
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=2 * 1e-7 * scale + 1e-45)


@given(rounds("float64"))
def test_float64_weights_lose_nothing_on_the_way(drawn):
    base, updates = drawn
    got = average({"w": base}, [({"w": values}, n) for values, n in updates])["w"]
    total = sum(n for _, n in updates)
    expected = base + sum(n * v for v, n in updates) / total
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-11)


@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_makes_no_difference(drawn, random):
    """Sums in another order differ by a few 1e-16: at most one unit in the last place of float32,
    and only if the exact value lies in the middle between two."""
    base, updates = drawn
    shuffled = random.sample(updates, len(updates))
    one, two = (
        average({"w": base}, [({"w": values}, n) for values, n in some])["w"]
        for some in (updates, shuffled)
    )
    scale = max(float(np.abs(a).max(initial=0)) for a in (base, *(v for v, _ in updates)))
    unit = np.spacing(np.maximum(np.abs(one), np.abs(two)))
    assert (np.abs(one.astype(np.float64) - two) <= unit + 1e-14 * scale).all()


@given(
    st.lists(
        st.tuples(hnp.arrays(np.float32, 8, elements=st.integers(-(2**20), 2**20)), counts),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_where_the_sums_are_exact_no_bit_depends_on_the_order(updates, random):
    base = {"w": np.full(8, 0.125, np.float32)}
    shuffled = random.sample(updates, len(updates))
    one, two = (
        average(base, [({"w": values}, n) for values, n in some])["w"]
        for some in (updates, shuffled)
    )
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_known_vectors(dtype):
    one = np.array([[1, 2, 3], [4, 5, 6]], dtype)
    two = np.array([[29, 23, 19], [17, 13, 11]], dtype)
    expected = [[59 / 3, 16, 41 / 3], [38 / 3, 31 / 3, 28 / 3]]
    for base in (np.zeros((2, 3), dtype), np.full((2, 3), 7, dtype)):
        got = average_of({"w": base}, [({"w": one}, 1), ({"w": two}, 2)])["w"]
        np.testing.assert_allclose(got, expected, rtol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scalars_stay_scalars(dtype):
    base = {"s": np.zeros((), dtype)}
    got = average_of(base, [({"s": np.array(1, dtype)}, 1), ({"s": np.array(3, dtype)}, 2)])["s"]
    assert isinstance(got, np.ndarray)
    assert (got.shape, got.dtype) == ((), np.dtype(dtype))
    assert float(got) == pytest.approx(7 / 3, rel=float(ml_dtypes.finfo(dtype).eps))


def test_equal_updates_average_to_themselves():
    base = {"w": np.linspace(-3, 3, 7, dtype=np.float32)}
    still = {"w": np.zeros(7, np.float32)}
    got = average(base, [(still, 3), (still, 10**12)])
    assert got["w"].tobytes() == base["w"].tobytes()


@given(st.data())
def test_every_tensor_is_averaged_by_its_own_name(data):
    names = data.draw(
        st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5, unique=True)
    )
    base = {name: np.full(2, position, np.float64) for position, name in enumerate(names)}
    update = {name: np.full(2, 100 * position, np.float64) for position, name in enumerate(names)}
    backwards = dict(reversed(update.items()))
    got = average(base, [(update, 1), (backwards, 3)])
    assert list(got) == names
    for position, name in enumerate(names):
        assert got[name].tolist() == [101 * position] * 2


# --- integers, and the ends of the dtypes ------------------------------------------------------


@given(st.sampled_from(INTEGERS), st.data())
def test_integers_are_rounded_to_the_nearest_and_never_wrap(dtype, data):
    limits = np.iinfo(dtype)
    elements = st.integers(max(limits.min, -(2**40)), min(limits.max, 2**40)) | st.sampled_from(
        [max(limits.min, -(2**40)), min(limits.max, 2**40)]
    )
    arrays = hnp.arrays(dtype, 3, elements=elements)
    base = data.draw(arrays)
    trained = data.draw(st.lists(st.tuples(arrays, st.integers(1, 50)), min_size=1, max_size=5))
    got = average_of({"n": base}, [({"n": weights}, n) for weights, n in trained])["n"]
    assert got.dtype == np.dtype(dtype)
    total = sum(n for _, n in trained)
    for position in range(3):
        exact = sum(n * int(weights[position]) for weights, n in trained)
        assert abs(int(got[position]) * total - exact) * 2 <= total * (1 + 1e-3)


def test_halves_are_rounded_to_even():
    base = {"n": np.zeros(4, np.int32)}
    ones = [({"n": np.int32([1, 3, -1, -3])}, 1), ({"n": np.int32([0, 2, 0, -2])}, 1)]
    assert average_of(base, ones)["n"].tolist() == [0, 2, 0, -2]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_saturate_at_the_end_of_their_dtype(dtype):
    limits = np.iinfo(dtype)
    base = {"n": np.array([limits.max, limits.min, limits.max, limits.min], dtype)}
    beyond = {"n": np.int64([2**61, -(2**61), 0, 0])}
    got = average(base, [(beyond, 3)])["n"]
    assert got.dtype == np.dtype(dtype)
    assert got.tolist() == base["n"].tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_updates_never_make_a_model_that_is_not_finite(dtype):
    largest = np.dtype(dtype).type(ml_dtypes.finfo(dtype).max)
    base = {"w": np.array([largest, -largest, 1], dtype)}
    half = np.array([largest / 2, -largest / 2, 1], dtype)
    got = average(base, [({"w": half}, 1), ({"w": half}, 1)])["w"]
    assert got.tolist() == [float(largest), -float(largest), 2.0]
    assert got.dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", [0, 40_000, 69_999])
def test_a_value_that_saturates_does_not_change_others(dtype, index):
    largest = np.dtype(dtype).type(ml_dtypes.finfo(dtype).max)
    base = {"w": np.full(70_000, 2, dtype)}  # more than two blocks
    update = {"w": np.full(70_000, 0.5, dtype)}
    base["w"][index] = update["w"][index] = largest
    got = average(base, [(update, 3)])["w"]
    assert got[index] == largest
    assert (np.delete(got, index) == 2.5).all()


def test_half_precision_is_summed_in_double():
    # In float16, 2048 + 1 is 2048, and 65504 is the largest value.
    base = {"w": np.zeros(2, np.float16)}
    updates = [({"w": np.float16([1, 60000])}, 1) for _ in range(4000)]
    assert average(base, updates)["w"].tolist() == [1, 60000]


def test_without_examples_there_is_no_average():
    base = {"w": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="nothing to average"):
        fedavg.finish(fedavg.init(base), base)


@pytest.mark.parametrize("discount", [0.0, 1e-310])
@pytest.mark.parametrize("close", [strategy.Weighted.finish, strategy.Weighted.replaced])
def test_without_weight_there_is_no_average(discount, close):
    base = {"w": np.zeros(2, np.float32)}
    mean = strategy.weighted()
    one = Contribution(worker="a", num_examples=1, delta=base, discount=discount)
    with pytest.raises(ValueError, match="so the updates have no mean; check the discounts"):
        close(mean, mean.fold(mean.init(base), one), base)


# --- memory and blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("block", [1, 3])
def test_blocks_make_no_difference(monkeypatch, size, block):
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=size), "n": rng.integers(0, 9, size)}
    updates = [({"w": rng.normal(size=size), "n": rng.integers(-9, 9, size)}, n) for n in (1, 2, 5)]
    expected = average(base, updates)
    monkeypatch.setattr(blocks, "BLOCK", block)
    got = average(base, updates)
    assert {k: v.tolist() for k, v in got.items()} == {k: v.tolist() for k, v in expected.items()}


def test_tensors_of_more_than_a_block_are_folded_whole():
    size = 2 * blocks.BLOCK + 5
    rng = np.random.default_rng(0)
    updates = [(rng.normal(size=size), n) for n in (3, 4)]
    base = {"w": rng.normal(size=size)}
    got = average(base, [({"w": values}, n) for values, n in updates])["w"]
    expected = base["w"] + sum(n * v for v, n in updates) / 7
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", ["T", "reversed", "F", "read-only"])
def test_any_memory_layout_is_folded_by_its_values(layout):
    array = np.arange(12.0).reshape(3, 4)
    update = {
        "T": np.ascontiguousarray(array.T).T,
        "reversed": np.ascontiguousarray(array[:, ::-1])[:, ::-1],
        "F": np.asfortranarray(array),
        "read-only": np.frombuffer(array.tobytes()).reshape(3, 4),
    }[layout]
    base = {"w": np.asfortranarray(np.ones((3, 4)))}
    got = average(base, [({"w": update}, 2)])["w"]
    assert got.tolist() == (array + 1).tolist()


def test_arguments_are_not_changed():
    base = {"w": np.ones(3, np.float32), "n": np.ones(3, np.uint8)}
    update = {"w": np.full(3, 2, np.float32), "n": np.full(3, 2, np.int64)}
    for array in (*base.values(), *update.values()):
        array.setflags(write=False)
    state = fedavg.init(base)
    state = fold(state, update, 3)
    first, state = fedavg.finish(state, base)
    assert (first["w"].tolist(), first["n"].tolist()) == ([3] * 3, [3] * 3)
    assert not any(np.shares_memory(first[name], base[name]) for name in base)


def test_a_finished_state_is_empty_and_serves_the_next_round():
    base = {"w": np.ones(3, np.float32)}
    state = fold(fedavg.init(base), {"w": np.full(3, 2, np.float32)}, 3)
    rest = state.mean.totals.rest
    first, state = fedavg.finish(state, base)
    assert (state.mean.num_examples, state.mean.totals.rest is rest) == (0, True)
    assert not np.shares_memory(first["w"], state.mean.totals.memory)
    state = fold(state, {"w": np.full(3, 5, np.float32)}, 7)
    assert fedavg.finish(state, first)[0]["w"].tolist() == [8] * 3


def test_the_state_does_not_grow_with_the_number_of_updates():
    base = {"w": np.zeros(1000, np.float32)}
    state = fedavg.init(base)
    first, rest = state.mean.totals.memory, state.mean.totals.rest
    for _ in range(20):
        state = fold(state, {"w": np.ones(1000, np.float32)}, 5)
    assert state.mean.num_examples == 100
    assert (state.mean.totals.memory is first, state.mean.totals.rest is rest) == (True, True)


# --- compared with exact fractions -------------------------------------------------------------


def exact(base: object, updates: Sequence[tuple[object, int]]) -> Fraction:
    total = sum(n for _, n in updates)
    return Fraction(base) + sum((Fraction(value) * n for value, n in updates), Fraction(0)) / total


ANY_COUNT = st.integers(1, 10**12) | st.sampled_from([1, 2, 10**12])


@given(st.sampled_from(INTEGERS), st.data())
def test_integers_of_any_size_are_averaged_exactly(dtype, data):
    limits, small = np.iinfo(dtype), st.integers(-3, 3)
    near = st.sampled_from([0, 2**53, -(2**53), 2**62, 2**63 - 1, -(2**63)])
    values = st.integers(-(2**63), 2**63 - 1) | st.tuples(near, small).map(sum)
    values = values.map(lambda value: min(max(value, -(2**63)), 2**63 - 1))
    bases = st.integers(int(limits.min), int(limits.max)) | st.sampled_from(
        [int(limits.min), int(limits.max)]
    )
    size = data.draw(st.integers(1, 4))
    base = np.array(data.draw(st.lists(bases, min_size=size, max_size=size)), dtype)
    vectors = st.lists(values, min_size=size, max_size=size).map(np.int64)
    updates = data.draw(st.lists(st.tuples(vectors, ANY_COUNT), min_size=1, max_size=6))
    got = average({"n": base}, [({"n": update}, n) for update, n in updates])["n"]
    assert got.dtype == np.dtype(dtype)
    for place in range(size):
        mean = exact(int(base[place]), [(int(update[place]), n) for update, n in updates])
        assert int(got[place]) == min(max(round(mean), int(limits.min)), int(limits.max))


@pytest.mark.parametrize(
    ("dtype", "trained", "expected"),
    [
        ("int64", [2**53 + 1, 2**53 + 1], 2**53 + 1),
        ("int64", [2**62 + 1, 2**62 + 3], 2**62 + 2),
        ("int64", [-(2**63), -(2**63) + 1], -(2**63)),  # a half is rounded to even
        ("int64", [2**63 - 1, 2**63 - 2], 2**63 - 2),
        ("uint64", [2**64 - 1, 2**64 - 1], 2**64 - 1),
        ("uint64", [2**64 - 1, 2**64 - 3], 2**64 - 2),
    ],
)
def test_integers_above_2_to_the_53_keep_their_last_digit(dtype, trained, expected):
    start = 2**63 if dtype == "uint64" else 0
    base = {"n": np.full(3, start, dtype)}
    got = average_of(base, [({"n": np.full(3, value, dtype)}, 10**12) for value in trained])["n"]
    assert got.tolist() == [expected] * 3


def test_integer_tensors_among_floats_are_averaged_separately():
    base = {
        "n": np.arange(70_000).reshape(7, 10_000),
        "w": np.ones(3, np.float32),
        "b": np.array(5, np.uint8),
        "none": np.zeros((0, 3), np.int16),
    }
    learnt = {
        "n": np.arange(70_000)[::-1].reshape(7, 10_000),
        "w": np.full(3, 0.5, np.float32),
        "b": np.array(-7),
        "none": np.zeros((0, 3), np.int64),
    }
    for _ in range(2):
        state = fold(fedavg.init(base), learnt, 3)
        got, state = fedavg.finish(fold(state, learnt, 4), base)
        assert (got["n"] == 69_999).all()
        assert (got["w"].tolist(), got["b"].tolist(), got["none"].shape) == ([1.5] * 3, 0, (0, 3))


MOST = sys.float_info.max
WIDE = st.floats(-MOST, MOST) | st.sampled_from([MOST, -MOST, 1e308, -1e308, 5e-324, 0.0])


@given(WIDE, st.lists(st.tuples(WIDE, ANY_COUNT), min_size=1, max_size=6))
def test_float64_of_any_size_is_averaged_to_the_last_digits(base, updates):
    got = average({"w": np.array([base])}, [({"w": np.array([v])}, n) for v, n in updates])["w"]
    mean = exact(base, updates)
    expected = min(max(mean, Fraction(-MOST)), Fraction(MOST))
    largest = max(abs(Fraction(value)) for value in (base, *(v for v, _ in updates)))
    off = abs(Fraction(float(got[0])) - expected)
    assert off <= largest * Fraction(len(updates) + 3, 2**52) + Fraction(1, 10**300)


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([(1e308, 1), (1e308, 1)], 1e308),
        ([(1e308, 10**12), (1e308, 10**12)], 1e308),
        ([(1e308, 7), (-1e308, 7)], 0.0),  # not NaN, the difference of two infinities
        ([(MOST, 10**12), (MOST, 3)], MOST),
        ([(-MOST, 10**12), (MOST, 10**12), (1.0, 1)], 0.0),
    ],
)
def test_a_sum_beyond_float64_has_an_average(updates, expected):
    for order in (updates, updates[::-1]):
        got = average({"w": np.zeros(3)}, [({"w": np.full(3, v)}, n) for v, n in order])["w"]
        assert got.tolist() == pytest.approx([expected] * 3, rel=1e-15, abs=1e300)
        assert np.isfinite(got).all()


def test_scaling_costs_no_bit():
    numbers = np.random.default_rng(0)
    values = [numbers.normal(size=1000) * 10.0 ** numbers.integers(-200, 200) for _ in range(5)]
    base = {"w": np.zeros(1000)}
    got = average(base, [({"w": one}, 1 + 10**n) for n, one in enumerate(values)])["w"]
    plain = sum(((1 + 10**n) * one for n, one in enumerate(values[1:], 1)), 2 * values[0])
    assert got.tobytes() == (plain / sum(1 + 10**n for n in range(5))).tobytes()


def test_very_many_examples_are_counted_exactly_and_not_beyond():
    base = {"w": np.zeros(1, np.float32), "n": np.zeros(1, np.int64)}
    learnt = {"w": np.ones(1, np.float32), "n": np.array([2**62])}
    state = fedavg.init(base)
    for _ in range(1000):
        state = fold(state, learnt, 10**12 + 1)
    assert state.mean.num_examples == 1000 * (10**12 + 1)
    got, _ = fedavg.finish(state, base)
    assert (got["w"].tolist(), got["n"].tolist()) == ([1.0], [2**62])
    with pytest.raises(ValueError, match="exceeds the limit"):
        fold(state, learnt, 2**63)

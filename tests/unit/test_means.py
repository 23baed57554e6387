"""Means: published numbers, naive NumPy implementations, order and blocks."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fluffle_common.tensors.on_disk import map_to_disk
from fluffle_coordinator.strategy import robust_means
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.names import named_strategy

ROBUST = ["median", "trimmed:0.3", "krum:1", "multikrum:f=1,m=2", "rfa:iterations=5"]


def mean_of(name, deltas, *, workers=None, base=None, counts=None, metrics=None):
    """Return the mean of deltas, which are arrays or mappings of names to arrays."""
    mean = named_strategy(name).strategy.mean
    deltas = [one if isinstance(one, Mapping) else {"w": np.asarray(one, float)} for one in deltas]
    base = base or {n: np.zeros(t.shape, t.dtype) for n, t in deltas[0].items()}
    state = mean.init(base)
    for place, delta in enumerate(deltas):
        one = Contribution(
            worker=workers[place] if workers else f"w{place:03d}",
            num_examples=counts[place] if counts else 1,
            delta=delta,
            metrics=metrics[place] if metrics else {},
        )
        state = mean.fold(state, one)
    mean_delta, emptied = mean.finish(state, base)
    with pytest.raises(ValueError, match="no update has been added"):
        mean.finish(emptied, base)
    return mean_delta["w"] if list(mean_delta) == ["w"] else mean_delta


# --- the published numbers ---------------------------------------------------------------------


def test_published_numbers():
    rows = [[1, 0.2, 0.5, 1], [0.2, 0.5, 1, 0.2], [0.5, 1, 0.2, 0.5]]
    assert mean_of("median", rows).tolist() == [0.5] * 4
    assert mean_of("trimmed:0.25", [[0.5], [1], [2], [100]]).tolist() == [1.5]
    np.testing.assert_allclose(mean_of("multikrum:f=1,m=2", [[0.2], [0.5], [1.0]]), [0.35])


@pytest.mark.parametrize("order", list(itertools.permutations([0.2, 0.7, 1.0])))
def test_krum_prefers_the_smaller_of_equal_scores(order):
    assert mean_of("krum:f=1", [[one] for one in order]).tolist() == [0.7]


def test_rfa_finds_the_geometric_median_of_updates_that_almost_lie_on_a_line():
    # That of four points is where the diagonals cross.
    rows = [[-1.0, 0.0], [1.0, 0.0], [-0.5, 0.1], [0.7, -0.1]]
    np.testing.assert_allclose(mean_of("rfa", rows), [0.1, 0.0], atol=1e-3)


# --- naive NumPy -------------------------------------------------------------------------------


def naive(name, rows):
    """Return the mean of rows, shape [updates, elements], as the papers define it."""
    if name == "median":
        return np.median(rows, axis=0)
    if name.startswith("trimmed"):
        cut = int(0.3 * len(rows) + 1e-9)
        return np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0)
    if name.startswith("rfa"):
        point = np.zeros(rows.shape[1])
        for _ in range(5):
            shares = np.array([1 / max(1e-6, np.linalg.norm(row - point)) for row in rows])
            point = (shares[:, None] * rows).sum(axis=0) / shares.sum()
        return point
    apart = np.square(rows[:, None] - rows[None]).sum(axis=2)
    scores = [
        sorted(np.delete(row, place))[: max(1, len(rows) - 3)] for place, row in enumerate(apart)
    ]
    # The two updates that are closest to each other have the same score: the smaller one wins.
    best = np.lexsort((np.square(rows).sum(axis=1), [sum(score) for score in scores]))
    return rows[best[: 1 if name == "krum:1" else 2]].mean(axis=0)


@st.composite
def updates(draw):
    """Return random updates that differ from each other."""
    count, size = draw(st.integers(3, 9)), draw(st.integers(1, 7))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
    return numbers.normal(size=(count, size)) * draw(st.sampled_from([1e-3, 1.0, 1e6]))


@pytest.mark.parametrize("name", ROBUST)
@settings(max_examples=25, deadline=None)
@given(rows=updates(), permuted=st.randoms(use_true_random=False))
def test_a_robust_mean_is_the_naive_one_in_any_order(name, rows, permuted):
    mean_delta = mean_of(name, rows)
    scale = np.abs(rows).max()
    np.testing.assert_allclose(mean_delta, naive(name, rows), rtol=1e-4, atol=1e-9 * scale)
    order = permuted.sample(range(len(rows)), len(rows))
    again = mean_of(name, rows[order], workers=[f"w{place:03d}" for place in order])
    assert mean_delta.tobytes() == again.tobytes()


@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
               elements=st.floats(-1e3, 1e3)),
    st.data(),
)  # fmt: skip
def test_linear_means_equal_their_formulas(rows, data):
    count = len(rows)
    examples = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    steps = data.draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
    losses = data.draw(st.lists(st.floats(0.01, 9), min_size=count, max_size=count))
    metrics = [{"steps": float(t), "loss": f} for t, f in zip(steps, losses, strict=True)]
    n, t, f = np.array(examples), np.array(steps), np.array(losses)
    claims = {"counts": examples, "metrics": metrics}
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(mean_of("uniform", rows, **claims), rows.mean(axis=0), **close)
    p = n / n.sum()
    nova = (p * t).sum() * (p / t) @ rows
    np.testing.assert_allclose(mean_of("fednova", rows, **claims), nova, **close)
    squares = np.square(rows).sum(axis=1)
    q, lr = 2.0, 0.5
    fair = (f**q) @ rows / (f**q + q * f ** (q - 1) * squares / lr).sum()
    mean_delta = mean_of(f"qfedavg:q={q},lr={lr}", rows, **claims)
    np.testing.assert_allclose(mean_delta, fair, rtol=1e-5, atol=1e-9)


def test_with_the_same_steps_fednova_is_fedavg_and_without_fairness_q_is_uniform():
    rows, counts = [[1.0, 2.0], [5.0, -2.0]], [1, 3]
    metrics = [{"steps": 7.0, "loss": 0.3}, {"steps": 7.0, "loss": 9.0}]
    nova = mean_of("fednova", rows, counts=counts, metrics=metrics)
    np.testing.assert_allclose(nova, [4.0, -1.0])
    fair = mean_of("qfedavg:q=0", rows, counts=counts, metrics=metrics)
    np.testing.assert_allclose(fair, [3.0, 0.0])


def test_a_norm_whose_square_overflows_makes_a_q_fair_step_of_0():
    assert not mean_of("qfedavg", [[1e200, 0.0], [1.0, 2.0]], metrics=[{"loss": 1.0}] * 2).any()
    losses = [{"loss": 1e10}, {"loss": 1.0}]
    assert mean_of("qfedavg:q=2", [[1e308, 0.0], [1.0, 2.0]], metrics=losses).tolist() == [0, 0]


def test_a_stale_update_counts_with_its_discount():
    base, metrics = {"w": np.zeros(1)}, {"steps": 2.0, "loss": 1.0}
    for name in ("uniform", "fednova", "qfedavg:q=0"):
        mean = named_strategy(name).strategy.mean
        state = mean.init(base)
        for value, discount in ((1.0, 1.0), (4.0, 0.5)):
            delta = {"w": np.array([value])}
            one = Contribution(
                worker="a", num_examples=7, delta=delta, metrics=metrics, discount=discount
            )
            state = mean.fold(state, one)
        np.testing.assert_allclose(mean.finish(state, base)[0]["w"], [2.0])


# --- dtypes and shapes -------------------------------------------------------------------------


def form(seed):
    numbers = np.random.default_rng(seed)
    return {
        "w": numbers.normal(size=(5, 3)).astype(np.float32),
        "b": numbers.normal(size=3).astype("bfloat16"),
        "s": np.asarray(numbers.normal(), np.float64),
        "n": numbers.integers(-99, 99, 4),
        "none": np.zeros((0, 2), np.float32),
    }


def test_a_trimmed_mean_leaves_something_however_large_its_fraction():
    assert mean_of("trimmed:0.49999996", [[value] for value in range(10)]).tolist() == [4.5]


@pytest.mark.parametrize("name", [*ROBUST, "uniform"])
def test_every_dtype_and_shape_in_blocks_and_from_disk(name, tmp_path, monkeypatch):
    updates = [form(seed) for seed in range(5)]
    whole = mean_of(name, updates)
    as_rows = [np.concatenate([t.reshape(-1).astype(float) for t in u.values()]) for u in updates]
    one_vector = mean_of(name, as_rows)
    flat = np.concatenate([tensor.reshape(-1) for tensor in whole.values()])
    np.testing.assert_allclose(flat, one_vector, rtol=1e-12)
    assert whole["s"].shape == ()
    monkeypatch.setattr(robust_means, "_ELEMENTS", 0)
    on_disk = mean_of(name, [map_to_disk(one, tmp_path) for one in updates])
    assert {n: t.tobytes() for n, t in on_disk.items()} == {
        n: t.tobytes() for n, t in whole.items()
    }
    assert list(tmp_path.iterdir()) == []


def test_a_robust_mean_holds_updates_on_disk_even_after_a_transform(tmp_path):
    strategy, base = named_strategy("clip:1+median").strategy, {"w": np.zeros(3)}
    one = Contribution(
        worker="a",
        num_examples=1,
        delta={"w": np.full(3, 9.0)},
        lay_on_disk=lambda tensors: map_to_disk(tensors, tmp_path),
    )
    ((_, held),) = strategy.fold(strategy.init(base), one).mean
    assert isinstance(held.memory.obj, mmap.mmap)
    np.testing.assert_allclose(held["w"], np.full(3, 1 / np.sqrt(3)))


def test_large_tensors_are_read_in_blocks(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(5, 2500))
    monkeypatch.setattr(robust_means, "_ELEMENTS", 5 * 1024)
    for name in ROBUST:
        np.testing.assert_allclose(
            mean_of(name, rows), naive(name, rows), rtol=1e-5, atol=1e-9, err_msg=name
        )


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_values_of_one_worker_change_little(name, dtype):
    end = np.finfo(dtype).max
    honest = [np.array([1.0 + place / 10, -1.0], dtype) for place in range(6)]
    deltas = [{"w": one} for one in [*honest, np.array([end, -end], dtype)]]
    mean_delta = mean_of(name, deltas)
    assert 0.9 < mean_delta[0] < 1.7
    assert -1.1 < mean_delta[1] < -0.9


def test_the_mean_of_the_ends_of_a_dtype_is_finite():
    end = np.finfo(float).max
    assert mean_of("median", [[end], [end], [end], [end]]).tolist() == [end]
    for name in ("trimmed:0.2", "multikrum:f=1,m=3", "rfa", "uniform"):
        np.testing.assert_allclose(mean_of(name, [[end]] * 5), [end])
    assert np.isfinite(mean_of("rfa", [[1.0], [1e200], [1.1e200]])).all()


@pytest.mark.parametrize(
    ("name", "fewest"),
    [
        ("median", 3),
        ("trimmed:0.2", 5),
        ("trimmed:0.3", 4),
        ("trimmed:0.49", 3),
        ("krum:1", 5),
        ("krum:3", 9),
        ("multikrum:f=1,m=4", 7),
        ("rfa", 3),
        ("uniform", 1),
        ("clip:1+median+fedadam", 3),
    ],
)
def test_the_fewest_updates(name, fewest):
    assert named_strategy(name).strategy.needs.min_updates == fewest


def test_clipping_scales_only_larger_updates():
    strategy = named_strategy("clip:5+uniform").strategy
    clip = strategy.transforms[0]
    large = {"w": np.array([6.0, 0.0], np.float32), "b": np.array([8], "bfloat16")}
    one = Contribution(worker="a", num_examples=1, delta=large)
    clipped = clip(one).delta
    assert {n: (t.tolist(), str(t.dtype)) for n, t in clipped.items()} == {
        "w": ([3.0, 0.0], "float32"), "b": ([4.0], "bfloat16")
    }  # fmt: skip
    assert clip(clip(one)).delta is not large
    small = Contribution(worker="a", num_examples=1, delta={"w": np.array([3.0, 4.0])})
    assert clip(small) is small

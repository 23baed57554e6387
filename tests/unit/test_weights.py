"""Deltas: subtraction, checks and norms."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fluffle_common.tensors.weights import (
    DTYPES,
    FLOATS,
    INTEGERS,
    NotFinite,
    check_delta,
    check_finite,
    delta,
    delta_dtype,
    finite_norm,
    largest,
    same_form,
    size_bytes,
)

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def integer_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    dtype = np.dtype(draw(st.sampled_from(INTEGERS)))
    limits = np.iinfo(dtype)
    # Differences of 64-bit integers fit into 64 bits unless the integers are far apart.
    elements = st.integers(max(limits.min, -(2**62)), min(limits.max, 2**62))
    shape = draw(SHAPES)
    return tuple(draw(hnp.arrays(dtype, shape, elements=elements)) for _ in range(2))


@given(integer_pairs())
def test_a_delta_of_integers_is_exact_and_signed(pair):
    trained, received = pair
    got = delta({"n": trained}, {"n": received})["n"]
    assert got.dtype == np.int64
    assert got.shape == trained.shape
    exact = [int(a) - int(b) for a, b in zip(trained.flat, received.flat, strict=True)]
    assert [int(value) for value in got.flat] == exact
    assert (received.astype(np.int64) + got).tolist() == trained.astype(np.int64).tolist()
    check_delta({"n": got}, {"n": received})


@pytest.mark.parametrize(
    ("dtype", "old", "new"),
    [("int64", -(2**63), 0), ("int64", 2**62, -(2**62) - 1), ("uint64", 0, 2**63)],
)
def test_a_difference_beyond_64_bits_does_not_wrap(dtype, old, new):
    received, trained = ({"k": np.array([3, value], dtype)} for value in (old, new))
    with pytest.raises(
        ValueError, match="'k' changed by more than an int64 can hold; keep this tensor"
    ):
        delta(trained, received)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_difference_of_finite_weights_is_never_infinite(dtype):
    largest_of = largest(np.dtype(dtype))
    received, trained = ({"k": np.array([3, value], dtype)} for value in (-largest_of, largest_of))
    with pytest.raises(ValueError, match="'k' changed by more than a .*float.* can hold; the "):
        delta(trained, received)


def test_a_difference_of_just_64_bits_is_exact():
    received, trained = (
        {"k": np.array(values, np.uint64)} for values in ([2**63, 5], [0, 2**63 + 4])
    )
    assert delta(trained, received)["k"].tolist() == [-(2**63), 2**63 - 1]


def test_a_delta_of_small_unsigned_integers_does_not_wrap():
    got = delta({"n": np.array([0, 255], np.uint8)}, {"n": np.array([255, 0], np.uint8)})
    assert got["n"].tolist() == [-255, 255]


@given(st.sampled_from(FLOATS), SHAPES, st.data())
def test_a_delta_of_floats_keeps_dtype_and_shape(dtype, shape, data):
    elements = st.floats(-100, 100, width=16)
    trained, received = (
        {"w": data.draw(hnp.arrays(dtype, shape, elements=elements))} for _ in range(2)
    )
    got = delta(trained, received)
    assert got["w"].dtype == np.dtype(dtype)
    assert got["w"].shape == shape
    assert np.array_equal(got["w"], trained["w"] - received["w"])
    check_delta(got, received)


def test_a_delta_of_a_scalar_is_an_array():
    got = delta({"s": np.array(3.0, np.float32)}, {"s": np.array(1.0, np.float32)})["s"]
    assert (np.shape(got), got.dtype, float(got)) == ((), np.float32, 2.0)


def test_a_delta_matches_tensors_by_name_in_any_order():
    received = {"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}
    trained = {"b": np.full(2, 3, np.float32), "a": np.full(2, 5, np.float32)}
    got = delta(trained, received)
    assert {name: tensor.tolist() for name, tensor in got.items()} == {"a": [5, 5], "b": [2, 2]}


def test_deltas_of_all_supported_dtypes_are_supported():
    assert {np.dtype(name).name for name in DTYPES} == DTYPES
    for name in DTYPES:
        assert delta_dtype(np.dtype(name)).name in DTYPES


BASE = {"w": np.zeros((2, 3), np.float32), "s": np.zeros((), np.float32), "n": np.uint8([1])}
GOOD = {"w": np.ones((2, 3), np.float32), "s": np.ones((), np.float32), "n": np.int64([-1])}


def test_the_unspoilt_example_is_a_delta():
    check_delta(GOOD, BASE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"w": np.ones((3, 2), np.float32)}, r"'w' has shape \(3, 2\); the model has \(2, 3\)"),
        ({"w": np.ones((1, 3), np.float32)}, "'w' has shape"),  # would broadcast
        ({"w": np.ones((), np.float32)}, "'w' has shape"),
        ({"w": np.ones(6, np.float32)}, "'w' has shape"),
        ({"w": np.ones((1, 2, 3), np.float32)}, "'w' has shape"),
        ({"s": np.ones(1, np.float32)}, r"'s' has shape \(1,\); the model has \(\)"),
        ({"w": np.ones((2, 3), np.float64)}, "'w' is float64; expected float32"),
        ({"w": np.ones((2, 3), np.int64)}, "'w' is int64; expected float32"),
        ({"n": np.uint8([1])}, "'n' is uint8; expected int64"),
        ({"n": np.float32([1])}, "'n' is float32; expected int64"),
        ({"more": np.float32([1])}, "unknown more"),
        ({"w": None}, "missing w"),
        ({"w": None, "v": np.ones((2, 3), np.float32)}, "missing w; unknown v"),
        ({"w": np.float32([[1, 2, np.nan], [1, 2, 3]])}, "'w' has 1 value that is NaN or inf"),
        ({"w": np.float32([[1, 2, np.inf], [-np.inf, 2, 3]])}, "'w' has 2 values"),
        ({"s": np.array(np.inf, np.float32)}, "'s' has 1 value "),
    ],
)
def test_a_tensor_that_does_not_match_the_model_is_refused_by_name(changes, reason):
    spoilt = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        check_delta(spoilt, BASE)


def test_the_other_byte_order_is_accepted():
    # To NumPy, '>f4' and '<f4' differ; tensors from the wire are always '<'.
    read = {"w": np.ones(2, np.dtype("float32").newbyteorder("<"))}
    check_delta(read, {"w": np.zeros(2, np.float32)})


def test_long_lists_of_different_names_are_shortened():
    with pytest.raises(ValueError, match="missing w0, w1, w2 …$"):
        same_form({}, {f"w{n}": np.zeros(1) for n in range(9)})


@pytest.mark.parametrize("other", [np.zeros(2, np.float64), np.zeros((2, 1), np.float32)])
def test_weights_of_different_forms_have_no_delta(other):
    weights = {"w": np.zeros(2, np.float32)}
    for trained, received in ((weights, {"w": other}), ({"w": other}, weights)):
        with pytest.raises(ValueError, match="'w'"):
            delta(trained, received)
    with pytest.raises(ValueError, match="'w' is complex64; expected float32"):
        delta({"w": np.zeros(2, np.complex64)}, weights)
    with pytest.raises(ValueError, match="missing w"):
        delta({}, weights)


@given(st.sampled_from(FLOATS), st.data())
def test_exactly_the_values_that_are_not_finite_are_refused(dtype, data):
    elements = st.floats(width=8 * np.dtype(dtype).itemsize)
    array = data.draw(
        hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=2), elements=elements)
    )
    bad = int((~np.isfinite(array)).sum())
    for check in (check_finite, finite_norm):
        if bad:
            with pytest.raises(ValueError, match=f"'w' has {bad} value"):
                check({"w": array})
        else:
            check({"w": array})


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_finite_values_whose_sum_overflows_are_finite(dtype):
    check_finite({"w": np.full(100, largest(np.dtype(dtype)), dtype)})


def test_the_size_includes_all_tensors():
    assert size_bytes({"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.int64)}) == 32
    assert size_bytes({}) == 0


# --- norms -------------------------------------------------------------------------------------


def exact_norm(weights: dict[str, np.ndarray]) -> float:
    """Compute the norm in exact fractions, which neither overflow nor underflow."""
    values = [
        Fraction(int(v)) if tensor.dtype.kind in "iu" else Fraction(float(v))
        for tensor in weights.values()
        for v in tensor.flat
    ]
    square = sum((value * value for value in values), Fraction(0))
    if not square:
        return 0.0
    shift = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    root = math.sqrt(square / Fraction(4) ** shift)
    try:
        return math.ldexp(root, shift)
    except OverflowError:
        return sys.float_info.max


@given(st.sampled_from(sorted(DTYPES)), st.data())
def test_the_check_returns_the_norm(dtype, data):
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        elements = st.integers(int(limits.min), int(limits.max))
    else:
        wide = "float32" if dtype == "bfloat16" else dtype
        most = largest(np.dtype(dtype)) if dtype != "bfloat16" else float(2.0**127)
        elements = st.floats(-most, most, width=8 * np.dtype(wide).itemsize)
    array = np.asarray(data.draw(st.lists(elements, max_size=6)), dtype)
    weights = {"w": array, "again": array[:1], "none": np.zeros((2, 0), np.float32)}
    assert finite_norm(weights) == pytest.approx(exact_norm(weights), rel=1e-6, abs=5e-324)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", ["tiny", "one", "huge"])
def test_the_norm_of_many_values_is_accurate_to_a_millionth(dtype, scale):
    end = min(largest(np.dtype(dtype)), 1e305)
    by = {"tiny": 0.01 if dtype == "float16" else 1e-30, "one": 1.0, "huge": end / 8}[scale]
    normal = np.random.default_rng(0).standard_normal(70_001).clip(-4, 4)
    tensor = (normal * by).astype(dtype)
    expected = np.linalg.norm(tensor.astype(np.float64) / by) * by
    got = check_delta({"w": tensor}, {"w": np.zeros_like(tensor)})
    assert got == pytest.approx(expected, rel=1e-6)


def test_a_norm_beyond_float64_is_the_largest_float64():
    assert finite_norm({"w": np.full(3, 1.7e308)}) == sys.float_info.max


@pytest.mark.parametrize("where", [0, 8191, 8192, 19_999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("others", [0.0, 1.0, 3e38, 1e-30])
def test_a_single_bad_value_among_many_is_found(where, value, others):
    tensor = np.full(20_000, others, np.float32)
    tensor[where] = value
    with pytest.raises(NotFinite, match="'w' has 1 value "):
        check_finite({"w": tensor})

"""Tensors in one buffer behave like separate ones, whatever values are in the gaps."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fluffle_common.protocol.wire_format import lay_out
from fluffle_common.tensors.layout import Tensors, as_maps, check_signature, layout_for, layout_of
from fluffle_common.tensors.table import TensorEntry
from fluffle_common.tensors.weights import (
    BFLOAT16,
    DTYPES,
    FLOATS,
    NotFinite,
    check_delta,
    check_finite,
    delta,
    finite_norm,
    is_float,
)
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.fedavg import fedavg

SHAPES = st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), max_size=5)
RUBBISH = st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\x01"])


@st.composite
def models(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Weights of one dtype or of several."""
    dtype = draw(st.sampled_from(FLOATS))
    odd = draw(st.sampled_from([None, "int32", "float64"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = {
        f"t{number}": rng.standard_normal(shape).astype(dtype)
        for number, shape in enumerate(draw(SHAPES))
    }
    if odd is not None:
        found["odd"] = rng.standard_normal(3).astype(odd)
    return found


def in_one_piece(weights: dict[str, np.ndarray], between: bytes = b"\0") -> Tensors:
    """Lay out weights in one buffer, filling the gaps with ``between``."""
    layout = layout_for(weights)
    memory = bytearray(between * layout.nbytes)
    for entry in layout.table:
        tensor = weights[entry.name]
        memory[entry.offset : entry.offset + entry.nbytes] = tensor.tobytes()
    return layout.over(bytes(memory))


def same(one: object, other: object) -> bool:
    return {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}


@given(models(), RUBBISH)
def test_tensors_in_one_buffer_equal_separate_ones(weights, between):
    whole = in_one_piece(weights, between)
    assert list(whole) == list(weights)
    assert len(whole) == len(weights)
    for name, tensor in weights.items():
        assert whole[name].dtype == tensor.dtype
        assert whole[name].shape == tensor.shape
        assert not whole[name].flags.writeable
    assert same(whole, weights)
    with pytest.raises(KeyError):
        whole["another"]


@given(models())
def test_tensors_in_one_buffer_are_encoded_like_separate_ones(weights):
    whole = in_one_piece(weights)
    table, pieces = lay_out(whole)
    assert table == lay_out(weights)[0]
    assert b"".join(pieces) == b"".join(lay_out(weights)[1])
    assert [tuple(entry.values()) for entry in as_maps(table)] == [entry[:5] for entry in table]


def fold(state, update, num_examples):
    """Fold an update into the state of fedavg."""
    one = Contribution(worker="a", num_examples=num_examples, delta=update)
    return fedavg.fold(state, one)


@pytest.mark.filterwarnings("error")
@given(models(), st.lists(st.tuples(st.integers(1, 100), RUBBISH), min_size=1, max_size=3))
def test_the_average_is_bitwise_the_same_in_one_buffer_and_separately(base, updates):
    rng = np.random.default_rng(len(base))
    learnt = [
        delta(
            {n: (t + rng.standard_normal(t.shape)).astype(t.dtype) for n, t in base.items()}, base
        )
        for _ in updates
    ]
    whole, apart = fedavg.init(in_one_piece(base)), fedavg.init(base)
    for tensors, (count, between) in zip(learnt, updates, strict=True):
        whole = fold(whole, in_one_piece(dict(tensors), between), count)
        apart = fold(apart, dict(tensors), count)
    averaged, _ = fedavg.finish(whole, in_one_piece(base, updates[0][1]))
    expected, _ = fedavg.finish(apart, base)
    assert same(averaged, expected)
    # The values in the gaps of updates do not reach other workers.
    assert bytes(averaged.memory) == b"".join(lay_out(dict(averaged))[1])


@given(models(), RUBBISH)
def test_values_in_gaps_are_not_checked_and_values_in_tensors_are(weights, between):
    whole = in_one_piece(weights, between)
    check_finite(whole)
    check_delta(in_one_piece(dict(delta(weights, weights)), between), whole)
    floats = [name for name, tensor in weights.items() if is_float(tensor.dtype) and tensor.size]
    for name in floats:
        spoilt = {**weights, name: np.full_like(weights[name], np.nan)}
        with pytest.raises(NotFinite, match=name):
            check_finite(in_one_piece(spoilt, between))
        if (
            "odd" not in weights or weights["odd"].dtype.kind == "f"
        ):  # else its delta has another dtype
            with pytest.raises(NotFinite, match=name):
                check_delta(in_one_piece(spoilt, between), in_one_piece(weights))


def test_the_gaps_of_a_delta_do_not_leak_memory():
    base = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    for _ in range(50):
        np.full(1000, 255, np.uint8)  # leaves these values in freed memory
        found = delta(base, base)
        assert bytes(found.memory) == bytes(found.layout.nbytes)


def test_layouts_are_cached_unless_they_are_very_long():
    def table(length: int) -> tuple[TensorEntry, ...]:
        return tuple(TensorEntry(f"t{n}", "float32", (1,), 64 * n, 4) for n in range(length))

    assert layout_of(table(3)) is layout_of(table(3))
    assert layout_for({"t0": np.zeros(1, np.float32)}) is layout_of(table(1))
    assert layout_of(table(5001)) is not layout_of(table(5001))


# --- supported tensors -------------------------------------------------------------------------


def test_bfloat16_tensors_form_one_vector():
    base = {"w": np.arange(6).reshape(2, 3).astype(BFLOAT16), "b": np.ones(3, BFLOAT16)}
    whole = in_one_piece(base, b"\xff")
    assert whole.flat is not None
    assert whole.layout.floats
    assert [entry.dtype for entry in whole.layout.table] == ["bfloat16"] * 2
    learnt = delta({name: tensor + BFLOAT16.type(1) for name, tensor in base.items()}, whole)
    assert learnt.layout is whole.layout
    check_delta(learnt, whole)
    assert learnt["w"].tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (np.ones(2, bool), "'w' is bool, .* keep this tensor out of the weights or use uint8$"),
        (np.ones(2, ml_dtypes.float8_e4m3fn), "'w' is float8_e4m3fn, .*; use bfloat16$"),
        (np.ones(2, ml_dtypes.float8_e5m2), "'w' is float8_e5m2, .*; use bfloat16$"),
        (np.ones(2, ml_dtypes.int4), "'w' is int4, .*; use int8$"),
        (np.ones(2, np.complex64), "'w' is complex64, .*; split this tensor into its real and"),
        (np.ones(2, np.longdouble), r"'w' is (float|longdouble)\d*, .*; use float64$"),
        (np.array(["a"]), "'w' is <U1, .*; keep this tensor out of the weights$"),
        (np.array([None]), "'w' is object, .*; keep this tensor out of the weights$"),
        (
            np.array(["2026-01-01"], "M8[D]"),
            "'w' is datetime64.*; keep this tensor out of the weights$",
        ),
        (np.zeros(2, [("a", "f4")]), "'w' is .*; keep this tensor out of the weights$"),
        ([1.0], "'w' is of type list, not an array"),
        (np.ma.masked_less([1.0, 2.0], 2), "'w' is a masked array; fill it, for example with"),
        (None, "'w' is of type NoneType, not an array"),
        (  # as a tensor of PyTorch
            SimpleNamespace(dtype="torch.float32", shape=(2,)),
            "'w' is of type SimpleNamespace, not an array; convert it with np.asarray",
        ),
        (np.ones((1,) * 33), "'w' has 33 dimensions; reshape it to at most 32 dimensions"),
    ],
)
def test_unsupported_tensors_are_refused_with_a_remedy(tensor, why):
    with pytest.raises(ValueError, match=why) as refused:
        check_signature({"good": np.ones(3, np.float32), "w": tensor})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "the empty name ''"),
        (
            "x" * 501,
            "^tensor 'x{60}…' has a name of 501 characters; use a name of at most 500",
        ),
        (("conv", "kernel"), "has a name of type tuple; use a string"),
        ("a\ud800", "not valid Unicode"),
    ],
)
def test_unsupported_names_are_refused_with_a_remedy(name, why):
    with pytest.raises(ValueError, match=why) as refused:
        check_signature({name: np.ones(3, np.float32)})
    refused.value.args[0].encode()
    assert len(str(refused.value)) < 700


def test_no_tensors_and_too_many_are_refused():
    with pytest.raises(ValueError, match="the weights contain no tensors"):
        check_signature({})
    with pytest.raises(
        ValueError, match="the number of tensors is 100001; at most 100000 can be sent"
    ):
        check_signature(dict.fromkeys(map(str, range(100_001)), np.float32(1)))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_memory_layout_and_byte_order_is_supported(dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    for odd in (array.T, array[:, ::-1], array[::2], array.astype(array.dtype.newbyteorder(">"))):
        check_signature({"w": odd})
        table, pieces = lay_out({"w": odd})
        assert layout_of(table).over(b"".join(pieces))["w"].tolist() == odd.astype(dtype).tolist()
        learnt = delta({"w": odd}, {"w": np.zeros(odd.shape, dtype)})
        check_delta(learnt, {"w": np.zeros(odd.shape, dtype)})
        assert learnt["w"].tolist() == odd.astype(dtype).tolist()


def test_a_large_gap_takes_no_memory_and_does_not_count():
    gap = 2**24
    table = (
        TensorEntry("a", "float32", (1,), 0, 4),
        TensorEntry("b", "float32", (1,), gap, 4),
    )
    weights = layout_of(table).over(bytes(4) + b"\x3f" * (gap - 4) + bytes(4))
    tracemalloc.start()
    try:
        assert finite_norm(weights) == 0.0
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < gap // 16


@pytest.mark.parametrize("between", [b"\0", b"\x7f", b"\xff", b"\x01"])
def test_the_norm_excludes_the_gaps(between):
    weights = {"a": np.full(3, 2, np.float32), "b": np.full((2, 2), -1, np.float32)}
    assert finite_norm(in_one_piece(weights, between)) == 4.0
    assert check_delta(in_one_piece(weights, between), in_one_piece(weights)) == 4.0


def test_gaps_of_tensors_in_another_dtype_are_not_measured():
    layout = layout_for({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)})
    wide = layout.empty_as(np.dtype(np.float64))
    wide.flat[:] = 7.0
    wide["a"][...], wide["b"][...] = 0.0, 3.0
    wide.flat[:8] = 0.0  # the other half of the gap holds 7
    assert finite_norm(wide) == 3.0
    tensors = layout.empty()
    tensors["a"][...] = 4.0
    assert layout.has_zero_gaps(tensors.flat)
    assert layout.has_zero_gaps(tensors.flat[1:], 1)

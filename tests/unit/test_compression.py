"""Compression: encoding errors, error feedback, and checks of encoded tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import Compression, Plan, Update, parse
from fluffle_common.protocol.wire_format import decode, encode, lay_out
from fluffle_common.tensors.codecs.int8 import BLOCK
from fluffle_common.tensors.codecs.registry import encoding_of
from fluffle_common.tensors.compression import SMALLEST, compress, decompress
from fluffle_common.tensors.weights import check_delta, size_bytes
from fluffle_coordinator.strategy.update_checks import decode_update

HOWS = ("bf16", "f16", "int8", "topk:0.01", "topk:0.5")
FED_BACK = ("int8", "topk:0.01", "topk:0.5")
F16_TINY = float(np.finfo(np.float16).tiny)


@st.composite
def tensors(draw: st.DrawFn, largest: float = 1e30) -> np.ndarray:
    """Values of many magnitudes, including zeros, whose number is not a multiple of a block."""
    size = draw(st.integers(SMALLEST, SMALLEST + 3 * BLOCK))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted(draw(st.tuples(*[st.floats(-30, math.log10(largest) - 1)] * 2)))
    values = numbers.normal(size=size).clip(-9, 9) * 10 ** numbers.uniform(low, high, size)
    values[numbers.random(size) < draw(st.sampled_from([0.0, 0.1, 1.0]))] = 0
    return values.astype(draw(st.sampled_from([np.float32, np.float64])))


def sent_of(delta: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    encoded, _ = compress(delta, how, {})
    return decompress(encoded, encoding_of(how), delta)


def update(encoded: dict[str, np.ndarray], encoding: str | None) -> tuple[Update, memoryview]:
    """Return an update as the coordinator decodes it."""
    table, pieces = lay_out(encoded)
    message = Update(
        federation="f", run="r", round=1, base="b", worker="w", num_examples=1, seconds=0.0,
        tensors=table, encoding=encoding,
    )  # fmt: skip
    decoded, payload = decode(encode(message, pieces))
    assert isinstance(decoded, Update)
    return decoded, payload


# --- round trips -------------------------------------------------------------------------------


@given(tensors())
def test_the_error_of_bf16_is_at_most_half_a_step(tensor):
    got = sent_of({"w": tensor}, "bf16")["w"]
    assert got.dtype == tensor.dtype
    assert np.all(np.abs(got - tensor) <= 2.0**-8 * np.abs(tensor))


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F808000, 0x3F80),  # a tie, rounded down to even
        (0x3F818000, 0x3F82),  # a tie, rounded up to even
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0xBF818000, 0xBF82),
        (0x7F7FFFFF, 0x7F7F),  # the largest float32 stays finite
        (0xFF7FFFFF, 0xFF7F),
        (0x80000000, 0x8000),
    ],
)
def test_bf16_rounds_to_nearest_and_halves_to_even(bits, rounded):
    tensor = np.full(SMALLEST, bits, np.uint32).view(np.float32)
    encoded, _ = compress({"w": tensor}, "bf16", {})
    assert encoded["w"].dtype == np.uint16
    assert np.all(encoded["w"] == rounded)


@given(tensors(largest=6e4))
def test_the_error_of_f16_is_at_most_half_a_step(tensor):
    got = sent_of({"w": tensor}, "f16")["w"]
    assert got.dtype == tensor.dtype
    bound = np.where(np.abs(tensor) >= F16_TINY, 2.0**-11 * np.abs(tensor), 2.0**-25)
    assert np.all(np.abs(got - tensor) <= bound)


def test_f16_clips_values_beyond_its_range():
    tensor = np.tile(np.array([1e6, -1e6], np.float32), SMALLEST)
    assert np.all(np.abs(sent_of({"w": tensor}, "f16")["w"]) == 65504)


@given(tensors())
def test_the_error_of_int8_is_at_most_half_a_scale(tensor):
    encoded, left = compress({"w": tensor}, "int8", {})
    q, scale = encoded["w#q"], encoded["w#scale"]
    assert q.shape == tensor.shape
    assert scale.shape == (-(-tensor.size // BLOCK),)
    off = np.abs(decompress(encoded, "int8", {"w": tensor})["w"] - tensor)
    half = np.repeat(scale, BLOCK)[: tensor.size] / 2
    # The quotient itself is rounded before rint, and scales may be subnormal.
    assert np.all(off <= half.astype(np.float64) * (1 + 1e-4) + 1e-42)
    assert np.array_equal(np.abs(left["w"]), off)
    assert np.abs(q).max() <= 127


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_int8_sends_the_largest_values_as_finite_ones(dtype):
    largest = np.finfo(np.float32).max
    delta = {"w": np.full(1024, largest, dtype)}
    sent, residual = compress(delta, "int8", {})
    assert decompress(sent, "int8", delta)["w"] == pytest.approx(delta["w"])
    assert np.isfinite(residual["w"]).all()


@given(tensors(), st.sampled_from(["topk:0.01", "topk:0.3", "topk:0.000001"]))
def test_topk_sends_exactly_the_largest_values(tensor, how):
    encoded, left = compress({"w": tensor}, how, {})
    index, value = encoded["w#index"], encoded["w#value"]
    kept = math.ceil(float(how.partition(":")[2]) * tensor.size)
    assert index.shape == value.shape == (kept,)
    assert np.array_equal(value, tensor[index].astype(np.float32))
    others = np.delete(np.abs(tensor), index)
    assert others.max() <= np.abs(tensor[index]).min()
    got = decompress(encoded, "topk", {"w": tensor})["w"]
    assert np.count_nonzero(got) <= kept
    assert np.array_equal(np.delete(left["w"], index), np.delete(tensor, index))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", [(1024,), (33, 40), (1, 5, 300), (2, 0), (), (1023,)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_dtype_and_shape_is_restored(how, shape, dtype):
    numbers = np.random.default_rng(1)
    delta = {
        "w": np.asarray(numbers.normal(size=shape), dtype),
        "counts": numbers.integers(-9, 9, 2000),
    }
    base = {"w": delta["w"], "counts": delta["counts"].astype(np.int32)}
    encoded, left = compress(delta, how, {})
    got, _, _ = decode_update(*update(encoded, encoding_of(how)), base)
    check_delta(got, base)
    assert np.array_equal(got["counts"], delta["counts"])
    if delta["w"].size < SMALLEST:
        assert left == {}
        assert np.array_equal(got["w"], delta["w"])
    else:
        np.testing.assert_allclose(
            got["w"] + left.get("w", 0), delta["w"], rtol=0.005, atol=0.005 if left else 1e-6
        )


def test_a_column_major_tensor_is_encoded_in_c_order():
    tensor = np.asfortranarray(np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32))
    for how in HOWS:
        plain, turned = (sent_of({"w": one}, how)["w"] for one in (tensor.copy("C"), tensor))
        assert np.array_equal(plain, turned)


def test_bytes_on_the_wire():
    delta = {"w": np.ones(256_000, np.float32)}
    plain = size_bytes(delta)
    assert {how: size_bytes(compress(delta, how, {})[0]) / plain for how in HOWS} == {
        "bf16": 0.5, "f16": 0.5, "int8": 0.25 + 1 / 256, "topk:0.01": 0.02, "topk:0.5": 1.0,
    }  # fmt: skip


# --- tensors that are not encoded --------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_leave_no_residual(how, value):
    good = np.ones(2000, np.float32)
    bad = good.copy()
    bad[7] = value
    encoded, left = compress({"w": bad, "v": good}, how, {})
    assert "w" not in left
    with pytest.raises(MalformedMessage, match="NaN or infinite") as refused:
        decode_update(*update(encoded, encoding_of(how)), {"w": good, "v": good})
    assert refused.value.cause == "not_finite"


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("other", ["w#q", "w#scale", "w#index", "w#value"])
def test_names_of_the_model_are_never_mistaken_for_parts(how, other):
    tensor = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    delta = {"w": tensor, other: 2 * tensor, "x" * 500: 3 * tensor}
    encoded, left = compress(delta, how, {})
    got, _, _ = decode_update(*update(encoded, encoding_of(how)), delta)
    for name, learnt in delta.items():
        np.testing.assert_allclose(got[name] + left.get(name, 0), learnt, rtol=0.01, atol=1e-3)


# --- error feedback ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", FED_BACK)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_the_residual_is_the_delta_less_what_was_sent(how, seed):
    numbers = np.random.default_rng(seed)
    learnt, sent, left = np.zeros((3, 700)), np.zeros((3, 700)), {}
    for _ in range(40):
        delta = {"w": numbers.normal(size=(3, 700)).astype(np.float32)}
        encoded, left = compress(delta, how, left)
        learnt += delta["w"]
        sent += decompress(encoded, encoding_of(how), delta)["w"]
    np.testing.assert_allclose(sent, learnt - left["w"], atol=1e-3)


def test_small_values_accumulate_until_they_are_sent():
    delta = {"w": np.full(SMALLEST, 1e-3, np.float32)}
    delta["w"][::BLOCK] = 1.0  # a scale of 1/127: the others round to 0
    sent, left = np.zeros(SMALLEST), {}
    for _ in range(100):
        encoded, left = compress(delta, "int8", left)
        sent += decompress(encoded, "int8", delta)["w"]
    assert abs(sent[1] - 0.1) < 1 / 127
    assert sent_of(delta, "int8")["w"][1] == 0


@pytest.mark.parametrize("how", ["bf16", "f16"])
def test_bf16_and_f16_leave_no_residual(how):
    assert compress({"w": np.full(SMALLEST, 1 / 3, np.float32)}, how, {})[1] == {}


# --- invalid encoded tensors -------------------------------------------------------------------

BASE = {"w": np.zeros((30, 50), np.float32), "n": np.zeros(3, np.int32)}
DELTA = {"w": np.random.default_rng(3).normal(size=(30, 50)).astype(np.float32), "n": np.arange(3)}
F32 = np.float32


def spoilt(how: str, **changes: np.ndarray | None) -> tuple[Update, memoryview]:
    encoded, _ = compress(DELTA, how, {})
    for suffix, tensor in changes.items():
        name = f"w#{suffix}" if suffix in ("q", "scale", "index", "value") else suffix
        encoded[name] = tensor
    return update({n: t for n, t in encoded.items() if t is not None}, encoding_of(how))


def with_one(tensor: np.ndarray, place: int, value: float) -> np.ndarray:
    tensor = tensor.copy()
    tensor[place] = value
    return tensor


INDEX = np.array([0, 5, 9], np.int32)
VALUE = np.ones(3, F32)


@pytest.mark.parametrize(
    ("message", "reason", "cause"),
    [
        (spoilt("bf16", w=DELTA["w"].astype(np.uint32)), "is uint32 (30, 50)", "tensors"),
        (spoilt("bf16", w=np.zeros((50, 30), np.uint16)), "expected uint16 (30, 50)", "tensors"),
        (spoilt("bf16", w=np.full((30, 50), 0x7F80, np.uint16)), "NaN or infinite", "not_finite"),
        (spoilt("bf16", w=np.full((30, 50), 0x7FA0, np.uint16)), "NaN or infinite", "not_finite"),
        (spoilt("bf16", n=np.zeros(3, np.uint16)), "'n' is uint16; expected int64", "tensors"),
        (spoilt("f16", w=np.zeros(1500, np.float16)), "expected float16 (30, 50)", "tensors"),
        (spoilt("f16", w=np.full((30, 50), np.inf, np.float16)), "NaN or infinite", "not_finite"),
        (spoilt("int8", q=np.zeros((30, 50), np.uint8)), "uint8 (30, 50); expected", "tensors"),
        (spoilt("int8", q=np.zeros((30, 49), np.int8)), "expected int8 (30, 50)", "tensors"),
        (spoilt("int8", scale=np.zeros(5, F32)), "(5,); expected float32 (6,)", "tensors"),
        (spoilt("int8", scale=np.zeros(6)), "is float64 (6,); expected float32 (6,)", "tensors"),
        (spoilt("int8", scale=np.full(6, -1, F32)), "has negative values", "tensors"),
        (spoilt("int8", scale=np.full(6, np.nan, F32)), "NaN or infinite", "not_finite"),
        (spoilt("int8", scale=np.full(6, 3e38, F32)), "NaN or infinite", "not_finite"),
        (spoilt("int8", scale=None), "unknown w#q", "tensors"),
        (spoilt("int8", w=DELTA["w"]), "unknown w#q, w#scale", "tensors"),
        (spoilt("int8", other=VALUE), "unknown other", "tensors"),
        (spoilt("topk:0.1", index=INDEX), "(150,); expected float32 (3,)", "tensors"),
        (spoilt("topk:0.1", index=INDEX.astype(np.int64), value=VALUE), "is int64", "tensors"),
        (spoilt("topk:0.1", index=INDEX[None], value=VALUE), "or shorter", "tensors"),
        (spoilt("topk:0.1", index=INDEX[::-1], value=VALUE), "must increase", "tensors"),
        (spoilt("topk:0.1", index=INDEX * 0, value=VALUE), "must increase", "tensors"),
        (spoilt("topk:0.1", index=INDEX - 1, value=VALUE), "must increase", "tensors"),
        (spoilt("topk:0.1", index=INDEX + 1491, value=VALUE), "must increase", "tensors"),
        (spoilt("topk:0.1", index=INDEX, value=VALUE * np.inf), "NaN or infinite", "not_finite"),
        (
            spoilt("topk:0.1", index=np.arange(1501, dtype=np.int32), value=np.ones(1501, F32)),
            "'w#index' is int32 (1501,); expected int32 (1500,) or shorter",
            "tensors",
        ),
    ],
)  # fmt: skip
def test_invalid_encoded_tensors_are_refused(message, reason, cause):
    with pytest.raises(MalformedMessage) as refused:
        decode_update(*message, BASE)
    assert reason in str(refused.value)
    assert refused.value.cause == cause


def test_encoded_tensors_without_an_encoding_are_refused():
    encoded, _ = compress(DELTA, "int8", {})
    with pytest.raises(MalformedMessage, match="tensor names differ"):
        decode_update(*update(encoded, None), BASE)


@pytest.mark.parametrize("encoding", [None, "bf16", "f16", "int8", "topk"])
def test_plain_tensors_are_accepted_with_any_encoding(encoding):
    got, _, _ = decode_update(*update(DELTA, encoding), BASE)
    assert all(np.array_equal(got[name], DELTA[name]) for name in BASE)


NAMES = ["w", "n", "w#q", "w#scale", "w#index", "w#value", "n#q", "n#scale", "none", "none#index"]
ANY = hnp.arrays(
    st.sampled_from(["int8", "int32", "int64", "uint16", "float16", "float32", "float64"]),
    st.sampled_from([(), (0,), (1,), (2,), (3,), (2, 3), (1, 0)]),
)


@given(
    st.dictionaries(st.sampled_from(NAMES), ANY, max_size=6),
    st.sampled_from([None, "bf16", "f16", "int8", "topk"]),
    st.sampled_from(["float16", "float32", "float64"]),
)
@settings(max_examples=7 * settings.default.max_examples)
def test_any_tensors_are_a_delta_or_refused(sent, encoding, dtype):
    base = {"w": np.zeros((2, 3), dtype), "none": np.zeros((0,), dtype), "n": np.zeros(1, np.int8)}
    base = {name: tensor for name, tensor in base.items() if name == "w" or len(sent) % 2}
    try:
        got, _, _ = decode_update(*update(sent, encoding), base)
    except MalformedMessage as wrong:
        assert wrong.cause in ("tensors", "not_finite")
    else:
        check_delta(got, base)


# --- codecs in messages ------------------------------------------------------------------------


@pytest.mark.parametrize("how", [*HOWS, "topk:0.000001"])
def test_a_plan_carries_the_codec(how):
    compress = Compression.parse(how)
    assert str(compress) == how
    assert Plan.model_validate(Plan(compress=compress).model_dump()).compress == compress


@pytest.mark.parametrize(
    "how",
    [
        "",
        "Int4",
        "topk",
        "topk:",
        "topk:1",
        "topk:0.0",
        "int8:4",
        "a.py:b",
        "x:",
        "x/y",
    ],
)
def test_a_plan_refuses_invalid_codecs(how):
    with pytest.raises(
        ValueError, match="is not a codec; expected bf16, f16, int8, topk:0.01 or NAME"
    ):
        Compression.parse(how)


@pytest.mark.parametrize(
    "said",
    [
        "int8", {}, {"kind": "topk"}, {"kind": "int8", "fraction": 0.5},
        {"kind": "topk", "fraction": 1.0}, {"kind": "f16", "settings": "4"},
        {"kind": "x", "fraction": 0.5}, {"kind": "topk", "fraction": "0.1"},
    ],
)  # fmt: skip
def test_a_codec_is_a_map_on_the_wire(said):
    with pytest.raises(ValueError, match="compress"):
        Plan.model_validate({"compress": said})


def test_a_plan_may_name_a_codec_that_is_not_built_in():
    assert [str(Compression.parse(how)) for how in ("zip", "zip:4,x=1")] == ["zip", "zip:4,x=1"]


def test_an_invalid_name_of_an_encoding_is_malformed():
    header = update(DELTA, None)[0].model_dump(exclude={"pad", "transfer"}) | {"encoding": "a/b"}
    with pytest.raises(MalformedMessage, match="encoding"):
        parse(header)


def test_an_unknown_encoding_is_refused_with_a_list_of_known_ones():
    with pytest.raises(
        MalformedMessage, match="unknown codec 'zip'; choose from bf16, f16"
    ) as wrong:
        decode_update(*update(DELTA, "zip"), BASE)
    assert wrong.value.cause == "tensors"

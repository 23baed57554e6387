"""bfloat16 models from end to end: checks, encodings, averages and checkpoints."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fluffle_broker.inspect.decode import decode_message
from fluffle_common.errors import MalformedMessage, UsageError
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.topology import Queue
from fluffle_common.protocol.wire_format import lay_out
from fluffle_common.tensors.checkpoint import read_checkpoint, save_checkpoint
from fluffle_common.tensors.codecs.registry import encoding_of
from fluffle_common.tensors.compression import SMALLEST, compress, decompress
from fluffle_common.tensors.weights import BFLOAT16, check_delta, check_finite, size_bytes
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.messaging import Route, send_tensors
from fluffle_coordinator.service.run_opening import begin_with, read_first_model
from fluffle_coordinator.storage.replay import distance
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.fedavg import fedavg
from fluffle_coordinator.strategy.update_checks import decode_update

HOWS = ("bf16", "f16", "int8", "topk:0.05")


def update(tensors: dict[str, np.ndarray], encoding: str | None) -> tuple[Update, memoryview]:
    table, pieces = lay_out(tensors)
    message = Update(
        federation="f", run="r", round=1, base="b", worker="w", num_examples=1, seconds=0.0,
        tensors=table, encoding=encoding,
    )  # fmt: skip
    return message, memoryview(b"".join(pieces))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(value):
    bad = np.ones(2000, BFLOAT16)
    bad[1234] = value
    with pytest.raises(ValueError, match="'w' has 1 value that is NaN or infinite"):
        check_finite({"w": bad})
    check_finite({"w": np.full(2000, ml_dtypes.finfo(BFLOAT16).max, BFLOAT16)})


# --- encodings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_a_bfloat16_model_is_encoded_and_decoded(how):
    numbers = np.random.default_rng(0)
    delta = {"w": numbers.normal(size=(60, 50)).astype(BFLOAT16)}
    encoded, left = compress(delta, how, {})
    got, _, _ = decode_update(*update(encoded, encoding_of(how)), delta)
    check_delta(got, delta)
    assert size_bytes(encoded) < 0.55 * size_bytes(delta) or how in ("bf16", "f16")
    total = got["w"].astype(np.float32) + left.get("w", 0)
    if how.startswith("topk"):
        np.testing.assert_array_equal(total, delta["w"].astype(np.float32))
    else:
        np.testing.assert_allclose(total, delta["w"].astype(np.float32), atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("how", ["int8", "topk:0.01"])
def test_the_residual_accumulates_in_float32(how, dtype):
    """In bfloat16, 1 + 0.003 is 1, so the residual must be wider."""
    delta = {"w": np.full(SMALLEST, 0.003, dtype)}
    delta["w"][::100] = 1.0
    sent, left = np.zeros(SMALLEST), {}
    for _ in range(1000):
        encoded, left = compress(delta, how, left)
        sent += decompress(encoded, encoding_of(how), delta)["w"].astype(np.float64)
    expected = 1000 * float(delta["w"][1])
    assert abs(sent[1] + float(left["w"][1]) - expected) < 0.02 * expected
    assert abs(float(left["w"][1])) < 0.3 * expected


def test_a_worker_without_bfloat16_may_send_the_upper_halves_of_float32():
    base = {"w": np.ones((2, 3), BFLOAT16)}
    halves = {"w": base["w"].view(np.uint16)}
    got, _, _ = decode_update(*update(halves, "bf16"), base)
    assert (got["w"].dtype, got["w"].tolist()) == (BFLOAT16, base["w"].tolist())
    with pytest.raises(MalformedMessage, match="'w' is uint16; expected bfloat16"):
        decode_update(*update(halves, None), base)


# --- averages ----------------------------------------------------------------------------------


def nearest(exact: Fraction) -> float:
    """Round to the nearest bfloat16, ties to even, by comparing the neighbours."""
    close = np.array([float(exact)]).astype(BFLOAT16).view(np.uint16)[0]
    around = np.array([close - 1, close, close + 1], np.uint16)
    found = around.view(BFLOAT16).astype(np.float64)
    return min(
        zip(found, around, strict=True),
        key=lambda one: (abs(Fraction(float(one[0])) - exact), int(one[1]) & 1),
    )[0]


values = st.integers(0x3E80, 0x4080).map(
    lambda bits: float(np.array([bits], np.uint16).view(BFLOAT16)[0])
)


def fold(state, update, num_examples):
    """Fold an update into the state of a strategy."""
    one = Contribution(worker="a", num_examples=num_examples, delta=update)
    return fedavg.fold(state, one)


@given(values, st.lists(st.tuples(values, st.integers(1, 10**6)), min_size=1, max_size=5))
def test_the_average_is_the_exact_one_rounded_to_nearest(base, updates):
    weights = {"w": np.array([base], BFLOAT16)}
    state = fedavg.init(weights)
    for value, count in updates:
        state = fold(state, {"w": np.array([value], BFLOAT16)}, count)
    got, _ = fedavg.finish(state, weights)
    total = sum(count for _, count in updates)
    exact = Fraction(base) + sum(Fraction(value) * count for value, count in updates) / total
    assert got["w"].dtype == BFLOAT16
    rounded = nearest(exact)
    if rounded != float(got["w"][0]):  # the cast goes through float32, which may round to a tie
        middle = (Fraction(rounded) + Fraction(float(got["w"][0]))) / 2
        assert abs(exact - middle) <= middle / 2**24


@pytest.mark.parametrize("beyond", [2.0**119, 2.0**120, 2.0**126])  # the first is half a step
def test_values_beyond_the_largest_saturate(beyond):
    largest = float(ml_dtypes.finfo(BFLOAT16).max)
    base = {"w": np.array([largest, -largest], BFLOAT16)}
    delta = {"w": np.array([beyond, -beyond], BFLOAT16)}
    got, _ = fedavg.finish(fold(fedavg.init(base), delta, 3), base)
    assert got["w"].tolist() == [largest, -largest]


def test_many_updates_are_not_summed_in_bfloat16():
    base = {"w": np.zeros(2, BFLOAT16)}
    state = fedavg.init(base)
    for _ in range(4000):
        state = fold(state, {"w": np.array([1, 3e38], BFLOAT16)}, 1)
    got, _ = fedavg.finish(state, base)
    assert got["w"].tolist() == np.array([1, 3e38], BFLOAT16).tolist()


# --- files -------------------------------------------------------------------------------------


def model() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(1)
    return {
        "w": numbers.normal(size=(3, 5)).astype(BFLOAT16),
        "one": np.array(2.5, BFLOAT16),
        "none": np.zeros((0, 2), BFLOAT16),
        "f": numbers.normal(size=3).astype(np.float32),
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == tensor.dtype
        assert other[name].shape == tensor.shape
        assert other[name].tobytes() == tensor.tobytes()


def test_a_checkpoint_is_readable_here_and_by_safetensors(tmp_path):
    save_checkpoint(tmp_path / "m", model(), {"round": "3"})
    assert_same(read_checkpoint(tmp_path / "m")[0], model())
    assert_same(dict(load_file(tmp_path / "m")), model())
    assert b'"BF16"' in (tmp_path / "m").read_bytes()


def begin(file: Path, folder: Path) -> dict[str, np.ndarray]:
    store = RunStore(folder)
    saved = begin_with(read_first_model(file), store, store.load("letters"), "letters")
    assert saved.weights is not None
    return saved.weights


def test_a_run_may_start_from_a_bfloat16_file(tmp_path):
    save_file(model(), tmp_path / "first")
    assert_same(begin(tmp_path / "first", tmp_path / "run"), model())
    assert_same(RunStore(tmp_path / "run").load("letters").weights, model())


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"mask": np.ones(3, bool)}, "'mask' is bool, .* use uint8"),
        ({"x" * 501: np.ones(3)}, "a name of 501 characters"),
        ({"c": np.ones(3, np.complex64)}, "'c' is complex64, .* its real and"),
        ({"w": np.array([1, np.nan], BFLOAT16)}, "'w' has 1 value that is NaN"),
        ({}, "the weights contain no tensors"),
    ],
)
def test_a_run_does_not_start_from_unsupported_tensors(tmp_path, tensors, why):
    save_file(tensors, tmp_path / "first")
    with pytest.raises(UsageError, match=why) as refused:
        begin(tmp_path / "first", tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "round-0000.safetensors").exists()


# --- inspection --------------------------------------------------------------------------------


async def test_tensors_of_a_message_are_described():
    link = await MemoryBroker().open()
    await link.declare([Queue("q", "of a test")])
    message, _ = update({}, None)
    tensors = {"w": np.array([3, -4, np.nan, np.inf], BFLOAT16)}
    await send_tensors(link, message, tensors, Route("", ["q"]))
    delivery = await link.get("q")
    assert delivery is not None
    (facts,) = decode_message(delivery, "f").tensors
    assert (facts.dtype, facts.norm, facts.min, facts.max) == ("bfloat16", 5.0, -4.0, 3.0)
    assert (facts.nan, facts.inf) == (1, 1)


def test_neighbours_are_one_apart():
    a, b = np.array([1.0, -0.0], BFLOAT16), np.array([1.0 + 2.0**-7, 0.0], BFLOAT16)
    found = distance(a, b)
    assert (found.different, found.ulps) == (2, 1)

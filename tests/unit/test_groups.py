"""Groups of tensors: their layout in a payload, and the checks of extra tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import wire_format as wire
from fluffle_common.protocol.messages import Part, Plan, Update
from fluffle_common.protocol.transfer_parts import Assembly, digest_of, pack
from fluffle_common.protocol.wire_format import decode, encode, lay_out, read_groups
from fluffle_common.tensors.groups import check_extra
from fluffle_common.tensors.layout import as_maps, layout_for
from fluffle_common.tensors.table import TensorEntry
from fluffle_coordinator.strategy.update_checks import (
    check_announced,
    decode_update,
)

MODEL = {"w": np.arange(5, dtype=np.float32), "n": np.array(3, np.int64)}
EXTRA = {"w": np.full(5, 0.5, np.float32)}
OF = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": "w"}


def update(**fields: Any) -> Update:
    return Update(**OF, num_examples=1, seconds=0.0, **fields)


def sent(extra: Any, group: str = "extra") -> tuple[Update, memoryview]:
    message, payload = decode(pack(update(), MODEL, {group: extra})[1])
    assert isinstance(message, Update)
    return message, payload


tensors = st.dictionaries(
    st.sampled_from("abc"),
    st.tuples(
        st.sampled_from(["float32", "bfloat16", "int8", "float64"]),
        st.sampled_from([(), (0,), (3,), (2, 17), (0, 4)]),
    ).map(lambda form: np.ones(form[1], form[0])),
)


@given(model=tensors, groups=st.dictionaries(st.sampled_from(["extra", "keys"]), tensors))
def test_groups_are_decoded_unchanged_and_each_in_one_buffer(model, groups):
    table, pieces = lay_out(model, groups)
    body = encode(update(), pieces, table)
    message, payload = decode(body)
    found = read_groups(message.tensors, payload)
    expected = {"model": model} | {name: one for name, one in groups.items() if one}
    assert found.keys() == expected.keys()
    for group, one in expected.items():
        assert list(found[group]) == list(one)
        for name, tensor in one.items():
            assert found[group][name].dtype == tensor.dtype
            assert found[group][name].tobytes() == tensor.tobytes()
            assert not found[group][name].flags.writeable
        assert found[group].layout.table == layout_for(one).table
    assert wire.read_tensors(message.tensors, payload).keys() == model.keys()


def test_the_group_of_the_model_is_left_out_on_the_wire():
    table, _ = lay_out(MODEL, {"extra": EXTRA})
    assert [entry.get("group") for entry in as_maps(table)] == [None, None, "extra"]


def test_groups_travel_in_parts(monkeypatch):
    monkeypatch.setattr(wire, "PART_BYTES", 64)
    transfer, body, parts = pack(update(), MODEL, {"extra": EXTRA})
    assert transfer is not None
    assembly = Assembly(transfer)
    for one in parts:
        part, payload = decode(one)
        assert isinstance(part, Part)
        assembly.add(part, payload)
    message, _ = decode(body)
    found = read_groups(message.tensors, assembly.payload())
    assert found["extra"]["w"].tolist() == [0.5] * 5
    assert transfer.digest == digest_of(MODEL, {"extra": EXTRA})
    check_announced(message, MODEL, Plan(extra="model"))
    with pytest.raises(
        MalformedMessage, match="the extra tensor 'w', which the strategy did not request"
    ) as wrong:
        check_announced(message, MODEL)
    assert wrong.value.cause == "tensors"


@pytest.mark.parametrize(
    ("groups", "offsets", "reason"),
    [
        (["model", "extra", "model"], [0, 64, 128], "of the group 'model' are not contiguous"),
        (["model", "extra"], [0, 4], "'b' has the wrong offset 4"),
        (["model", "extra", "extra"], [0, 128, 64], "'c' has the wrong offset -64"),
        (["extra", "model"], [64, 0], "'b' has the wrong offset 0"),
        (["model", "extra"], [0, 192], "'b' ends at byte 200, but the payload has 72 bytes"),
    ],
)
def test_inconsistent_groups_are_refused(groups, offsets, reason):
    table = tuple(
        TensorEntry(name, "float32", (2,), offset, 8, group)
        for name, group, offset in zip("abc", groups, offsets, strict=False)
    )
    with pytest.raises(MalformedMessage, match=reason) as wrong:
        read_groups(table, memoryview(bytes(72)))
    assert wrong.value.cause == "tensors"


def test_a_name_may_be_in_two_groups_but_not_twice_in_one():
    entries = [TensorEntry("w", "float32", (1,), 64 * n, 4, "extra") for n in range(2)]
    with pytest.raises(MalformedMessage, match="'w' appears twice"):
        read_groups(tuple(entries), memoryview(bytes(68)))


@pytest.mark.parametrize(
    ("wanted", "extra", "cause", "reason"),
    [
        (None, EXTRA, "tensors", "the extra tensor 'w', which the strategy did not request"),
        ("model", {}, "tensors", "lacks the tensors that the strategy requires"),
        ("model", {"v": np.ones(5)}, "tensors", "'v', which the strategy did not request"),
        (
            "model",
            {"w": np.ones(1)},
            "tensors",
            r"'w', .*, is float64 \(1,\); expected floats of sha",
        ),
        ({"k": (2,)}, {"k": np.ones(2, np.int8)}, "tensors", "'k', .*, is int8"),
        ({"k": (2,)}, {"l": np.ones(2)}, "tensors", "lacks the tensor 'k'"),
        ({"k": (2,)}, {"k": np.array([1, np.inf])}, "not_finite", "'k' has 1 value that is NaN"),
    ],
)
def test_extra_tensors_that_do_not_match_the_plan_are_refused(wanted, extra, cause, reason):
    message, payload = sent(extra)
    with pytest.raises(MalformedMessage, match=reason) as wrong:
        decode_update(message, payload, MODEL, Plan(extra=wanted))
    assert wrong.value.cause == cause


def test_an_unexpected_group_is_refused():
    message, payload = sent({"k": np.ones(1)}, "keys")
    with pytest.raises(
        MalformedMessage, match="of the group 'keys', which the coordinator did not request"
    ):
        decode_update(message, payload, MODEL, Plan())


def test_required_extra_tensors_are_accepted():
    _, _, found = decode_update(*sent(EXTRA), MODEL, Plan(extra="model"))
    assert found["w"].tolist() == [0.5] * 5
    steps = {"steps": np.array(3.0)}
    assert decode_update(*sent(steps), MODEL, Plan(extra={"steps": ()}))[2]["steps"] == 3
    assert not decode_update(*sent({}), MODEL, Plan())[2]
    check_extra(EXTRA, {"w": (5,)}, MODEL)


@pytest.mark.parametrize(
    ("names", "reason"), [("w", "unknown w"), ("", "missing n"), ("nm", "unknown m")]
)
def test_an_update_has_exactly_the_tensors_of_the_plan(names, reason):
    """The plan trains ``n`` and not ``w``."""
    weights = {name: MODEL.get(name, MODEL["n"]) for name in names}
    message, payload = decode(pack(update(), weights)[1])
    with pytest.raises(MalformedMessage, match=reason) as wrong:
        decode_update(message, payload, MODEL, Plan(train=("n",)))
    assert wrong.value.cause == "tensors"


def test_tensors_that_are_not_trained_have_a_delta_of_zero():
    message, payload = decode(pack(update(), {"n": MODEL["n"]})[1])
    delta, norm, _ = decode_update(message, payload, MODEL, Plan(train=("n",)))
    assert list(delta) == list(MODEL)
    assert (delta["w"].tolist(), int(delta["n"]), norm) == ([0.0] * 5, 3, 3.0)

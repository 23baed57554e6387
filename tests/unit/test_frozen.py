"""Frozen tensors: their digest, their file, and what a worker does with those that it is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.messages import Evaluate, Fit, Plan
from fluffle_common.protocol.model_form import model_form
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode, encode, lay_out
from fluffle_common.tensors.checkpoint import save_checkpoint
from fluffle_common.tensors.frozen import (
    IN_METADATA,
    NO_FROZEN,
    Frozen,
    frozen_file,
    frozen_of,
    read_frozen,
    save_frozen,
)
from fluffle_common.tensors.groups import FROZEN
from fluffle_common.user_errors import full_trace
from fluffle_coordinator.service.run_opening import begin_with, read_first_model
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_worker import frozen as module
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.heartbeat import Presence
from fluffle_worker.inbox import read_work
from fluffle_worker.settings import WorkerSettings

MODEL = {"w": np.ones(4, np.float32)}


def backbone(value: float = 1.0, width: int = 3) -> dict[str, np.ndarray]:
    return {"b": np.full(width, value, np.float32), "a": np.arange(width)}


class Backed:
    """As much of a task as frozen tensors need."""

    num_examples = 1
    share_frozen = True

    def __init__(self, value: float = 1.0, width: int = 3) -> None:
        self.tensors: Any = backbone(value, width)

    def frozen(self) -> Any:
        return self.tensors

    def use_frozen(self, tensors: Any) -> None:
        self.tensors = tensors


# --- the digest, and the file --------------------------------------------------------------------


def test_the_digest_is_what_the_protocol_says():
    tensors = {"b": np.array([1.0, 2.0], "<f4"), "a": np.array([[3]], "<i8")}
    table = b'[["a","int64",[1,1]],["b","float32",[2]]]'
    values = tensors["a"].tobytes() + tensors["b"].tobytes()
    assert frozen_of(tensors).digest == blake3(table + values).hexdigest()


@pytest.mark.parametrize(
    "same",
    [
        dict(reversed(backbone().items())),
        {
            name: tensor.astype(tensor.dtype.newbyteorder(">"))
            for name, tensor in backbone().items()
        },
        {name: np.stack([tensor, tensor], 1)[:, 0] for name, tensor in backbone().items()},
    ],
    ids=["order", "byte order", "strides"],
)
def test_how_they_lie_in_memory_does_not_matter(same):
    assert frozen_of(same).digest == frozen_of(backbone()).digest


@pytest.mark.parametrize(
    "other",
    [
        backbone(2.0),
        {**backbone(), "c": np.zeros(0)},
        {"b2": backbone()["b"], "a": backbone()["a"]},
        {**backbone(), "b": backbone()["b"][None]},
        {**backbone(), "b": backbone()["b"].view(np.int32)},
        {**backbone(), "b": -backbone()["b"]},
    ],
)
def test_whatever_differs_has_another_digest(other):
    assert frozen_of(other).digest != frozen_of(backbone()).digest


def test_none_have_no_digest_and_no_file(tmp_path):
    assert frozen_of({}) == read_frozen(tmp_path, "") == NO_FROZEN


@given(st.lists(st.floats(width=32), max_size=9), st.sampled_from(["float32", "bfloat16"]))
def test_what_is_written_is_read(tmp_path_factory, values, dtype):
    folder = tmp_path_factory.mktemp("frozen")
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    frozen = frozen_of({"w": np.array(values, dtype), "one": np.ones((), np.uint8)})
    save_frozen(folder, frozen)
    found = read_frozen(folder, frozen.digest)
    assert found.digest == frozen.digest
    for name, tensor in frozen.tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (
            tensor.dtype,
            tensor.shape,
        )
        assert found.tensors[name].tobytes() == tensor.tobytes()
        assert not found.tensors[name].flags.writeable


def test_their_file_may_be_of_another_program_and_go_while_they_are_used(tmp_path):
    frozen = frozen_of(backbone())
    path = frozen_file(tmp_path, frozen.digest)
    save_file(dict(frozen.tensors), path)
    found = read_frozen(tmp_path, frozen.digest)
    path.unlink()
    assert frozen_of(found.tensors).digest == frozen.digest


def test_a_file_of_what_does_not_travel_is_refused(tmp_path):
    path = frozen_file(tmp_path, "d" * 64)
    save_file({"flags": np.zeros(2, bool)}, path)
    with pytest.raises(UsageError, match="'flags' .* is BOOL"):
        read_frozen(tmp_path, "d" * 64)


def test_they_are_written_once(tmp_path):
    frozen = frozen_of(backbone())
    save_frozen(tmp_path, frozen)
    written = frozen_file(tmp_path, frozen.digest).stat().st_ino
    save_frozen(tmp_path, frozen)
    assert frozen_file(tmp_path, frozen.digest).stat().st_ino == written


def test_a_damaged_file_is_written_again(tmp_path):
    frozen = frozen_of(backbone())
    save_frozen(tmp_path, frozen)
    path = frozen_file(tmp_path, frozen.digest)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    save_frozen(tmp_path, frozen)
    assert read_frozen(tmp_path, frozen.digest).digest == frozen.digest


def test_what_is_missing_damaged_or_another_is_named(tmp_path):
    frozen, other = frozen_of(backbone()), frozen_of(backbone(2.0))
    path = frozen_file(tmp_path, frozen.digest)
    with pytest.raises(UsageError, match="there is no model file"):
        read_frozen(tmp_path, frozen.digest)
    save_frozen(tmp_path, other)
    frozen_file(tmp_path, other.digest).rename(path)
    with pytest.raises(
        UsageError, match=f"different tensors, with the digest {other.digest[:16]}…"
    ):
        read_frozen(tmp_path, frozen.digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="is not a complete model file"):
        read_frozen(tmp_path, frozen.digest)


def test_they_belong_to_the_form_of_a_model():
    alone, with_them = model_form(MODEL), model_form(MODEL, backbone())
    assert alone.digest != with_them.digest == model_form(MODEL, backbone(5.0)).digest
    assert alone.digest != model_form({**MODEL, **backbone()}).digest != with_them.digest
    assert with_them.summary == (
        "1 tensor, 4 parameters: float32 1; frozen: 2 tensors, 6 parameters: float32 1, int64 1"
    )


# --- on the wire --------------------------------------------------------------------------------


def carrying(frozen: dict[str, Any], digest: str | None, kind: str = "fit") -> Any:
    """Return a message with these frozen tensors, as a worker decodes it."""
    ids = {"federation": "f", "run": "r", "round": 1, "base": "b", "frozen": digest}
    work = Fit(**ids, evaluate=False, plan=Plan()) if kind == "fit" else Evaluate(**ids)
    table, pieces = lay_out(MODEL, {FROZEN: frozen})
    return decode(encode(work.model_copy(update={"critical": (FROZEN,)}), pieces, table))


@pytest.mark.parametrize("kind", ["fit", "evaluate"])
def test_they_travel_in_a_group_beside_the_model(kind):
    frozen = frozen_of(backbone())
    message, payload = carrying(frozen.tensors, frozen.digest, kind)
    weights, extra, found = read_work(message, payload)
    assert (weights.keys(), extra) == (MODEL.keys(), {})
    assert found.digest == frozen.digest == frozen_of(found.tensors).digest


def test_work_without_them_brings_none():
    assert read_work(*carrying({}, "d" * 64)).frozen == NO_FROZEN
    assert read_work(*carrying(backbone(), None)).frozen == NO_FROZEN  # of nobody knows which run


def test_a_run_does_not_begin_with_what_is_not_finite(tmp_path):
    frozen = frozen_of({"b": np.array([np.nan], np.float32)})
    save_frozen(tmp_path, frozen)
    save_checkpoint(tmp_path / "model", MODEL, {IN_METADATA: frozen.digest})
    store = RunStore(tmp_path / "run")
    with pytest.raises(UsageError, match="tensor 'b' has 1 .*NaN or infinite"):
        begin_with(read_first_model(tmp_path / "model"), store, store.load("f"), "f")


@pytest.mark.parametrize("digest", ["", "d" * 63, "D" * 64, 5])
def test_a_digest_that_is_none_is_malformed(digest):
    body = json.loads(Evaluate(federation="f", run="r", round=1, base="b").model_dump_json())
    with pytest.raises(ValueError, match="frozen"):
        Evaluate(**{**body, "frozen": digest})


# --- at a worker ---------------------------------------------------------------------------------


def test_a_worker_uses_what_it_is_sent_once_it_is_asked_to():
    task, sent = Backed(), frozen_of(backbone(2.0))
    frozen = FrozenTensors(task)
    own = frozen_of(backbone()).digest
    assert frozen.digests == (own,)
    frozen.receive(NO_FROZEN)
    frozen.receive(sent)
    assert (frozen.digests, task.tensors["b"][0]) == ((own, sent.digest), 1.0)
    frozen.use(None)
    frozen.use(own)
    assert task.tensors["b"][0] == 1.0
    frozen.use(sent.digest)
    frozen.receive(sent)
    assert (frozen.digests, task.tensors["b"][0]) == ((sent.digest,), 2.0)
    assert frozen.to_share() is not None
    assert frozen_of(frozen.to_share()).digest == sent.digest


def test_what_is_not_what_its_digest_says_is_refused_and_not_claimed():
    task = Backed()
    frozen = FrozenTensors(task)
    frozen.receive(Frozen("d" * 64, backbone(2.0)))
    assert "d" * 64 in frozen.digests
    with pytest.raises(
        TaskError, match="have the digest .*; expected the digest dddddddddddddddd…"
    ):
        frozen.use("d" * 64)
    assert "d" * 64 not in frozen.digests
    with pytest.raises(
        TaskError, match="not received the run's frozen tensors .digest dddddddddddddddd…"
    ):
        frozen.use("d" * 64)
    assert task.tensors["b"][0] == 1.0


def test_what_does_not_fit_the_task_is_refused():
    task, sent = Backed(), frozen_of(backbone(width=4))
    frozen = FrozenTensors(task)
    frozen.receive(sent)
    with pytest.raises(TaskError, match=r"tensor '.' is .* of shape \(4,\) in the federation"):
        frozen.use(sent.digest)
    assert task.tensors["b"].shape == (3,)


def test_what_a_worker_was_sent_outlives_a_restart_and_nothing_older_does(tmp_path):
    folder = tmp_path / "state"
    first, second = (frozen_of(backbone(value)) for value in (2.0, 3.0))
    frozen = FrozenTensors(Backed(), folder)
    for sent in (first, second):
        frozen.receive(sent)
        frozen.use(sent.digest)
    assert list(folder.iterdir()) == [frozen_file(folder, second.digest)]
    task = Backed(7.0)
    again = FrozenTensors(task, folder)
    assert again.digests == (frozen_of(backbone(7.0)).digest, second.digest)
    assert task.tensors["b"][0] == 7.0  # its own are what it would share
    again.use(second.digest)
    assert task.tensors["b"][0] == 3.0
    assert list(folder.iterdir()) == [frozen_file(folder, second.digest)]


def test_what_was_kept_and_is_damaged_or_fits_no_more_is_passed_over(tmp_path):
    sent = frozen_of(backbone(2.0))
    save_frozen(tmp_path, sent)
    assert len(FrozenTensors(Backed(), tmp_path).digests) == 2
    assert len(FrozenTensors(Backed(width=4), tmp_path).digests) == 1
    path = frozen_file(tmp_path, sent.digest)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert len(FrozenTensors(Backed(), tmp_path).digests) == 1


def test_a_full_disk_costs_no_more_than_sending_them_again(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module, "warn", said.append)
    (tmp_path / "state").write_text("no folder")
    task, sent = Backed(), frozen_of(backbone(2.0))
    frozen = FrozenTensors(task, tmp_path / "state")
    frozen.receive(sent)
    frozen.use(sent.digest)
    assert task.tensors["b"][0] == 2.0
    assert len(said) == 1
    assert "must receive the frozen tensors again" in said[0]


def test_a_task_that_shares_none_only_says_which_it_has(tmp_path):
    class Own(Backed):
        share_frozen = False

    save_frozen(tmp_path, frozen_of(backbone(2.0)))
    frozen = FrozenTensors(Own(), tmp_path)
    assert frozen.digests == (frozen_of(backbone()).digest,)
    assert frozen.to_share() == {}
    hello = Presence(WorkerSettings("f", "w", "t"), Own(), Topology("f"), (), frozen)._status()
    assert (hello["model"], hello["features"]) == (None, ())


def test_a_task_of_before_has_none(tmp_path: Path):
    frozen = FrozenTensors(object(), tmp_path)  # type: ignore[arg-type]
    assert (frozen.digests, frozen.shared, frozen.to_share()) == ((), False, {})


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({}, "share_frozen=True, but no frozen tensors"),
        ({"w": np.zeros(2, bool)}, "uint8"),
        ([1], "a mapping of names"),
    ],
)
def test_what_cannot_travel_is_refused_at_the_start(tensors, why):
    task = Backed()
    task.tensors = tensors
    with pytest.raises(TaskError, match=why):
        FrozenTensors(task)


def test_a_task_that_cannot_use_the_federation_s_frozen_tensors_is_refused_at_the_start():
    class Unable(Backed):
        use_frozen = None  # type: ignore[assignment]

    with pytest.raises(TaskError, match="has share_frozen=True, but no method use_frozen; add"):
        FrozenTensors(Unable())


@pytest.mark.parametrize("error", [ValueError("no file"), SystemExit(3)])
def test_a_task_whose_frozen_fails_is_a_task_that_failed(error, capsys):
    class Failing(Backed):
        def frozen(self) -> Any:
            raise error

    with pytest.raises(TaskError, match=r"frozen\(\) failed: .* \(test_frozen.py:\d+\)") as failed:
        FrozenTensors(Failing())
    assert failed.value.__cause__ is error
    stderr = capsys.readouterr().err
    assert "the error in the task's code:" in stderr
    assert stderr.count("  File ") == 1  # the task's own frame


def test_the_traceback_of_a_failing_use_frozen_begins_in_the_task():
    class Failing(Backed):
        def use_frozen(self, tensors: Any) -> None:
            raise ValueError("does not fit")

    frozen = FrozenTensors(Failing())
    received = frozen_of(backbone(2.0))
    assert frozen.receive(received)
    with pytest.raises(ValueError, match="does not fit") as failed:
        frozen.use(received.digest)
    trace = failed.value.__traceback__
    assert trace is not None
    text = full_trace(failed.value.with_traceback(trace.tb_next))  # without this test's own frame
    assert text.count("  File ") == 1

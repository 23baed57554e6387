"""A frozen backbone is sent once to each worker that lacks it, and to no other."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fluffle_common.errors import RefusedError
from fluffle_common.protocol.wire_format import decode
from fluffle_common.tensors.checkpoint import read_metadata, save_checkpoint
from fluffle_common.tensors.frozen import IN_METADATA, frozen_of, save_frozen
from fluffle_common.tensors.groups import FROZEN
from fluffle_common.tensors.weights import Weights
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.service.run_opening import begin_with, read_first_model
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_worker.task import TrainResult
from tests.federation.harness import NAME, Adder, Federation, Process

pytestmark = pytest.mark.usefixtures("in_small_parts")
SMALL, LARGE = 1000, 3 * 2**12  # of float32; the large one travels in three parts and more


@dataclass
class OnABackbone(Adder):
    """A task that adds the first number of its backbone, which it does not train.

    Args:
        backbone: what that number is, as its worker makes it.
        width: how many numbers there are.
        share_frozen: whether the backbone is the federation's.
    """

    backbone: float = 1.0
    width: int = SMALL
    share_frozen: bool = True

    def __post_init__(self) -> None:
        self.kernel = np.full(self.width, self.backbone, np.float32)

    def frozen(self) -> Weights:
        return {"backbone/kernel": self.kernel}

    def use_frozen(self, tensors: Weights) -> None:
        self.kernel = tensors["backbone/kernel"]

    def train(self, weights: Weights, plan: Any, progress: Any) -> TrainResult:
        self.value = float(self.kernel[0])
        return super().train(weights, plan, progress)


class Wire:
    """Counts what is sent to the workers.

    Args:
        federation: whose broker is watched.
    """

    def __init__(self, federation: Federation) -> None:
        self.nbytes, self.crossings = Counter[str](), Counter[str]()
        self._work, self._route = federation.topology.work, federation.broker.route
        federation.broker.route = self._counting  # type: ignore[method-assign]

    def _counting(self, stored: Any, exchange: str, keys: Any) -> None:
        if exchange == self._work:
            message, _ = decode(stored.body)
            with_it = any(entry.group == FROZEN for entry in getattr(message, "tensors", ()))
            for worker in keys:
                self.nbytes[worker] += len(stored.body)
                self.crossings[worker] += with_it
        self._route(stored, exchange, keys)


def moved(federation: Federation) -> list[float]:
    """Return by how much each round has moved the model."""
    models = [federation.weights(n)["w"][0] for n in range(len(federation.history()) + 1)]
    return [float(new - old) for old, new in itertools.pairwise(models)]


def on_backbones(federation: Federation, width: int = SMALL, **options: Any) -> list[Process]:
    """Start the workers a, b and c, whose backbones are 1, 2 and 3."""
    return [
        federation.worker(
            name, OnABackbone(federation.loop, backbone=value, width=width), **options
        )
        for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_it_crosses_the_wire_once_a_worker_and_not_once_a_round(federated, width):
    async def scenario(federation):
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=5, min_workers=3)
        on_backbones(federation, width)
        await coordinator.end()
        # The first weights are a's, and so is the backbone, which a has.
        assert wire.crossings == {"b": 1, "c": 1, "a": 0}
        assert moved(federation) == [1.0] * 5
        backbone = 4 * width
        assert wire.nbytes["a"] < 12_000
        for name in "bc":
            assert backbone < wire.nbytes[name] < backbone + 15_000
        for line in federation.history():
            assert [one["bytes"] for one in line["participants"]] == [16] * 3

    federated(scenario)


def test_one_that_only_the_coordinator_has_crosses_once_to_each_worker(federated, tmp_path):
    frozen = frozen_of({"backbone/kernel": np.full(SMALL, 9.0, np.float32)})
    save_frozen(tmp_path, frozen)
    start = tmp_path / "start.safetensors"
    save_checkpoint(start, {"w": np.zeros(4, np.float32)}, {IN_METADATA: frozen.digest})

    async def scenario(federation):
        store = RunStore(federation.folder)
        begin_with(read_first_model(start), store, store.load(NAME), NAME)
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=5, min_workers=3)
        on_backbones(federation)
        await coordinator.end()
        assert wire.crossings == dict.fromkeys("abc", 1)
        assert moved(federation) == [9.0] * 5

    federated(scenario)


def test_first_weights_with_frozen_tensors_that_are_not_finite_are_asked_of_another(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, min_workers=2)
        federation.worker("a", OnABackbone(federation.loop, backbone=np.nan))
        federation.worker("b", OnABackbone(federation.loop, backbone=4.0))
        failure = await coordinator.log.until("failure")
        assert (failure["worker"], failure["round"]) == ("a", 0)
        assert "'backbone/kernel' has 1000" in failure["reason"]
        await coordinator.end()
        assert moved(federation) == [4.0]

    federated(scenario)


def test_it_is_in_the_run_folder_once_and_every_checkpoint_names_it(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, min_workers=3)
        on_backbones(federation)
        await coordinator.end()
        digest = frozen_of({"backbone/kernel": np.ones(SMALL, np.float32)}).digest
        assert [p.name for p in federation.folder.glob("frozen-*")] == [
            f"frozen-{digest[:16]}.safetensors"
        ]
        for number in range(3):
            path = federation.folder / f"round-{number:04}.safetensors"
            assert read_metadata(path)[IN_METADATA] == digest
            assert federation.weights(number).keys() == {"w"}
        received = [one.log.of("frozen_received") for one in federation.processes[1:]]
        assert received == [[], *[[{"round": 1, "digest": digest}]] * 2]
        sent = coordinator.log.of("frozen_sent")
        assert [(one["workers"], one["digest"]) for one in sent] == [(["b", "c"], digest)]

    federated(scenario)


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_whoever_joins_late_is_sent_it_then(federated, width):
    async def scenario(federation):
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=6, number=1, min_workers=1)
        task = OnABackbone(federation.loop, width=width)
        federation.worker("a", task)
        await coordinator.log.until("committed", 2)
        federation.worker("b", OnABackbone(federation.loop, backbone=5.0, width=width))
        await coordinator.end()
        assert wire.crossings == {"a": 0, "b": 1}
        assert moved(federation) == [1.0] * 6

    federated(scenario)


@pytest.mark.parametrize("kept", [True, False])
def test_a_worker_that_restarts_is_sent_it_again_only_if_it_kept_none(federated, tmp_path, kept):
    options = {"state_dir": tmp_path / "state"} if kept else {}

    async def scenario(federation):
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=6, min_workers=2)
        federation.worker("a", OnABackbone(federation.loop))
        first = federation.worker("b", OnABackbone(federation.loop, backbone=5.0), **options)
        await coordinator.log.until("committed", 2)
        await first.kill()
        second = OnABackbone(federation.loop, backbone=7.0)
        federation.worker("b", second, **options)
        await coordinator.end()
        assert wire.crossings == {"a": 0, "b": 1 if kept else 2}
        assert second.kernel[0] == 1.0
        assert moved(federation) == [1.0] * 6

    federated(scenario)


def test_a_worker_that_has_the_same_ones_is_not_sent_them(federated):
    async def scenario(federation):
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=2, min_workers=2)
        for name in "ab":
            federation.worker(name, OnABackbone(federation.loop, backbone=4.0))
        await coordinator.end()
        assert wire.crossings == {"a": 0, "b": 0}
        assert moved(federation) == [4.0, 4.0]

    federated(scenario)


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_a_coordinator_that_was_killed_goes_on_without_sending_it_again(federated, width):
    async def scenario(federation):
        wire = Wire(federation)
        first = federation.coordinator(rounds=6, min_workers=3)
        on_backbones(federation, width)
        await first.log.until("committed", 3)
        await first.kill()
        second = federation.coordinator(rounds=6, min_workers=3)
        await second.end()
        assert wire.crossings == {"a": 0, "b": 1, "c": 1}
        assert moved(federation) == [1.0] * 6
        assert not second.log.of("refused")

    federated(scenario)


def test_a_coordinator_that_was_killed_sends_it_to_whoever_joins(federated):
    async def scenario(federation):
        wire = Wire(federation)
        first = federation.coordinator(rounds=6, number=1, min_workers=1)
        task = OnABackbone(federation.loop)
        federation.worker("a", task)
        await first.log.until("committed", 2)
        await first.kill()
        second = federation.coordinator(rounds=6, min_workers=2)
        federation.worker("b", OnABackbone(federation.loop, backbone=5.0))
        await second.end()
        assert wire.crossings == {"a": 0, "b": 1}
        assert moved(federation) == [1.0] * 6

    federated(scenario)


@pytest.mark.parametrize("who", ["coordinator", "worker"])
def test_a_death_amid_its_parts_costs_no_more_than_sending_it_again(federated, who):
    async def scenario(federation):
        first = federation.coordinator(rounds=5, min_workers=2)
        first.line.bytes_per_s = 4 * 2**20
        federation.worker("a", OnABackbone(federation.loop, width=LARGE))
        task = OnABackbone(federation.loop, backbone=5.0, width=LARGE)
        worker = federation.worker("b", task)
        await first.log.until("frozen_sent")
        await asyncio.sleep(1.5)  # a part has arrived, and another one is on its way
        if who == "coordinator":
            await first.kill()
            first = federation.coordinator(rounds=5, min_workers=2)
        else:
            await worker.kill()
            task = OnABackbone(federation.loop, backbone=7.0, width=LARGE)
            federation.worker("b", task)
        await first.end()
        assert task.kernel[0] == 1.0
        assert moved(federation) == [1.0] * 5
        assert federation.participants() == [["a", "b"]] * 5

    federated(scenario)


@pytest.mark.parametrize("whose", ["worker", "coordinator"])
@pytest.mark.parametrize("kind", ["fit", "part"])
def test_what_was_lost_with_a_link_is_sent_again(federated, whose, kind):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=4, min_workers=2)
        federation.worker("a", OnABackbone(federation.loop, width=LARGE))
        task = OnABackbone(federation.loop, backbone=5.0, width=LARGE)
        worker = federation.worker("b", task)
        await coordinator.log.until("first_weights")
        if whose == "coordinator":
            coordinator.line.lose_next = {kind}
        else:
            await coordinator.log.until("frozen_sent")
            await asyncio.sleep(0.0 if kind == "fit" else 0.01)
            worker.line.cut()
        await coordinator.end()
        assert task.kernel[0] == 1.0
        assert moved(federation) == [1.0] * 4

    federated(scenario)


def test_it_is_not_sent_twice_over_a_line_on_which_it_takes_long(federated):
    async def scenario(federation):
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=100, number=1, min_workers=1)
        federation.worker("a", OnABackbone(federation.loop, width=LARGE))
        await coordinator.log.until("committed")
        task = OnABackbone(federation.loop, backbone=5.0, width=LARGE)
        worker = federation.worker("b", task)
        await coordinator.log.until("frozen_sent")
        began = federation.loop.time()
        while task.kernel[0] != 1.0:  # a message or two, then nothing for a while
            worker.line.release()
            await asyncio.sleep(0)
            worker.line.hold(incoming=True)
            await asyncio.sleep(10.0)
        assert federation.loop.time() - began >= 20.0  # longer than work may stand still
        worker.line.release()
        await coordinator.end()
        assert wire.crossings["b"] == 1

    federated(scenario)


def test_tensors_of_another_digest_are_refused_and_the_run_says_so(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=6, number=1, min_workers=1)
        federation.worker("a", OnABackbone(federation.loop))
        await coordinator.log.until("committed")
        other = {"backbone/kernel": np.full(SMALL, 9.0, np.float32)}
        coordinator.service._aggregator.frozen = other
        task = OnABackbone(federation.loop, backbone=5.0)
        federation.worker("b", task)
        failure = await coordinator.log.until("failure")
        assert failure["worker"] == "b"
        assert "the received frozen tensors have the digest" in failure["reason"]
        assert task.kernel[0] == 5.0
        await coordinator.end()
        assert federation.participants() == [["a"]] * 6

    federated(scenario)


@pytest.mark.parametrize("first", ["a", "z"])
def test_a_worker_that_takes_none_is_refused_in_one_line(federated, first):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, number=1, min_workers=1, wait_s=100.0)
        federation.worker(first, OnABackbone(federation.loop))
        await coordinator.log.until("first_weights")
        other = federation.worker("m", OnABackbone(federation.loop, share_frozen=False))
        with pytest.raises(RefusedError, match="frozen: 1 tensor, 1,000 parameters"):
            await other.end()
        unknown = federation.worker("n", OnABackbone(federation.loop, share_frozen=False))
        unknown.service._presence._about["model"] = None  # it does not say what its model is
        with pytest.raises(RefusedError, match="worker n does not accept frozen tensors"):
            await unknown.end()
        await coordinator.end()

    federated(scenario)


def test_whoever_takes_none_is_refused_once_it_is_known_that_there_are_some(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, number=1, min_workers=2)
        federation.worker("a", OnABackbone(federation.loop))
        other = federation.worker("b", OnABackbone(federation.loop, share_frozen=False))
        other.service._presence._about["model"] = None
        with pytest.raises(RefusedError, match="worker b does not accept frozen tensors"):
            await other.end()
        await coordinator.stop()

    federated(scenario)


def test_where_each_has_its_own_those_that_differ_are_told_of(federated):
    async def scenario(federation):
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=2, min_workers=3)
        for name, value in (("a", 1.0), ("b", 1.0), ("c", 4.0)):
            task = OnABackbone(federation.loop, backbone=value, share_frozen=False)
            federation.worker(name, task)
        await coordinator.end()
        assert not any(wire.crossings.values())
        assert moved(federation) == [2.0, 2.0]
        assert coordinator.log.of("frozen_differs") == [{"worker": "c", "other": "a"}]
        assert not list(federation.folder.glob("frozen-*"))

    federated(scenario)


def test_in_an_asynchronous_run_it_crosses_once_too(federated):
    async def scenario(federation):
        wire = Wire(federation)
        coordinator = federation.coordinator(rounds=12, schedule=Buffered(buffer=1), min_workers=3)
        on_backbones(federation)
        await coordinator.end()
        assert wire.crossings == {"a": 0, "b": 1, "c": 1}

    federated(scenario)

"""Random federations under random faults: each update counts once, and each run reaches its end.

Rules, schedule, workers and faults are drawn from the seed. Each training adds a number of its own
and reports it as a metric, so the history tells which updates each model must consist of.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fluffle_common.protocol.messages import Plan
from fluffle_common.transport.base import QueueFull
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QuorumRounds
from fluffle_coordinator.machine.selection import parse_selection
from fluffle_coordinator.machine.state import Quorum
from fluffle_coordinator.user_code.hooks import Hooks
from fluffle_worker.task import EvalResult, TrainResult
from tests.federation.harness import Adder, Federation, Process

SEEDS = range(20)
PLANS = (Plan(), Plan(train=("head",)))
SELECTIONS = ("uniform", "weighted", "round-robin", "fastest:0.2")


@dataclass
class Numbered(Adder):
    """A task that adds another number in each training; ``faulty`` trainings give NaN."""

    numbers: Any = None
    backbone: float = 0.0
    share_frozen: bool = True
    faulty: int = 0

    def frozen(self):
        return {"backbone": np.full(8, self.backbone, np.float32)}

    def use_frozen(self, tensors):
        self.backbone = float(tensors["backbone"][0])

    def init(self, seed):
        return {"body": np.zeros(4, np.float32), "head": np.zeros(4, np.float32)}

    def evaluate(self, weights):
        return EvalResult(float(weights["head"][0]), 5, {})

    def train(self, weights, plan, progress):
        super().train(weights, plan, progress)
        number = next(self.numbers) / 1024
        new = {name: old + np.float32(number) for name, old in weights.items()}
        if self.faulty:
            self.faulty -= 1
            new["head"] *= np.nan
        whole, start = float(plan.train is None), float(weights["head"][0])
        metrics = {"number": number, "whole": whole, "start": start, "backbone": self.backbone}
        return TrainResult(new, self.num_examples, metrics)


def random_rules(rng: random.Random, workers: int) -> dict[str, Any]:
    """Draw the rules of a run that can end whatever happens."""
    rules: dict[str, Any] = {
        "rounds": rng.randint(3, 9),
        "min_workers": rng.randint(1, workers),
        "deadline_s": rng.choice([30.0, 60.0]),
        "max_reopenings": 100,
        "grace_s": rng.choice([0.0, 0.5, 3.0]),
        "max_examples": rng.choice([None, 25]),
        "selection": parse_selection(rng.choice(SELECTIONS)),
    }
    if rng.random() < 0.4:
        staleness = rng.choice([0, 1, 5, 50])
        concurrency = rng.choice([None, 1, 2])
        rules["schedule"] = Buffered(rng.randint(1, 4), concurrency, staleness)
        return rules
    rules["schedule"] = QuorumRounds(rng.choice([0, 0, 2]))
    most = workers
    if rng.random() < 0.4:
        most = rules["sample"] = rng.randint(1, workers)
        rules["over_provision"] = rng.choice([1.0, 1.5, 2.0])
    rules["least"] = rng.randint(1, most)
    rules["quorum"] = rng.choice([Quorum(), Quorum(fraction=0.5), Quorum(number=most)])
    if rng.random() < 0.3:
        rules.update(on_deadline="close", min_updates=1)
    return rules


@dataclass
class Rain:
    """Random faults for a random federation."""

    federation: Federation
    rng: random.Random
    folder: Any
    rules: dict[str, Any] = field(init=False)
    workers: dict[str, Process] = field(default_factory=dict)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.names = "abcde"[: self.rng.randint(2, 5)]
        self.rules = random_rules(self.rng, len(self.names))
        self.plan, self.stops_after = self.rng.choice(PLANS), self.rng.choice([None, None, 2])
        self.kept = self.rng.random() < 0.5
        for name in self.names:
            self.start_worker(name)
        self.coordinator, self.standby = self.start_coordinator(), None

    def start_worker(self, name: str) -> None:
        """Start a worker, which may have other data than before."""
        rng = self.rng
        task = Numbered(
            self.federation.loop,
            num_examples=rng.randint(1, 40),
            steps=rng.randint(1, 5),
            step_s=rng.choice([0.01, 0.25, 1.0]),
            size=4,
            numbers=self.numbers,
            backbone=float(ord(name)),
        )
        kept = {"state_dir": self.folder / f"state-{name}"} if self.kept else {}
        self.workers[name] = self.federation.worker(name, task, **kept)
        self.workers[name].task = task  # type: ignore[attr-defined]

    def start_coordinator(self) -> Process:
        def enough(commit):
            return "enough" if self.stops_after and commit.round >= self.stops_after else None

        return self.federation.coordinator(**self.rules, plan=self.plan, hooks=Hooks(None, enough))

    async def fault(self) -> None:
        faults: list[Callable[[], Awaitable[None]]] = [
            *(self.kill_coordinator, self.kill_coordinator, self.kill_worker, self.kill_worker),
            *(self.add_standby, self.cut, self.cut, self.lose, self.freeze, self.stop_broker),
            *(self.delete, self.delete, self.unbind, self.refuse, self.spoil),
            lambda: self.federation.block(self.rng.uniform(1.0, 20.0)),
        ]
        await self.rng.choice(faults)()
        await asyncio.sleep(self.rng.choice([0.0, 0.01, 0.3, 1.0, 5.0, 15.0]))

    async def kill_coordinator(self) -> None:
        """Kill or stop it; the next one may train other tensors, or find a damaged checkpoint."""
        await self.rng.choice([self.coordinator.kill, self.coordinator.stop])()
        self.plan = self.rng.choice([self.plan, *PLANS])
        if self.standby is None:
            checkpoints = sorted(self.federation.folder.glob("round-*.safetensors"))
            if len(checkpoints) > 1 and self.rng.random() < 0.2:
                checkpoints[-1].write_bytes(b"damaged")
            await asyncio.sleep(self.rng.choice([0.0, 0.5, 40.0]))
            self.standby = self.start_coordinator()
        self.coordinator, self.standby = self.standby, None

    async def kill_worker(self) -> None:
        name = self.rng.choice(self.names)
        await self.rng.choice([self.workers[name].kill, self.workers[name].stop])()
        await asyncio.sleep(self.rng.choice([0.0, 1.0, 8.0, 30.0]))
        self.start_worker(name)

    async def add_standby(self) -> None:
        self.standby = self.standby or self.start_coordinator()

    def anyone(self) -> Process:
        return self.rng.choice([self.coordinator, *self.workers.values()])

    async def cut(self) -> None:
        self.anyone().line.cut()

    async def lose(self) -> None:
        kinds = ["hello", "update", "evaluation", "part", "fit", "welcome", "event", "verdict"]
        self.anyone().line.lose_next = {self.rng.choice(kinds)}

    async def freeze(self) -> None:
        await self.coordinator.log.until("connected")
        if not self.coordinator.running.done():
            await self.federation.freeze(self.coordinator, self.rng.uniform(3.0, 30.0))

    async def stop_broker(self) -> None:
        self.federation.broker.stop()
        await asyncio.sleep(self.rng.choice([0.5, 20.0]))
        self.federation.broker.up = True

    def any_queue(self) -> str:
        queues = self.federation.broker.queues
        return self.rng.choice(sorted(name for name in queues if "journal" not in name))

    async def delete(self) -> None:
        """Delete an exchange or a queue, whose consumers the broker tells."""
        broker, topology = self.federation.broker, self.federation.topology
        if not broker.queues or self.rng.random() < 0.3:
            broker.delete_exchange(self.rng.choice([topology.work, topology.results]))
            return
        queue = self.any_queue()
        consumers = list(broker.queues[queue].consumers)
        broker.delete(queue)
        for consumer in consumers:
            consumer.link.cut()

    async def unbind(self) -> None:
        bindings = sorted(self.federation.broker.bindings, key=repr)
        if bindings:
            self.federation.broker.bindings.discard(self.rng.choice(bindings))

    async def refuse(self) -> None:
        """Let a queue refuse messages for a while, as one that is full."""

        def put(_):
            raise QueueFull("full")

        if self.federation.broker.queues:
            queue = self.federation.broker.queues[self.any_queue()]
            queue.put = put
            await asyncio.sleep(self.rng.choice([0.5, 3.0, 12.0]))
            del queue.put

    async def spoil(self) -> None:
        self.anyone_task().faulty = self.rng.randint(1, 2)

    def anyone_task(self) -> Numbered:
        return self.workers[self.rng.choice(self.names)].task  # type: ignore[attr-defined]

    async def finish(self) -> None:
        """Wait for the last round; whoever has left, as at an early end, starts again."""
        async with asyncio.timeout(7200.0):
            while True:
                there = [one.running for one in (self.coordinator, self.standby) if one]
                done, _ = await asyncio.wait(there, timeout=60.0, return_when="FIRST_COMPLETED")
                for one in done:
                    if one.result().committed == self.rules["rounds"]:
                        return
                    early = one.result().reason
                    assert early == "enough" or "every worker failed" in early
                    self.stops_after = None
                if done:
                    if self.coordinator.running.done():
                        self.coordinator = self.standby or self.start_coordinator()
                    self.standby = None
                for name, worker in list(self.workers.items()):
                    if worker.running.done():
                        worker.running.result()
                        self.start_worker(name)


def check(federation: Federation, rules: dict[str, Any]) -> None:
    """Check the history and each model against an average in float64."""
    schedule, seen = rules["schedule"], set()
    expected, starts = {"body": 0.0, "head": 0.0}, [0.0]
    assert [line["round"] for line in federation.history()] == [*range(1, rules["rounds"] + 1)]
    for line in federation.history():
        everyone = line["participants"]
        fresh = [one["worker"] for one in everyone if not one.get("staleness")]
        if schedule.continuous:
            assert len(everyone) >= schedule.buffer
        else:
            least = max(rules["least"], rules["quorum"].number or 1)
            assert len(fresh) >= (1 if "min_updates" in rules else least)
            assert len(fresh) == len(set(fresh))
        assert all(one.get("staleness", 0) <= schedule.max_staleness for one in everyone)
        weights = [one["num_examples"] * (1 + one.get("staleness", 0)) ** -0.5 for one in everyone]
        assert max(one["num_examples"] for one in everyone) <= (rules["max_examples"] or 40)
        for one in everyone:  # trained from the weights that it says
            start = starts[-1 - one.get("staleness", 0)]
            assert one["metrics"]["start"] == pytest.approx(start, rel=1e-5)
        numbers = [one["metrics"]["number"] for one in everyone]
        assert seen.isdisjoint(numbers)
        seen.update(numbers)
        mean = math.fsum(map(math.prod, zip(weights, numbers, strict=True))) / math.fsum(weights)
        (whole,) = {one["metrics"]["whole"] for one in everyone}
        expected["head"] += mean
        expected["body"] += whole * mean
        starts.append(expected["head"])
        for name, value in expected.items():
            model = federation.weights(line["round"])[name]
            np.testing.assert_allclose(model, value, rtol=1e-5, atol=1e-6)
    everyone = [one for line in federation.history() for one in line["participants"]]
    assert len(seen) == len(everyone)
    assert len({one["metrics"]["backbone"] for one in everyone}) == 1
    evaluated = [line["round"] for line in federation.history("evaluated")]
    assert len(evaluated) == len(set(evaluated))


@pytest.mark.parametrize(
    "in_parts", [False, True], ids=["in one message", "in parts"], indirect=True
)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_federations(federated, tmp_path, seed, in_parts):
    async def scenario(federation):
        unexpected = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unexpected.append(what))
        rng = random.Random(seed)
        rain = Rain(federation, rng, tmp_path)
        await asyncio.sleep(rng.choice([0.0, 0.1, 0.5, 4.0]))
        for _ in range(rng.randint(2, 9)):
            await rain.fault()
        await rain.finish()
        check(federation, rain.rules)
        assert not unexpected

    federated(scenario)

"""Whole federations in one process: a real coordinator and workers over an in-memory broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.checkpoint import read_checkpoint
from fluffle_common.tensors.codecs.registry import CODECS
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.reconnect import Backoff
from fluffle_coordinator.machine.state import Quorum, Rules, State
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.observe.watchers import Watcher, Watchers
from fluffle_coordinator.service.coordinator import Coordinator
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_worker.service import WorkerService
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.task import EvalResult, TrainResult
from tests.federation.clock import Training, VirtualLoop
from tests.federation.line import Line

NAME = "letters"


@dataclass
class Adder:
    """A task that adds ``value`` to every weight, in steps that take virtual time.

    Args:
        loop: the loop.
        value: the number to add.
        num_examples: the number of its training examples.
        steps: the number of training steps.
        step_s: the duration of a step in seconds.
        size: the number of weights.
        dtype: the dtype of the weights.
        classes: its classes.
        odd: called at each step, for faults.
        says: the number of examples that its updates claim; None claims ``num_examples``.
    """

    loop: VirtualLoop
    value: float = 1.0
    num_examples: int = 10
    steps: int = 4
    step_s: float = 0.25
    size: int = 4
    dtype: str = "float32"
    classes: tuple[str, ...] = ()
    odd: Callable[[int], object] | None = None
    says: int | None = None
    inits: int = 0
    trained: list[int] = field(default_factory=list)  # the plan's seed in each finished training

    def init(self, seed: int) -> Weights:
        self.inits += 1
        return {"w": np.zeros(self.size, self.dtype)}

    def evaluate(self, weights: Weights) -> EvalResult:
        return EvalResult(float(np.abs(weights["w"]).max()), 5, {"accuracy": 0.5})

    def train(self, weights: Weights, plan: Any, progress: Any) -> TrainResult:
        for step in range(1, self.steps + 1):
            progress(step, self.steps, 1.0)
            if self.odd is not None:
                self.odd(step)
            self.loop.sleep(self.step_s)
        self.trained.append(plan.seed)
        new = {name: old + old.dtype.type(self.value) for name, old in weights.items()}
        return TrainResult(new, self.says or self.num_examples, {"loss": 0.5})


class Log(Watcher):
    """Collects the events of a process with their times, and lets tests wait for them."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str, Mapping[str, Any]]] = []
        self._news = asyncio.Event()

    def record(self, event: RunEvent) -> None:
        assert event.sentence()
        self.tell(event.name, event.fields())

    def tell(self, what: str, fields: Mapping[str, Any]) -> None:
        self.lines.append((time.monotonic(), what, dict(fields)))
        self._news.set()

    def of(self, what: str) -> list[Mapping[str, Any]]:
        return [fields for _, name, fields in self.lines if name == what]

    async def until(self, what: str, count: int = 1, within_s: float = 3600.0) -> Mapping[str, Any]:
        """Wait for the ``count``-th event of a name; return its fields."""
        async with asyncio.timeout(within_s):
            while len(self.of(what)) < count:
                self._news.clear()
                await self._news.wait()
        return self.of(what)[count - 1]


@dataclass(eq=False)
class Process:
    """A simulated process: its line to the broker, its log and its asyncio task."""

    name: str
    line: Line
    log: Log
    running: asyncio.Task[Any]
    service: Any = None
    training: Training | None = None

    async def end(self, within_s: float = 36000.0) -> Any:
        """Wait until it ends by itself; return its result."""
        async with asyncio.timeout(within_s):
            return await asyncio.shield(self.running)

    async def kill(self) -> None:
        """End it like ``kill -9``: nothing more reaches the broker."""
        self.line.down()
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    async def stop(self) -> None:
        """End it like Ctrl-C."""
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


class Federation:
    """A federation: its run folder, broker and processes."""

    def __init__(self, folder: Path, loop: VirtualLoop) -> None:
        self.folder, self.loop = folder / "run", loop
        self.broker = MemoryBroker()
        self.topology = Topology(NAME)
        self.processes: list[Process] = []

    def coordinator(self, rounds: int = 3, **options: Any) -> Process:
        """Start a coordinator; ``options`` are settings, rules, or ``number`` for a quorum."""
        of_settings = {"classes", "init", "verify_users", "max_workers", "plan"}
        of_settings |= {"learning_rate_schedule", "strategy", "hooks", "stopping"}
        of_settings |= {"schedule", "keep_checkpoints", "keep_updates"}
        given = {name: options.pop(name) for name in of_settings & options.keys()}
        number, exchanges = options.pop("number", None), options.pop("exchanges", None)
        quorum = Quorum(number=number) if number else options.pop("quorum", Quorum())
        rules = Rules(rounds=rounds, quorum=quorum, **options)
        backoff = Backoff(first_s=0.2, most_s=1.0, give_up_s=3600.0)
        settings = CoordinatorSettings(NAME, rules, backoff=backoff, **given)
        line, log = Line(self.broker), Log()
        process = Process("coordinator", line, log, None)  # type: ignore[arg-type]

        async def run() -> State:
            store = RunStore(self.folder)
            while not store.try_lock():  # noqa: ASYNC110
                await asyncio.sleep(0.5)
            try:
                journal = Journal(self.topology)
                process.service = Coordinator(
                    settings,
                    transport=line,
                    topology=self.topology,
                    store=store,
                    saved=store.load(NAME),
                    watcher=Watchers(log, journal),
                    journal=journal,
                    exchanges=exchanges,
                )
                state: State = await process.service.run()
                return state
            finally:
                if store._lock is not None:  # like the end of a process
                    store._lock.close()

        process.running = asyncio.ensure_future(run())
        self.processes.append(process)
        return process

    def worker(self, name: str, task: Any = None, **options: Any) -> Process:
        """Start a worker; without ``task``, its task adds 1."""
        backoff = Backoff(first_s=0.2, most_s=1.0, give_up_s=36000.0)
        codecs, exchanges = options.pop("codecs", CODECS), options.pop("exchanges", None)
        settings = WorkerSettings(NAME, name, "adder", backoff=backoff, **options)
        line, log, training = Line(self.broker), Log(), Training(self.loop)
        process = Process(name, line, log, None, training=training)  # type: ignore[arg-type]
        process.service = WorkerService(
            settings,
            task if task is not None else Adder(self.loop),
            transport=line,
            topology=self.topology,
            record=log.record,
            bar=lambda *_: None,
            enqueue=training.put,
            signature=getattr(task, "signature", None),
            codecs=codecs,
            exchanges=exchanges,
        )
        process.running = asyncio.ensure_future(process.service.run())
        self.processes.append(process)
        return process

    def workers(self, count: int, **options: Any) -> list[Process]:
        """Start workers a, b, c, …"""
        return [self.worker("abcdefghij"[number], **options) for number in range(count)]

    async def block(self, seconds: float) -> None:
        """Block all publishers for a while, like a broker with a memory alarm."""
        for process in self.processes:
            process.line.hold(outgoing=True)
        await asyncio.sleep(seconds)
        for process in self.processes:
            process.line.release()

    async def freeze(self, coordinator: Process, seconds: float) -> None:
        """Stop the coordinator like SIGSTOP; when it continues, its timer fires before it reads."""
        service = coordinator.service
        service._next_tick.cancel()
        coordinator.line.hold(incoming=True, outgoing=True)
        await asyncio.sleep(seconds)
        service._tick()
        coordinator.line.release()

    def history(self, event: str = "committed") -> list[dict[str, Any]]:
        """Return the history's lines of one event."""
        path = self.folder / "history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def participants(self) -> list[list[str]]:
        """Return the participants of each round."""
        return [sorted(one["worker"] for one in line["participants"]) for line in self.history()]

    def weights(self, number: int) -> Weights:
        """Return the model after a round."""
        weights, _ = read_checkpoint(self.folder / f"round-{number:04}.safetensors")
        return weights

    def check_averages(self, values: Mapping[str, float]) -> None:
        """Check every model against an independent average, where worker x adds ``values[x]``."""
        expected = 0.0
        for line in self.history():
            parts = [(one["num_examples"], values[one["worker"]]) for one in line["participants"]]
            total = math.fsum(n for n, _ in parts)
            expected += math.fsum(n * value for n, value in parts) / total
            np.testing.assert_allclose(self.weights(line["round"])["w"], expected, rtol=1e-6)

    async def close(self) -> None:
        """End all processes."""
        self.loop.over = True
        for process in self.processes:
            process.line.release()
            process.running.cancel()
        await asyncio.gather(*(p.running for p in self.processes), return_exceptions=True)


Scenario = Callable[[Federation], Awaitable[None]]


def play(scenario: Scenario, folder: Path, patch: Callable[[Callable[[], float]], object]) -> None:
    """Play a scenario with a new federation in virtual time."""
    loop = VirtualLoop()
    patch(loop.time)
    federation: list[Federation] = []

    async def main() -> None:
        federation.append(Federation(folder, loop))
        try:
            await scenario(federation[0])
        finally:
            await federation[0].close()

    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main())
    finally:
        for process in federation[0].processes if federation else []:
            if process.training is not None:
                process.training.end()
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()

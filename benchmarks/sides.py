"""The sides of a comparison: each runs rounds when it is told to, and stands still otherwise.

``compare`` lets them run in turn, a block of rounds each, and tells what each took a round: time,
processor time, memory. A block begins with one round that does not count, so that every round that
does follows one of its own kind.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks import figures
from benchmarks.arrays import TENSORS
from benchmarks.floor import Spec
from benchmarks.gate import Gates
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, Died, Programs, cpu_s, peak_bytes, reset_peak

_LATE_S = 10.0
_MUCH_BYTES = 10**9
WARM_UP = 2


class Side(Protocol):
    """One of those compared; it is running, and stands still."""

    name: str

    def block(self, rounds: int) -> list[float]:
        """Run one round that does not count, then ``rounds`` that do; return their seconds."""

    def pids(self) -> dict[str, int]:
        """Return its processes by name."""

    def more(self) -> dict[str, Any]:
        """Return what else is known of the rounds that counted."""


class Floor:
    """Bare AMQP; see ``floor``.

    Args:
        programs: what starts its processes.
        spec: what is sent.
    """

    name = "floor"

    def __init__(self, programs: Programs, spec: Spec) -> None:
        self._programs = programs
        roles = ["coordinator", *map(str, range(1, spec.workers + 1))]
        self._running: dict[str, subprocess.Popen[str]] = {}
        for role in roles:
            name = role if role == "coordinator" else f"worker {role}"
            self._running[name] = programs.start(
                f"floor-{role}", sys.executable, "-m", "benchmarks.floor", spec.json(), role,
                pipes=True,
            )  # fmt: skip
        for name in self._running:
            self._answer(name)
        self.block(WARM_UP)

    def block(self, rounds: int) -> list[float]:
        """See ``Side``."""
        words = self._running["coordinator"].stdin
        assert words is not None
        words.write(f"{rounds + 1}\n")
        words.flush()
        seconds: list[float] = json.loads(self._answer("coordinator"))
        return seconds[1:]

    def pids(self) -> dict[str, int]:
        """See ``Side``."""
        return {name: program.pid for name, program in self._running.items()}

    def more(self) -> dict[str, Any]:
        """See ``Side``."""
        return {}

    def _answer(self, name: str) -> str:
        lines = self._running[name].stdout
        assert lines is not None
        line = lines.readline()
        if not line:
            self._programs.check()
            raise Died(f"the floor's {name} says no more")
        return line


class Fluffle:
    """The real thing: ``fluffle coordinator`` and ``fluffle worker``, with a no-op task at a gate.

    A round lasts from one commit to the next, as the coordinator tells them.

    Args:
        programs: what starts its processes.
        url: the broker.
        size_bytes: of the model.
        tensors: how many it has.
        workers: how many.
        queue_type: classic or quorum.
        noise: whether workers change what they are given.
        evaluates: whether every worker evaluates every round's model.
        options: more options of ``fluffle coordinator``.
    """

    name = "fluffle"

    def __init__(
        self,
        programs: Programs,
        url: str,
        *,
        size_bytes: int,
        workers: int,
        tensors: int = TENSORS,
        queue_type: str = "classic",
        noise: bool = True,
        evaluates: bool = False,
        options: Sequence[object] = (),
    ) -> None:
        self._gates = Gates(programs.folder / "fluffle.gate", workers, programs.check)
        programs.afterwards(self._gates.close)
        self._run = programs.folder / "run"
        self._log, self._offset = programs.log("fluffle-coordinator"), 0
        self._timings: list[Mapping[str, float]] = []
        self._training: list[float] = []
        common = ("--federation", "bench", "--url", url, "--queue-type", queue_type)
        self._pids = {
            "coordinator": programs.start(
                "fluffle-coordinator", *FLUFFLE, "coordinator", *common, "--run", self._run,
                "--rounds", 10**6, "--quorum", workers, "--deadline", 10**6,
                "--log-format", "json", *options,
            ).pid
        }  # fmt: skip
        for number in range(1, workers + 1):
            data = f"size={size_bytes},tensors={tensors},gate={self._gates.path},seed={number}"
            data += f",noise={int(noise)},evaluates={int(evaluates)}"
            self._pids[f"worker {number}"] = programs.start(
                f"fluffle-worker-{number}", *FLUFFLE, "worker", *common, "--id", f"w{number}",
                "--task", "benchmarks.noop:task", "--data", data,
            ).pid  # fmt: skip
        self._gates.wait()
        self.block(WARM_UP)
        self._timings.clear()
        self._training.clear()

    def block(self, rounds: int) -> list[float]:
        """See ``Side``."""
        self._gates.release(rounds + 1)
        self._gates.wait()
        committed = self._committed(rounds + 1)
        self._forget_models()
        return figures.gaps(committed)

    def pids(self) -> dict[str, int]:
        """See ``Side``."""
        return dict(self._pids)

    def more(self) -> dict[str, Any]:
        """See ``Side``: where the coordinator says the time went, and how long training took."""
        names = sorted({name for timings in self._timings for name in timings})
        medians = {
            name: round(statistics.median(t[name] for t in self._timings if name in t), 6)
            for name in names
        }
        train_s = statistics.median(self._training) if self._training else None
        return {"timings": medians, "train_s": train_s}

    def _committed(self, expected: int) -> list[float]:
        """Return when the rounds of this block were committed."""
        moments: list[float] = []
        latest = time.monotonic() + _LATE_S
        while len(moments) < expected:
            events, self._offset = read_events(self._log, self._offset)
            for when, told in events:
                if told["event"] == "committed":
                    moments.append(when)
                    if len(moments) > 1:
                        self._timings.append(told.get("timings") or {})
                elif told["event"] == "counted" and moments and told.get("train_s") is not None:
                    self._training.append(told["train_s"])
            if time.monotonic() > latest:
                raise Died(f"fluffle committed {len(moments)} rounds of {expected}")
        return moments

    def _forget_models(self) -> None:
        """Keep the disk from filling up; the last model stays, and whatever is not whole yet.

        Small ones all stay: after many files were deleted, ext4 takes longer to make new ones.
        """
        models = sorted(self._run.glob("round-*.safetensors"))
        if sum(path.stat().st_size for path in models) > _MUCH_BYTES:
            for path in models[:-1]:
                path.unlink()


@dataclass
class Measured:
    """What was found of one side.

    Args:
        blocks: the seconds of each round that counts, by block.
        processor: the seconds that each process computed, over all rounds.
        peaks: the most bytes that each process ever had.
        broker_peak: the same for the broker, while this side ran.
        more: see ``Side``.
    """

    blocks: list[list[float]] = field(default_factory=list)
    processor: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    peaks: dict[str, int | None] = field(default_factory=dict)
    broker_peak: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Measured) -> None:
        """Take in what was found of the same side at another time."""
        self.blocks += other.blocks
        for who, seconds in other.processor.items():
            self.processor[who] += seconds
        for who, peak in other.peaks.items():
            self.peaks[who] = max(self.peaks.get(who) or 0, peak or 0)
        self.more = other.more

    @property
    def times(self) -> list[float]:
        """All rounds' seconds."""
        return [seconds for block in self.blocks for seconds in block]

    @property
    def rounds(self) -> int:
        """How many were run, with those that do not count."""
        return len(self.times) + len(self.blocks)

    @property
    def cpu_s_a_round(self) -> float:
        """The processor time of all processes together."""
        return sum(self.processor.values()) / self.rounds

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        cpu = {name: round(seconds / self.rounds, 6) for name, seconds in self.processor.items()}
        return {
            **figures.summary(self.times),
            **self.more,
            "cpu_s_a_round": cpu,
            "peak_rss_mb": {name: _mb(peak) for name, peak in self.peaks.items()},
            "broker_peak_mb": _mb(self.broker_peak),
        }


def compare(
    sides: Sequence[Side],
    sizes: Sequence[int],
    *,
    broker_pid: int | None = None,
    said: Callable[[str], None] = lambda _: None,
) -> dict[str, Measured]:
    """Let sides run in turn.

    Args:
        sides: who runs.
        sizes: how many rounds that count each block has.
        broker_pid: the broker's process, whose memory and time are told for each side.
        said: told of each block as it is over.
    """
    by_name = {side.name: side for side in sides}
    found = {side.name: Measured() for side in sides}
    for name, size in figures.interleaved(list(by_name), sizes):
        side, measured = by_name[name], found[name]
        pids = {**side.pids(), **({"broker": broker_pid} if broker_pid else {})}
        if broker_pid:
            reset_peak(broker_pid)
        before = {who: cpu_s(pid) for who, pid in pids.items()}
        seconds = side.block(size)
        measured.blocks.append(seconds)
        for who, pid in pids.items():
            measured.processor[who] += cpu_s(pid) - before[who]
        if broker_pid:
            measured.broker_peak = max(measured.broker_peak or 0, peak_bytes(broker_pid) or 0)
        said(f"{name}: {size} rounds, median {statistics.median(seconds):.4f} s")
    for name, side in by_name.items():
        found[name].peaks = {who: peak_bytes(pid) for who, pid in side.pids().items()}
        found[name].more = side.more()
    return found


def _mb(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / 1e6, 1)

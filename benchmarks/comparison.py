"""The sides of a comparison, each of which runs rounds on request and waits otherwise.

``compare`` lets them run blocks of rounds in turn and measures time, CPU time and memory. Each
block starts with a round that does not count, so that each counted one follows one of its own side.
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

from benchmarks import stats
from benchmarks.arrays import TENSORS
from benchmarks.floor import Spec
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, Died, Programs, cpu_s, peak_bytes, reset_peak
from benchmarks.round_gate import Gates

_LATE_S = 10.0
_MAX_MODELS_BYTES = 10**9
WARM_UP = 2


class Side(Protocol):
    """A running system whose rounds are measured."""

    name: str

    def block(self, rounds: int) -> list[float]:
        """Run one uncounted round and ``rounds`` counted ones; return the seconds of the latter."""

    def pids(self) -> dict[str, int]:
        """Return its process ids by name."""

    def more(self) -> dict[str, Any]:
        """Return further results about the counted rounds."""


class Floor:
    """Bare AMQP; see ``floor``.

    Args:
        programs: starts the processes.
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
            self._read_line(name)
        self.block(WARM_UP)

    def block(self, rounds: int) -> list[float]:
        """Run rounds; see ``Side``."""
        stdin = self._running["coordinator"].stdin
        assert stdin is not None
        stdin.write(f"{rounds + 1}\n")
        stdin.flush()
        seconds: list[float] = json.loads(self._read_line("coordinator"))
        return seconds[1:]

    def pids(self) -> dict[str, int]:
        """Return the process ids by name."""
        return {name: program.pid for name, program in self._running.items()}

    def more(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}

    def _read_line(self, name: str) -> str:
        stdout = self._running[name].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            self._programs.check()
            raise Died(f"the floor's {name} closed its output")
        return line


class Fluffle:
    """``fluffle coordinator`` and ``fluffle worker`` with a no-op task behind a gate.

    A round lasts from one commit to the next, by the times in the coordinator's log.

    Args:
        programs: starts the processes.
        url: the address of the broker.
        size_bytes: the size of the model.
        tensors: the number of its tensors.
        workers: the number of workers.
        queue_type: ``classic`` or ``quorum``.
        noise: whether workers add noise to the weights.
        evaluates: whether every worker evaluates every round's model.
        options: further options of ``fluffle coordinator``.
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
                "--rounds", 10**6, "--quorum", workers, "--deadline", 86_400,
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
        """Run rounds; see ``Side``."""
        self._gates.release(rounds + 1)
        self._gates.wait()
        committed = self._committed(rounds + 1)
        self._delete_models()
        return stats.gaps(committed)

    def pids(self) -> dict[str, int]:
        """Return the process ids by name."""
        return dict(self._pids)

    def more(self) -> dict[str, Any]:
        """Return the median phases of a round in the coordinator, and the median training time."""
        names = sorted({name for timings in self._timings for name in timings})
        medians = {
            name: round(statistics.median(t[name] for t in self._timings if name in t), 6)
            for name in names
        }
        train_s = statistics.median(self._training) if self._training else None
        return {"timings": medians, "train_s": train_s}

    def _committed(self, expected: int) -> list[float]:
        """Return the commit times of this block's rounds."""
        moments: list[float] = []
        latest = time.monotonic() + _LATE_S
        while len(moments) < expected:
            events, self._offset = read_events(self._log, self._offset)
            for when, event in events:
                if event["event"] == "committed":
                    moments.append(when)
                    if len(moments) > 1:
                        self._timings.append(event.get("timings") or {})
                elif event["event"] == "counted" and moments and event.get("train_s") is not None:
                    self._training.append(event["train_s"])
            if time.monotonic() > latest:
                raise Died(f"fluffle committed {len(moments)} of {expected} rounds")
        return moments

    def _delete_models(self) -> None:
        """Delete all models but the last if they take up much space.

        Small models stay, because ext4 creates files more slowly after many deletions.
        """
        models = sorted(self._run.glob("round-*.safetensors"))
        if sum(path.stat().st_size for path in models) > _MAX_MODELS_BYTES:
            for path in models[:-1]:
                path.unlink()


@dataclass
class Measured:
    """The measurements of one side.

    Args:
        blocks: the seconds of each counted round, by block.
        cpu_s: the CPU time of each process over all rounds.
        peaks: the peak memory of each process in bytes.
        broker_peak: the broker's peak memory in bytes while this side ran.
        more: further results, see ``Side.more``.
    """

    blocks: list[list[float]] = field(default_factory=list)
    cpu_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    peaks: dict[str, int | None] = field(default_factory=dict)
    broker_peak: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Measured) -> None:
        """Add measurements of another run of the same side."""
        self.blocks += other.blocks
        for name, seconds in other.cpu_s.items():
            self.cpu_s[name] += seconds
        for name, peak in other.peaks.items():
            self.peaks[name] = max(self.peaks.get(name) or 0, peak or 0)
        self.more = other.more

    @property
    def times(self) -> list[float]:
        """The seconds of all counted rounds."""
        return [seconds for block in self.blocks for seconds in block]

    @property
    def rounds(self) -> int:
        """The number of rounds run, including uncounted ones."""
        return len(self.times) + len(self.blocks)

    @property
    def cpu_s_a_round(self) -> float:
        """The CPU time per round of all processes together."""
        return sum(self.cpu_s.values()) / self.rounds

    def as_dict(self) -> dict[str, Any]:
        """Return the results as a JSON object."""
        cpu = {name: round(seconds / self.rounds, 6) for name, seconds in self.cpu_s.items()}
        return {
            **stats.summary(self.times),
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
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Measured]:
    """Let sides run in turn and return their measurements by name.

    Args:
        sides: the sides.
        sizes: the number of counted rounds of each block.
        broker_pid: the broker's process; if given, its memory and CPU time are measured too.
        report: called with a line about each block.
    """
    by_name = {side.name: side for side in sides}
    measurements = {side.name: Measured() for side in sides}
    for name, size in stats.interleaved(list(by_name), sizes):
        side, measured = by_name[name], measurements[name]
        pids = {**side.pids(), **({"broker": broker_pid} if broker_pid else {})}
        if broker_pid:
            reset_peak(broker_pid)
        before = {process: cpu_s(pid) for process, pid in pids.items()}
        seconds = side.block(size)
        measured.blocks.append(seconds)
        for process, pid in pids.items():
            measured.cpu_s[process] += cpu_s(pid) - before[process]
        if broker_pid:
            measured.broker_peak = max(measured.broker_peak or 0, peak_bytes(broker_pid) or 0)
        report(f"{name}: {size} rounds, median {statistics.median(seconds):.4f} s")
    for name, side in by_name.items():
        measurements[name].peaks = {
            process: peak_bytes(pid) for process, pid in side.pids().items()
        }
        measurements[name].more = side.more()
    return measurements


def _mb(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / 1e6, 1)

"""Runs a federation under a seeded sequence of faults, and judges it independently.

    python -m tests.faults.chaos --faults 100 --seed 7          make chaos FAULTS=100 SEED=7
    python -m tests.faults.chaos --faults 100 --seed 7 --schedule buffered

One coordinator and a standby on the same run folder, four workers, and a real RabbitMQ behind a
proxy. The seed alone determines the faults and the pauses between them. After the last fault and
enough rounds, the run is finished and `checker` judges it from its files. Prints a line per fault
and a verdict; the exit code is 0 if the verdict is clean. On failure the folder is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgpack

from fluffle_broker.node import node
from tests.faults.alarm import memory_alarm
from tests.faults.checker import Verdict, check
from tests.faults.fault_sequence import WORKERS, Fault, fault_sequence
from tests.faults.harness import Federation, Program, marked, now, wait_until
from tests.faults.hostile import Foe, Hostile
from tests.faults.proxy import Proxy

_TRAIN_S, _SLOW_S = 0.4, 0.9  # one worker is slower, so that rounds are open with updates in them
_HEARTBEAT_S = 1.0
_STOP_S = 15.0  # three times as long as a worker may miss heartbeats
_QUIET_S = 2.0  # after a stop or an alarm, so that its consequences show before the next fault
_SLOW_BYTES_S = 500e3
_KERNEL = 2**15  # elements: a model of 131 kB, a quarter of a second on such a line
_STALLED_FOR_S = 60.0  # a run that commits no round for this long hangs
_END_S = 90.0
SYNCHRONOUS = ("--quorum", "all")
ASYNCHRONOUS = ("--schedule", "buffered", "--buffer", 3, "--max-staleness", 50)
# All workers must take part within this many of the latest rounds.
_LATEST = {SYNCHRONOUS: 1, ASYNCHRONOUS: 4}


class Chaos:
    """One run under faults.

    Args:
        federation: the federation.
        state: the state folder of its broker.
        broker: the broker.
        proxy: the proxy between the two.
        say: prints one line per fault.
        timing: the coordinator's schedule options.
    """

    def __init__(
        self,
        federation: Federation,
        state: Path,
        broker: node.NodeInfo,
        proxy: Proxy,
        say: Callable[[str], None],
        timing: tuple[str | int, ...],
    ) -> None:
        self._timing = timing
        self.federation, self.proxy, self._say = federation, proxy, say
        self._state, self._broker = state, broker
        self._began = time.monotonic()
        self._pause = threading.Event()
        self._progress = (0, time.monotonic())
        self._last_round = 10**6
        self.coordinators = [self._coordinator(), self._coordinator()]
        self.workers = [self._worker(number) for number in range(WORKERS)]

    def run(self, faults: list[Fault], rounds: int) -> None:
        """Cause the faults, wait for enough rounds, and finish the run."""
        self.federation.wait_committed(1)
        for number, fault in enumerate(faults, start=1):
            self._wait(fault.after_s)
            began = now()
            outcome = self._do(fault)
            line = {"fault": number, "kind": fault.kind, "what": outcome, "began": began}
            self.federation.note("faults", {**line, "lasts_s": fault.lasts_s})
            at = time.monotonic() - self._began
            self._say(
                f"fault {number:3}/{len(faults)}  at {at:6.1f} s, "
                f"{self.federation.committed():3} rounds: {fault.kind}: {outcome}"
            )
        while self.federation.committed() < rounds:
            self._wait(0.1)
        self._recover()
        self._end()

    def _recover(self) -> None:
        """Wait until all workers take part again, without any help."""
        began = time.monotonic()
        everybody = {f"w{number}" for number in range(WORKERS)}
        while True:
            latest = self.federation.history("committed")[-_LATEST[self._timing] :]
            there = {one["worker"] for line in latest for one in line["participants"]}
            if there == everybody:
                return
            missing = ", ".join(sorted(everybody - there))
            assert time.monotonic() - began < _STALLED_FOR_S, f"{missing} never came back"
            self._wait(0.1)

    def _wait(self, seconds: float) -> None:
        """Wait; no process may end by itself meanwhile, and rounds must continue."""
        end = time.monotonic() + seconds
        while True:
            self._watch()
            left = end - time.monotonic()
            if left <= 0:
                return
            self._pause.wait(min(left, 0.2))

    def _watch(self) -> None:
        for program in (*self.coordinators, *self.workers):
            if not program.alive():
                raise AssertionError(
                    f"{program.name} ended by itself with {program.code}; {program.log}:\n"
                    f"{program.tail()}"
                )
        committed, now = self.federation.committed(), time.monotonic()
        if committed > self._progress[0]:
            self._progress = (committed, now)
        elif now - self._progress[1] > _STALLED_FOR_S:
            raise AssertionError(
                f"no round after {committed} in {_STALLED_FOR_S:.0f} s; the coordinator says:\n"
                f"{self._active().tail()}"
            )

    def _end(self) -> None:
        """Finish the run with a last coordinator, as an operator would."""
        self._last_round = self.federation.committed() + 2
        # After the last fault, two coordinators may compete for the run folder: find the holder.
        wait_until(lambda: any(map(_has_begun, self.coordinators)), "one has the run folder")
        standby, active = self._standby(), self._active()
        standby.wait_for("standby")  # extension modules can swallow a Ctrl-C during import
        for program in (standby, active):
            program.interrupt()
            program.end()
        last = self._coordinator(min_workers=WORKERS)
        self.coordinators = [last]
        code = last.end(_END_S)
        assert code == 0, f"the coordinator ends with {code}:\n{last.tail()}"
        for program in self.workers:
            code = program.end(_END_S)
            assert code == 0, f"{program.name} ends with {code}:\n{program.tail()}"

    # --- the faults ----------------------------------------------------------------------------

    def _do(self, fault: Fault) -> str:
        act: dict[str, Callable[[Fault, random.Random], str]] = {
            "coordinator": self._kill_coordinator,
            "worker": self._kill_worker,
            "both": self._kill_both,
            "broker": self._kill_broker,
            "cut": self._cut,
            "stall": self._stall,
            "half-close": self._half_close,
            "slow": self._slow,
            "replay": self._replay,
            "garbage": self._garbage,
            "stop": self._stop,
            "alarm": self._alarm,
        }
        return act[fault.kind](fault, random.Random(fault.seed))

    def _kill_coordinator(self, fault: Fault, _: random.Random) -> str:
        victim = self._standby() if fault.who == 0 else self._active()
        what = "the standby" if victim is self._standby() else "the active one"
        victim.kill()
        self.coordinators.remove(victim)
        self.coordinators.append(self._coordinator())
        return f"killed {what} (pid {victim.pid}), started another"

    def _kill_worker(self, fault: Fault, _: random.Random) -> str:
        victim = self.workers[fault.who]
        victim.kill()
        self._pause.wait(fault.for_s / 3)
        self.workers[fault.who] = self._worker(fault.who)
        return (
            f"killed w{fault.who} (pid {victim.pid}), started again {fault.for_s / 3:.1f} s later"
        )

    def _kill_both(self, fault: Fault, _: random.Random) -> str:
        """Kill the coordinator, and a worker whose update is counted but not committed."""
        active = self._active()

        def counted() -> list[str]:
            number = self.federation.committed() + 1
            return [
                event["worker"] for event in active.events("counted") if event["round"] == number
            ]

        with contextlib.suppress(AssertionError):
            wait_until(counted, "an update was counted", timeout_s=5)
        number = int((counted() or [f"w{fault.who}"])[0].removeprefix("w"))
        self.workers[number].kill()
        active.kill()
        self.coordinators.remove(active)
        self.coordinators.append(self._coordinator())
        self._pause.wait(fault.for_s)
        self.workers[number] = self._worker(number)
        return f"killed the active coordinator and w{number}, which came back {fault.for_s} s later"

    def _kill_broker(self, fault: Fault, _: random.Random) -> str:
        assert self._broker.pid is not None
        killed = time.monotonic()
        os.kill(self._broker.pid, signal.SIGKILL)
        self._pause.wait(fault.for_s / 3)
        began = time.monotonic()
        self._broker = node.up(self._state, ports=self._broker.ports)
        committed, at = self._progress
        # No round can continue without the broker, so that time does not count as a stall.
        self._progress = committed, at + time.monotonic() - killed
        return (
            f"killed, began {fault.for_s / 3:.1f} s later, up {time.monotonic() - began:.1f} s on"
        )

    def _cut(self, fault: Fault, rng: random.Random) -> str:
        count = self.proxy.cut(fault.share, rng)
        return f"{count} connections reset"

    def _stall(self, fault: Fault, rng: random.Random) -> str:
        count = self.proxy.stall(fault.share, fault.for_s, rng)
        return f"{count} connections stalled for {fault.for_s} s"

    def _half_close(self, fault: Fault, rng: random.Random) -> str:
        count = self.proxy.half_close(fault.share, fault.side, fault.for_s, rng)
        return f"{count} connections ended towards the {fault.side} only, for {fault.for_s} s"

    def _slow(self, fault: Fault, rng: random.Random) -> str:
        count = self.proxy.slow_some(fault.share, _SLOW_BYTES_S, fault.for_s, rng)
        return f"{count} connections share {_SLOW_BYTES_S / 1e3:.0f} kB/s for {fault.for_s} s"

    def _stop(self, _: Fault, __: random.Random) -> str:
        """Stop the coordinator for longer than a worker may miss heartbeats, then continue it."""
        wait_until(lambda: any(map(_has_begun, self.coordinators)), "one has the run folder")
        victim = self._active()
        with self.federation.stopped(victim):
            self._pause.wait(_STOP_S)
        self._pause.wait(_QUIET_S)
        return f"stopped the active one (pid {victim.pid}) for {_STOP_S:.0f} s"

    def _alarm(self, fault: Fault, _: random.Random) -> str:
        """Raise a memory alarm, and publish nothing from the harness until it is over."""
        with self.federation.unheard("alarm"), memory_alarm(self._broker):
            self._pause.wait(fault.for_s)
        self._pause.wait(_QUIET_S)
        return f"a memory alarm for {fault.for_s} s"

    def _replay(self, fault: Fault, rng: random.Random) -> str:
        """Publish copies of past updates: the newest twice, and three old ones."""
        bodies = self.federation.bodies("update")
        if not bodies:
            return "nothing was sent yet"
        rounds = {path: msgpack.unpackb(path.read_bytes())[0]["round"] for path in bodies}
        bodies.sort(key=lambda path: (rounds[path], path.name))
        chosen = [bodies[-1], bodies[-1], *rng.choices(bodies, k=3)]
        self.federation.inject(
            [
                Hostile(f"{self.federation.name}.updates", "replay", path.read_bytes(), False)
                for path in chosen
            ]
        )
        return f"updates of rounds {', '.join(str(rounds[path]) for path in chosen)} again"

    def _garbage(self, fault: Fault, rng: random.Random) -> str:
        names = [f"w{number}" for number in range(WORKERS)]
        foe = Foe(rng, self.federation.name, names, self.federation.run_id())
        messages = foe.some(12)
        self.federation.inject(messages)
        return f"{len(messages)} hostile messages over all queues, such as {messages[0].what}"

    # --- the processes -------------------------------------------------------------------------

    def _coordinator(self, min_workers: int = 2) -> Program:
        return self.federation.coordinator(
            "--rounds", self._last_round, *self._timing, "--min-workers", min_workers,
            "--deadline", 20, "--config", f"train_s={_TRAIN_S}", "--config", f"slow_s={_SLOW_S}",
        )  # fmt: skip

    def _worker(self, number: int) -> Program:
        return self.federation.worker(
            number, WORKERS, "--heartbeat", _HEARTBEAT_S, FAULTS_KERNEL=str(_KERNEL)
        )

    def _active(self) -> Program:
        """Return the coordinator that holds the run folder, or will hold it."""
        for program in self.coordinators:
            if _has_begun(program):
                return program
        return self.coordinators[0]

    def _standby(self) -> Program:
        active = self._active()
        return next(program for program in self.coordinators if program is not active)


def _has_begun(coordinator: Program) -> bool:
    return bool(coordinator.events("started") or coordinator.events("resumed"))


def rain(
    faults: int,
    seed: int,
    rounds: int,
    folder: Path,
    say: Callable[[str], None],
    timing: tuple[str | int, ...] = SYNCHRONOUS,
) -> Verdict:
    """Run a federation under faults, end its processes, and judge it.

    Raises:
        AssertionError: if it hangs, or a process ends by itself.
    """
    state = folder / "broker"
    with marked(folder):  # so that a leftover broker is found too
        try:
            broker = node.up(state, ports=node.Ports(0, 0, 0, 0, 0))
            with Proxy(broker.ports.amqp) as proxy:
                url = broker.url.replace(f":{broker.ports.amqp}", f":{proxy.port}")
                management = broker.ports.management
                with Federation(folder, broker.url, management, url=url) as federation:
                    chaos = Chaos(federation, state, broker, proxy, say, timing)
                    chaos.run(fault_sequence(seed, faults), rounds)
                    federation.gather()
        finally:
            node.down(state, grace_s=0)
    federation.gather_orphans()
    return check(folder)


def main() -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=30, help="at least so many")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    parser.add_argument("--schedule", choices=["quorum", "buffered"], default="quorum")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fluffle-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    began = time.monotonic()
    try:
        timing = ASYNCHRONOUS if given.schedule == "buffered" else SYNCHRONOUS
        verdict = rain(given.faults, given.seed, given.rounds, folder, _say, timing)
    except KeyboardInterrupt:
        _say(f"interrupted; what there is is in {folder}")
        return 130
    except AssertionError as wrong:
        _say(f"verdict after {time.monotonic() - began:.0f} s, seed {given.seed}: FAILED: {wrong}")
        _say(f"everything is in {folder}")
        return 1
    _say(f"verdict after {time.monotonic() - began:.0f} s, seed {given.seed}: {verdict.text()}")
    if not verdict.clean:
        _say(f"everything is in {folder}")
    elif given.folder is None:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    return 0 if verdict.clean else 1


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Users' functions that are slow or never return."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import fluffle
from fluffle_common.protocol.events import Slow
from fluffle_common.tensors.checkpoint import save_checkpoint
from fluffle_coordinator.user_code import calls
from fluffle_coordinator.user_code.calls import call_user
from fluffle_worker.task import EvalResult, TrainResult

SCRIPT = """
import time
from fluffle_common.cli.exit_now import Interrupted
from fluffle_common.cli.runtime import run_until_signalled
from fluffle_coordinator.user_code.calls import call_user, leave

def hang():
    print("hangs", flush=True)
    time.sleep(1000)

try:
    run_until_signalled(call_user("hang", hang, print))
except Interrupted as signalled:
    leave(signalled.exit_code)
"""


class Task:
    num_examples, classes = 1, ()

    def init(self, seed):
        return {"w": np.zeros(2, np.float32)}

    def train(self, weights, plan, progress):
        return TrainResult({"w": weights["w"] + 1}, 1)

    def evaluate(self, weights):
        return EvalResult(0.0, 1)


def fail():
    raise KeyError("b")


async def test_a_result_and_an_error_reach_the_caller():
    assert await call_user("it", lambda: 7, print) == 7
    with pytest.raises(KeyError, match="b"):
        await call_user("it", fail, print)


async def test_a_slow_function_is_reported_ever_more_rarely(monkeypatch):
    monkeypatch.setattr(calls, "_SLOW_S", 0.2)
    events: list[Slow] = []
    third = threading.Event()

    def record(event: Slow) -> None:
        events.append(event)
        if len(events) == 3:
            third.set()

    await call_user("the evaluate hook of round 3", lambda: third.wait(60), record)
    assert [event.running_s for event in events[:3]] == [0.2, 0.4, 0.8]
    assert events[0].sentence() == (
        "the evaluate hook of round 3 has been running for 0.2 s; the run waits for it"
    )


@pytest.mark.parametrize("what", ["evaluate", "on_round", "init", "finish"])
async def test_a_run_can_be_cancelled_while_users_code_hangs(what, tmp_path):
    hangs, over = threading.Event(), threading.Event()

    def hang(*_):
        hangs.set()
        over.wait()

    class Hanging(fluffle.Strategy):
        def init(self, weights):
            return []

        def fold(self, state, contribution):
            return state

        def finish(self, state, weights):
            return weights, state

    given = {what: hang}
    if what in ("init", "finish"):  # of a strategy
        setattr(Hanging, what, hang)
        save_checkpoint(tmp_path / "first.safetensors", Task().init(0), {})
        given = {"strategy": Hanging(), "init": tmp_path / "first.safetensors"}
    run = asyncio.ensure_future(fluffle.arun([Task()], rounds=2, **given))
    try:
        assert await asyncio.to_thread(hangs.wait, 60)
        run.cancel()
        await asyncio.wait([run], timeout=20)
        assert run.cancelled()
    finally:
        over.set()


def test_one_signal_ends_the_process_while_users_code_hangs():
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hangs\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM

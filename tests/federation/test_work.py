"""Work that is lost, slow, hung, rejected, too large or invalid."""

from __future__ import annotations

import asyncio
import shutil

import msgpack
import numpy as np
import pytest

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import (
    Bye,
    Echo,
    Exchange,
    Fit,
    Plan,
    Refusal,
    Stop,
    Verdict,
)
from fluffle_common.protocol.transfer_parts import pack
from fluffle_common.protocol.wire_format import encode
from fluffle_common.tensors.layout import signature_of
from fluffle_common.transport.base import Properties
from fluffle_worker import job
from fluffle_worker.signature import UNKNOWN
from fluffle_worker.task import TrainResult
from tests.federation.harness import NAME, Adder, Quorum

LARGE = 3 * 2**12  # of float32: three small parts


def test_a_stop_that_is_lost_is_sent_again(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1)
        workers = federation.workers(2)
        coordinator.line.lose_next = {"stop"}
        assert (await coordinator.end()).outcome == "finished"
        for worker in workers:
            await worker.end(60)

    federated(scenario)


@pytest.mark.parametrize("kind", ["fit", "part"])
def test_a_model_in_parts_continues_after_the_coordinators_outage(federated, in_small_parts, kind):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, deadline_s=600)
        for name in "ab":
            federation.worker(name, Adder(federation.loop, size=LARGE))
        await coordinator.log.until("joined", 2)
        coordinator.line.lose_next = {kind}
        await coordinator.log.until("reconnected")
        await coordinator.log.until("committed", within_s=60)
        await coordinator.end()
        federation.check_averages({"a": 1.0, "b": 1.0})

    federated(scenario)


def test_a_long_round_is_waited_for_while_its_workers_advance(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, deadline_s=60, max_reopenings=1)
        federation.worker("a", Adder(federation.loop))
        federation.worker("b", Adder(federation.loop, steps=70, step_s=20.0))
        state = await coordinator.end()
        assert state.outcome == "finished"
        assert federation.participants() == [["a", "b"]]
        assert len(coordinator.log.of("reopened")) > 20

    federated(scenario)


def test_a_coordinator_whose_run_folder_is_outdated_says_so_once(federated):
    async def scenario(federation):
        federation.workers(2)
        coordinator = federation.coordinator(rounds=6, number=2)
        await coordinator.log.until("committed", 2)
        backup = shutil.copytree(federation.folder, federation.folder.with_name("backup"))
        await coordinator.log.until("committed", 4)
        await coordinator.kill()
        federation.folder = backup
        coordinator = federation.coordinator(rounds=6, number=2)
        assert (await coordinator.end()).outcome == "finished"
        (outdated,) = coordinator.log.of("outdated")
        assert outdated["round"] in {2, 3}  # the copy may have the next commit
        assert outdated["ahead"] > outdated["round"] + 1

    federated(scenario)


def test_a_stalled_training_is_reported_and_optionally_not_waited_for(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, deadline_s=6000, stall_timeout_s=300)
        hangs = Adder(federation.loop, odd=lambda step: step == 3 and federation.loop.sleep(1e9))
        for name in "ab":
            federation.worker(name, Adder(federation.loop))
        federation.worker("c", hangs)
        event = await coordinator.log.until("stalled")
        assert (event["worker"], event["step"], event["steps"]) == ("c", 3, 4)
        await coordinator.log.until("committed", within_s=600)
        assert federation.participants() == [["a", "b"]]

    federated(scenario)


def test_a_last_evaluation_that_hangs_is_optionally_not_waited_for(federated):
    class Hangs(Adder):
        def evaluate(self, weights):
            if weights["w"][0]:
                federation_loop[0].sleep(1e9)
            return super().evaluate(weights)

    federation_loop = []

    async def scenario(federation):
        federation_loop.append(federation.loop)
        coordinator = federation.coordinator(rounds=1, deadline_s=6000, stall_timeout_s=300)
        federation.worker("a", Adder(federation.loop))
        federation.worker("b", Hangs(federation.loop))
        assert (await coordinator.end(within_s=600)).outcome == "finished"
        (line,) = federation.history("evaluated")[-1:]
        assert (line["round"], line["evaluators"]) == (1, ["a"])

    federated(scenario)


class Bad(Adder):
    """A task whose first update is not finite and whose later ones are valid."""

    def train(self, weights, plan, progress):
        result = super().train(weights, plan, progress)
        if len(self.trained) > 1:
            return result
        return TrainResult({"w": np.full(self.size, np.nan, np.float32)}, 10, {})


def test_a_rejected_update_is_not_sent_again_byte_for_byte(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, number=2, deadline_s=60)
        bad = Bad(federation.loop)
        federation.worker("a", Adder(federation.loop))
        worker = federation.worker("b", bad)
        state = await coordinator.end()
        assert state.outcome == "finished"
        (event,) = worker.log.of("not_counted")
        assert event["round"] == 1
        assert "NaN" in event["reason"]
        assert len(coordinator.log.of("rejected")) == 1
        assert len(bad.trained) == 2
        federation.check_averages({"a": 1.0, "b": 1.0})

    federated(scenario)


class AlwaysBad(Adder):
    """Every update is full of NaN."""

    def train(self, weights, plan, progress):
        super().train(weights, plan, progress)
        return TrainResult({"w": np.full(self.size, np.nan, np.float32)}, 10, {})


@pytest.mark.parametrize(
    ("task", "error"), [(Bad, None), (AlwaysBad, "its update was rejected: tensor 'w' has")]
)
def test_a_worker_whose_updates_are_all_rejected_ends_with_an_error(federated, task, error):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, number=1, grace_s=5, deadline_s=60)
        federation.worker("a", Adder(federation.loop))
        worker = federation.worker("b", task(federation.loop))
        state = await coordinator.end()
        await worker.end()
        assert state.outcome == "finished"
        verdict = worker.service.verdict()
        if error is None:
            assert verdict is None
        else:
            assert isinstance(verdict, TaskError)
            assert f"the task failed in every round: {error}" in str(verdict)

    federated(scenario)


def test_a_worker_is_told_that_its_update_came_too_late(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, number=1, min_workers=2)
        federation.worker("a", Adder(federation.loop, step_s=1.0))
        slow = federation.worker("b", Adder(federation.loop))
        await coordinator.log.until("opened")
        slow.line.hold(outgoing=True)
        await coordinator.log.until("committed")
        slow.line.release()
        late = await coordinator.log.until("late")
        assert (await coordinator.end()).outcome == "finished"
        assert [event["round"] for event in slow.log.of("late")] == [late["round"]] == [1]

    federated(scenario)


@pytest.mark.parametrize("step_s", [1.0, 200.0])
def test_a_worker_redeclares_a_lost_outbox(federated, in_small_parts, step_s):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, deadline_s=6000)
        for name in "ab":
            federation.worker(name, Adder(federation.loop, size=LARGE, step_s=step_s))
        await coordinator.log.until("opened")
        outbox = federation.topology.outbox("b")
        federation.broker.delete(outbox)  # as if it had expired
        await asyncio.sleep(3.5 * step_s)  # the training takes 4 steps
        assert (outbox in federation.broker.queues) == (step_s > 10)
        assert (await coordinator.end()).outcome == "finished"
        federation.check_averages({"a": 1.0, "b": 1.0})
        assert federation.participants() == [["a", "b"]] * 2
        # A short training ends before the worker redeclares the queue, so its parts are lost once.
        assert len(coordinator.log.of("resend")) <= (3 if step_s < 10 else 0)

    federated(scenario)


@pytest.mark.parametrize("protocol", [1, 3])
def test_a_worker_of_another_version_is_refused_in_its_own_protocol(federated, protocol):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1)
        await coordinator.log.until("connected")
        link = await federation.broker.open()
        await link.declare(federation.topology.queues_of("old"))
        hello = {
            "protocol": protocol, "federation": NAME, "kind": "hello", "worker": "old",
            "session": "s1", "num_examples": 10, "task": "t", "heartbeat_s": 2.0, "whatever": 1,
        }  # fmt: skip
        body = msgpack.packb([hello, b""])
        route = {"exchange": federation.topology.results, "keys": ["hello.old"]}
        for _ in range(3):
            await link.publish(body, Properties(type="hello", message_id="h"), **route)
        event = await coordinator.log.until("refused")
        assert event["reason"] == (
            f"worker old speaks protocol {protocol}, but this coordinator speaks protocol 2; "
            "install the same version of fluffle on both sides"
        )
        await asyncio.sleep(5)
        assert len(coordinator.log.of("refused")) == 1
        mail = [(await link.get(federation.topology.inbox("old"))).body]
        assert await link.get(federation.topology.inbox("old")) is None
        refusal, _ = msgpack.unpackb(mail[0])
        assert refusal == {
            "protocol": protocol, "federation": NAME, "kind": "refusal", "session": "s1",
            "reason": event["reason"],
        }  # fmt: skip
        lower = msgpack.packb([{**hello, "protocol": 2, "protocols": [2, protocol]}, b""])
        await link.publish(lower, Properties(type="hello", message_id="h2"), **route)
        await coordinator.log.until("joined")
        welcome, _ = msgpack.unpackb((await link.get(federation.topology.inbox("old"))).body)
        assert (welcome["kind"], welcome["protocol"]) == ("welcome", 2)
        bye = Bye(federation=NAME, worker="old", session="s1", reason="of a test")
        route["keys"] = ["bye.old"]
        await link.publish(encode(bye), Properties(type="bye", message_id="b"), **route)
        await coordinator.log.until("left")
        federation.workers(2)
        assert (await coordinator.end()).outcome == "finished"

    federated(scenario)


@pytest.mark.parametrize("says", [10**9, 10**12])
def test_an_update_weighs_what_its_worker_announced(federated, says):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2)
        federation.worker("a", Adder(federation.loop, 1.0))
        federation.worker("b", Adder(federation.loop, 3.0, says=says))
        await coordinator.end()
        federation.check_averages({"a": 1.0, "b": 3.0})
        np.testing.assert_allclose(federation.weights(2)["w"], 4.0)
        assert {event["worker"] for event in coordinator.log.of("overweight")} == {"b"}

    federated(scenario)


def test_first_weights_come_from_another_worker_if_the_first_hangs(federated):
    class Hangs(Adder):
        signature = signature_of({"w": np.zeros(4, np.float32)})  # known without asking init()

        def init(self, seed):
            self.loop.sleep(1e9)
            raise AssertionError

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, min_workers=3, deadline_s=60)
        federation.worker("a", Hangs(federation.loop))
        for name in "bc":
            federation.worker(name, Adder(federation.loop))
        await coordinator.log.until("first_weights", within_s=120)
        assert [event["worker"] for event in coordinator.log.of("init")] == ["a", "b"]

    federated(scenario)


def test_a_reopened_round_asks_idle_workers(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=1, min_workers=4, fraction=0.5, deadline_s=60, seed=3
        )
        hang = lambda _: federation.loop.sleep(1e9)  # noqa: E731
        workers = federation.workers(4)
        asked = (await coordinator.log.until("opened"))["asked"]
        for worker in workers:
            if worker.name in asked:
                worker.service._task.odd = hang
        state = await coordinator.end()
        assert state.outcome == "finished"
        (participants,) = federation.participants()
        assert set(participants) == set("abcd") - set(asked)

    federated(scenario)


def test_a_round_waits_while_its_sample_cannot_reach_the_quorum(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=1, min_workers=3, fraction=0.5, quorum=Quorum(number=3)
        )
        federation.workers(4)
        await asyncio.sleep(60)
        event = coordinator.log.of("waiting")[-1]
        assert "4 of 5" in event["reason"]
        federation.worker("e")
        assert (await coordinator.end()).outcome == "finished"

    federated(scenario)


def test_the_majority_decides_on_classes_and_the_odd_one_leaves(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, min_workers=3)
        odd = federation.worker("a", Adder(federation.loop, classes=("x", "y")))
        for name in "bcd":
            federation.worker(name, Adder(federation.loop, classes=("x", "z")))
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["b", "c", "d"]]
        with pytest.raises(Exception, match=r"has the class y, .*lacks the class z; .* from b, c;"):
            await odd.end()

    federated(scenario)


def test_a_worker_passes_over_what_another_run_and_another_session_were_sent(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, min_workers=1)
        worker = federation.worker("a", exchanges={"sum": lambda *_: pytest.fail("handled")})
        await coordinator.log.until("counted")  # so that a verdict would find the update
        link, base = await federation.broker.open(), coordinator.service.state.base
        of = {"federation": NAME, "run": "q", "round": 1}
        for message in (
            Stop(**of, reason="it is over"),
            Refusal(federation=NAME, session="x", reason="not wanted"),
            Verdict(**of, base=base, outcome="rejected", reason="NaN", train_again=True),
            Verdict(**of, base=base, outcome="late", reason="too late"),
            Exchange(**of, name="sum", phase="one"),
            Echo(federation=NAME, session="x", number=1),
        ):
            keys = [federation.topology.inbox("a")]
            await link.publish(encode(message), Properties(), exchange="", keys=keys)
        assert (await coordinator.end()).outcome == "finished"
        await worker.end()
        assert [one["reason"] for one in worker.log.of("rejected")] == [
            "a message of kind echo is not for workers"
        ]
        assert not {"not_counted", "late"} & {name for _, name, _ in worker.log.lines}
        assert len(worker.service._task.trained) == 2

    federated(scenario)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({}, "the message contains no tensor"),
        ({"strategy/w": np.zeros(2, np.float32)}, "'strategy/w' begins with 'strategy/'"),
        ({"w": np.full(2, np.nan, np.float32)}, "tensor 'w' has"),
    ],
)
def test_first_weights_that_no_run_can_use_stop_it_with_the_reason(
    federated, monkeypatch, weights, reason
):
    monkeypatch.setattr(job, "check_signature", lambda _: None)  # as another program's worker may

    async def scenario(federation):
        task = Adder(federation.loop)
        task.init, task.signature = lambda seed: weights, UNKNOWN
        federation.worker("a", task)
        state = await federation.coordinator(rounds=2, min_workers=1).end()
        assert state.outcome == "stopped"
        assert reason in state.reason

    federated(scenario)


def test_a_worker_that_stays_trains_the_round_again_that_was_stopped(federated):
    async def scenario(federation):
        worker = federation.worker("a", Adder(federation.loop, step_s=4.0), stay=True)
        options = {"rounds": 1, "min_workers": 1}
        stopped = federation.coordinator(**options, deadline_s=10.0, on_deadline="stop")
        assert (await stopped.end()).outcome == "stopped"
        await worker.log.until("ended")
        assert (await federation.coordinator(**options).end(600.0)).outcome == "finished"

    federated(scenario)


def test_a_stop_amid_the_parts_of_a_model_ends_that_work_too(federated, in_small_parts):
    async def scenario(federation):
        worker = federation.worker("a", Adder(federation.loop, size=LARGE), stay=True)
        coordinator = federation.coordinator(min_workers=2)
        await coordinator.log.until("joined")
        of = {"federation": NAME, "run": coordinator.service.state.run, "round": 1}
        fit = Fit(**of, base="b", evaluate=False, plan=Plan())
        _, body, parts = pack(fit, {"w": np.zeros(LARGE, np.float32)})
        bodies = [body, next(parts), encode(Stop(**of, reason="it is over")), *parts]
        link = await federation.broker.open()
        for body in bodies:
            keys = [federation.topology.inbox("a")]
            await link.publish(body, Properties(), exchange="", keys=keys)
        await worker.log.until("ended")
        await asyncio.sleep(5.0)
        assert not worker.log.of("begin")
        assert coordinator.service.state.workers["a"].state == "idle"

    federated(scenario)

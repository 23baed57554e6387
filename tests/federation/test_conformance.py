"""``fluffle conformance`` passes our own worker, and finds the mistakes of others."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from typing import Any

import msgpack
import pytest

from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol import wire_format
from fluffle_common.protocol.messages import Bye, Evaluate, Heartbeat, Hello, Stop
from fluffle_common.protocol.transfer_parts import Incoming
from fluffle_common.protocol.wire_format import read_tensors
from fluffle_common.tensors.frozen import NO_FROZEN
from fluffle_common.transport import messaging
from fluffle_common.transport.base import Properties
from fluffle_coordinator.conformance.examine import SCENARIOS, examine
from fluffle_coordinator.conformance.listener import ExamOptions
from fluffle_coordinator.conformance.scenario import Finding
from fluffle_worker import connection, job, machine, service, uploader
from fluffle_worker.heartbeat import Presence
from fluffle_worker.service import WorkerService
from fluffle_worker.signature import UNKNOWN
from tests.federation.harness import Adder
from tests.federation.test_frozen import OnABackbone

LARGE = 3 * 2**20  # of float32: 12 MiB, three parts


class Slowing(Adder):
    """Takes longer each time, so that two trainings can be told apart by their seconds."""

    def train(self, weights, plan, progress):
        self.step_s += 0.01
        return super().train(weights, plan, progress)


class SlowingOnABackbone(Slowing, OnABackbone):
    """Does so with frozen tensors, and with a tensor that is no parameter."""

    statistics = ("w",)


async def examined(federation, **how: Any) -> dict[str, Finding]:
    options = ExamOptions(patience_s=30, **how)
    examination = examine(federation.broker, federation.topology, options)
    findings = [finding async for finding in examination]
    assert [finding.scenario for finding in findings] == [one.name for one in SCENARIOS]
    return {finding.scenario: finding for finding in findings}


def failed(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.outcome == "failed"]


def skipped(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.outcome == "skipped"]


def test_our_worker_passes(federated):
    async def scenario(federation):
        worker = federation.worker("w", Slowing(federation.loop))
        findings = await examined(federation)
        assert failed(findings) == [], [
            finding for finding in findings.values() if finding.outcome == "failed"
        ]
        in_parts = ["lost part", "update in parts", "another digest"]
        assert skipped(findings) == ["frozen tensors", *in_parts, "refusal"]
        await worker.end(60)

    federated(scenario)


def test_our_worker_passes_with_a_model_in_parts_and_after_a_refusal(federated):
    async def scenario(federation):
        def tell(line: str) -> None:
            if "once more" in line:
                federation.worker("w", Slowing(federation.loop, size=LARGE))

        federation.worker("w", Slowing(federation.loop, size=LARGE))
        findings = await examined(federation, twice=True, tell=tell)
        assert failed(findings) == [], [
            finding for finding in findings.values() if finding.outcome == "failed"
        ]
        assert skipped(findings) == ["frozen tensors"]
        assert "3 parts" in findings["lost part"].seen

    federated(scenario)


def test_it_takes_frozen_tensors_as_the_document_requires(federated):
    async def scenario(federation):
        federation.worker("w", SlowingOnABackbone(federation.loop))
        findings = await examined(federation)
        assert failed(findings) == []
        assert findings["frozen tensors"].seen == "1 frozen tensors, sent once for two rounds"

    federated(scenario)


def test_scenarios_after_a_failed_round_are_not_tried(federated):
    async def scenario(federation):
        federation.worker("w")  # which trains its own model only
        findings = await examined(federation, large=True)
        assert failed(findings) == ["fit"]
        assert "'conformance/large' is not in this task's model" in findings["fit"].seen
        assert findings["stop"].seen == "not tried, because 'fit' failed"

    federated(scenario)


def test_a_worker_that_stays_after_the_stop_passes(federated):
    async def scenario(federation):
        federation.worker("w", Slowing(federation.loop), stay=True)
        findings = await examined(federation)
        assert failed(findings) == [], [
            finding for finding in findings.values() if finding.outcome == "failed"
        ]
        assert "stays" in findings["stop"].seen

    federated(scenario)


def test_earlier_messages_do_not_count_and_the_worker_may_run_already(federated):
    async def scenario(federation):
        earlier = federation.worker("w", Slowing(federation.loop))
        findings = await examined(federation)
        assert findings["hello"].outcome == "ok"
        await earlier.end(60)
        await federation.worker("dead").kill()
        here = federation.worker("w", Slowing(federation.loop))
        await asyncio.sleep(5)
        findings = await examined(federation, worker="w")
        assert failed(findings) == [], [
            finding for finding in findings.values() if finding.outcome == "failed"
        ]
        assert "worker w was started before this command" in findings["hello"].seen
        await here.end(60)

    federated(scenario)


def test_a_bye_from_before_is_no_sign_of_life(federated):
    async def scenario(federation):
        async def leave_and_return():
            link = await federation.broker.open()
            bye = Bye(federation="letters", worker="w", session="earlier", reason="stopped")
            properties = Properties(type="bye", message_id="bye")
            results = federation.topology.results
            await link.publish(
                wire_format.encode(bye), properties, exchange=results, keys=["bye.w"]
            )
            await link.close()
            federation.worker("w", Slowing(federation.loop))

        tasks = set[asyncio.Future[None]]()

        def tell(line: str) -> None:
            if line.startswith("waiting for"):
                tasks.add(asyncio.ensure_future(leave_and_return()))

        findings = await examined(federation, worker="w", tell=tell)
        assert failed(findings) == []
        assert findings["hello"].outcome == "ok"

    federated(scenario)


def test_a_federation_in_use_is_left_alone(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1000)
        workers = federation.workers(2)
        await coordinator.log.until("committed", 2)
        with pytest.raises(RunError, match="has a coordinator"):
            await examined(federation)
        await coordinator.kill()
        waiting = federation.broker.queues[federation.topology.updates].ready
        while not waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        for worker in workers:
            await worker.kill()
        with pytest.raises(UsageError, match="has messages of run"):
            await examined(federation)
        assert waiting

    federated(scenario)


def test_it_gives_up_without_a_worker(federated):
    async def scenario(federation):
        with pytest.raises(RunError, match="no worker connected"):
            await examined(federation, wait_s=20)

    federated(scenario)


def test_a_malformed_hello_is_reported(federated, monkeypatch):
    monkeypatch.setattr(Hello, "model_dump", lambda self, **_: {"kind": "hello", "protocol": 2})

    async def scenario(federation):
        federation.worker("w")
        findings = await examined(federation)
        assert failed(findings) == ["hello", "well formed"]
        assert (
            "a message in letters.presence is malformed (hello.federation" in findings["hello"].seen
        )
        assert findings["fit"].seen == "not tried, because 'hello' failed"

    federated(scenario)


def test_a_failure_to_make_first_weights_is_reported_with_its_reason(federated):
    async def scenario(federation):
        task = Adder(federation.loop)
        task.init, task.signature = lambda seed: 1 / 0, UNKNOWN
        federation.worker("w", task)
        findings = await examined(federation)
        reason = "the worker sent a failure instead of first weights: ZeroDivisionError: division"
        assert findings["first weights"].seen.startswith(reason)

    federated(scenario)


# --- mistakes of workers -------------------------------------------------------------------------


def trains_again(patch):
    real = machine._asked

    def asked(state, work):
        if work != state.answered:
            return real(state, work)
        return real(state._replace(answered=None), work)

    patch(machine, "_asked", asked)


def answers_any_attempt(patch):
    real = WorkerService._work

    def work(self, message, payload):
        if not isinstance(message, Evaluate):
            message = message.model_copy(update={"attempt": 0})
        real(self, message, payload)

    patch(WorkerService, "_work", work)
    patch(WorkerService, "_handle_verdict", lambda self, verdict: None)


def leaves_at_any_stop(patch):
    real = WorkerService._receive

    def receive(self, message, payload):
        if isinstance(message, Stop):
            message = message.model_copy(update={"run": self._run})
        real(self, message, payload)

    patch(WorkerService, "_receive", receive)


def knows_no_critical_keys(patch):
    def lenient(body, federation):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            header, payload = msgpack.unpackb(body)
            header.pop("critical", None)
            body = msgpack.packb([header, payload])
        return wire_format.decode(body, federation)

    patch(connection, "decode", lenient)


def works_for_any_federation(patch):
    def lenient(body, federation):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            header, payload = msgpack.unpackb(body)
            body = msgpack.packb([{**header, "federation": federation}, payload])
        return wire_format.decode(body, federation)

    patch(connection, "decode", lenient)


def does_not_look_at_the_weights(patch):
    patch(
        service,
        "read_work",
        lambda work, payload: (read_tensors(work.tensors, payload), {}, NO_FROZEN),
    )


def hides_that_it_receives(patch):
    real = Presence.now

    def now(self, state, work, *, steps=0):
        real(self, "idle" if state == "receiving" else state, work, steps=steps)

    patch(Presence, "now", now)


def forgets_what_it_did(patch):
    real = Presence.speak_up

    def speak_up(self):
        self._doing |= {"run": None, "round": 0, "base": None}
        real(self)

    patch(Presence, "speak_up", speak_up)


def leaves_without_a_word(patch):
    async def bye(self, link, reason):
        return None

    patch(Presence, "bye", bye)


def is_never_the_same(patch):
    real = Presence.speak_up

    def speak_up(self):
        self._ids["session"] = uuid.uuid4().hex
        real(self)

    patch(Presence, "speak_up", speak_up)


def sends_what_a_broker_forgets(patch):
    real = uploader.send_tensors

    async def send_tensors(link, message, weights, route, **how):
        await real(link, message, weights, dataclasses.replace(route, durable=False), **how)

    patch(uploader, "send_tensors", send_tensors)


def evaluates_another_round(patch):
    real = job.Executor._evaluate

    def evaluate(*arguments):
        evaluation = real(*arguments)
        return evaluation and evaluation.model_copy(update={"round": evaluation.round + 1})

    patch(job.Executor, "_evaluate", evaluate)


def is_silent_at_work(patch):
    real = Presence._start_sending

    def start_sending(self, link, message):
        if not isinstance(message, Heartbeat) or message.state == "idle":
            real(self, link, message)

    patch(Presence, "_start_sending", start_sending)


def hides_its_frozen_tensors(patch):
    real = Presence._status
    patch(Presence, "_status", lambda self, *on: {**real(self, *on), "frozen": ()})


def sends_everything_in_one_piece(patch):
    patch(messaging, "fits", lambda pieces: True)


def leaves_out_the_sequence(patch):
    real = uploader.send_tensors

    async def send_tensors(link, message, weights, route, **how):
        await real(link, message.model_copy(update={"sequence": None}), weights, route, **how)

    patch(uploader, "send_tensors", send_tensors)


def trains_everything(patch):
    patch(job, "select_tensors", lambda weights, train: weights)


def has_no_extra_tensors_and_does_not_say_so(patch):
    patch(job, "_extra", lambda *_: {})


def reads_sealed_payloads(patch):
    def lenient(body, federation):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            header, payload = msgpack.unpackb(body)
            header.pop("sealed", None)
            body = msgpack.packb([header, payload])
        return wire_format.decode(body, federation)

    patch(connection, "decode", lenient)


def does_not_compare_digests(patch):
    patch(Incoming, "check_digest", lambda self: None)


MISTAKES = {
    trains_again: {"same fit again"},
    answers_any_attempt: {"rejected update"},
    leaves_at_any_stop: {"stop of another run"},
    knows_no_critical_keys: {"unknown critical key"},
    works_for_any_federation: {"messages to ignore"},
    does_not_look_at_the_weights: {"unsound weights"},
    hides_that_it_receives: {"lost part"},
    forgets_what_it_did: {"last work"},
    leaves_without_a_word: {"stop"},
    is_never_the_same: {"one session"},
    sends_what_a_broker_forgets: {"well formed"},
    evaluates_another_round: {"evaluation before the update", "evaluate"},
    is_silent_at_work: {"heartbeats"},
    hides_its_frozen_tensors: {"frozen tensors"},
    sends_everything_in_one_piece: {"update in parts"},
    leaves_out_the_sequence: {"ticket"},
    trains_everything: {"part of the model"},
    has_no_extra_tensors_and_does_not_say_so: {"extra tensors"},
    reads_sealed_payloads: {"messages to ignore"},
    does_not_compare_digests: {"another digest"},
}


IN_PARTS = (hides_that_it_receives, sends_everything_in_one_piece, does_not_compare_digests)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_each_mistake_is_found_by_its_scenario(federated, monkeypatch, mistake):
    mistake(monkeypatch.setattr)

    async def scenario(federation):
        size = LARGE if mistake in IN_PARTS else 4
        step_s = 5.0 if mistake is is_silent_at_work else 0.25
        task = Slowing(federation.loop, size=size, step_s=step_s)
        if mistake is hides_its_frozen_tensors:
            task = SlowingOnABackbone(federation.loop)
        federation.worker("w", task)
        assert set(failed(await examined(federation))) == MISTAKES[mistake]

    federated(scenario)

"""Extra tensors: what strategies broadcast and request, and what local rules keep."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fluffle
from fluffle_common.errors import TaskError
from fluffle_common.protocol import wire_format
from fluffle_common.protocol.messages import Compression, Plan
from fluffle_coordinator.cli.run_folder import replay
from fluffle_coordinator.strategy.base import Needs
from fluffle_coordinator.user_code.strategy_loading import load_strategy
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.loading import use_local_rule
from fluffle_worker.task import EvalResult, TrainResult
from tests.federation.harness import Adder

FILE = Path(__file__).with_name("scaffold.py")
TARGETS = {"a": 1.0, "b": 4.0}
STEPS = {"a": 2, "b": 5}
SIZE = 40


class Descent:
    """Gradient descent on a quadratic; each worker has its own curvature."""

    num_examples = 10

    def __init__(
        self, name: str, rule: str | None = f"{FILE}:controlled", pause: Any = lambda: None
    ) -> None:
        self.target, self.steps, self.pause = TARGETS[name], STEPS[name], pause
        self.local_rule = BoundRule()
        if rule:
            use_local_rule(self, rule)

    def init(self, seed: int) -> Any:
        return {"w": np.zeros(SIZE, np.float32), "b": np.zeros((), np.float32)}

    def evaluate(self, weights: Any) -> EvalResult:
        return EvalResult(0.0, 1)

    def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
        state = self.local_rule.begin(weights)
        for number in range(1, self.steps + 1):
            gradient = {n: np.asarray(w - np.float32(self.target)) for n, w in weights.items()}
            gradient, state = self.local_rule.gradient(gradient, weights, state)
            step = np.float32(0.5)
            weights = {n: np.asarray(w - step * gradient[n]) for n, w in weights.items()}
            progress(number, self.steps, None)
            self.pause()
        self.local_rule.end(weights, state)
        return TrainResult(weights, self.num_examples)


def reference(rounds: int) -> list[float]:
    """Return x after each round, by the algorithm in the paper."""
    x, c, own, values = 0.0, 0.0, dict.fromkeys(TARGETS, 0.0), []
    for _ in range(rounds):
        moved, changed = [], []
        for name, target in TARGETS.items():
            y = x
            for _ in range(STEPS[name]):
                y -= 0.5 * (y - target + c - own[name])
            new = own[name] - c + (x - y) / (STEPS[name] * 0.5)
            moved.append(y - x)
            changed.append(new - own[name])
            own[name] = new
        x += float(np.mean(moved))
        c += sum(changed) / len(TARGETS)
        values.append(x)
    return values


def strategy():
    return load_strategy(f"{FILE}:scaffold")


def check(federation, rounds: int) -> None:
    for number, expected in enumerate(reference(rounds), start=1):
        for tensor in federation.weights(number).values():
            np.testing.assert_allclose(tensor, expected, rtol=1e-5)


@pytest.mark.parametrize("part_bytes", [wire_format.PART_BYTES, 64])
def test_scaffold_from_a_file_matches_the_paper(federated, monkeypatch, part_bytes):
    """Compare with the paper, for tensors in one message and in parts."""
    monkeypatch.setattr(wire_format, "PART_BYTES", part_bytes)
    monkeypatch.setattr("fluffle_coordinator.service.outbox.PART_BYTES", part_bytes)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=4, strategy=strategy(), keep_updates=True)
        for name in TARGETS:
            federation.worker(name, Descent(name))
        assert (await coordinator.end()).outcome == "finished"
        assert not coordinator.log.of("rejected")
        check(federation, 4)
        for number in ("1", "4"):
            words = [str(federation.folder), "--round", number, "--strategy", f"{FILE}:scaffold"]
            shown = CliRunner().invoke(replay, words)
            assert (shown.exit_code, "equal: all 2 tensors" in shown.output) == (0, True)

    federated(scenario)


def test_the_states_of_rule_and_strategy_survive_restarts(federated, tmp_path):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, strategy=strategy())
        first = [
            federation.worker(name, Descent(name), state_dir=tmp_path / name) for name in TARGETS
        ]
        await coordinator.end()
        for process in first:
            await process.end()
        again = federation.coordinator(rounds=4, strategy=strategy())
        for name in TARGETS:
            federation.worker(name, Descent(name), state_dir=tmp_path / name)
        assert (await again.end()).outcome == "finished"
        check(federation, 4)
        names = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert names == [f"local-rule-000{number}.safetensors" for number in (2, 3, 4)]

    federated(scenario)


def test_a_worker_without_the_rule_names_what_is_missing(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, number=1, min_workers=2, strategy=strategy())
        federation.worker("a", Descent("a", pause=lambda: federation.loop.sleep(1.0)))
        b = federation.worker("b", Descent("b", rule=None))
        await coordinator.end()
        assert federation.participants() == [["a"]]
        (event, *_) = b.log.of("failure")
        assert "requires extra tensors" in event["reason"]
        assert "--local-rule" in event["reason"]

    federated(scenario)


def test_tensors_that_nobody_requests_stay_with_the_worker(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1)
        sends = [Descent(name, rule=None) for name in TARGETS]
        for name, task in zip(TARGETS, sends, strict=True):
            task.local_rule = BoundRule(
                SimpleNamespace(
                    begin=lambda *_: None,
                    gradient=lambda gradient, weights, state: (gradient, state),
                    end=lambda trained, state: ({}, {"private": np.ones(9)}),
                )
            )
            federation.worker(name, task)
        await coordinator.end()
        (line,) = federation.history()
        # 40 float32, and one more at the next 64-byte boundary.
        assert [one["bytes"] for one in line["participants"]] == [196, 196]

    federated(scenario)


@pytest.mark.parametrize(
    ("wanted", "sent", "reason"),
    [
        ({"steps": ()}, {"steps": np.ones(2)}, "weights, is float64 (2,); expected floats of sh"),
        ({"steps": ()}, {"steps": np.array(1)}, "the weights, is int64 ()"),
        ({"steps": ()}, {"step": np.ones(())}, "lacks the tensor 'steps', which"),
        (
            {"steps": ()},
            {"steps": np.ones(()), "more": np.ones(1)},
            "'more', which the strategy did not request",
        ),
        ({"steps": ()}, {"steps": np.array(np.nan)}, "'steps' has 1 value that is NaN"),
        ("model", {"w": np.ones(3)}, "weights, is float64 (3,); expected floats of shape (4,)"),
        ("model", {"v": np.ones(4)}, "'v', which the strategy did not request"),
    ],
)
def test_extra_tensors_that_do_not_match_the_request_fail(federated, wanted, sent, reason):
    named = strategy()
    object.__setattr__(named, "strategy", SimpleNamespace(**{
        name: getattr(named.strategy, name) for name in ("init", "fold", "finish", "dump", "load")
    }, broadcast=lambda state: {}, needs=Needs(extra=wanted)))  # fmt: skip

    class Sends(Adder):
        def train(self, *of: Any) -> TrainResult:
            result = super().train(*of)
            return TrainResult(result.weights, result.num_examples, {}, sent)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, min_workers=1, strategy=named)
        federation.worker("a", Sends(federation.loop))
        assert reason in (await coordinator.log.until("failure"))["reason"]
        await coordinator.kill()

    federated(scenario)


def test_an_invalid_broadcast_stops_the_run(federated):
    class Broken(type(strategy().strategy)):
        def broadcast(self, state: Any) -> Any:
            return {"c": np.array([1.0, np.nan])}

    named = strategy()
    object.__setattr__(named, "strategy", Broken())

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, min_workers=1, strategy=named)
        federation.worker("a", Descent("a"))
        with pytest.raises(TaskError, match=r"in broadcast\(\): .* \(tensor 'c' has 1 value "):
            await coordinator.end()

    federated(scenario)


@pytest.mark.parametrize("compress", [None, "int8"])
@pytest.mark.parametrize("part_bytes", [wire_format.PART_BYTES, 256])
def test_tensors_that_the_plan_does_not_train_stay_unchanged_and_do_not_travel(
    federated, monkeypatch, compress, part_bytes
):
    monkeypatch.setattr(wire_format, "PART_BYTES", part_bytes)
    monkeypatch.setattr("fluffle_coordinator.service.outbox.PART_BYTES", part_bytes)

    class Three(Adder):
        def init(self, seed: int) -> Any:
            ones = np.ones(2000, np.float32)
            steps = np.array(7, np.int64)
            return {
                "body/w": ones * np.float32(0.1),
                "head/w": ones,
                "head/b": ones[:3],
                "n": steps,
            }

    async def scenario(federation):
        how = Compression.parse(compress) if compress else None
        plan = Plan(train=("head/*", "n"), compress=how)
        coordinator = federation.coordinator(rounds=2, plan=plan, keep_updates=True)
        for name, value in (("a", 1.0), ("b", 3.0)):
            federation.worker(name, Three(federation.loop, value))
        assert (await coordinator.end()).outcome == "finished"
        assert not coordinator.log.of("rejected")
        before, after = federation.weights(0), federation.weights(2)
        assert after["body/w"].tobytes() == before["body/w"].tobytes()
        np.testing.assert_allclose(after["head/w"], before["head/w"] + 4, rtol=1e-6)
        np.testing.assert_allclose(after["head/b"], before["head/b"] + 4, rtol=1e-6)
        assert after["n"] == 11
        sent = [one["bytes"] for line in federation.history() for one in line["participants"]]
        assert max(sent) < (2500 if compress else 8500)
        # run.json of a real run with this plan.
        noted = coordinator.service._settings.configuration(federation.topology)
        run = json.dumps({"configurations": [{"from_round": 1, **noted}]})
        (federation.folder / "run.json").write_text(run)
        words = [str(federation.folder), "--round", "2"]
        shown = CliRunner().invoke(replay, words)
        assert (shown.exit_code, "equal: all 4 tensors" in shown.output) == (0, True)

    federated(scenario)


@pytest.mark.parametrize("name", ["optax:adamw,learning_rate=0.1,weight_decay=0.5", "fedavgm"])
def test_no_step_of_the_server_changes_a_tensor_that_is_not_trained(federated, name):
    class Two(Adder):
        def init(self, seed: int) -> Any:
            return {"body": np.ones(3, np.float32), "head": np.ones(3, np.float32)}

    async def scenario(federation):
        strategy = load_strategy(name)
        for rounds, plan in ((2, Plan()), (4, Plan(train=("head",)))):  # body keeps its momentum
            coordinator = federation.coordinator(
                rounds=rounds,
                min_workers=1,
                strategy=strategy,
                plan=plan,
                keep_updates=True,
            )
            worker = federation.worker("a", Two(federation.loop))
            assert (await coordinator.end()).outcome == "finished"
            await worker.kill()
        before, after = federation.weights(2), federation.weights(4)
        assert (after["body"] == before["body"]).all()
        assert (after["head"] != before["head"]).all()
        noted = coordinator.service._settings.configuration(federation.topology)
        run = json.dumps({"configurations": [{"from_round": 1, **noted}]})
        (federation.folder / "run.json").write_text(run)
        for number in ("3", "4"):
            words = [str(federation.folder), "--round", number]
            assert "equal: all 2" in CliRunner().invoke(replay, words).output

    federated(scenario)


def test_a_plan_that_trains_no_tensor_of_the_model_is_reported(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=1, min_workers=1, plan=Plan(train=("head/*", "tail"))
        )
        federation.worker("a", Adder(federation.loop))
        reason = (await coordinator.log.until("failure"))["reason"]
        assert "--train selects the tensors head/*, tail, but this task's model has" in reason
        assert "; correct --train (tensors of the model: " in reason
        await coordinator.kill()

    federated(scenario)


def test_a_run_in_one_process_resumes_with_the_state_of_its_rules(tmp_path):
    for rounds in (2, 4):
        tasks = {name: Descent(name) for name in TARGETS}
        fluffle.run(
            tasks, rounds=rounds, strategy=f"{FILE}:scaffold", folder=tmp_path, progress=False
        )
    for number, expected in enumerate(reference(4), start=1):
        weights = fluffle.load_model(tmp_path / f"round-{number:04d}.safetensors")
        np.testing.assert_allclose(weights["w"], expected, rtol=1e-5)

"""Hooks: what a user's code sees after each commit, and how it can affect a run."""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from fluffle_common.errors import UsageError
from fluffle_coordinator.service.early_stopping import Stopping
from fluffle_coordinator.storage.history import read_history
from fluffle_coordinator.user_code.hooks import Hooks, StopRun
from tests.federation.harness import Adder


def test_every_round_is_tested_and_shown_before_the_next_one_opens(federated):
    seen = []

    async def scenario(federation):
        def evaluate(weights):
            return {"first": weights["w"][0], "trained": np.int64(len(federation.trained))}

        federation.trained = tasks[0].trained
        hooks = Hooks(evaluate, seen.append)
        coordinator = federation.coordinator(3, hooks=hooks)
        for task, name in zip(tasks, "ab", strict=True):
            task.loop = federation.loop
            federation.worker(name, task)
        assert (await coordinator.end()).outcome == "finished"
        rows = {row["round"]: row for row in read_history(federation.folder)}
        # The next round does not begin while the hook tests this one.
        for number in (1, 2, 3):
            assert rows[number]["test/first"] == number
            assert rows[number]["test/trained"] == number
        assert coordinator.log.of("tested")[0]["metrics"]["first"] == 1.0
        for number, commit in enumerate(seen, start=1):
            assert (commit.round, commit.rounds, commit.num_examples) == (number, 3, 20)
            assert commit.participants == {"a": 10, "b": 10}
            assert commit.test == {"first": number, "trained": number}
            # The evaluation is the previous model's; the first weights are not evaluated.
            before = {"loss": number - 1.0, "accuracy": 0.5}
            assert commit.evaluation == (before if number > 1 else {})
            assert commit.checkpoint == federation.folder / f"round-{number:04}.safetensors"
            np.testing.assert_array_equal(commit.weights["w"], federation.weights(number)["w"])
            with pytest.raises(ValueError, match="read-only"):
                commit.weights["w"][0] = 7

    tasks = [Adder(None), Adder(None)]
    federated(scenario)
    assert len(seen) == 3


def test_a_hook_that_writes_to_the_model_does_not_change_the_run(federated):
    def write(weights):
        tensor = weights["w"]  # as torch.from_numpy does, which ignores NumPy's read-only flag
        (ctypes.c_float * tensor.size).from_address(tensor.ctypes.data)[0] = 100.0
        return {"first": tensor[0]}

    async def scenario(federation):
        hooks = Hooks(write, lambda commit: write(commit.weights) and None)
        coordinator = federation.coordinator(3, hooks=hooks)
        federation.workers(2)
        await coordinator.end()
        for number in (1, 2, 3):
            np.testing.assert_array_equal(federation.weights(number)["w"], number)

    federated(scenario)


@pytest.mark.parametrize("raises", [True, False])
def test_a_hook_ends_the_run_at_its_round_and_the_same_command_continues_it(federated, raises):
    def enough(commit):
        if commit.round == 2:
            if raises:
                raise StopRun("good enough")
            return "good enough"
        return None

    async def scenario(federation):
        first = federation.coordinator(5, hooks=Hooks(on_round=enough))
        workers = federation.workers(2)
        state = await first.end()
        assert (state.outcome, state.reason, state.committed) == ("finished", "good enough", 2)
        for worker in workers:
            assert await worker.end() == "good enough"
            assert worker.service.verdict() is None
        # The last model is evaluated, as in any run.
        assert [line["round"] for line in federation.history("evaluated")] == [1, 2]
        assert federation.history("ended")[-1]["reason"] == "good enough"
        again = federation.coordinator(5)
        federation.workers(2)
        assert (await again.end()).committed == 5

    federated(scenario)


def test_a_failing_hook_is_reported_once_and_loses_no_round(federated, capsys):
    def evaluate(weights):
        raise KeyError("accuracy")

    def on_round(commit):
        return 7

    async def scenario(federation):
        coordinator = federation.coordinator(3, hooks=Hooks(evaluate, on_round))
        federation.workers(2)
        assert (await coordinator.end()).committed == 3
        notes = [one["what"] for one in coordinator.log.of("note")]
        assert len(notes) == 2
        assert notes[0].startswith(
            "round 1 is committed, but its evaluate hook failed: KeyError: 'accuracy' "
            "(test_hooks.py:"
        )
        assert notes[1] == (
            "round 1 is committed, but its on_round hook failed: the function returned int; "
            "expected None, or a string with the reason to end the run"
        )
        lines = (federation.folder / "history.jsonl").read_text().splitlines()
        assert not any("test" in json.loads(line)["event"] for line in lines)

    federated(scenario)
    errors = capsys.readouterr().err
    assert errors.count("Traceback") == 1
    assert 'raise KeyError("accuracy")' in errors


@pytest.mark.parametrize(
    "wrong", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, SystemExit]
)
def test_a_hook_cannot_end_the_process(federated, capsys, wrong):
    def evaluate(weights):
        raise wrong

    async def scenario(federation):
        coordinator = federation.coordinator(1, hooks=Hooks(evaluate))
        federation.workers(2)
        assert (await coordinator.end()).outcome == "finished"
        (note,) = coordinator.log.of("note")
        assert f"evaluate hook failed: {wrong.__name__} (test_hooks.py:" in note["what"]

    federated(scenario)
    assert "raise wrong" in capsys.readouterr().err


def test_a_result_that_is_no_mapping_is_reported(federated, capsys):
    async def scenario(federation):
        coordinator = federation.coordinator(1, hooks=Hooks(lambda _: 0.5))
        federation.workers(2)
        await coordinator.end()
        (note,) = coordinator.log.of("note")
        assert (
            "evaluate hook failed: the function returned float; expected a mapping" in note["what"]
        )

    federated(scenario)
    errors = capsys.readouterr().err
    assert "the evaluate hook failed: " in errors  # fluffle.run shows no notes
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "value",
    ["high", "0.5", np.zeros(2), {"a": 0.5}, None, 1j, np.complex64(1j), 10**400, np.array("x")],
)
@pytest.mark.filterwarnings("error")
def test_a_metric_that_is_no_number_is_named_once_and_costs_no_other(federated, capsys, value):
    metrics = {"accuracy": np.float32(0.5), "odd": value, "rate": Fraction(1, 4)}

    async def scenario(federation):
        coordinator = federation.coordinator(2, hooks=Hooks(lambda _: dict(metrics)))
        federation.workers(2)
        await coordinator.end()
        for row in read_history(federation.folder)[1:]:
            found = {name: number for name, number in row.items() if name.startswith("test/")}
            assert found == {"test/accuracy": 0.5, "test/rate": 0.25}
        (note,) = coordinator.log.of("note")
        assert note["what"].startswith("the evaluate hook's metric 'odd' is left out: it is ")
        wrong = ", which is too large" if isinstance(value, int) else "; expected a number"
        assert note["what"].endswith(wrong)

    federated(scenario)
    errors = capsys.readouterr().err
    assert errors.count("metric 'odd'") == 1  # fluffle.run shows no notes
    assert "Traceback" not in errors


def test_a_metric_without_a_name_is_left_out_and_reported_once(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(2, hooks=Hooks(lambda _: {"": 1.0, "accuracy": 0.5}))
        federation.workers(2)
        await coordinator.end()
        for row in read_history(federation.folder)[1:]:
            found = {name: number for name, number in row.items() if name.startswith("test/")}
            assert found == {"test/accuracy": 0.5}
        (note,) = coordinator.log.of("note")
        assert note["what"] == ("the evaluate hook's metric '' is left out: its name is empty")

    federated(scenario)


@pytest.mark.parametrize("raises", [True, False])
def test_text_that_is_not_valid_unicode_ends_no_coordinator(federated, raises):
    name = "d\udce9j\udce0"  # as os.fsdecode returns a name that is not UTF-8

    def on_round(commit):
        if raises:
            raise StopRun(name)
        return name

    async def scenario(federation):
        coordinator = federation.coordinator(3, hooks=Hooks(lambda _: {name: 1.0}, on_round))
        federation.workers(2)
        state = await coordinator.end()
        assert (state.outcome, state.reason) == ("finished", r"d\udce9j\udce0")
        assert read_history(federation.folder)[-1][r"test/d\udce9j\udce0"] == 1.0

    federated(scenario)


@pytest.mark.parametrize("values", [(0.5, math.nan, math.inf), (math.nan,) * 3])
def test_a_metric_that_is_not_finite_is_reported_and_is_no_improvement(federated, capsys, values):
    async def scenario(federation):
        rest = iter(values)
        stopping = Stopping("test/a", patience=2)
        hooks = Hooks(lambda _: {"a": np.array([next(rest)])})
        coordinator = federation.coordinator(5, hooks=hooks, stopping=stopping)
        federation.workers(2)
        state = await coordinator.end()
        assert state.committed == 3
        assert state.reason == (
            "test/a has not improved for 2 rounds; the best is "
            f"{values[0]:.4f} in round 1 (--patience)"
        )
        notes = [one["what"] for one in coordinator.log.of("note")]
        assert len(notes) == len(set(values) - {0.5})
        assert "the evaluate hook's metric 'a' is nan; it is recorded as missing" in notes[0]

    federated(scenario)
    assert "metric 'a' is nan" in capsys.readouterr().err  # fluffle.run shows no notes


def test_a_metric_with_the_test_prefix_is_kept_apart(federated):
    class Confusing(Adder):
        def evaluate(self, weights):
            result = super().evaluate(weights)
            return type(result)(result.loss, result.num_examples, {"test/accuracy": 0.25})

    async def scenario(federation):
        coordinator = federation.coordinator(1, hooks=Hooks(lambda _: {"accuracy": 0.75}))
        federation.worker("a", Confusing(federation.loop))
        federation.worker("b", Confusing(federation.loop))
        await coordinator.end()
        row = read_history(federation.folder)[-1]
        assert row["test/accuracy"] == 0.75
        assert row["metric/test/accuracy"] == 0.25

    federated(scenario)


def test_hooks_of_a_file_are_found_by_name(tmp_path):
    file = tmp_path / "hooks.py"
    file.write_text("def stop(commit):\n    return 'enough'\nnumber = 7\n")
    hooks = Hooks.load(on_round=f"{file}:stop")
    assert hooks.on_round(None) == "enough"
    assert hooks.names() == {"on_round": "stop"}
    assert not Hooks.load()
    with pytest.raises(UsageError, match="--evaluate must be a function, not int"):
        Hooks.load(evaluate=f"{file}:number")
    with pytest.raises(UsageError, match="has no 'absent'; correct the name in --evaluate"):
        Hooks.load(evaluate=f"{file}:absent")


def test_a_hook_takes_one_argument():
    assert Hooks.load(evaluate=lambda weights, data=None: {}, on_round=print)
    expected = "one argument, the weights .missing a required argument: 'data'"
    with pytest.raises(UsageError, match=expected):
        Hooks.load(evaluate=lambda weights, data: {})
    with pytest.raises(UsageError, match="--on-round must .* one argument, the commit .too many"):
        Hooks.load(on_round=lambda: None)


def test_an_async_hook_is_refused():
    async def hook(_):
        return None

    class Called:
        async def __call__(self, _):
            return None

    for given in (hook, Called()):
        with pytest.raises(UsageError, match="--evaluate must be a plain .*; remove its 'async'"):
            Hooks.load(evaluate=given)

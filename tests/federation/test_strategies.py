"""Strategies from users' files: run, killed, resumed, replayed, and broken."""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fluffle_common.errors import RunError, TaskError, UsageError
from fluffle_common.tensors.checkpoint import (
    checkpoint_name,
    read_checkpoint,
    read_whole,
    save_checkpoint,
)
from fluffle_common.tensors.on_disk import map_to_disk
from fluffle_coordinator.cli.run_folder import replay
from fluffle_coordinator.service import committer
from fluffle_coordinator.strategy.base import Contribution, Strategy
from fluffle_coordinator.user_code.guarded_strategy import GuardedStrategy
from fluffle_coordinator.user_code.strategy_loading import load_strategy
from tests.federation.harness import Adder

FILE = Path(__file__).with_name("momentum.py")
MEDIAN = load_strategy("median")
DOCS = Path(__file__).parents[2] / "docs" / "strategies.md"
BROKEN = """
import numpy as np
from fluffle_coordinator.strategy.base import Strategy
from fluffle_coordinator.strategy.weighted import apply_delta

class Mean(Strategy):
    def init(self, weights):
        return []

    def fold(self, state, one):
        {fold}
        return [*state, one.delta]

    def finish(self, state, weights):
        new = {{n: old + np.mean([d[n] for d in state], 0) for n, old in weights.items()}}
        {finish}
        return new, []

    def dump(self, state):
        {dump}
        return {{"seen": np.zeros(1)}}

mean = Mean()
"""


def momentum():
    return load_strategy(f"{FILE}:momentum")


def from_the_docs(folder: Path, name: str) -> str:
    """Write the documentation's example of this file name to disk; return its path."""
    (text,) = re.findall(rf"```python\n(# {name}\n.*?)```", DOCS.read_text(), re.DOTALL)
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_strategy_outside_the_product_runs_a_federation_and_is_replayed(federated):
    async def scenario(federation):
        strategy = momentum()
        coordinator = federation.coordinator(rounds=3, strategy=strategy, keep_updates=True)
        federation.worker("a", Adder(federation.loop, 1.0))
        federation.worker("b", Adder(federation.loop, 4.0, num_examples=20))
        assert (await coordinator.end()).outcome == "finished"
        weights, velocity = 0.0, 0.0
        for number in (1, 2, 3):
            velocity = 0.9 * velocity + 3.0
            weights += 0.7 * velocity
            np.testing.assert_allclose(federation.weights(number)["w"], weights, rtol=1e-6)
            state = read_whole(federation.folder / checkpoint_name(number)).strategy_state
            np.testing.assert_allclose(state["w"], velocity, rtol=1e-6)
            assert list(federation.weights(number)) == ["w"]
            words = [str(federation.folder), "--round", str(number), "--strategy"]
            shown = CliRunner().invoke(replay, [*words, f"{FILE}:momentum"])
            assert (shown.exit_code, "equal: all 1 tensors" in shown.output) == (0, True)
        assert {line["strategy"] for line in federation.history()} == {"momentum.py:momentum"}

    federated(scenario)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        (f"{FILE}:momentum", {"w"}),
        ("fedavgm:lr=0.5", {"w"}),
        ("fedadam:lr=0.1", {"steps", "first/w", "second/w"}),
        ("fedyogi:lr=0.1", {"steps", "first/w", "second/w"}),
    ],
)
def test_a_killed_and_resumed_run_matches_an_undisturbed_one_bit_for_bit(federated, name, tensors):
    rounds, folders, strategy = 6, [], load_strategy(name)

    async def uninterrupted(federation):
        federation.folder = federation.folder.with_name("whole")
        folders.append(federation.folder)
        coordinator = federation.coordinator(rounds, strategy=strategy)
        federation.worker("a", Adder(federation.loop, 0.1))
        federation.worker("b", Adder(federation.loop, 0.3, num_examples=30))
        await coordinator.end()

    async def killed(federation):
        federation.folder = federation.folder.with_name("killed")
        folders.append(federation.folder)
        federation.worker("a", Adder(federation.loop, 0.1))
        federation.worker("b", Adder(federation.loop, 0.3, num_examples=30))
        for when in ("first_weights", "committed", "opened"):
            coordinator = federation.coordinator(rounds, strategy=strategy)
            await coordinator.log.until(when, 1 if when == "first_weights" else 2)
            await coordinator.kill()
        assert (await federation.coordinator(rounds, strategy=strategy).end()).round >= rounds

    federated(uninterrupted)
    federated(killed)
    for number in range(rounds + 1):
        one, other = (read_whole(folder / checkpoint_name(number)) for folder in folders)
        assert (
            one.strategy_state.keys()
            == other.strategy_state.keys()
            == (tensors if number else set())
        )
        for mine, theirs in (
            (one.weights, other.weights),
            (one.strategy_state, other.strategy_state),
        ):
            assert {n: t.tobytes() for n, t in mine.items()} == {
                n: t.tobytes() for n, t in theirs.items()
            }


@pytest.mark.parametrize("name", ["fedadam:lr=0.1", "median+fedavgm", "multikrum:f=0,m=2"])
def test_a_strategy_with_a_name_is_in_the_history_and_is_replayed(federated, name):
    async def scenario(federation):
        strategy = load_strategy(name)
        coordinator = federation.coordinator(rounds=3, strategy=strategy, keep_updates=True)
        for number, worker in enumerate("abcd"):
            federation.worker(worker, Adder(federation.loop, 1.0 + number, num_examples=5))
        assert (await coordinator.end()).outcome == "finished"
        assert {line["strategy"] for line in federation.history()} == {strategy.name}
        for number in (1, 2, 3):
            words = [str(federation.folder), "--round", str(number)]
            shown = CliRunner().invoke(replay, words, catch_exceptions=False)
            assert "equal: all 1 tensors" in shown.output

    federated(scenario)


def test_updates_for_a_robust_mean_wait_in_the_run_folder(federated, monkeypatch):
    laid = []

    def lay(delta, folder):
        mapped = map_to_disk(delta, folder)
        laid.append((folder, isinstance(mapped.memory.obj, mmap.mmap)))
        return mapped

    monkeypatch.setattr(committer, "map_to_disk", lay)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, min_workers=3, strategy=MEDIAN)
        for worker, value in (("a", 1.0), ("b", 2.0), ("c", 99.0)):
            federation.worker(worker, Adder(federation.loop, value))
        await coordinator.end()
        assert federation.weights(2)["w"].tolist() == [4.0] * 4
        assert laid == [(federation.folder, True)] * 6
        assert not [path for path in federation.folder.iterdir() if path.name.startswith("tmp")]

    federated(scenario)


def test_a_full_disk_pauses_a_robust_mean_until_there_is_room(federated, monkeypatch):
    async def scenario(federation):
        full_until = federation.loop.time() + 12.0

        def lay(delta, folder):
            if federation.loop.time() < full_until:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return map_to_disk(delta, folder)

        monkeypatch.setattr(committer, "map_to_disk", lay)
        tasks = [Adder(federation.loop, value) for value in (1.0, 2.0, 9.0)]
        for name, task in zip("abc", tasks, strict=True):
            federation.worker(name, task)
        coordinator = federation.coordinator(rounds=1, min_workers=3, strategy=MEDIAN)
        assert (await coordinator.end()).outcome == "finished"
        (disk,) = coordinator.log.of("disk")
        assert disk["reason"] == "No space left on device"
        assert federation.loop.time() >= full_until
        assert federation.weights(1)["w"].tolist() == [2.0] * 4
        assert [len(task.trained) for task in tasks] == [1, 1, 1]

    federated(scenario)


def test_a_full_disk_under_a_users_strategy_ends_the_run_and_loses_nothing(federated, monkeypatch):
    """Its fold cannot be repeated: it may have changed its state already."""
    strategy = dataclasses.replace(MEDIAN, ours=False)

    def full(delta, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scenario(federation):
        tasks = [Adder(federation.loop, value) for value in (1.0, 2.0, 9.0)]
        for name, task in zip("abc", tasks, strict=True):
            federation.worker(name, task)
        with monkeypatch.context() as patch:
            patch.setattr(committer, "map_to_disk", full)
            coordinator = federation.coordinator(rounds=1, min_workers=3, strategy=strategy)
            with pytest.raises(
                RunError, match=r"\(No space left on device\); free disk space there"
            ):
                await coordinator.end()
        await federation.coordinator(rounds=1, min_workers=3, strategy=strategy).end()
        assert federation.weights(1)["w"].tolist() == [2.0] * 4
        assert [len(task.trained) for task in tasks] == [1, 1, 1]  # the same updates

    federated(scenario)


def test_an_update_without_the_metric_that_the_strategy_needs_is_refused(federated):
    class Counting(Adder):
        def train(self, weights, plan, progress):
            result = super().train(weights, plan, progress)
            return dataclasses.replace(result, metrics={"steps": 4.0})

    async def scenario(federation):
        strategy = load_strategy("fednova")
        coordinator = federation.coordinator(rounds=1, number=1, strategy=strategy)
        federation.worker("a", Counting(federation.loop, 3.0, step_s=1.0))
        federation.worker("b", Adder(federation.loop, 5.0))
        await coordinator.end()
        (refused,) = coordinator.log.of("rejected")
        assert refused["worker"] == "b"
        assert "the update has no metric 'steps', which the strategy" in refused["reason"]
        assert federation.participants() == [["a"]]

    federated(scenario)


def test_the_privacy_budget_is_in_the_history_and_survives_a_crash(federated):
    strategy = load_strategy("dp:clip=1,noise=4,workers=2,budget=2+fedavgm:momentum=0.5")
    most = strategy.strategy.needs.max_rounds
    assert most == 4

    async def scenario(federation):
        rules = {"rounds": most, "strategy": strategy, "keep_updates": True}
        first = federation.coordinator(**rules)
        federation.workers(2)
        await first.log.until("committed", 2)
        await first.kill()
        again = federation.coordinator(**rules)
        await again.end()
        spent = [
            {name: line[name] for name in ("epsilon", "delta")} for line in federation.history()
        ]
        assert spent == [strategy.strategy.spent(number) for number in range(1, most + 1)]
        assert [one["delta"] for one in spent] == [1e-5] * most
        assert federation.history("ended")[-1]["reason"] == "4 rounds are done"
        assert spent[-1]["epsilon"] <= 2 < strategy.strategy.spent(most + 1)["epsilon"]
        assert again.log.of("privacy")[-1] == {"round": most, **spent[-1]}
        words = [str(federation.folder), "--round", "1"]
        with pytest.raises(UsageError, match="cannot be replayed, because the strategy dp:clip=1"):
            CliRunner().invoke(replay, words, catch_exceptions=False, standalone_mode=False)

    federated(scenario)


@pytest.mark.parametrize("name", ["median", "momentum"])
def test_the_examples_of_the_docs_run(federated, tmp_path, name):
    strategy = load_strategy(f"{from_the_docs(tmp_path, f'{name}.py')}:{name}")

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, min_workers=3, strategy=strategy)
        for worker, value in (("a", 1.0), ("b", 2.0), ("c", 99.0)):
            federation.worker(worker, Adder(federation.loop, value))
        await coordinator.end()
        expected = {"median": [2.0, 4.0], "momentum": [34.0, 98.6]}[name]
        values = [federation.weights(number)["w"][0] for number in (1, 2)]
        np.testing.assert_allclose(values, expected, rtol=1e-6)

    federated(scenario)


@pytest.mark.parametrize("name", ["median", "momentum"])
def test_a_scalar_of_the_model_stays_an_array(tmp_path, name):
    """NumPy's arithmetic turns an array of shape () into a scalar, which must be accepted."""
    named = load_strategy(f"{from_the_docs(tmp_path, f'{name}.py')}:{name}")
    strategy = GuardedStrategy(named, 1)
    weights = {"s": np.array(1.0, np.float32)}
    state = strategy.init(weights)
    for value in (1.0, 2.0, 3.0):
        delta = {"s": np.array(value, np.float32)}
        state = strategy.fold(state, Contribution(worker="a", num_examples=1, delta=delta))
    weights, state = strategy.finish(state, weights)
    assert (weights["s"].shape, weights["s"].dtype, float(weights["s"])) == ((), np.float32, 3.0)
    assert all(isinstance(one, np.ndarray) for one in strategy.dump(state).values())


def test_a_method_with_a_wrong_signature_is_described_without_our_frames(capsys):
    class Wrong(Strategy):
        def init(self):
            return []

    named = dataclasses.replace(momentum(), strategy=Wrong())
    with pytest.raises(TaskError, match=r"init\(\): TypeError: .* 1 positional") as wrong:
        GuardedStrategy(named, 1).init({})
    shown = str(wrong.value) + capsys.readouterr().err
    assert "guarded_strategy" not in shown
    assert "user_code" not in shown


@pytest.mark.parametrize("budget", [None, {"epsilon": "much"}, {"delta": [1]}])
def test_a_wrong_privacy_budget_is_an_error_of_the_strategy(budget):
    class Wrong(Strategy):
        def spent(self, rounds):
            return budget

    named = dataclasses.replace(momentum(), strategy=Wrong())
    with pytest.raises(
        TaskError, match=r"in spent\(\): it returned something .* mapping of names to"
    ):
        GuardedStrategy(named, 2).spent(2)


def test_a_strategy_cannot_make_the_model_writeable(tmp_path):
    how = {"fold": "pass", "finish": "weights['w'].flags.writeable = True", "dump": "pass"}
    (tmp_path / "broken.py").write_text(BROKEN.format(**how))
    strategy = GuardedStrategy(load_strategy(f"{tmp_path / 'broken.py'}:mean"), 1)
    with pytest.raises(TaskError, match="cannot set WRITEABLE"):
        strategy.finish([{"w": np.ones(3)}], {"w": np.zeros(3)})


CANCEL = "import asyncio; raise asyncio.CancelledError"
WRONG = {
    "fold": ({"fold": "raise KeyError('b')"}, r"fold\(\) of the update of [ab]: KeyError: 'b' \("),
    "exit": ({"fold": "raise SystemExit(3)"}, r"fold\(\) of the update of [ab]: SystemExit: 3"),
    "cancel": ({"fold": CANCEL}, r"fold\(\) of the update of [ab]: CancelledError \(broken"),
    "close": ({"finish": "raise GeneratorExit"}, r"finish\(\): GeneratorExit \(broken.py:16\)"),
    "in place": ({"fold": "one.delta['w'][0] = 1"}, "read-only"),
    "base": ({"finish": "weights['w'][0] = 1"}, "read-only"),
    "finish": ({"finish": "1 / 0"}, r"finish\(\): ZeroDivisionError: .* \(broken.py:16\)"),
    "nan": ({"finish": "new['w'][1] = np.nan"}, r"tensor 'w' has 1 value that is NaN"),
    "inf": ({"finish": "new['w'][:] = np.inf"}, r"tensor 'w' has 4 values that are NaN"),
    "shape": ({"finish": "new['w'] = new['w'][:2]"}, r"has shape \(2,\); the model has \(4,\)"),
    "dtype": ({"finish": "new['w'] = new['w'].astype(float)"}, "is float64; expected float32"),
    "name": ({"finish": "new['v'] = new.pop('w')"}, "missing w; unknown v"),
    "list": ({"finish": "new['w'] = [1.0]"}, "tensor 'w' is of type list, not an array"),
    "none": (
        {"finish": "return None"},
        r"returned something other than \(weights, state\) \(cannot unpack",
    ),
    "model": ({"finish": "return [], 1"}, "the value is of type list, not a mapping"),
    "dump": ({"dump": "return {'m': np.array(['x'])}"}, "'m' is <U1, which is not supported"),
    "state": ({"dump": "return 5"}, r"a state that cannot be saved \(the value is of type int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_failing_strategy_ends_the_run_and_loses_nothing(federated, tmp_path, capsys, case):
    how, message = WRONG[case]
    code = {"fold": "pass", "finish": "pass", "dump": "pass"}
    (tmp_path / "broken.py").write_text(BROKEN.format(**{**code, **how}))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "broken.py").write_text(BROKEN.format(**code))
    broken, mended = (
        load_strategy(f"{folder / 'broken.py'}:mean") for folder in (tmp_path, tmp_path / "sub")
    )

    async def scenario(federation):
        tasks = [Adder(federation.loop, value) for value in (1.0, 3.0)]
        coordinator = federation.coordinator(rounds=1, strategy=broken)
        for name, task in zip("ab", tasks, strict=True):
            federation.worker(name, task)
        with pytest.raises(TaskError, match=message) as wrong:
            await coordinator.end()
        assert wrong.value.exit_code == 5
        assert str(wrong.value).startswith("the strategy broken.py:mean failed in round 1, in ")
        assert "\n" not in str(wrong.value)
        assert coordinator.log.of("note")[-1] == {"what": str(wrong.value)}
        assert federation.history() == []
        assert [path.name for path in federation.folder.glob("round-*")] == [checkpoint_name(0)]
        again = federation.coordinator(rounds=1, strategy=mended)
        assert (await again.end()).outcome == "finished"
        assert federation.participants() == [["a", "b"]]
        assert [len(task.trained) for task in tasks] == [1, 1]  # the same updates
        np.testing.assert_allclose(federation.weights(1)["w"], 2.0)

    federated(scenario)
    shown = capsys.readouterr().err
    raises = case in ("fold", "exit", "cancel", "close", "in place", "base", "finish")
    assert ("the error in the strategy's code:" in shown) == raises
    assert ("broken.py" in shown) == raises
    assert "guarded_strategy.py" not in shown
    assert "user_code" not in shown


def test_a_state_that_cannot_be_loaded_is_reported_before_anything_is_sent(federated, tmp_path):
    async def scenario(federation):
        first = federation.coordinator(rounds=1, strategy=momentum())
        federation.workers(2)
        await first.end()
        path = federation.folder / checkpoint_name(1)
        weights, metadata = read_checkpoint(path)
        save_checkpoint(path, weights, metadata, {"v": np.zeros(4)})
        again = federation.coordinator(rounds=2, strategy=momentum())
        with pytest.raises(TaskError, match=r"failed in round 2, in load\(\): KeyError: 'w'"):
            await again.end()

    federated(scenario)

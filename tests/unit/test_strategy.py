"""Strategies: composition, loading, checks, and their state in a checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fluffle_common.cli.app import fluffle
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.checkpoint import (
    check_names,
    checkpoint_name,
    read_checkpoint,
    read_whole,
    save_checkpoint,
)
from fluffle_common.tensors.weights import NotFinite, check_delta
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QUORUM, QuorumRounds
from fluffle_coordinator.machine.state import Quorum, Rules
from fluffle_coordinator.service.run_opening import begin_with, read_first_model
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.replay import strategy_of
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_coordinator.strategy.base import Contribution, NamedStrategy, Needs, Strategy
from fluffle_coordinator.strategy.fedavg import FEDAVG, fedavg
from fluffle_coordinator.strategy.pipeline import Server, pipeline, replace
from fluffle_coordinator.strategy.weighted import Weighted, apply_delta, weighted
from fluffle_coordinator.user_code import strategy_loading as module
from fluffle_coordinator.user_code.schedule_loading import GuardedSchedule
from fluffle_coordinator.user_code.strategy_loading import check_same, load_strategy, rules_for
from tests.history_lines import committed

ROOT = Path(__file__).parents[2]
MOMENTUM = ROOT / "tests" / "federation" / "momentum.py"


def of(delta, num_examples=1, worker="a"):
    return Contribution(worker=worker, num_examples=num_examples, delta=delta)


def model(seed=0):
    numbers = np.random.default_rng(seed)
    return {
        "w": numbers.normal(size=(5, 3)).astype(np.float32),
        "d": numbers.normal(size=4),
        "h": numbers.normal(size=3).astype(np.float16),
        "b": numbers.normal(size=3).astype("bfloat16"),
        "n": np.array([3, -7], np.int32),
        "u": np.array(250, np.uint8),
        "none": np.zeros((0, 2), np.float32),
    }


def delta(seed, weights):
    numbers = np.random.default_rng(seed)
    return {
        name: numbers.integers(-9, 9, one.shape)
        if one.dtype.kind in "iu"
        else np.asarray(numbers.normal(size=one.shape), one.dtype)
        for name, one in weights.items()
    }


def averaged(strategy, weights, updates):
    state = strategy.init(weights)
    for update, num_examples in updates:
        check_delta(update, weights)
        state = strategy.fold(state, of(update, num_examples))
    return strategy.finish(state, weights)


class Adding(Server):
    """Does what ``replace`` does, but through the general path of server steps."""

    def init(self, weights):
        return None

    def step(self, state, weights, delta):
        assert all(one.dtype == np.float64 for one in delta.values())
        return apply_delta(weights, delta), None


# --- composition -------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 10**6)), min_size=1, max_size=4),
    st.sets(st.sampled_from(sorted(model())), min_size=1),
)
def test_the_fast_path_of_fedavg_equals_the_general_one_bit_by_bit(drawn, names):
    weights = {name: tensor for name, tensor in model().items() if name in names}
    updates = [(delta(seed, weights), n) for seed, n in drawn]
    one, _ = averaged(fedavg, weights, updates)
    other, _ = averaged(pipeline(mean=weighted(), server=Adding()), weights, updates)
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}
    assert [t.dtype for t in one.values()] == [t.dtype for t in other.values()]


def test_fedavg_takes_the_fast_path(monkeypatch):
    monkeypatch.setattr(Weighted, "finish", None)
    assert averaged(fedavg, {"w": np.zeros(1)}, [({"w": np.ones(1)}, 1)])[0]["w"].tolist() == [1.0]


def test_a_mean_delta_shares_no_memory_with_the_state():
    weights = {"w": np.zeros(3, np.float32)}
    mean = weighted()
    state = mean.fold(mean.init(weights), of({"w": np.ones(3, np.float32)}, 5))
    mean_delta, state = mean.finish(state, weights)
    mean.fold(state, of({"w": np.full(3, 9, np.float32)}, 5))
    assert mean_delta["w"].tolist() == [1.0] * 3


def test_transforms_are_applied_in_order():
    def plus(one):
        return dataclasses.replace(one, delta={n: t + 1 for n, t in one.delta.items()})

    def twice(one):
        return dataclasses.replace(one, delta={n: t * 2 for n, t in one.delta.items()})

    strategy = pipeline(plus, twice, mean=weighted(), server=replace())
    weights = {"w": np.zeros(2)}
    assert averaged(strategy, weights, [({"w": np.ones(2)}, 3)])[0]["w"].tolist() == [4.0, 4.0]


def test_the_state_of_a_server_step_is_dumped_and_loaded():
    strategy = load_strategy(f"{MOMENTUM}:momentum").strategy
    weights = model()
    update = delta(1, weights)
    first, state = averaged(strategy, weights, [(update, 3)])
    resumed = strategy.load(strategy.dump(state), first)
    one, _ = strategy.finish(strategy.fold(resumed, of(update)), first)
    other, _ = strategy.finish(strategy.fold(state, of(update)), first)
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}
    moved = 0.7 * (0.9 + 1.0) * update["d"]
    np.testing.assert_allclose(one["d"], first["d"] + moved, rtol=1e-12)


def test_fedavg_keeps_nothing():
    weights = model()
    _, state = averaged(fedavg, weights, [(delta(1, weights), 1)])
    assert (dict(fedavg.dump(state)), dict(fedavg.broadcast(state))) == ({}, {})
    assert fedavg.load({}, weights).mean.num_examples == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_refused(value):
    with pytest.raises(NotFinite, match="tensor 'w'"):
        apply_delta({"w": np.zeros(2, np.float32)}, {"w": np.array([0.0, value])})


def test_a_step_saturates_at_the_end_of_its_dtype():
    weights = {"w": np.ones(1, np.float16), "n": np.array([2**63 - 5]), "u": np.uint8([3, 3])}
    moved = apply_delta(
        weights, {"w": np.array([1e9]), "n": np.array([1e30]), "u": np.array([-9.0, 0.5])}
    )
    assert {n: t.tolist() for n, t in moved.items()} == {
        "w": [65504.0], "n": [2**63 - 1], "u": [0, 4]
    }  # fmt: skip


# --- loading -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_strategy_from_a_file_is_named_by_the_file_without_its_folder(here):
    (here / "sub").mkdir()
    for folder in (here, here / "sub"):
        (folder / "mine.py").write_text(MOMENTUM.read_text())
    one, other = load_strategy("mine.py:momentum"), load_strategy("sub/mine.py:momentum")
    assert one.name == other.name == "mine.py:momentum"
    assert (one.file, other.file) == (str(here / "mine.py"), str(here / "sub" / "mine.py"))
    assert load_strategy("mine:momentum").name == "mine:momentum"


def test_packages_add_names_by_entry_points(monkeypatch):
    other = EntryPoint("other", "fluffle_coordinator.strategy.fedavg:fedavg", "fluffle.strategies")
    broken = EntryPoint("broken", "nothing_of_that_name:x", "fluffle.strategies")
    monkeypatch.setattr(
        module, "installed", lambda group: {one.name: one for one in (other, broken)}
    )
    assert load_strategy("other") == NamedStrategy("other", fedavg)
    with pytest.raises(
        UsageError, match="unknown strategy 'x'.* choose from broken, clip, .*other, .*path.py:name"
    ):
        load_strategy("x")
    with pytest.raises(TaskError, match="'broken' .*nothing_of_that_name:x.* fails to load"):
        load_strategy("broken")


LACKING = """
from fluffle_coordinator.strategy.pipeline import pipeline
from fluffle_coordinator.strategy.fedavg import fedavg

class Half:
    def init(self, weights): pass
    def fold(self, state, one): pass

half = Half()
number = 3

def make():
    return fedavg
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "unknown strategy 'nope' .*choose from clip, .* path.py:name loads your own"),
        ("gone.py:x", r"there is no file gone\.py; .* --strategy"),
        ("gone_too:x", r"there is no module gone_too; .* --strategy"),
        ("mine.py:", "--strategy expects module:name or path.py:name, not 'mine.py:'"),
        ("mine.py:x", "mine.py has no 'x'"),
        ("mine.py:Half", "is a class or a function, not a strategy; .* my_half = Half()"),
        ("mine.py:half", r"Half lacks broadcast\(\), finish\(\), dump\(\), load\(\), needs \("),
        ("mine.py:make", "create an object, such as my_make = make"),
        ("mine.py:number", "this int lacks init.*; inherit from .*base.Strategy"),
    ],
)
def test_an_object_that_is_not_a_strategy_is_refused_in_one_line(here, name, message):
    (here / "mine.py").write_text(LACKING)
    with pytest.raises(UsageError, match=message) as wrong:
        load_strategy(name)
    assert "\n" not in str(wrong.value)
    words = ["coordinator", "--federation", "f", "--strategy", name]
    result = CliRunner().invoke(fluffle, words)
    assert isinstance(result.exception, UsageError)
    files = {path.name for path in here.iterdir()}
    assert files <= {"mine.py", "__pycache__"}  # no run folder was created


def test_needs_that_fail_are_an_error_of_the_strategy(here):
    (here / "mine.py").write_text(
        "class Mine:\n    @property\n    def needs(self):\n        1 / 0\n\n\nmine = Mine()\n"
    )
    with pytest.raises(
        TaskError, match=r"strategy mine.py:mine failed in needs: ZeroDiv.* \(mine.py:4\)"
    ):
        load_strategy("mine.py:mine")


def test_a_file_that_fails_to_load_is_reported_with_its_traceback(here, capsys):
    (here / "mine.py").write_text("x = 1\nraise KeyError('k')\n")
    with pytest.raises(TaskError, match=r"strategy's file mine.py fails to load: .*\(mine.py:2\)"):
        load_strategy("mine.py:x")
    shown = capsys.readouterr().err
    assert "raise KeyError" in shown
    assert not any(name in shown for name in ("loading.py", "importlib"))


# --- checks ------------------------------------------------------------------------------------


def needing(**needs):
    class Needy(Strategy):
        def init(self, weights):
            return None

    Needy.needs = Needs(**needs)
    return NamedStrategy("needy", Needy())


@pytest.mark.parametrize(
    ("needs", "rules", "message"),
    [
        ({"metrics": "loss"}, {}, r"'needs.metrics' of .* is 'loss'; expected .* \('loss',\)"),
        ({"extra": ("c",)}, {}, r"'needs.extra' of .* is \('c',\); expected"),
        (
            {"min_updates": 3},
            {"quorum": Quorum(number=2)},
            "needs at least 3 updates per round, but --quorum 2 closes a round with fewer",
        ),
        (
            {"min_updates": 3},
            {"sample": 2},
            "needs at least 3 updates per round, but --sample 2 asks for fewer; give --sa",
        ),
    ],
)
def test_a_run_that_does_not_meet_a_strategys_needs_is_refused(needs, rules, message):
    with pytest.raises(UsageError, match=message):
        rules_for(needing(**needs), Rules(rounds=1, **rules))


def test_a_schedule_that_does_not_meet_a_strategys_needs_is_refused():
    rules = Rules(rounds=1)
    with pytest.raises(
        UsageError, match="needs at least 5 updates per version, but --buffer 3 makes"
    ):
        rules_for(needing(min_updates=5), rules, Buffered(buffer=3))
    rules_for(needing(min_updates=5), rules, Buffered(buffer=5))
    rules_for(needing(once=True), rules, QUORUM)
    own = GuardedSchedule("mine.py:mine", QUORUM, max_staleness=0, continuous=False)
    for schedule in (Buffered(buffer=3), QuorumRounds(2), own):
        with pytest.raises(UsageError, match="needs synchronous rounds that discard late updates"):
            rules_for(needing(once=True), rules, schedule)


def test_a_run_that_meets_a_strategys_needs_is_accepted():
    plain, five = Rules(rounds=1), Rules(rounds=1, min_workers=5, least=5, min_updates=5)
    assert rules_for(FEDAVG, plain) == plain
    assert rules_for(needing(min_updates=5), plain) == five
    assert rules_for(needing(min_updates=3), five) == five


def test_a_run_continues_only_with_its_own_strategy(tmp_path):
    store, mine = RunStore(tmp_path), load_strategy(f"{MOMENTUM}:momentum")
    run = {"run": store.load("f").run}
    store.save_weights(0, model(), {**run, "round": "0"})
    check_same(mine, store.load("f"), tmp_path)  # no round is committed yet
    settings = CoordinatorSettings("f", Rules(rounds=1), strategy=mine)
    store.note_configuration(settings.configuration(Topology("f")), 0)
    run["base"] = "b"
    store.save_weights(1, model(), {**run, "round": "1"}, {"v": np.ones(2)})
    store.history.append(committed(1, strategy=mine.name, **run))
    saved = store.load("f")
    assert (saved.strategy, list(saved.kept), list(saved.weights)) == (
        mine.name, ["v"], list(model())
    )  # fmt: skip
    check_same(mine, saved, tmp_path)
    with pytest.raises(UsageError, match=r"momentum.py:momentum up to round 1, .* names fedavg; "):
        check_same(FEDAVG, saved, tmp_path)
    assert strategy_of(tmp_path, 1) == (mine.name, str(MOMENTUM))


# --- checkpoints -------------------------------------------------------------------------------


def test_the_strategys_state_is_in_the_checkpoint_and_not_in_the_model(tmp_path):
    path, state = tmp_path / "m", {"v": np.arange(3.0), "strategy/deep": np.int8([1])}
    save_checkpoint(path, model(), {"round": "3"}, state)
    weights, metadata = read_checkpoint(path)
    whole = read_whole(path)
    assert weights.keys() == whole.weights.keys() == model().keys()
    assert metadata == whole.metadata == {"round": "3"}
    assert {n: t.tolist() for n, t in whole.strategy_state.items()} == {
        n: t.tolist() for n, t in state.items()
    }
    assert load_file(path).keys() == {*model(), "strategy/v", "strategy/strategy/deep"}


def test_a_model_of_another_program_may_use_any_tensor_names(tmp_path):
    save_file({"strategy/w": np.zeros(2)}, tmp_path / "m")
    whole = read_whole(tmp_path / "m")
    assert (list(whole.weights), whole.strategy_state) == (["strategy/w"], {})
    store = RunStore(tmp_path / "run")
    with pytest.raises(
        UsageError, match="first weights: the name of tensor 'strategy/w' .*rename this tensor"
    ):
        begin_with(read_first_model(tmp_path / "m"), store, store.load("f"), "f")
    assert not (store.folder / checkpoint_name(0)).exists()
    with pytest.raises(ValueError, match="rename this tensor"):
        check_names({"w": np.zeros(1), "strategy/x": np.zeros(1)})

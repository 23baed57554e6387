"""The advice at the end of a run, and observers, which must never end one."""

from __future__ import annotations

import asyncio
import errno
import fcntl
from pathlib import Path

import numpy as np
import pytest

from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.checkpoint import checkpoint_name, save_checkpoint
from fluffle_common.transport.base import OtherArguments
from fluffle_common.transport.memory import MemoryBroker
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.machine.state import Issued, Phase, Rules, State, Ticket, Worker
from fluffle_coordinator.observe.waiting import waiting_for
from fluffle_coordinator.observe.watchers import View, Watcher, Watchers
from fluffle_coordinator.service import app as main
from fluffle_coordinator.service import endings, run_opening
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore

FOLDER = Path("runs/f")


class Recorder(Watcher):
    def __init__(self) -> None:
        self.events: list[run_events.RunEvent] = []
        self.shown = 0

    def record(self, event):
        self.events.append(event)

    def show(self, state, now):
        self.shown += 1


class Broken(Recorder):
    def record(self, event):
        raise UnicodeEncodeError("ascii", "Ö", 0, 1, "ordinal not in range")

    def show(self, state, now):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_watcher_that_raises_is_reported_once_and_others_continue(capsys):
    before, after = Recorder(), Recorder()
    watchers = Watchers(before, Broken(), after)
    for _ in range(3):
        watchers.record(run_events.Committed(round=1))
        watchers.show(State(Rules(1), "r", 1, QUORUM), 0.0)
    assert len(before.events) == len(after.events) == after.shown == 3
    errors = capsys.readouterr().err
    assert errors.count("fluffle: Broken cannot show the event 'committed'") == 1
    assert "the run continues" in errors
    assert len(errors.splitlines()) == 1


class Terminal:
    draws = True

    def __init__(self) -> None:
        self.drawn = asyncio.Queue[int]()  # how many rounds the bar of the rounds has, each time

    def bar(self, label: str, done: int, total: int, *_: object) -> None:
        if label == "rounds":
            self.drawn.put_nowait(total)


async def test_bars_whose_text_names_every_worker_are_not_drawn_after_every_event(monkeypatch):
    monkeypatch.setattr("fluffle_coordinator.observe.watchers._DRAW_EVERY_S", 60.0)
    terminal, state = Terminal(), State(Rules(1), "r", 1, QUORUM)
    view = View(terminal)
    for _ in range(1000):
        view.show(state, 0.0)
    assert terminal.drawn.qsize() == 1
    view.show(state.replace(phase=Phase.ENDED), 0.0)
    assert [terminal.drawn.get_nowait() for _ in range(terminal.drawn.qsize())] == [1, 1]


async def test_the_last_of_many_states_is_drawn_although_no_event_follows(monkeypatch):
    monkeypatch.setattr("fluffle_coordinator.observe.watchers._DRAW_EVERY_S", 0.01)
    terminal = Terminal()
    view = View(terminal)
    for rounds in range(1, 1000):
        view.show(State(Rules(rounds), "r", 1, QUORUM), 0.0)
    async with asyncio.timeout(60):
        while await terminal.drawn.get() != 999:
            pass


# --- the command that continues ------------------------------------------------------------------


def test_a_stop_names_the_command_that_continues():
    before = {3: frozenset([Ticket("a", 3)])}
    state = State(Rules(6), "r", 4, QUORUM, has_weights=True, counted_before=before)
    advice = endings.after_a_stop(state, FOLDER)
    assert advice == (
        "fix the cause, and run the same command (without --fresh) to continue with round 4"
    )
    for other in ({"failed": {"a": "shape differs"}}, {"doubted": {"a": "tensors differ"}}):
        advice = endings.after_a_stop(state.replace(**other), FOLDER)
        assert "if the model or the classes have changed" in advice
        assert "add --fresh to start a new run" in advice
        assert advice.endswith("run the same command (without --fresh) to continue with round 4")
    # A run without a model needs no --fresh.
    state = State(Rules(6), "r", 1, QUORUM, failed={"a": "no first weights within 6 s"})
    advice = endings.after_a_stop(state, FOLDER)
    assert advice == (
        "fix the cause, and run the same command (without --fresh) to continue with round 1"
    )


def test_a_run_whose_strategy_allows_no_more_rounds_is_not_told_to_ask_for_more():
    rules = Rules(6, rounds_limit="the strategy dp allows no more rounds")
    advice = endings.done_already(FOLDER, 6, rules)
    assert "it has 6 rounds and the strategy dp allows no more rounds. " in advice
    assert advice.endswith("shows the rounds; run the same command with --fresh to start a new run")


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path / "run")
    store.load("f")
    return store


def begin(store: RunStore, weights: dict[str, np.ndarray]) -> None:
    store.save_weights(0, weights, {"base": "b", "classes": "[]"})


def test_only_the_runs_own_first_weights_are_accepted_as_init(store, tmp_path):
    weights = {"w": np.array([0.0, np.nan], np.float32), "n": np.array(3, np.int64)}
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    save_checkpoint(same, weights, {})
    save_checkpoint(other, {**weights, "n": np.array(4, np.int64)}, {})
    begin(store, weights)
    watcher = Recorder()
    run_opening.check_first_weights(same, store, watcher)
    assert not watcher.events
    with pytest.raises(UsageError, match=r"other\.safetensors conflicts with .* --fresh"):
        run_opening.check_first_weights(other, store, watcher)
    for differs in ({"w": weights["w"]}, {**weights, "w": weights["w"].astype(np.float64)}):
        save_checkpoint(other, differs, {})
        with pytest.raises(UsageError, match="conflicts"):
            run_opening.check_first_weights(other, store, watcher)


async def test_a_run_that_the_broker_refuses_leaves_the_earlier_run_in_its_folder(store):
    broker, settings = MemoryBroker(), CoordinatorSettings("f", Rules(rounds=1))
    await (await broker.open()).declare(Topology("f", "quorum").shared())
    begin(store, {"w": np.zeros(2, np.float32)})
    files = sorted(store.folder.iterdir())
    with pytest.raises(OtherArguments):
        await main.coordinate(settings, broker, Topology("f"), store, Recorder(), fresh=True)
    assert sorted(store.folder.iterdir()) == files


def test_a_missing_init_file_is_reported_and_the_run_continues(store, tmp_path):
    begin(store, {"w": np.zeros(2, np.float32)})
    watcher = Recorder()
    run_opening.check_first_weights(tmp_path / "gone.safetensors", store, watcher)
    (event,) = watcher.events
    assert isinstance(event, run_events.Note)
    assert "--init is no longer needed" in event.sentence()
    assert (store.folder / checkpoint_name(0)).exists()


FOLDER = "cannot use the run folder .* --run"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        *((number, FOLDER) for number in (errno.ENOLCK, errno.ENOTSUP, errno.EACCES, errno.EROFS)),
        (errno.ENOSPC, "cannot use the run folder .*; free disk space and run the same command"),
        (errno.EMFILE, "^too many open files; .*'ulimit -n 4096'"),
    ],
)
async def test_a_folder_that_cannot_be_locked_is_an_error_in_one_line(
    monkeypatch, tmp_path, number, message
):
    def refuse(*_: object) -> None:
        raise OSError(number, "refused by the system")

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = RunStore(tmp_path / "run")
    settings = CoordinatorSettings("f", Rules(rounds=1))
    with pytest.raises(RunError, match=message) as caught:
        await main.coordinate(settings, None, None, store, Recorder(), journaled=False)
    assert "\n" not in str(caught.value)


async def test_another_users_lock_file_is_an_error_in_one_line(monkeypatch, tmp_path):
    store = RunStore(tmp_path / "run")

    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(RunError, match="lock: Permission denied"):
        settings = CoordinatorSettings("f", Rules(rounds=1))
        await main.coordinate(settings, None, None, store, Recorder(), journaled=False)


async def test_a_checkpoint_that_cannot_be_opened_is_an_error_about_this_file(store):
    begin(store, {"w": np.zeros(2, np.float32)})
    checkpoint = store.folder / checkpoint_name(0)
    checkpoint.unlink()
    checkpoint.symlink_to(checkpoint)
    wrong = f"{checkpoint}: Too many levels.*; make this file readable and writable, and run"
    with pytest.raises(RunError, match=wrong):
        settings = CoordinatorSettings("f", Rules(rounds=1))
        await main.coordinate(settings, None, None, store, Recorder(), journaled=False)
    store.unlock()


# --- what a worker is doing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "number", "words"),
    [
        ("training", 4, "a training 3/8"),
        ("training", 3, "a training for round 3"),
        ("receiving", 3, "a receiving for round 3"),
        ("idle", 3, "a idle (last heartbeat 2 s ago)"),
    ],
)
def test_the_state_of_a_missing_worker_is_named(state, number, words):
    worker = Worker(
        "a", "s", 5, (), 2.0, last_seen=8.0, state=state, run="r", round=number, step=3, steps=8
    )
    run = State(
        Rules(6),
        "r",
        4,
        QUORUM,
        phase=Phase.OPEN,
        link=1,
        workers={"a": worker},
        asked={"a": Issued(1.0, 4, 4)},
    )
    waiting = waiting_for(run, 10.0)
    assert waiting is not None
    assert waiting.sentence().endswith(f"; {words}")

"""The committer: what it writes, beyond what tests/federation covers."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluffle_common.errors import RunError
from fluffle_common.protocol import events as run_events
from fluffle_coordinator.dashboard.report import read_report
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine.records import Evaluated
from fluffle_coordinator.machine.rules import Rules
from fluffle_coordinator.service.committer import Average, Committer
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.history import read_history, read_history_lines
from fluffle_coordinator.storage.round_stats import Clock
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_coordinator.user_code.hooks import Commit, Hooks

LATE = {"worker": "b", "round": 1, "num_examples": 10}


class Run:
    """A running committer with a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commits: list[Commit] = []
        self.posted: list[ev.Event] = []
        store = RunStore(folder)
        self.identity = store.load("f").run
        self.committer = Committer(
            store,
            CoordinatorSettings("f", Rules(rounds=9), hooks=Hooks(on_round=self.commits.append)),
            metadata=lambda number: {"run": self.identity, "round": str(number)},
            record=lambda _: None,
            post=self.posted.append,
        )

    async def commit(self, number: int) -> None:
        participant: dict[str, Any] = {
            "worker": "a",
            "sequence": 1,
            "num_examples": 10,
            "train_loss": None,
        }
        participant |= {"seconds": 1.0, "counted_s": 1.0, "bytes": 4, "norm": 1.0}
        clock = Clock()
        clock.open()
        clock.closed_at = clock.averaged_at = clock.opened_at
        weights = {"w": np.full(1, number, np.float32)}
        self.committer.commit(Average(number, weights, "base", ("a", "b"), [participant], clock))
        await self.committer.drained()


@pytest.fixture
async def run(tmp_path):
    made = Run(tmp_path)
    made.running = asyncio.create_task(made.committer.run())
    yield made
    made.running.cancel()


async def test_a_round_is_committed_when_checkpoint_and_line_are_on_disk(run):
    await run.commit(1)
    (event,) = run.posted
    (line,) = read_history_lines(run.folder)
    assert isinstance(event, ev.Committed)
    assert (event.round, event.base) == (1, line["base"])
    assert (event.num_examples, event.timings) == (10, line["timings"])
    assert line["asked"] == ["a", "b"]
    assert RunStore(run.folder).load("f").base == event.base


async def test_a_hook_sees_the_newest_evaluation_although_an_older_one_came_after_it(run):
    for number, loss in ((1, 0.5), (0, 2.0)):
        run.committer.record_evaluation(number, {"a": Evaluated(5, loss, {})})
    await run.commit(2)
    assert run.commits[0].evaluation == {"loss": 0.5}


async def test_a_late_update_is_in_the_next_rounds_line(run):
    await run.commit(1)
    run.committer.counts.note(run_events.from_fields("late", LATE))
    await run.commit(2)
    assert [line["late"] for line in read_history_lines(run.folder)] == [0, 1]


async def test_an_update_that_is_late_for_the_last_round_is_in_the_history(run):
    run.committer.counts.note(run_events.from_fields("rejected", {"reason": "it has a NaN"}))
    await run.commit(1)
    run.committer.counts.note(run_events.from_fields("late", LATE))
    run.committer.record_end(1, "finished", "1 round is done")
    await run.committer.drained()
    ended = read_history_lines(run.folder)[-1]
    assert (ended["event"], ended["outcome"], ended["late"]) == ("ended", "finished", 1)
    (row,) = read_history(run.folder)
    assert (row["late"], row["late_updates"]) == (1, [LATE])
    assert (row["rejected"], row["rejections"]) == (1, [{"reason": "it has a NaN"}])
    shown = read_report(run.folder, 0.0)
    assert [(one["late"], one["rejected"]) for one in shown["rounds"]] == [(1, 1)]
    assert shown["run"]["phase"] == "ended"


async def test_a_run_that_ends_before_its_first_round_has_no_line(run):
    run.committer.record_end(0, "stopped", "nobody came")
    await run.committer.drained()
    assert not (run.folder / "history.jsonl").exists()


def _folder_as_checkpoint(folder: Path) -> None:
    (folder / "round-0001.safetensors").mkdir()


def _dangling_checkpoint(folder: Path) -> None:
    (folder / "round-0001.safetensors").symlink_to(folder / "unmounted" / "round")


def _looping_history(folder: Path) -> None:
    (folder / "history.jsonl").symlink_to("history.jsonl")


@pytest.mark.parametrize("spoil", [_folder_as_checkpoint, _dangling_checkpoint, _looping_history])
async def test_what_waiting_cannot_mend_ends_the_run_with_one_line(run, spoil):
    spoil(run.folder)
    with pytest.raises(RunError, match=r"cannot write to .*/(round|history).*no update is lost"):
        async with asyncio.timeout(60):
            await asyncio.gather(run.commit(1), run.running)


async def test_a_removed_history_is_not_begun_anew(run):
    await run.commit(1)
    (run.folder / "history.jsonl").unlink()
    with pytest.raises(RunError, match=r"cannot write to .*/history\.jsonl \(No such file"):
        async with asyncio.timeout(60):
            await asyncio.gather(run.commit(2), run.running)
    assert not (run.folder / "history.jsonl").exists()


async def test_a_run_whose_folder_is_removed_ends_with_one_line(run):
    await run.commit(1)
    shutil.rmtree(run.folder)
    with pytest.raises(RunError, match=r"the run folder .* was removed .*no update is lost"):
        async with asyncio.timeout(60):
            await asyncio.gather(run.commit(2), run.running)

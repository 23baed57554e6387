"""Early stopping, and the choice of the best model."""

from __future__ import annotations

import re

import pytest

from fluffle_common.tensors.checkpoint import read_checkpoint
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.service.early_stopping import NO_STOPPING, Standing, Stopping
from fluffle_coordinator.user_code.hooks import Hooks
from fluffle_worker.task import EvalResult
from tests.federation.harness import Adder

ACCURACY = {0: 0.1, 1: 0.5, 2: 0.8, 3: 0.7, 4: 0.9, 5: 0.85, 6: 0.86, 7: 0.2, 8: 0.3}


class Scored(Adder):
    """A task whose model after round r has weights r and the accuracy listed above."""

    def evaluate(self, weights):
        return EvalResult(1.0, 5, {"accuracy": ACCURACY[int(weights["w"][0])]})


def of_the_model(weights):
    return {"accuracy": ACCURACY[int(weights["w"][0])]}


def run_with(federation, stopping, rounds=8, **options):
    coordinator = federation.coordinator(rounds, stopping=stopping, **options)
    for name in "ab":
        federation.worker(name, Scored(federation.loop))
    return coordinator


def best_of(federation):
    return read_checkpoint(federation.folder / "best.safetensors")[1]["round"]


@pytest.mark.parametrize(
    ("stopping", "rounds", "reason"),
    [
        # The federated accuracy of round 2 is known when round 3 is committed.
        (
            Stopping("accuracy", target=0.8),
            3,
            "accuracy reached 0.8000 in round 2 (--target 0.8)",
        ),
        (
            Stopping("accuracy", patience=2),
            7,
            "accuracy has not improved for 2 rounds; the best is 0.9000 in round 4 (--patience)",
        ),
        (
            Stopping(patience=3),
            5,
            "loss has not improved for 3 rounds; the best is 1.0000 in round 1 (--patience)",
        ),
        (Stopping("accuracy", target=0.95, patience=9), 8, "8 rounds are done"),
        (NO_STOPPING, 8, "8 rounds are done"),
    ],
)
def test_a_run_stops_early(federated, stopping, rounds, reason):
    async def scenario(federation):
        state = await run_with(federation, stopping).end()
        assert (state.outcome, state.committed, state.reason) == ("finished", rounds, reason)
        there = (federation.folder / "best.safetensors").exists()
        assert there == (stopping.monitor is not None)

    federated(scenario)


def test_the_coordinators_own_test_counts_immediately(federated):
    async def scenario(federation):
        stopping = Stopping("test/accuracy", target=0.8)
        state = await run_with(federation, stopping, hooks=Hooks(of_the_model)).end()
        assert (state.committed, best_of(federation)) == (2, "2")

    federated(scenario)


@pytest.mark.parametrize("written", [True, False])
def test_the_best_model_is_kept_across_a_restart(federated, written):
    async def scenario(federation):
        first = run_with(federation, Stopping("accuracy"))
        await first.log.until("evaluated", 4)
        await first.kill()
        assert best_of(federation) == "4"
        if not written:  # as if it had crashed before
            (federation.folder / "best.safetensors").unlink()
        again = federation.coordinator(8, stopping=Stopping("accuracy"))
        assert (await again.end()).committed == 8
        assert best_of(federation) == "4"
        assert not [*federation.folder.glob("*.partial")]

    federated(scenario)


def checkpoints_of(federation):
    return sorted(path.stem for path in federation.folder.glob("*.safetensors"))


def test_only_the_newest_checkpoints_the_first_and_the_best_stay(federated):
    async def scenario(federation):
        coordinator = run_with(federation, Stopping("accuracy"), keep_checkpoints=2)
        assert (await coordinator.end()).committed == 8
        assert best_of(federation) == "4"
        assert checkpoints_of(federation) == ["best", "round-0000", "round-0007", "round-0008"]

    federated(scenario)


def test_the_checkpoint_of_a_model_that_may_still_become_the_best_stays(federated):
    async def scenario(federation):
        class Slow(Adder):
            def evaluate(self, weights):
                federation.loop.sleep(5)  # while the other worker trains for several rounds
                return EvalResult(1.0, 5, {"accuracy": 0.9})

        options = {"stopping": Stopping("accuracy"), "schedule": Buffered(buffer=1)}
        coordinator = federation.coordinator(12, keep_checkpoints=2, min_workers=2, **options)
        for name, task in (("a", Adder), ("b", Slow)):
            federation.worker(name, task(federation.loop))
        assert (await coordinator.end()).committed == 12
        best, *_ = (e["round"] for e in coordinator.log.of("evaluated") if e["accuracy"] == 0.9)
        assert best_of(federation) == str(best)

    federated(scenario)


def test_a_resumed_run_removes_the_checkpoints_that_an_earlier_command_kept(federated):
    async def scenario(federation):
        await run_with(federation, NO_STOPPING, rounds=5).end()
        (federation.folder / "round-0005.safetensors").write_bytes(b"damaged")
        again = run_with(federation, NO_STOPPING, rounds=6, keep_checkpoints=3)
        assert (await again.end()).committed == 6
        assert checkpoints_of(federation) == [f"round-{n:04d}" for n in (0, 4, 5, 6)]

    federated(scenario)


def test_a_run_resumes_without_the_checkpoint_of_its_best_model(federated):
    async def scenario(federation):
        first = run_with(federation, Stopping("accuracy"))
        await first.log.until("evaluated", 6)
        await first.kill()
        (federation.folder / "round-0004.safetensors").unlink()  # to make room
        again = federation.coordinator(8, stopping=Stopping("accuracy"))
        assert (await again.end()).committed == 8
        assert not again.log.of("disk")
        assert best_of(federation) == "4"

    federated(scenario)


def test_time_before_a_restart_counts(federated):
    async def scenario(federation):
        first = run_with(federation, Stopping(time_budget_s=2.5))
        await first.log.until("committed", 2)
        await first.kill()
        again = federation.coordinator(8, stopping=Stopping(time_budget_s=2.5))
        state = await again.end()
        assert 2 < state.committed < 8
        assert re.fullmatch(r".* took \d\.\d s \(--time-budget 2\.5\)", state.reason)

    federated(scenario)


@pytest.mark.parametrize(
    "stopping", [Stopping("accuracy", target=0.8), Stopping(patience=3), Stopping(time_budget_s=2)]
)
def test_a_run_that_has_stopped_early_is_not_continued_by_the_same_command(federated, stopping):
    async def scenario(federation):
        stopped = await run_with(federation, stopping).end()
        again = await run_with(federation, stopping).end()
        assert (again.outcome, again.reason) == ("finished", stopped.reason)
        assert again.committed == stopped.committed < 8
        assert (await run_with(federation, NO_STOPPING).end()).committed == 8

    federated(scenario)


def test_an_unknown_metric_is_reported_once(federated):
    async def scenario(federation):
        coordinator = run_with(federation, Stopping("acuracy", patience=1), rounds=3)
        assert (await coordinator.end()).committed == 3
        reported = [one["what"] for one in coordinator.log.of("unmeasured")]
        assert reported == [
            "no round has the metric 'acuracy' (--monitor); choose from loss, accuracy"
        ]

    federated(scenario)


def test_asynchronous_workers_have_time_to_evaluate(federated):
    async def scenario(federation):
        # Three workers begin with the first weights, so nobody evaluates before round 3.
        schedule, rules = Buffered(buffer=1), Stopping(patience=9)
        coordinator = federation.coordinator(6, schedule=schedule, stopping=rules, min_workers=3)
        for name in "abc":
            federation.worker(name, Scored(federation.loop))
        assert (await coordinator.end()).committed == 6
        assert coordinator.log.of("evaluated")
        assert not coordinator.log.of("unmeasured")

    federated(scenario)


def test_a_metric_that_nobody_measures_is_reported():
    standing = Standing(Stopping(patience=1))
    assert standing.missing({"test/accuracy": 0.5}) is None  # workers may measure the loss
    assert standing.missing({}) == (
        "no round has the metric 'loss' (--monitor), because no worker has evaluated a model; "
        "choose from test/accuracy"
    )
    alone = Standing(Stopping(patience=1)).missing({})
    assert alone is not None
    assert alone.endswith("; add --evaluate")


def test_a_missing_value_is_never_the_best():
    standing = Standing(Stopping("loss", target=0.1))
    standing.note(1, {"loss": float("nan")})
    standing.note(2, {"loss": None})
    assert (standing.best, standing.enough()) == (None, "")
    standing.note(3, {"loss": 0.2})
    standing.note(4, {"loss": 0.2})
    assert (standing.best, standing.enough()) == (3, "")
    standing.note(5, {"loss": 0.1})
    assert standing.enough() == "loss reached 0.1000 in round 5 (--target 0.1)"

"""Recovery of a run of real processes from each kind of failure.

``FULL=1`` in the environment uses the longer times and larger numbers of docs/guarantees.md.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pika
import pytest
from safetensors.numpy import load_file

from tests.faults.checker import check
from tests.faults.harness import Federation, Program, wait_until
from tests.faults.hostile import Foe, Hostile

pytestmark = pytest.mark.rabbit

FULL = os.environ.get("FULL") == "1"
Beat = ("--heartbeat", 0.5)


def start(
    federation: Federation, workers: int, *flags: object, hold: Path | None = None, **env: str
) -> tuple[Program, list[Program]]:
    """Start all workers, and a coordinator that waits for all; the first heeds the hold file."""
    coordinator = federation.coordinator(*rules(workers), *flags)
    first = {} if hold is None else {"FAULTS_HOLD": str(hold)}
    others = [federation.worker(n, workers, *Beat, **env) for n in range(1, workers)]
    return coordinator, [federation.worker(0, workers, *Beat, **env, **first), *others]


def hold_from(hold: Path, number: int) -> None:
    """Let no round end from this one on."""
    new = hold.with_suffix(".new")
    new.write_text(str(number))
    new.rename(hold)


def rules(workers: int) -> tuple[object, ...]:
    return ("--quorum", workers, "--min-workers", workers)


def assert_ended_well(federation: Federation, *programs: Program) -> None:
    """Wait until all processes have ended by themselves, and check that nothing was lost."""
    assert [program.end() for program in programs] == [0] * len(programs)
    federation.gather()
    federation.gather_orphans()
    verdict = check(federation.folder)
    assert verdict.clean, verdict.text()


# --- the coordinator -----------------------------------------------------------------------------


def test_a_coordinator_killed_in_every_round_ends_with_the_same_weights(
    federation: Federation, tmp_path: Path
) -> None:
    rounds, workers = 20 if FULL else 5, 3
    undisturbed = Federation(
        tmp_path / "undisturbed", federation.broker_url, federation.management_port
    )
    with undisturbed:
        coordinator, others = start(undisturbed, workers, "--rounds", rounds)
        assert [program.end() for program in (coordinator, *others)] == [0] * 4

    def again() -> Program:
        coordinator.kill()
        return federation.coordinator(*rules(workers), *flags)

    rng, hold = random.Random(23), tmp_path / "hold"
    hold_from(hold, 1)
    flags = ("--rounds", rounds, "--config", "train_s=0.4")
    coordinator, others = start(federation, workers, *flags, hold=hold)
    for number in range(1, rounds + 1):
        coordinator.wait_for("opened", round=number)
        time.sleep(rng.uniform(0.0, 0.6))  # at any time in the round
        coordinator = again()
        once_more = rng.random()
        if once_more < 0.3:  # before or shortly after its start
            time.sleep(rng.uniform(0.3, 1.5))
            coordinator = again()
        hold_from(hold, number + 1)
        if 0.3 <= once_more < 0.6:  # while it averages or writes
            coordinator.wait_for("counted", round=number, updates=workers)
            coordinator = again()
    assert_ended_well(federation, coordinator, *others)

    name = f"round-{rounds:04d}.safetensors"
    expected, got = load_file(undisturbed.run / name), load_file(federation.run / name)
    assert expected.keys() == got.keys()
    for tensor in expected:
        np.testing.assert_allclose(got[tensor], expected[tensor], rtol=1e-6, atol=1e-6)


def test_a_standby_takes_over_from_a_killed_coordinator(federation: Federation) -> None:
    hold, flags = federation.folder / "hold", ("--rounds", 8, "--config", "train_s=0.3")
    hold_from(hold, 3)
    active, workers = start(federation, 2, *flags, hold=hold)
    active.wait_for("connected")
    standby = federation.coordinator(*rules(2), *flags)
    standby.wait_for("standby")
    federation.wait_committed(2)
    active.kill()
    hold.unlink()
    standby.wait_for("opened")
    assert standby.events("resumed")[0]["round"] >= 2
    assert_ended_well(federation, standby, *workers)


def test_a_counted_update_outlives_both_its_worker_and_the_coordinator(
    federation: Federation,
) -> None:
    hold, flags = federation.folder / "hold", ("--quorum", "all", "--rounds", 3)
    hold_from(hold, 2)
    coordinator = federation.coordinator(*flags, "--min-workers", 2)
    slow = federation.worker(0, 2, *Beat, FAULTS_HOLD=str(hold))
    quick = federation.worker(1, 2, *Beat)
    coordinator.wait_for("counted", round=2, worker="w1")
    quick.kill()
    coordinator.kill()
    hold.unlink()
    again = federation.coordinator(*flags, "--min-workers", 1)
    federation.wait_committed(2)
    line = next(line for line in federation.history("committed") if line["round"] == 2)
    assert {one["worker"] for one in line["participants"]} == {"w0", "w1"}
    assert_ended_well(federation, again, slow)


# --- invalid messages ----------------------------------------------------------------------------


@contextlib.contextmanager
def listening(federation: Federation) -> Iterator[dict[str, str]]:
    """Consume the rejected queue; collect the reason of each hostile message by its id."""
    reasons: dict[str, str] = {}
    done = threading.Event()

    def listen() -> None:
        connection = pika.BlockingConnection(pika.URLParameters(federation.broker_url))
        channel = connection.channel()
        queue = f"{federation.name}.rejected"
        for method, properties, body in channel.consume(
            queue, auto_ack=True, inactivity_timeout=0.1
        ):
            if method is not None:
                line = federation.note_rejected(properties, body)
                reasons[line["id"]] = line["reason"]
            elif done.is_set():
                break
        connection.close()

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield reasons
    finally:
        done.set()
        thread.join(60)


def test_a_flood_of_hostile_messages(federation: Federation) -> None:
    count = 10_000 if FULL else 3_000
    flags = ("--rounds", 1000, "--config", "train_s=0.2", "--deadline", 60)
    coordinator, workers = start(federation, 2, *flags)
    federation.wait_committed(3)
    foe = Foe(random.Random(6), federation.name, ["w0", "w1"], federation.run_id())
    with listening(federation) as rejected:
        # Warm up, so that one-time allocations do not count as growth.
        flood(federation, foe.some(count // 10), rejected)
        before = {program.name: program.rss_bytes() for program in (coordinator, *workers)}
        committed = federation.committed()
        flood(federation, foe.some(count), rejected)
        federation.wait_committed(committed + 3)
        grown = {
            program.name: (program.rss_bytes() - before[program.name]) / 2**20
            for program in (coordinator, *workers)
        }
        last = finish(federation, coordinator)
        assert_ended_well(federation, last, *workers)
    assert max(grown.values()) < 25, f"MB more than before: {grown}"


def flood(federation: Federation, messages: list[Hostile], rejected: dict[str, str]) -> None:
    """Publish messages, and wait until each is rejected with a reason."""
    federation.inject(messages, confirm=False)
    wanted = {one.id: one for one in messages}

    def lacking() -> list[str]:
        return [f"{wanted[id].queue}: {wanted[id].what}" for id in wanted.keys() - rejected.keys()]

    with contextlib.suppress(AssertionError):
        wait_until(lambda: not lacking(), "all are rejected", timeout_s=60 + len(messages) / 100)
    assert lacking() == []
    assert all(rejected[id] for id in wanted)


def finish(federation: Federation, coordinator: Program) -> Program:
    """Finish an endless run with a last coordinator that runs one or two more rounds."""
    coordinator.interrupt()
    coordinator.end()
    return federation.coordinator(*rules(2), "--rounds", federation.committed() + 2)


def test_hostile_messages_among_the_parts_of_a_large_update(federation: Federation) -> None:
    coordinator, workers = start(
        federation, 2, "--rounds", 1000, "--config", "train_s=0.2", FAULTS_KERNEL=str(2 * 2**20)
    )
    federation.wait_committed(1)
    foe = Foe(random.Random(8), federation.name, ["w0", "w1"], federation.run_id())
    outboxes = [f"{federation.name}.outbox.w{number}" for number in (0, 1)]
    with listening(federation) as rejected:
        flood(federation, foe.some(100, outboxes), rejected)
        committed = federation.committed()
        federation.wait_committed(committed + 2)
        assert_ended_well(federation, finish(federation, coordinator), *workers)


def test_the_rejected_queue_is_bounded_and_what_it_dropped_can_be_counted(
    federation: Federation,
) -> None:
    coordinator, workers = start(federation, 2, "--rounds", 1000, "--config", "train_s=0.2")
    federation.wait_committed(1)
    foe = Foe(random.Random(9), federation.name, ["w0", "w1"], federation.run_id())
    federation.inject(foe.some(1200, foe.queues()[:2]), confirm=False)
    wait_until(lambda: len(coordinator.events("rejected")) >= 1200, "all are told")

    def held() -> int:  # messages on their way to the rejected queue, and updates of the open round
        return sum(federation.queues()[name]["unacked"] for name in ("presence", "updates"))

    wait_until(lambda: held() <= 2, "all are moved; the next coordinator would count them again")
    federation.wait_committed(federation.committed() + 2)  # a round's line has the number
    assert_ended_well(federation, finish(federation, coordinator), *workers)
    lines = (federation.folder / "evidence/rejected.jsonl").read_bytes().splitlines()
    assert len(lines) == 1000
    assert sum(line["rejected"] for line in federation.history("committed")) == 1200


# --- the disk ------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[bool], None]]:
    """Mount a disk of 4 MB at the folder; yield a function that fills it or makes room."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as why:
        pytest.skip(f"NOT TESTED on a full disk, which takes root and a tmpfs: {why}")
    filler = folder / "filler"

    def fill(full: bool) -> None:
        if not full:
            filler.unlink()
            return
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_pauses_the_run_until_there_is_room(federation: Federation) -> None:
    with small_disk(federation.run) as fill:
        hold = federation.folder / "hold"
        hold_from(hold, 3)
        coordinator, workers = start(federation, 2, "--rounds", 6, hold=hold)
        federation.wait_committed(2)
        fill(True)
        hold.unlink()
        event = coordinator.wait_for("disk")
        assert event["folder"] == str(federation.run)
        assert "No space left" in event["reason"]
        committed = federation.committed()
        threading.Event().wait(3)
        assert coordinator.alive()
        assert federation.committed() == committed
        fill(False)
        federation.wait_committed(committed + 1)
        assert_ended_well(federation, coordinator, *workers)
        assert len(coordinator.events("disk")) == 1


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of others: Linux only")
def test_a_disk_that_refuses_large_files_pauses_the_run_too(federation: Federation) -> None:
    # The same without root: a resource limit keeps files from growing.
    hold = federation.folder / "hold"
    hold_from(hold, 3)
    coordinator, workers = start(federation, 2, "--rounds", 5, hold=hold, FAULTS_KERNEL="400000")
    federation.wait_committed(2)
    limits = resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE, (10**6, limits[1]))
    hold.unlink()
    coordinator.wait_for("disk")
    assert not list(federation.run.glob("*.partial"))
    resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE, limits)
    assert_ended_well(federation, coordinator, *workers)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of others: Linux only")
def test_an_average_that_was_never_on_disk_was_never_sent(federation: Federation) -> None:
    hold, flags = federation.folder / "hold", ("--rounds", 5)
    hold_from(hold, 3)
    coordinator, workers = start(federation, 2, *flags, hold=hold, FAULTS_KERNEL="400000")
    federation.wait_committed(2)
    limits = resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE, (10**6, limits[1]))
    hold.unlink()
    coordinator.wait_for("disk")
    last = federation.committed()
    coordinator.kill()

    again = federation.coordinator(*rules(2), *flags)
    assert again.wait_for("resumed")["round"] == last
    assert_ended_well(federation, again, *workers)
    for worker in workers:  # their updates were delivered again
        begun = [event["round"] for event in worker.events("begin") if event["kind"] == "fit"]
        assert begun == list(range(1, 6))
    assert not again.events("rejected")


def test_a_torn_line_and_a_half_written_checkpoint_are_repaired(federation: Federation) -> None:
    hold = federation.folder / "hold"
    hold_from(hold, 3)
    coordinator, workers = start(federation, 2, "--rounds", 5, hold=hold)
    federation.wait_committed(2)
    coordinator.kill()
    hold.unlink()
    with (federation.run / "history.jsonl").open("a") as history:
        history.write('{"event":"committed","round":3,"partici')
    half_written = federation.run / "best.safetensors.partial"
    shutil.copy(federation.run / "round-0001.safetensors", half_written)
    again = federation.coordinator(*rules(2), "--rounds", 5)
    assert "incomplete last line" in again.wait_for("repaired")["what"]
    assert_ended_well(federation, again, *workers)
    assert not list(federation.run.glob("*.partial"))

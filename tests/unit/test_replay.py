"""The archive of updates, and the replay of rounds from it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fluffle_common.concurrency import run_all
from fluffle_common.errors import UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.tensors.checkpoint import checkpoint_name, read_checkpoint, save_checkpoint
from fluffle_common.tensors.codecs.registry import encoding_of
from fluffle_common.tensors.compression import compress
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.messaging import Route, send_tensors
from fluffle_coordinator.cli.run_folder import replay as replay_command
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine.effects import Fold
from fluffle_coordinator.machine.state import Handle, Rules
from fluffle_coordinator.service import committer as module
from fluffle_coordinator.service.aggregator import Aggregator
from fluffle_coordinator.service.committer import Committer
from fluffle_coordinator.service.fetcher import Fetcher
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage import replay
from fluffle_coordinator.storage import update_archive as archive
from fluffle_coordinator.storage.history import read_history_lines
from fluffle_coordinator.storage.run_store import RunStore, Saved

RUN = "abc"
TOPOLOGY = Topology("letters")
LARGE = 1_200_000  # float32 values: more than one part


def base() -> dict[str, np.ndarray]:
    """Return a small model with every kind of tensor that is averaged differently."""
    numbers = np.random.default_rng(0)
    return {
        "w": numbers.normal(size=(5, 3)).astype(np.float32),
        "d": numbers.normal(size=4),
        "h": numbers.normal(size=3).astype(np.float16),
        "b": numbers.normal(size=3).astype("bfloat16"),
        "n": np.array([3, -7], np.int32),
        "s": np.array(0.5, np.float32),
        "none": np.zeros((0, 2), np.float32),
    }


def delta(seed: int, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    return {
        name: numbers.integers(-9, 9, one.shape)
        if one.dtype.kind == "i"
        else np.asarray(numbers.normal(size=one.shape), one.dtype)
        for name, one in weights.items()
    }


class Run:
    """A real aggregator and committer, fed by hand over the broker in memory."""

    def __init__(self, folder: Path, weights: dict[str, np.ndarray], *, keep: bool = True) -> None:
        self.store, self.weights = RunStore(folder), weights
        self.events: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.recorded: asyncio.Queue[run_events.RunEvent] = asyncio.Queue()
        settings = CoordinatorSettings("letters", Rules(rounds=9), keep_updates=keep)
        self.committer = Committer(
            self.store,
            settings,
            metadata=lambda number: {"run": RUN, "round": str(number)},
            record=self.recorded.put_nowait,
            post=self.events.put_nowait,
        )
        self.aggregator = Aggregator(
            Fetcher(TOPOLOGY, settings, link=lambda: self.link),
            Saved("r", weights=weights),
            self.committer,
            settings,
            post=self.events.put_nowait,
        )

    async def begin(self) -> None:
        self.link = await MemoryBroker().open()
        await self.link.declare(TOPOLOGY.shared())

    async def fold(
        self, worker: str, number: int, seed: int, num_examples: int, how: str | None = None
    ) -> Held:
        """Send an update and give it to the aggregator, without waiting for it."""
        await self.link.declare(TOPOLOGY.of_worker(worker))
        message = Update(
            federation="letters", run=RUN, round=number, base="b", worker=worker,
            num_examples=num_examples, seconds=1.0, encoding=how and encoding_of(how),
        )  # fmt: skip
        tensors = delta(seed, self.weights)
        if how is not None:
            tensors, _ = compress(tensors, how, {})
        outbox = Route("", [TOPOLOGY.outbox(worker)])
        await send_tensors(self.link, message, tensors, Route("", [TOPOLOGY.updates]), parts=outbox)
        delivery = await self.link.get(TOPOLOGY.updates)
        assert delivery is not None
        message, payload = decode(delivery.body)
        assert isinstance(message, Update)
        held = Held(delivery, message, payload)
        self.aggregator.fold(held, Fold(held.arrived(0.0, Handle(1, 1))), number)
        return held

    async def commit(self, number: int) -> None:
        await self.aggregator.drained()
        self.aggregator.opened()
        self.aggregator.commit(number, ())
        await self.aggregator.drained()
        await self.committer.drained()
        assert self.aggregator.weights is not None
        self.weights = self.aggregator.weights


@contextlib.asynccontextmanager
async def at_work(run: Run) -> AsyncIterator[Run]:
    await run.begin()
    task = asyncio.ensure_future(run_all(run.aggregator.run(), run.committer.run()))
    try:
        yield run
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def two_rounds(folder: Path, weights: dict[str, np.ndarray], *, keep: bool = True) -> None:
    """Commit two rounds of three workers whose sum depends on the order they came in."""
    run = Run(folder, weights, keep=keep)
    run.store.load("letters")
    run.store.save_weights(0, weights, {"run": RUN})
    async with at_work(run):
        for number, order in ((1, ("c", "a", "b.x-1")), (2, ("a", "b.x-1", "c"))):
            for place, worker in enumerate(order):
                await run.fold(worker, number, 10 * number + place, 3 + 4 * place)
            await run.commit(number)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a run of two rounds whose updates are archived."""
    asyncio.run(two_rounds(tmp_path / "run", base()))
    return tmp_path / "run"


def files(folder: Path, number: int) -> list[str]:
    return sorted(path.name for path in archive.round_folder(folder, number).iterdir())


# --- archiving ---------------------------------------------------------------------------------


def test_updates_are_archived_in_the_order_of_the_sum(folder):
    assert files(folder, 1) == ["0001-c.msgpack", "0002-a.msgpack", "0003-b.x-1.msgpack"]
    assert files(folder, 2) == ["0001-a.msgpack", "0002-b.x-1.msgpack", "0003-c.msgpack"]


async def test_an_update_is_kept_byte_for_byte(tmp_path):
    run = Run(tmp_path, base())
    async with at_work(run):
        held = await run.fold("a", 1, 1, 5)
        body = bytes(held.delivery.body)
        await run.aggregator.drained()
    assert archive.update_path(tmp_path, 1, 1, "a").read_bytes() == body
    assert held.delivery.body == b""  # and is released in memory


@pytest.mark.parametrize("how", ["bf16", "f16", "int8", "topk:0.1"])
async def test_an_encoded_round_is_kept_as_it_came_and_replayed(tmp_path, how):
    weights = {**base(), "large": np.ones((70, 40), np.float32)}
    run = Run(tmp_path, weights)
    run.store.load("letters")
    run.store.save_weights(0, weights, {"run": RUN})
    async with at_work(run):
        await run.fold("plain", 1, 1, 5)
        held = await run.fold("encoded", 1, 2, 7, how)
        assert {"bf16": "large", "f16": "large", "int8": "large#q"}.get(how, "large#index") in {
            entry.name for entry in held.message.tensors
        }
        await run.commit(1)
    exact = (5.0 * delta(1, weights)["large"] + 7.0 * delta(2, weights)["large"]) / 12
    off = np.abs(run.weights["large"] - 1 - exact).max()
    assert 0 < off < (3 if how.startswith("topk") else 0.02)
    assert replay.replay(tmp_path, 1).equal


async def test_nothing_is_kept_unless_asked_for(tmp_path):
    await two_rounds(tmp_path, base(), keep=False)
    assert not (tmp_path / "updates").exists()


async def test_what_is_refused_is_not_kept(tmp_path):
    run = Run(tmp_path, base())
    async with at_work(run):
        run.weights = {**run.weights, "w": np.full((5, 3), np.nan, np.float32)}
        run.weights["more"] = np.zeros(1)
        await run.fold("a", 1, 1, 5)
        await run.aggregator.drained()
        assert isinstance(await run.events.get(), ev.FoldFailed)
        run.weights = base()
        await run.fold("b", 1, 2, 5)
        await run.aggregator.drained()
    assert files(tmp_path, 1) == ["0001-b.msgpack"]


async def test_a_full_disk_pauses_and_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DISK_RETRY_S", 0.0)
    full, keep_update = [True], archive.keep_update

    def refuses(path: Path, body: bytes, payload: memoryview | None) -> None:
        if full[0]:
            path.parent.mkdir(parents=True, exist_ok=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        keep_update(path, body, payload)

    monkeypatch.setattr(archive, "keep_update", refuses)
    run = Run(tmp_path, base())
    async with at_work(run):
        await run.fold("a", 1, 1, 5)
        event = await run.recorded.get()
        assert isinstance(event, run_events.Disk)
        assert event.reason == "No space left on device"
        assert run.events.empty()  # an update is archived before it counts
        assert files(tmp_path, 1) == []
        full[0] = False
        assert isinstance(await run.events.get(), ev.Folded)
        await run.commit(1)
    assert files(tmp_path, 1) == ["0001-a.msgpack"]


def test_an_incomplete_file_never_has_the_final_name(tmp_path, monkeypatch):
    path = archive.update_path(tmp_path, 1, 1, "a")
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(OSError, match="bad"):
        archive.keep_update(path, b"body", [memoryview(b"pay"), memoryview(b"load")])
    assert files(tmp_path, 1) == []


def test_a_run_folder_that_was_removed_is_not_created_anew(tmp_path):
    with pytest.raises(FileNotFoundError):
        archive.keep_update(archive.update_path(tmp_path / "moved", 1, 1, "a"), b"body", None)
    assert not (tmp_path / "moved").exists()


def test_after_a_crash_an_uncommitted_round_starts_over(folder):
    body = archive.update_path(folder, 2, 1, "a").read_bytes()
    archive.keep_update(archive.update_path(folder, 3, 1, "a"), body, None)
    (archive.round_folder(folder, 3) / "0002-c.msgpack.partial").write_bytes(b"half")
    (folder / "run.json").write_text(json.dumps({"run": RUN, "federation": "letters"}))
    RunStore(folder).load("letters")
    assert not archive.round_folder(folder, 3).exists()
    assert len(files(folder, 2)) == 3


async def test_the_norm_of_an_update_is_told_and_is_in_the_history(tmp_path):
    weights = {"w": np.zeros((3, 2), np.float32), "n": np.array(5)}
    run = Run(tmp_path / "run", weights)
    run.store.load("letters")
    run.store.save_weights(0, weights, {"run": RUN})
    async with at_work(run):
        await run.fold("a", 1, 1, 3)
        await run.commit(1)
    expected = np.sqrt(sum((t.astype(float) ** 2).sum() for t in delta(1, weights).values()))
    folded = await run.events.get()
    assert isinstance(folded, ev.Folded)
    assert folded.norm == pytest.approx(expected, rel=1e-6)
    (line,) = read_history_lines(tmp_path / "run")
    assert line["participants"][0]["norm"] == folded.norm


# --- replaying ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_is_equal_bit_by_bit(folder, number):
    result = replay.replay(folder, number)
    assert result.equal
    assert [tensor.name for tensor in result.tensors] == list(base())
    first = {"worker": "c" if number == 1 else "a", "num_examples": 3}
    assert result.participants[0] == first
    for tensor in result.tensors:
        assert tensor.replayed == replay.Distance(True, 0, 0.0, 0)


async def test_an_update_in_parts_is_kept_and_replayed(tmp_path):
    await two_rounds(tmp_path, {"w": np.ones(LARGE, np.float32)})
    assert len(files(tmp_path, 1)) == 6
    assert (archive.round_folder(tmp_path, 1) / "0001-c.payload").stat().st_size == 4 * LARGE
    assert replay.replay(tmp_path, 2).equal
    (archive.round_folder(tmp_path, 2) / "0001-a.payload").unlink()
    with pytest.raises(
        UsageError, match=r"the tensors of a's update are missing: .*0001-a\.payload"
    ):
        replay.replay(tmp_path, 2)


def test_the_order_is_that_of_the_history(folder):
    """Updates are result by their places in the sum, which their file names contain."""
    history = folder / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    lines[0]["participants"].reverse()
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=r"update of b\.x-1 is missing"):
        replay.replay(folder, 1)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_examples", "-1e999", "line 1 is damaged"),
        ("discount", "NaN", "line 1 is damaged"),
        ("discount", "-0.5", r"line 1 is damaged \(participants\.0\.discount\)"),
        ("discount", '"1"', r"line 1 is damaged \(participants\.0\.discount\)"),
    ],
)
def test_a_damaged_history_is_not_blamed_on_the_strategy(folder, field, value, says):
    history = folder / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    lines[0]["participants"][0][field] = json.loads(value)
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=says):
        CliRunner().invoke(replay_command, [str(folder), "--round", "1"], catch_exceptions=False)


@pytest.mark.parametrize("of", ["update", "checkpoint"])
def test_one_altered_bit_is_found_and_its_tensor_named(folder, of):
    if of == "update":
        path = archive.update_path(folder, 1, 2, "a")
        message, payload = decode(path.read_bytes())
        (entry,) = [one for one in message.tensors if one.name == "w"]
        at = path.stat().st_size - len(payload) + entry.offset + 2  # in its fraction
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    else:
        path = folder / checkpoint_name(1)
        weights, metadata = read_checkpoint(path)
        weights["w"] = weights["w"].copy()
        weights["w"][0, 0] = np.nextafter(weights["w"][0, 0], np.float32(9))
        save_checkpoint(path, weights, metadata)
    result = replay.replay(folder, 1)
    assert not result.equal
    assert [tensor.name for tensor in result.tensors if not tensor.replayed.equal] == ["w"]
    (tensor,) = [tensor for tensor in result.tensors if tensor.name == "w"]
    assert tensor.replayed.different == 1
    assert tensor.replayed.largest > 0
    assert tensor.replayed.ulps >= 1
    if of == "checkpoint":
        assert tensor.replayed.ulps == 1

    shown = CliRunner().invoke(replay_command, [str(folder), "--round", "1"])
    assert shown.exit_code == 1
    assert "DIFFERENT: 1 of 7 tensors differ from the committed model: w\n" in shown.output
    as_json = CliRunner().invoke(replay_command, [str(folder), "--round", "1", "--json"])
    assert as_json.exit_code == 1
    tensors = json.loads(as_json.output)["tensors"]
    assert [x["name"] for x in tensors if not x["replayed"]["equal"]] == ["w"]


def test_a_checkpoint_that_is_not_finite_is_different_and_still_json(folder):
    path = folder / checkpoint_name(1)
    weights, metadata = read_checkpoint(path)
    save_checkpoint(path, {**weights, "d": np.full(4, np.nan)}, metadata)
    result = CliRunner().invoke(replay_command, [str(folder), "--round", "1", "--json"])
    (wrong,) = [x for x in json.loads(result.output)["tensors"] if not x["replayed"]["equal"]]
    assert (wrong["name"], wrong["replayed"]["largest"]) == ("d", None)


def test_an_equal_replay_in_words(folder):
    shown = CliRunner().invoke(replay_command, [str(folder), "--round", "2"])
    assert shown.exit_code == 0
    assert "equal: all 7 tensors match the committed model bit for bit" in shown.output
    assert "a (3), b.x-1 (7), c (11)" in shown.output


def test_a_missing_update_is_reported_with_its_worker(folder):
    archive.update_path(folder, 1, 3, "b.x-1").unlink()
    with pytest.raises(UsageError, match=r"the update of b\.x-1 is missing .*0003-b\.x-1\.msgpack"):
        replay.replay(folder, 1)


def test_a_foreign_or_broken_update_is_reported(folder):
    path = archive.update_path(folder, 1, 1, "c")
    path.write_bytes(archive.update_path(folder, 2, 3, "c").read_bytes())
    with pytest.raises(UsageError, match="is not the update that was counted: .*'abc', 2, 'c', 3"):
        replay.replay(folder, 1)
    path.write_bytes(b"rubbish")
    with pytest.raises(
        UsageError, match="is not the update that was counted: the body is not a msgpack array"
    ):
        replay.replay(folder, 1)


def test_an_uncommitted_round_and_a_run_without_updates_are_reported(folder, tmp_path):
    with pytest.raises(
        UsageError, match="round 3 .* is not committed; the last committed round is 2"
    ):
        replay.replay(folder, 3)
    asyncio.run(two_rounds(tmp_path / "other", base(), keep=False))
    with pytest.raises(UsageError, match="ran without --keep-updates"):
        replay.replay(tmp_path / "other", 1)
    (folder / checkpoint_name(0)).unlink()
    with pytest.raises(UsageError, match=r"there is no model file .*round-0000"):
        replay.replay(folder, 1)


@pytest.mark.parametrize(
    ("dtype", "one", "other", "ulps"),
    [
        (np.float32, 1.0, np.nextafter(np.float32(1), np.float32(0)), 1),
        (np.float16, -1.0, 1.0, 2 * 0x3C00 + 1),
        (np.float64, -0.0, 0.0, 1),
        (np.float64, -np.inf, np.inf, 2 * 0x7FF0000000000000 + 1),
        (np.int8, -128, 127, 255),
        (np.uint16, 3, 65535, 65532),
        (np.int64, -(2**63), 2**63 - 1, 2**64 - 1),
    ],
)
def test_distances_count_the_values_in_between(dtype, one, other, ulps):
    a, b = np.array([one, 1], dtype), np.array([other, 1], dtype)
    assert replay.distance(a, b).ulps == replay.distance(b, a).ulps == ulps
    assert replay.distance(a, b).different == 1
    assert replay.distance(a, a).equal


@pytest.mark.parametrize("strategy", ["evil.py:mine", "evil:mine"])
def test_code_that_a_run_folder_names_is_not_run_unless_the_user_names_it(
    folder, monkeypatch, strategy
):
    monkeypatch.chdir(folder)
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nmine = None\n")
    history = folder / "history.jsonl"
    lines = [json.loads(x) | {"strategy": strategy} for x in history.read_text().splitlines()]
    history.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    file = {"strategy_file": str(folder / "evil.py")} if ".py" in strategy else {}
    run = json.loads((folder / "run.json").read_text())
    run["configurations"] = [{"from_round": 1, "strategy": strategy, **file}]
    (folder / "run.json").write_text(json.dumps(run))
    replayed = CliRunner().invoke(replay_command, [str(folder), "--round", "1"])
    assert isinstance(replayed.exception, UsageError)
    assert "evil" in str(replayed.exception).partition("give --strategy ")[2]
    assert not ran.exists()


def test_a_round_of_an_object_of_a_program_is_replayed_with_the_code_that_the_user_names(
    folder, monkeypatch
):
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text(
        "from fluffle_coordinator.strategy.fedavg import fedavg\n"
        "class Mine(type(fedavg)):\n    pass\n"
        "mine = Mine(*(getattr(fedavg, name) for name in vars(fedavg)))\n"
    )
    history = folder / "history.jsonl"
    lines = [json.loads(x) | {"strategy": "Mine"} for x in history.read_text().splitlines()]
    history.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    arguments = [str(folder), "--round", "1"]
    with pytest.raises(UsageError, match="give --strategy path.py:name"):
        CliRunner().invoke(replay_command, arguments, catch_exceptions=False)
    arguments += ["--strategy", "mine.py:mine"]
    assert CliRunner().invoke(replay_command, arguments, catch_exceptions=False).exit_code == 0

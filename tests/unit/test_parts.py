"""Updates in parts: they give bit for bit the same sum as whole ones, or do not enter it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import LinkLost
from fluffle_common.protocol import wire_format as wire
from fluffle_common.protocol.messages import Part, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import pack
from fluffle_common.protocol.wire_format import decode
from fluffle_common.tensors.compression import compress, decompress
from fluffle_common.tensors.in_pieces import InPieces
from fluffle_common.tensors.layout import FLOATS, Array, Tensors, layout_for
from fluffle_common.tensors.weights import NotFinite, check_delta, finite_norm
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.state import Rules
from fluffle_coordinator.service import spool
from fluffle_coordinator.service.aggregator import Aggregator
from fluffle_coordinator.service.committer import Average
from fluffle_coordinator.service.fetcher import Fetcher
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import Saved
from fluffle_coordinator.strategy import weighted
from fluffle_coordinator.strategy.base import Contribution, NamedStrategy
from fluffle_coordinator.strategy.fedavg import fedavg
from fluffle_coordinator.strategy.pipeline import pipeline, replace

SEEDS = st.integers(0, 2**32 - 1)


def in_one_piece(tensors: Mapping[str, Array]) -> Tensors:
    """Return tensors as one block of bytes, as on the wire."""
    whole = layout_for(tensors).empty()
    for name, into in whole.items():
        into[...] = tensors[name]
    return whole


def cut(whole: Tensors, size: int) -> InPieces:
    """Yield a block in pieces that share one buffer."""
    assert whole.memory is not None
    memory, buffer = whole.memory, memoryview(bytearray(size))

    class Pieces:
        def __iter__(self) -> Any:
            for start in range(0, len(memory), size):
                piece = buffer[: len(memory) - start]
                piece[:] = memory[start : start + size]
                yield piece

    return InPieces(whole.layout, Pieces())


def drawn(seed: int, dtype: np.dtype[Any], shapes: list[tuple[int, ...]]) -> Tensors:
    rng = np.random.default_rng(seed)
    return in_one_piece(
        {
            f"t{i}": (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4)).astype(dtype)
            for i, shape in enumerate(shapes)
        }
    )


def expected(base: Array, updates: list[tuple[Array, int]]) -> Array:
    """Compute the average with NumPy in float64, with the coordinator's scaling."""
    scale, total = 2.0**-64, sum(n for _, n in updates)
    summed = np.zeros(base.shape)
    for learnt, n in updates:
        summed += learnt.astype(np.float64) * (n * scale)
    return (base.astype(np.float64) + summed / (total * scale)).astype(base.dtype)


models = st.lists(
    st.sampled_from([(), (0,), (1,), (3,), (16,), (5, 7), (64,), (300,)]), min_size=1, max_size=6
)


@given(SEEDS, st.sampled_from(FLOATS), models, st.integers(1, 40), st.data())
def test_folding_pieces_equals_folding_the_whole_bit_for_bit(seed, name, shapes, cells, data):
    dtype = layout_for({"w": np.zeros(1, np.dtype(name))}).dtype
    model = drawn(seed, dtype, shapes)
    base: Mapping[str, Array] = data.draw(st.sampled_from([model, dict(model)]))
    counts = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=4))
    updates = [drawn(seed + i + 1, dtype, shapes) for i in range(len(counts))]
    forms: dict[str, Callable[[Tensors], Any]] = {
        "pieces": lambda whole: cut(whole, 8 * cells),
        "whole": lambda whole: whole,
        "named": dict,
    }
    averages = []
    for form, undivided in itertools.product(forms.values(), (0, weighted.BLOCK)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weighted, "_UNDIVIDED", undivided)
            state = fedavg.init(base)
            for _ in range(2):  # the second round reuses the memory of the first
                for update, n in zip(updates, counts, strict=True):
                    one = Contribution(worker="a", num_examples=n, delta=form(update))
                    state = fedavg.fold(state, one)
                average, state = fedavg.finish(state, base)
                averages.append(average)
    for average in averages:
        for tensor in base:
            both = [(update[tensor], n) for update, n in zip(updates, counts, strict=True)]
            assert average[tensor].tobytes() == averages[0][tensor].tobytes()
            if name in ("float32", "float64"):  # NumPy rounds the others in two steps
                assert average[tensor].tobytes() == expected(base[tensor], both).tobytes()


@given(SEEDS, st.sampled_from(FLOATS), models, st.integers(1, 40))
def test_the_mean_delta_of_pieces_equals_that_of_the_whole(seed, name, shapes, cells):
    dtype = layout_for({"w": np.zeros(1, np.dtype(name))}).dtype
    base, update = drawn(seed, dtype, shapes), drawn(seed + 1, dtype, shapes)
    mean, models = weighted.weighted(), []
    for delta in (update, cut(update, 8 * cells)):
        state = mean.fold(mean.init(base), Contribution(worker="a", num_examples=3, delta=delta))
        models.append(mean.finish(state, base)[0])
    assert all(models[0][name].tobytes() == models[1][name].tobytes() for name in base)


@given(SEEDS, st.sampled_from(FLOATS), models, st.integers(1, 40))
def test_the_norm_of_pieces_equals_that_of_the_whole(seed, name, shapes, cells):
    dtype = layout_for({"w": np.zeros(1, np.dtype(name))}).dtype
    whole = drawn(seed, dtype, shapes)
    assert check_delta(cut(whole, 8 * cells), whole) == pytest.approx(finite_norm(whole), rel=1e-6)


@pytest.mark.parametrize("size", [8, 24, 64, 80, 4096])
def test_values_that_are_not_finite_are_counted_by_tensor(size):
    whole = in_one_piece({"a": np.ones(5, np.float32), "b": np.ones((7, 3), np.float32)})
    whole["b"][2:4] = np.nan
    with pytest.raises(NotFinite, match="tensor 'b' has 6 values that are NaN or infinite"):
        check_delta(cut(whole, size), whole)


def test_bytes_between_tensors_are_ignored():
    whole = in_one_piece({"a": np.full(5, 3.0, np.float32), "b": np.full(1, 4.0, np.float32)})
    model = in_one_piece({name: np.zeros_like(tensor) for name, tensor in whole.items()})
    whole.flat[5:16] = np.nan
    delta = cut(whole, 24)
    assert check_delta(delta, model) == pytest.approx(7.81024967)
    state = fedavg.fold(fedavg.init(model), Contribution(worker="a", num_examples=3, delta=delta))
    average, _ = fedavg.finish(state, model)
    assert average["b"].tolist() == [4.0]
    assert not any(average.memory[20:64])


# --- through a broker ----------------------------------------------------------------------------

TOPOLOGY = Topology("f")
PART = 2**10
SHAPES = {"kernel": (40, 50), "bias": (50,), "scale": ()}
WORKERS = ("a", "b", "c", "mallory")


def values(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(s), np.float32) for name, s in SHAPES.items()}


class Sum:
    """An aggregator, the events that it posts, and the broker that it fetches from."""

    def __init__(self, link: MemoryLink, folder: Path, **options: Any) -> None:
        self.link: Any = link
        self.kept: list[bytes] = []
        self.news: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.averages: asyncio.Queue[Average] = asyncio.Queue()
        self.running: asyncio.Future[None]
        self.model = in_one_piece(values(0))
        settings = CoordinatorSettings("f", Rules(rounds=1), **options)
        self.aggregator = Aggregator(
            Fetcher(TOPOLOGY, settings, link=lambda: self.link, folder=folder),
            Saved("r", weights=self.model),
            self,  # type: ignore[arg-type]
            settings,
            post=self.news.put_nowait,
        )

    async def keep(self, place: int, held: Held, payload: Any) -> None:
        self.kept.append(b"".join(map(bytes, payload)))

    def lay_on_disk(self, tensors: Any) -> Any:
        return tensors

    async def when_room(self, work: Callable[[], Awaitable[Any]]) -> Any:
        return await work()

    def commit(self, average: Average) -> None:
        self.averages.put_nowait(average)

    async def send(
        self,
        worker: str,
        tensors: Any,
        change: Callable[[list[bytes]], list[bytes]] = list,
        encoding: str | None = None,
    ) -> Held:
        """Put the parts of an update into the worker's outbox; return its announcement."""
        of = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": worker}
        message = Update(**of, num_examples=3, seconds=0.0, encoding=encoding)
        _, body, parts = pack(message, tensors)
        for part in change(list(parts)):
            await self.link.publish(
                part, Properties(), exchange=TOPOLOGY.results, keys=[f"part.{worker}"]
            )
        announced, payload = decode(body)
        assert isinstance(announced, Update)
        return Held(Delivered(body), announced, payload)

    def begin_to_fold(self, held: Held, num_examples: int, number: int) -> None:
        arrived = held.arrived(0.0, rs.Handle(1, 1))
        arrived = dataclasses.replace(arrived, num_examples=num_examples)
        self.aggregator.fold(held, fx.Fold(arrived), number)

    async def fold(self, held: Held) -> ev.Event:
        self.begin_to_fold(held, held.message.num_examples, held.message.round)
        return await self.heard()

    async def heard(self) -> ev.Event:
        """Return the next event that it posts; raise the exception that ended it, if any."""
        news = asyncio.ensure_future(self.news.get())
        await asyncio.wait({news, self.running}, return_when=asyncio.FIRST_COMPLETED)
        if not news.done():
            self.running.result()
        return await news

    async def average(self) -> bytes:
        self.aggregator.commit(1, WORKERS)
        weights = (await self.averages.get()).weights
        return b"".join(weights[name].tobytes() for name in SHAPES)


class Delivered:
    """A delivery of an announcement."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    def ack(self) -> None:
        pass


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_BYTES", PART)
    monkeypatch.setattr(spool, "_IN_MEMORY_BYTES", 3 * PART)
    monkeypatch.setattr(spool, "_PIECE_BYTES", PART // 4)


@pytest.fixture
async def summing(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Sum]:
    link = await MemoryBroker().open()
    await link.declare([*TOPOLOGY.shared(), *(q for w in WORKERS for q in TOPOLOGY.of_worker(w))])
    total = Sum(link, tmp_path, **getattr(request, "param", {}))
    total.running = asyncio.ensure_future(total.aggregator.run())
    yield total
    total.running.cancel()
    await asyncio.gather(total.running, return_exceptions=True)


async def test_parts_may_come_in_any_order_and_repeatedly(summing):
    rng = np.random.default_rng(7)
    for number, worker in enumerate("abc", start=1):
        held = await summing.send(
            worker, values(number), lambda parts: [*parts[:2], *rng.permutation(parts)]
        )
        folded = await summing.fold(held)
        assert isinstance(folded, ev.Folded)
        assert folded.norm == pytest.approx(finite_norm(values(number)), rel=1e-6)
    updates = [values(number) for number in (1, 2, 3)]
    right = [expected(summing.model[n], [(u[n], 3) for u in updates]) for n in SHAPES]
    assert await summing.average() == b"".join(tensor.tobytes() for tensor in right)


@pytest.mark.parametrize("summing", [{"verify_users": True}], indirect=True)
async def test_with_verified_users_parts_without_a_user_are_rejected(summing):
    failed = await summing.fold(await summing.send("a", values(1)))
    assert isinstance(failed, ev.FoldFailed)
    assert "0 of 9 parts arrived" in failed.reason
    counts = await summing.link.counts(TOPOLOGY.rejected)
    assert counts.ready == 9


def replaced(number: int, change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    """Replace the payload of a part, which remains a well-formed message."""

    def change_part(parts: list[bytes]) -> list[bytes]:
        message, payload = decode(parts[number])
        assert isinstance(message, Part)
        parts[number] = wire.encode(message, change(bytes(payload)))
        return parts

    return change_part


def flipped(payload: bytes) -> bytes:
    return bytes([payload[0] ^ 1, *payload[1:]])


def with_nan_at_the_end() -> dict[str, Array]:
    return {**values(9), "scale": np.array(np.nan, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "change", "cause", "reason"),
    [
        (values(9), replaced(-2, flipped), "tensors", "replaced or damaged"),
        (values(9), replaced(3, lambda payload: payload[:-4]), None, "8 of 9 parts arrived"),
        (values(9), lambda parts: parts[:-1], None, "8 of 9 parts are in the queue"),
        (with_nan_at_the_end(), list, "not_finite", "tensor 'scale' has 1 value "),
    ],
    ids=["digest", "length", "missing", "NaN in the last part"],
)
async def test_an_update_that_fails_halfway_does_not_change_the_sum(
    summing, tensors, change, cause, reason
):
    assert isinstance(await summing.fold(await summing.send("a", values(1))), ev.Folded)
    failed = await summing.fold(await summing.send("mallory", tensors, change))
    assert isinstance(failed, ev.FoldFailed)
    assert reason in failed.reason
    assert (failed.again, failed.cause if not failed.again else None) == (cause is None, cause)
    assert isinstance(await summing.fold(await summing.send("b", values(2))), ev.Folded)
    right = [expected(summing.model[n], [(values(i)[n], 3) for i in (1, 2)]) for n in SHAPES]
    assert await summing.average() == b"".join(tensor.tobytes() for tensor in right)


class Cut:
    """A link that is lost after a number of messages."""

    def __init__(self, link: MemoryLink, left: int) -> None:
        self._link, self._left = link, left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def get(self, queue: str, *, foreign: bool) -> Any:
        if not self._left:
            raise LinkLost("cut")
        self._left -= 1
        return await self._link.get(queue, foreign=foreign)


async def test_a_link_lost_during_a_transfer_does_not_change_the_sum(summing):
    assert isinstance(await summing.fold(await summing.send("a", values(1))), ev.Folded)
    held, whole = await summing.send("b", values(2)), summing.link
    summing.link = Cut(whole, 5)
    failed = await summing.fold(held)
    assert isinstance(failed, ev.FoldFailed)
    assert (failed.again, failed.reason) == (True, "cut")
    summing.link = whole
    await whole.purge(TOPOLOGY.outbox("b"))
    assert isinstance(await summing.fold(await summing.send("b", values(2))), ev.Folded)
    right = [expected(summing.model[n], [(values(i)[n], 3) for i in (1, 2)]) for n in SHAPES]
    assert await summing.average() == b"".join(tensor.tobytes() for tensor in right)


async def test_a_large_update_uses_little_memory(summing, monkeypatch):
    many, parts = 2**18, 2**20 // (64 * PART)
    monkeypatch.setattr(wire, "PART_BYTES", 64 * PART)
    monkeypatch.setattr(spool, "_IN_MEMORY_BYTES", 2 * 64 * PART)
    model = in_one_piece({"kernel": np.zeros(many, np.float32)})
    summing.aggregator.weights = model
    summing.aggregator._state = fedavg.init(model)
    fold, held_bytes = type(fedavg).fold, []

    def looked_at(*on: Any) -> Any:
        gc.collect()
        held_bytes.append(tracemalloc.get_traced_memory()[0])
        return fold(*on)

    monkeypatch.setattr(type(fedavg), "fold", looked_at)
    gc.collect()
    tracemalloc.start()  # the sum is allocated already
    try:
        held = await summing.send("a", {"kernel": np.ones(many, np.float32)})
        assert held.message.transfer.parts == parts == 16
        assert tracemalloc.get_traced_memory()[0] > 2**20  # on the broker
        assert isinstance(await summing.fold(held), ev.Folded)
    finally:
        tracemalloc.stop()
    assert held_bytes[0] < 2**20 // 4


async def test_the_next_update_is_fetched_while_one_is_folded(summing, monkeypatch):
    begun, fetched, go_on = asyncio.Event(), asyncio.Event(), threading.Event()
    count = itertools.count()
    loop, fold, payload = asyncio.get_running_loop(), type(fedavg).fold, spool.Spool.payload

    def held_up(*on: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(60)
        return fold(*on)

    def whole(one: spool.Spool) -> InPieces:
        if next(count):  # at the second call
            fetched.set()
        return payload(one)

    monkeypatch.setattr(type(fedavg), "fold", held_up)
    monkeypatch.setattr(spool.Spool, "payload", whole)
    monkeypatch.setattr(summing.aggregator, "_at_once_bytes", 0)
    one, other = await summing.send("a", values(1)), await summing.send("b", values(2))
    summing.begin_to_fold(one, 3, 1)
    summing.begin_to_fold(other, 3, 1)
    async with asyncio.timeout(60):
        await begun.wait()
        await fetched.wait()  # the next is fetched while the first is folded
    summing.aggregator.commit(1, WORKERS)
    go_on.set()
    first = (await summing.averages.get()).weights
    assert first["bias"].tobytes() == expected(
        summing.model["bias"], [(values(1)["bias"], 3)]
    ).tobytes()  # fmt: skip
    assert isinstance(await summing.heard(), ev.Folded)
    await summing.aggregator.drained()
    assert summing.news.empty()
    assert isinstance(await summing.fold(await summing.send("c", values(3))), ev.Folded)
    summing.aggregator.commit(2, WORKERS)
    second = (await summing.averages.get()).weights
    assert second["bias"].tobytes() == expected(
        first["bias"], [(values(3)["bias"], 3)]
    ).tobytes()  # fmt: skip


async def test_updates_are_fetched_one_at_a_time(summing, monkeypatch):
    asked, get = [], MemoryLink.get

    def noted(link: MemoryLink, queue: str, *, foreign: bool) -> Any:
        asked.append(queue)
        return get(link, queue, foreign=foreign)

    monkeypatch.setattr(MemoryLink, "get", noted)
    for held in [await summing.send(worker, values(1)) for worker in "abc"]:
        summing.begin_to_fold(held, 3, 1)
    for _ in "abc":
        assert isinstance(await summing.heard(), ev.Folded)
    queues = [queue for queue, _ in itertools.groupby(asked)]
    assert queues == [TOPOLOGY.outbox(worker) for worker in "abc"]


async def test_a_full_disk_costs_memory_and_no_update(summing, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.SpoolFile, "write", full)
    assert isinstance(await summing.fold(await summing.send("a", values(1))), ev.Folded)
    right = [expected(summing.model[name], [(values(1)[name], 3)]) for name in SHAPES]
    assert await summing.average() == b"".join(tensor.tobytes() for tensor in right)


@pytest.mark.parametrize("summing", [{"keep_updates": True}], indirect=True)
async def test_an_update_in_pieces_is_archived_unchanged(summing):
    assert isinstance(await summing.fold(await summing.send("a", values(1))), ev.Folded)
    assert summing.kept == [bytes(in_one_piece(values(1)).memory)]


OWN = NamedStrategy("own", pipeline(mean=weighted.weighted(), server=replace()))


@pytest.mark.parametrize("summing", [{}, {"strategy": OWN}], ids=["fedavg", "own"], indirect=True)
@pytest.mark.parametrize("encoding", [None, "bf16", "f16", "int8", "topk:0.5"])
async def test_updates_in_parts_are_averaged_whatever_their_encoding_and_strategy(
    summing, encoding
):
    updates = []
    for number, worker in enumerate("abc", start=1):
        sent, name = values(number), encoding and encoding.partition(":")[0]
        if encoding is not None:
            sent, _ = compress(sent, encoding, {})
        held = await summing.send(worker, sent, encoding=name)
        assert held.message.transfer is not None
        assert isinstance(await summing.fold(held), ev.Folded)
        updates.append((decompress(sent, name, summing.model), 3))
    right = [expected(summing.model[n], [(u[n], c) for u, c in updates]) for n in SHAPES]
    assert await summing.average() == b"".join(tensor.tobytes() for tensor in right)

"""A round's average computed again from the updates that were kept, and compared bit by bit.

The same checks and the same strategy as in the coordinator, in the same order; and for federated
averaging, as a second opinion that shares no code with it, the average as NumPy has it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np

from fluffle_common.errors import MalformedMessage, UsageError
from fluffle_common.protocol.codec import decode
from fluffle_common.protocol.messages import Plan, Update
from fluffle_common.tensors.checkpoint import checkpoint_name, read_checkpoint, read_whole
from fluffle_common.tensors.weights import Array, Weights, is_float
from fluffle_coordinator.storage.history import read_history_lines
from fluffle_coordinator.storage.update_archive import read_update, round_folder, update_path
from fluffle_coordinator.strategy.base import Contribution, Strategy
from fluffle_coordinator.strategy.contribution import decode_contribution, decode_extra
from fluffle_coordinator.strategy.fedavg import FEDAVG, fedavg


@dataclass(frozen=True)
class Distance:
    """How far two tensors of one form are apart.

    Args:
        equal: every bit is the same.
        different: how many values differ in any bit.
        largest: the largest absolute difference; infinite where a value is not finite.
        ulps: the most representable values that lie between two values, plus one; of integers,
            the largest difference.
    """

    equal: bool
    different: int
    largest: float
    ulps: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of a replayed round, compared with the checkpoint.

    ``second_opinion`` is None where the strategy is not ``fedavg``: there is no other way to it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    replayed: Distance
    second_opinion: Distance | None


@dataclass(frozen=True)
class Replay:
    """A replayed round; ``participants`` in the order of the sum."""

    run: str
    round: int
    checkpoint: str
    participants: tuple[tuple[str, int], ...]  # worker, num_examples
    tensors: tuple[Tensor, ...]

    @property
    def equal(self) -> bool:
        """Whether what was committed is, bit by bit, what the kept updates give."""
        return all(tensor.replayed.equal for tensor in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """Return everything, as JSON can hold it."""
        told = asdict(self)
        told["participants"] = [
            {"worker": worker, "num_examples": examples} for worker, examples in self.participants
        ]
        for tensor in told["tensors"]:
            for distance in (tensor["replayed"], tensor["second_opinion"]):
                if distance and math.isinf(distance["largest"]):
                    distance["largest"] = None  # JSON has no infinity
        return {"equal": self.equal, **told}


def strategy_of(run: Path, number: int) -> tuple[str, str | None]:
    """Return the name of the strategy that made a round, and the file that it came from.

    Raises:
        UsageError: where the round is not committed.
    """
    name = _committed_by(_committed_line(run, number))
    file = None
    for one in _configurations(run, number):
        if one.get("strategy") == name:
            file = one.get("strategy_file")
    return name, file


def _configurations(run: Path, number: int) -> list[dict[str, Any]]:
    """Return how the run was configured up to a round, the last time last."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((run / "run.json").read_text())["configurations"]
        return [one for one in found if one["from_round"] <= number]
    return []


def _plan(run: Path, number: int, strategy: Strategy[Any]) -> Plan:
    """Return which tensors the workers were asked for in a round."""
    train = None
    for one in _configurations(run, number):
        train = one.get("plan", {}).get("train")
    return Plan(train=train, extra=strategy.needs.extra)


def replay(run: Path, number: int, strategy: Strategy[Any] = fedavg) -> Replay:
    """Compute the average of a round again.

    Args:
        run: the run's folder.
        number: the round, from 1.
        strategy: the one that made it; see ``strategy_of``.

    Raises:
        UsageError: where something that it takes is missing or is not what was counted.
    """
    line = _committed_line(run, number)
    participants = line["participants"]
    if not round_folder(run, number).is_dir():
        raise UsageError(
            f"no updates of round {number} are in {run}: its coordinator ran without "
            "--keep-updates, or they were removed since"
        )
    before = read_whole(run / checkpoint_name(number - 1))
    base = before.weights
    committed, _ = read_checkpoint(run / line.get("checkpoint", checkpoint_name(number)))
    plan = _plan(run, number, strategy)
    contributions = [
        _kept(update_path(run, number, place, one["worker"]), line, one, base, plan)
        for place, one in enumerate(participants, start=1)
    ]
    state = strategy.init(base) if number == 1 else strategy.load(before.strategy_state, base)
    for contribution in contributions:
        state = strategy.fold(state, contribution)
    replayed, _ = strategy.finish(state, base)
    averages = _committed_by(line) == FEDAVG.name
    opinion = _second_opinion(base, contributions) if averages else None
    return Replay(
        run=str(line.get("run", "")),
        round=number,
        checkpoint=checkpoint_name(number),
        participants=tuple((one["worker"], one["num_examples"]) for one in participants),
        tensors=_compared(committed, replayed, opinion),
    )


def _committed_line(run: Path, number: int) -> dict[str, Any]:
    committed = {
        line["round"]: line for line in read_history_lines(run) if line["event"] == "committed"
    }
    if number not in committed:
        last = max(committed, default=0)
        raise UsageError(
            f"round {number} of {run} is not committed; the last committed round is {last}"
        )
    return committed[number]


def _committed_by(line: Mapping[str, Any]) -> str:
    return str(line.get("strategy", FEDAVG.name))


def _kept(
    path: Path,
    line: Mapping[str, Any],
    participant: Mapping[str, Any],
    base: Weights,
    plan: Plan,
) -> Contribution:
    """Read a kept update as the coordinator read it when it came."""
    worker = participant["worker"]
    try:
        body, payload = read_update(path)
    except FileNotFoundError:
        raise UsageError(f"the update of {worker} is missing: there is no {path}") from None
    except OSError as why:
        raise UsageError(
            f"the update of {worker} cannot be read: {path} ({why.strerror})"
        ) from None
    try:
        message, inside = decode(body)
        if not isinstance(message, Update):
            raise MalformedMessage(f"a message of kind {message.kind} is no update")
        # It may say more examples than it was counted with.
        num_examples = min(message.num_examples, participant["num_examples"])
        # A stale one was trained from an earlier round's weights.
        number = message.round + participant.get("staleness", 0)
        found = (message.run, number, message.worker, num_examples)
        counted = (line["run"], line["round"], worker, participant["num_examples"])
        if found != counted:
            raise MalformedMessage(f"(run, round, worker, examples) is {found}, not {counted}")
        if message.transfer is not None and payload is None:
            missing = path.with_suffix(".payload")
            raise UsageError(
                f"the update of {worker} is missing its tensors: there is no {missing}"
            )
        payload = inside if payload is None else payload
        delta, _ = decode_contribution(message, payload, base, plan)
        extra = decode_extra(message, payload, base, plan)
    except MalformedMessage as wrong:
        raise UsageError(f"{path} is not the update that was counted: {wrong}") from None
    return Contribution(
        worker=worker,
        num_examples=participant["num_examples"],
        delta=delta,
        staleness=participant.get("staleness", 0),
        discount=participant.get("discount", 1.0),
        extra=extra,
        metrics=message.metrics,
    )


def _second_opinion(base: Weights, contributions: Sequence[Contribution]) -> Callable[[str], Array]:
    """Return what gives the average of one tensor, by other means than ``fedavg``."""
    deltas = [one.delta for one in contributions]
    examples = [one.num_examples for one in contributions]
    weights = [one.weight for one in contributions]

    def average(name: str) -> Array:
        dtype = base[name].dtype
        if dtype.kind in "iu":
            return _exactly(base[name], [delta[name] for delta in deltas], examples)
        # Halved so often that no sum is beyond the end of float64.
        several = [np.ldexp(delta[name].astype(np.float64), -64) for delta in deltas]
        with np.errstate(over="ignore", invalid="ignore"):  # beyond the ends of the dtype
            mean = np.ldexp(np.average(several, axis=0, weights=weights), 64)
            return np.asarray(base[name] + mean).astype(dtype)

    return average


def _exactly(base: Array, deltas: Sequence[Array], examples: Sequence[int]) -> Array:
    """Average integers as Python does, in as many digits as it takes."""
    limits, count = np.iinfo(base.dtype), sum(examples)
    averaged = [
        min(
            max(round(Fraction(sum(map(mul, examples, learnt)), count) + old), limits.min),
            limits.max,
        )
        for old, *learnt in zip(
            base.ravel().tolist(), *(d.ravel().tolist() for d in deltas), strict=True
        )
    ]
    return np.array(averaged, base.dtype).reshape(base.shape)


def _compared(
    committed: Weights, replayed: Weights, opinion: Callable[[str], Array] | None
) -> tuple[Tensor, ...]:
    if {n: (t.shape, t.dtype) for n, t in committed.items()} != {
        n: (t.shape, t.dtype) for n, t in replayed.items()
    }:
        raise UsageError("the checkpoints before and after the round are not of the same model")
    return tuple(
        Tensor(
            name=name,
            dtype=tensor.dtype.name,
            shape=tensor.shape,
            replayed=distance(tensor, replayed[name]),
            second_opinion=distance(tensor, opinion(name)) if opinion else None,
        )
        for name, tensor in committed.items()
    )


def distance(one: Array, other: Array) -> Distance:
    """Say how far two tensors of the same shape and dtype are apart.

    >>> distance(np.array([1.0, 2.0]), np.array([1.0, np.nextafter(2.0, 3.0)]))
    Distance(equal=False, different=1, largest=4.440892098500626e-16, ulps=1)
    >>> distance(np.array(0.0), np.array(-0.0))
    Distance(equal=False, different=1, largest=0.0, ulps=1)
    """
    a, b = _ordered(one), _ordered(other)
    different = int(np.count_nonzero(a != b))
    if not different:
        return Distance(equal=True, different=0, largest=0.0, ulps=0)
    steps = int((np.maximum(a, b) - np.minimum(a, b)).max())
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
    largest = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
    return Distance(equal=False, different=different, largest=largest, ulps=steps)


def _ordered(tensor: Array) -> Array:
    """Map values to unsigned integers in their order, so that neighbours are one apart."""
    bits = np.ascontiguousarray(tensor).reshape(-1)
    unsigned: Array = bits.view(np.dtype(f"u{tensor.dtype.itemsize}"))
    ordered = unsigned
    top = unsigned.dtype.type(1 << (8 * tensor.dtype.itemsize - 1))
    if tensor.dtype.kind == "i":
        ordered = unsigned ^ top
    elif is_float(tensor.dtype):
        # A sign and a magnitude: the negative ones run backwards, and -0 is just below 0.
        ordered = np.where(unsigned & top, ~unsigned, unsigned | top)
    return ordered

"""Replay: a round's model computed again from its archived updates, and compared bit for bit.

A replay uses the coordinator's checks and strategy, and the same order of updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluffle_common.cli.console import finite
from fluffle_common.errors import MalformedMessage, UsageError
from fluffle_common.protocol.messages import Plan, Update
from fluffle_common.protocol.wire_format import decode
from fluffle_common.tensors.checkpoint import checkpoint_name, names_in, read_checkpoint, read_whole
from fluffle_common.tensors.groups import STATISTICS, untrained
from fluffle_common.tensors.weights import Array, Weights, is_float
from fluffle_coordinator.storage.history import read_history_lines
from fluffle_coordinator.storage.run_file import read_run_file
from fluffle_coordinator.storage.update_archive import read_update, round_folder, update_path
from fluffle_coordinator.strategy.base import Contribution, Strategy, with_statistics
from fluffle_coordinator.strategy.fedavg import fedavg
from fluffle_coordinator.strategy.update_checks import decode_update


@dataclass(frozen=True)
class Distance:
    """How far apart two tensors of the same shape and dtype are."""

    equal: bool  # all bits
    different: int  # values that differ in any bit
    largest: float  # the largest absolute difference; infinite if a value is not finite
    ulps: int  # the largest difference in units in the last place; of integers, the difference


@dataclass(frozen=True)
class Tensor:
    """A tensor of a replayed round, compared with the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    replayed: Distance


@dataclass(frozen=True)
class Replay:
    """A replayed round; ``participants`` are in the order in which they were summed."""

    run: str
    round: int
    checkpoint: str
    participants: tuple[dict[str, Any], ...]  # their ``worker`` and ``num_examples``
    tensors: tuple[Tensor, ...]

    @property
    def equal(self) -> bool:
        """Whether the archived updates give the committed model bit for bit."""
        return all(tensor.replayed.equal for tensor in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return {"equal": self.equal, **finite(asdict(self))}


def strategy_of(run: Path, number: int) -> tuple[str, str | None]:
    """Return the name of the strategy that made a round, and the file that it came from, if any.

    Raises:
        UsageError: if the round is not committed.
    """
    name = str(_committed_line(run, number)["strategy"])
    file = None
    for configuration in _configurations(run, number):
        if configuration.get("strategy") == name:
            file = configuration.get("strategy_file")
    return name, file


def _configurations(run: Path, number: int) -> list[dict[str, Any]]:
    """Return the run's configurations up to a round, the one of that round last."""
    configurations = read_run_file(run).get("configurations", ())
    return [one for one in configurations if one["from_round"] <= number]


def _plan(run: Path, number: int, strategy: Strategy[Any]) -> Plan:
    """Return the plan of a round, as far as it says which tensors workers send."""
    configurations = _configurations(run, number)
    train = configurations[-1].get("plan", {}).get("train") if configurations else None
    return Plan(train=train, extra=strategy.needs.extra)


def replay(run: Path, number: int, strategy: Strategy[Any] = fedavg) -> Replay:
    """Compute a round's model again with its strategy, and compare it with the checkpoint.

    Raises:
        UsageError: if a file is missing, or is not the one that was counted.
    """
    line = _committed_line(run, number)
    participants = line["participants"]
    if not round_folder(run, number).is_dir():
        raise UsageError(
            f"{run} has no updates of round {number}, because the coordinator ran without "
            "--keep-updates or the updates were removed"
        )
    before = read_whole(run / checkpoint_name(number - 1))
    base = before.weights
    committed, metadata = read_checkpoint(run / checkpoint_name(number))
    strategy = with_statistics(strategy, frozenset(names_in(metadata, STATISTICS)))
    plan = _plan(run, number, strategy)
    state = strategy.init(base) if number == 1 else strategy.load(before.strategy_state, base)
    for place, who in enumerate(participants, start=1):
        path = update_path(run, number, place, who["worker"])
        state = strategy.fold(state, _archived(path, line, who, base, plan))
    replayed = {**strategy.finish(state, base)[0], **untrained(base, plan.train)}
    return Replay(
        run=line["run"],
        round=number,
        checkpoint=checkpoint_name(number),
        participants=tuple({n: who[n] for n in ("worker", "num_examples")} for who in participants),
        tensors=_compared(committed, replayed),
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


def _archived(
    path: Path, line: Mapping[str, Any], participant: Mapping[str, Any], base: Weights, plan: Plan
) -> Contribution:
    """Read an archived update as the coordinator read it when it arrived."""
    worker = participant["worker"]
    try:
        body, payload = read_update(path)
    except FileNotFoundError:
        raise UsageError(f"the update of {worker} is missing ({path})") from None
    except OSError as error:
        raise UsageError(
            f"the update of {worker} cannot be read: {path} ({error.strerror})"
        ) from None
    try:
        message, inline = decode(body)
        if not isinstance(message, Update):
            raise MalformedMessage(
                f"the file holds a message of kind {message.kind}, not an update"
            )
        # An update may claim more examples than it was counted with.
        num_examples = min(message.num_examples, participant["num_examples"])
        # A stale update names the earlier round that it was trained from.
        number = message.round + participant.get("staleness", 0)
        archived = (message.run, number, message.worker, num_examples)
        counted = (line["run"], line["round"], worker, participant["num_examples"])
        if archived != counted:
            raise MalformedMessage(
                f"the file holds (run, round, worker, examples) = {archived}, but the history "
                f"has {counted}"
            )
        if message.transfer is not None and payload is None:
            missing = path.with_suffix(".payload")
            raise UsageError(f"the tensors of {worker}'s update are missing: {missing}")
        payload = inline if payload is None else payload
        delta, _, extra = decode_update(message, payload, base, plan)
    except MalformedMessage as error:
        raise UsageError(f"{path} is not the update that was counted: {error}") from None
    return Contribution(
        worker=worker,
        num_examples=participant["num_examples"],
        delta=delta,
        staleness=participant.get("staleness", 0),
        discount=participant.get("discount", 1.0),
        extra=extra,
        metrics=message.metrics,
    )


def _compared(committed: Weights, replayed: Weights) -> tuple[Tensor, ...]:
    if {n: (t.shape, t.dtype) for n, t in committed.items()} != {
        n: (t.shape, t.dtype) for n, t in replayed.items()
    }:
        raise UsageError("the checkpoints before and after the round have different tensors")
    return tuple(
        Tensor(name, tensor.dtype.name, tensor.shape, distance(tensor, replayed[name]))
        for name, tensor in committed.items()
    )


def distance(one: Array, other: Array) -> Distance:
    """Return how far apart two tensors of the same shape and dtype are.

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
    """Map values to unsigned integers in the same order, in which neighbours differ by one."""
    bits = np.ascontiguousarray(tensor).reshape(-1)
    unsigned: Array = bits.view(np.dtype(f"u{tensor.dtype.itemsize}"))
    ordered = unsigned
    top = unsigned.dtype.type(1 << (8 * tensor.dtype.itemsize - 1))
    if tensor.dtype.kind == "i":
        ordered = unsigned ^ top
    elif is_float(tensor.dtype):
        # Floats are sign and magnitude: negative ones are in reverse order, and -0 is next to 0.
        ordered = np.where(unsigned & top, ~unsigned, unsigned | top)
    return ordered

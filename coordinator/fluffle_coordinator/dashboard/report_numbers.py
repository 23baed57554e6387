"""The numbers of a run's report, from its history and run.json; ``report_page`` shows them.

Older histories tell less: what a line does not have is None here, or left out, never an error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fluffle_common.errors import UsageError
from fluffle_coordinator.storage.round_stats import weighted_mean, with_later
from fluffle_coordinator.storage.run_store import read_history_lines

Line = Mapping[str, Any]
Answer = Literal["counted", "late", "no answer", "absent"]
PHASES = ("waiting", "training", "transfer", "aggregation", "checkpoint")

_NO_METRIC = {"event", "round", "run", "loss", "num_examples", "evaluators", "evaluated_at"}


@dataclass(frozen=True)
class Cell:
    """What a worker did in a round; ``num_examples`` where its update says so."""

    answer: Answer
    num_examples: int = 0


@dataclass(frozen=True)
class WorkerRow:
    """One worker: a cell a round, and in all."""

    name: str
    cells: tuple[Cell, ...]
    counted: int
    late: int
    rejected: int
    bytes: int
    train_s: float | None  # the mean of its updates that say it


@dataclass(frozen=True)
class RoundRow:
    """One committed round; ``phases`` in seconds by the names in ``PHASES``."""

    number: int
    opened_at: str | None
    committed_at: str | None
    participants: int
    num_examples: int
    bytes: int
    train_loss: float | None
    loss: float | None
    metrics: dict[str, float]
    evaluated_on: int  # held-out examples
    late: int
    rejected: int
    phases: dict[str, float] | None

    @property
    def seconds(self) -> float | None:
        """How long it took, from the commit before it to its own."""
        return None if self.phases is None else sum(self.phases.values())


@dataclass(frozen=True)
class Checkpoint:
    """A model file of the run."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Numbers:
    """Everything that the report shows."""

    federation: str
    run: str
    rounds: tuple[RoundRow, ...]
    workers: tuple[WorkerRow, ...]
    rejections: tuple[dict[str, Any], ...]  # ``during`` is the round that was open
    configurations: tuple[dict[str, Any], ...]
    checkpoints: tuple[Checkpoint, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics besides the loss; accuracy, where there is one, first."""
        names = {name for one in self.rounds for name in one.metrics}
        return tuple(sorted(names, key=lambda name: (name != "accuracy", name)))

    def as_json(self) -> dict[str, Any]:
        """Return everything, as JSON can hold it."""
        return asdict(self)


def read_numbers(folder: Path) -> Numbers:
    """Read a run's folder; every checkpoint in it is hashed.

    Raises:
        UsageError: where there is no run in it, or its files cannot be read.
    """
    lines = read_history_lines(folder)
    path = folder / "run.json"
    try:
        identity = json.loads(path.read_text())
    except FileNotFoundError:
        identity = {}
    except (OSError, ValueError):
        raise UsageError(f"{path} cannot be read") from None
    files = sorted(folder.glob("round-*.safetensors"))
    return numbers(lines, identity, [_checkpoint(file) for file in files])


def numbers(lines: Sequence[Line], identity: Line, checkpoints: Sequence[Checkpoint]) -> Numbers:
    """Work out the numbers of a report.

    Args:
        lines: of history.jsonl, in the order in which they were written.
        identity: what run.json says.
        checkpoints: the model files.
    """
    committed = {line["round"]: line for line in lines if line["event"] == "committed"}
    for line in lines:
        if line["event"] == "ended" and line["round"] in committed:
            committed[line["round"]] = with_later(committed[line["round"]], line)
    evaluated = {line["round"]: line for line in lines if line["event"] == "evaluated"}
    in_order = [committed[number] for number in sorted(committed)]
    return Numbers(
        federation=str(identity.get("federation", "")),
        run=str(identity.get("run", "")),
        rounds=tuple(_round(line, evaluated.get(line["round"], {})) for line in in_order),
        workers=_workers(in_order),
        rejections=tuple(
            {"during": line["round"], **one} for line in in_order for one in _rejections(line)
        ),
        configurations=tuple(identity.get("configurations", ())),
        checkpoints=tuple(checkpoints),
    )


def _round(line: Line, evaluation: Line) -> RoundRow:
    there = line.get("participants", ())
    return RoundRow(
        number=line["round"],
        opened_at=line.get("opened_at"),
        committed_at=line.get("committed_at"),
        participants=len(there),
        num_examples=sum(one.get("num_examples", 0) for one in there),
        bytes=sum(one.get("bytes") or 0 for one in there),
        train_loss=train_loss(there),
        loss=evaluation.get("loss"),
        metrics={
            name: value
            for name, value in evaluation.items()
            if name not in _NO_METRIC and isinstance(value, int | float)
        },
        evaluated_on=evaluation.get("num_examples", 0),
        late=line.get("late", 0),
        rejected=line.get("rejected", 0),
        phases=phases(line),
    )


def train_loss(participants: Sequence[Line]) -> float | None:
    """Average the training loss over the examples of those who tell it.

    >>> train_loss([{"num_examples": 1, "train_loss": 1.0}, {"num_examples": 3, "train_loss": 2.0}])
    1.75
    """
    told = [one for one in participants if one.get("train_loss") is not None]
    return weighted_mean((one["num_examples"], one["train_loss"]) for one in told)


def phases(line: Line) -> dict[str, float] | None:
    """Say where the time between one commit and the next went, in seconds.

    A round is as long as the path of the update that was counted last: it is trained (as its worker
    measured), it travels (this is what remains, so it also holds what a worker does besides: the
    evaluation before it trains, and its turn at the coordinator), and it is added up. Time after
    that update, waiting for others that did not come, counts as waiting.

    >>> timings = {"waiting_s": 1, "open_s": 10, "fold_s": 1, "average_s": 1, "checkpoint_s": 2}
    >>> who = [{"counted_s": 5.0, "seconds": 4.5}, {"counted_s": 8.0, "seconds": 6.0}]
    >>> phases({"timings": timings, "participants": who})
    {'waiting': 3.0, 'training': 6.0, 'transfer': 1.0, 'aggregation': 2.0, 'checkpoint': 2.0}
    """
    timings = line.get("timings")
    if not timings:
        return None
    open_s = float(timings.get("open_s", 0))
    timed = [one for one in line.get("participants", ()) if one.get("counted_s") is not None]
    last: Line = max(timed, key=lambda one: one["counted_s"], default={})
    # One that was counted before this coordinator resumed, or opened again, is no longer than open.
    counted_s = min(open_s, last.get("counted_s", open_s))
    training = min(counted_s, float(last.get("seconds") or 0))
    folding = min(counted_s - training, float(timings.get("fold_s", 0)))
    return {
        "waiting": float(timings.get("waiting_s", 0)) + open_s - counted_s,
        "training": training,
        "transfer": counted_s - training - folding,
        "aggregation": folding + float(timings.get("average_s", 0)),
        "checkpoint": float(timings.get("checkpoint_s", 0)),
    }


def _rejections(line: Line) -> list[dict[str, Any]]:
    """Return what is known of each rejection while this round was open."""
    return [dict(one) for one in line.get("rejections", ())]


def _workers(committed: Sequence[Line]) -> tuple[WorkerRow, ...]:
    """Return who ever had a part in the run, by name."""
    counted = {
        (line["round"], one["worker"]): one
        for line in committed
        for one in line.get("participants", ())
    }
    # A late update is told in the line of the round that was open when it came.
    late = {
        (one.get("round"), one["worker"]): one
        for line in committed
        for one in line.get("late_updates", ())
        if "worker" in one
    }
    asked = {(line["round"], name) for line in committed for name in line.get("asked", ())}
    # Whoever sends rubbish can put any name on it: that alone makes nobody a worker.
    refused = Counter(one.get("worker") for line in committed for one in _rejections(line))
    updates: dict[str, list[Line]] = {name: [] for _, name in (*counted, *late, *asked)}
    for (_, name), one in counted.items():
        updates[name].append(one)

    def cell(number: int, name: str) -> Cell:
        key = (number, name)
        if key in counted:
            return Cell("counted", counted[key].get("num_examples", 0))
        if key in late:
            return Cell("late", late[key].get("num_examples", 0))
        return Cell("no answer" if key in asked else "absent")

    def row(name: str) -> WorkerRow:
        cells = tuple(cell(line["round"], name) for line in committed)
        seconds = [one["seconds"] for one in updates[name] if one.get("seconds") is not None]
        return WorkerRow(
            name=name,
            cells=cells,
            counted=len(updates[name]),
            late=sum(one.answer == "late" for one in cells),
            rejected=refused[name],
            bytes=sum(one.get("bytes") or 0 for one in updates[name]),
            train_s=sum(seconds) / len(seconds) if seconds else None,
        )

    return tuple(row(name) for name in sorted(updates))


def _checkpoint(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Checkpoint(path.name, file.tell(), digest)
    except OSError as why:
        raise UsageError(f"{path} cannot be read ({why.strerror})") from None

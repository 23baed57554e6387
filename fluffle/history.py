"""What is known of every round of a run: rows of one type, and columns by name."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fluffle.models import load_model
from fluffle_common.errors import UsageError
from fluffle_common.protocol.metric_names import TEST_PREFIX, add_test_prefix, lower_is_better
from fluffle_coordinator.observe.round_view import metrics_of
from fluffle_coordinator.storage.history import read_history
from fluffle_coordinator.storage.round_stats import seconds_of, weighted_mean

if TYPE_CHECKING:
    from fluffle_common.tensors.weights import Array


@dataclass(frozen=True)
class Round:
    """One round, and the model that it ended with.

    Args:
        number: from 1.
        participants: the workers whose updates are in the model, with their numbers of examples.
        checkpoint: the file of the model.
        train_loss: the mean loss that the workers had while training, weighted by examples.
        loss: the federated loss of the model: on what the workers hold out, weighted by examples.
        metrics: the federated metrics of the model.
        test: what the ``evaluate`` hook measured of the model.
        epsilon: the privacy spent up to here, if the run accounts for it.
        seconds: of wall-clock time since the commit before, or since the coordinator started.
        late: how many updates came too late.
        rejected: how many messages were rejected.
    """

    number: int
    participants: Mapping[str, int]
    checkpoint: Path
    train_loss: float | None = None
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    seconds: float = 0.0
    late: int = 0
    rejected: int = 0

    @property
    def num_examples(self) -> int:
        """How many examples the model was trained on in this round."""
        return sum(self.participants.values())

    @property
    def weights(self) -> dict[str, Array]:
        """The model's arrays by name, read from its checkpoint at every use."""
        return load_model(self.checkpoint)

    def values(self) -> dict[str, float]:
        """Return every number that is known of the model, by the names of the columns."""
        known = {"train_loss": self.train_loss, "loss": self.loss, **self.metrics}
        known |= {**add_test_prefix(self.test), "epsilon": self.epsilon}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class History(Sequence[Round]):
    """The rounds of a run, in order.

    ``history[-1]`` is the last round, ``history["loss"]`` a column: one number a round, None where
    it is not known. ``columns`` are ``train_loss``, ``loss``, the federated metrics by their names,
    what the ``evaluate`` hook measured, as ``test/NAME``, and ``epsilon``.

    Example:
        >>> rounds = [Round(n, {"north": 80}, Path("x"), loss=1 / n) for n in (1, 2)]
        >>> history = History(tuple(rounds))
        >>> history["loss"], history.best().number
        ([1.0, 0.5], 2)
        >>> print(history)
        round  workers  examples    loss
            1        1        80  1.0000
            2        1        80  0.5000
    """

    rounds: tuple[Round, ...]

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read the history in a run's folder, as far as the run has come.

        Raises:
            UsageError: where the folder has no history, or one that cannot be read.
        """
        rows = read_history(folder)
        return cls(tuple(_round(row, folder) for row in rows if "checkpoint" in row))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all numbers that are known of any round."""
        return tuple(dict.fromkeys(name for one in self.rounds for name in one.values()))

    def best(self, metric: str = "loss") -> Round:
        """Return the round with the best value of a metric, the earliest of equals.

        Args:
            metric: a column. Of a loss or an error the lowest is the best, of all else the highest.

        Raises:
            UsageError: where no round has it.
        """
        known = [one for one in self.rounds if metric in one.values()]
        if not known:
            names = ", ".join(self.columns) or "nothing"
            raise UsageError(f"no round has the metric '{metric}'; known are {names}")
        sign = 1 if lower_is_better(metric) else -1
        return min(known, key=lambda one: sign * one.values()[metric])

    def __len__(self) -> int:
        return len(self.rounds)

    @overload
    def __getitem__(self, which: int) -> Round: ...
    @overload
    def __getitem__(self, which: slice) -> History: ...
    @overload
    def __getitem__(self, which: str) -> list[float | None]: ...

    def __getitem__(self, which: int | slice | str) -> Round | History | list[float | None]:
        if isinstance(which, str):
            if which not in self.columns:
                raise KeyError(f"{which}; known are {', '.join(self.columns)}")
            return [one.values().get(which) for one in self.rounds]
        return History(self.rounds[which]) if isinstance(which, slice) else self.rounds[which]

    def __repr__(self) -> str:
        names, rows = self._table()
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (names, *rows)
        )

    def _repr_html_(self) -> str:
        names, rows = self._table()
        body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
        return f"<table><thead><tr>{_cells('th', names)}</tr></thead><tbody>{body}</tbody></table>"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        names = ["round", "workers", "examples", *self.columns]
        rows = []
        for one in self.rounds:
            known = one.values()
            numbers = ["" if name not in known else f"{known[name]:.4f}" for name in self.columns]
            rows.append([str(one.number), str(len(one.participants)), str(one.num_examples)])
            rows[-1] += numbers
        return names, rows


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _round(row: Mapping[str, Any], folder: Path) -> Round:
    participants = row["participants"]
    metrics = metrics_of(row)
    counted: Counter[str] = Counter()  # an asynchronous round may count a worker more than once
    for one in participants:
        counted[one["worker"]] += one["num_examples"]
    return Round(
        number=row["round"],
        participants=dict(counted),
        checkpoint=folder / row["checkpoint"],
        train_loss=weighted_mean(
            (one["num_examples"], one["train_loss"])
            for one in participants
            if one.get("train_loss") is not None
        ),
        loss=row.get("loss"),
        metrics={n: value for n, value in metrics.items() if not n.startswith(TEST_PREFIX)},
        test={
            n.removeprefix(TEST_PREFIX): v for n, v in metrics.items() if n.startswith(TEST_PREFIX)
        },
        epsilon=row.get("epsilon"),
        seconds=seconds_of(row["timings"]),
        late=row.get("late", 0),
        rejected=row.get("rejected", 0),
    )

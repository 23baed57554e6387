"""The history of a run: one ``Round`` per committed round, and columns by name."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fluffle.models import load_model
from fluffle_common.cli.printing import aligned, one_line, text_table
from fluffle_common.errors import UsageError
from fluffle_common.plural import plural
from fluffle_common.protocol.events import decimal
from fluffle_common.protocol.metric_names import TEST_PREFIX, add_test_prefix, lower_is_better
from fluffle_common.tensors.checkpoint import read_metadata
from fluffle_coordinator.observe.round_view import metrics_of
from fluffle_coordinator.storage.round_stats import examples_by_worker, mean_train_loss, seconds_of
from fluffle_coordinator.storage.run_checkpoints import BEST
from fluffle_worker.task import EvalResult

if TYPE_CHECKING:
    from fluffle_common.tensors.weights import Array


@dataclass(frozen=True)
class Round:
    """One committed round and its model.

    Args:
        number: the number of the round, from 1.
        participants: the workers whose updates are in the model, with their numbers of examples.
        checkpoint: the file of the model.
        train_loss: the workers' mean training loss, weighted by examples.
        loss: the loss of the model on the workers' held-out data, weighted by examples.
        metrics: the federated metrics of the model, by name.
        evaluations: what each worker that evaluated the model measured, by its name.
        test: the metrics that the ``evaluate`` hook returned for the model.
        epsilon: the privacy budget spent so far, if the run accounts for it.
        seconds: wall-clock time since the previous commit, or since the coordinator started.
        late: the number of updates that arrived too late.
        rejected: the number of messages that were rejected.
    """

    number: int
    participants: Mapping[str, int]
    checkpoint: Path
    train_loss: float | None = None
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluations: Mapping[str, EvalResult] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    seconds: float = 0.0
    late: int = 0
    rejected: int = 0

    @property
    def num_examples(self) -> int:
        """The number of examples that the participants trained on in this round."""
        return sum(self.participants.values())

    @property
    def weights(self) -> dict[str, Array]:
        """The model's arrays by name, read from its checkpoint at each access.

        If ``keep_checkpoints=`` removed the checkpoint, the best model is still there.
        """
        best = self.checkpoint.with_name(BEST)
        if not self.checkpoint.exists() and best.exists():
            if read_metadata(best).get("round") == str(self.number):
                return load_model(best)
        return load_model(self.checkpoint)

    def __repr__(self) -> str:
        workers = plural(len(self.participants), "worker")
        examples = plural(self.num_examples, "example")
        values = [f"{one_line(name)} {decimal(value)}" for name, value in self.values().items()]
        return f"Round {self.number}: {', '.join([workers, examples, *values])}"

    def values(self) -> dict[str, float]:
        """Return the measured values of this round, by column name."""
        values = {"train_loss": self.train_loss, "loss": self.loss, **self.metrics}
        values |= {**add_test_prefix(self.test), "epsilon": self.epsilon}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class History(Sequence[Round]):
    """The rounds of a run, in order.

    ``history[-1]`` is the last round; ``history["loss"]`` is a column, a list with one number per
    round, or None for a round without that value. The columns are ``train_loss``, ``loss``, the
    federated metrics by name, the metrics of the ``evaluate`` hook as ``test/NAME``, and
    ``epsilon``.

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
    def of(cls, rows: Iterable[Mapping[str, Any]], folder: Path, kept: object = None) -> History:
        """Return the committed rounds among the rows of a history (``read_history``).

        Each round refers to ``kept``, which keeps a temporary folder alive.
        """
        return cls(tuple(_round(row, folder, kept) for row in rows if "checkpoint" in row))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns that have a value in some round."""
        return tuple(dict.fromkeys(name for each in self.rounds for name in each.values()))

    def best(self, metric: str = "loss") -> Round:
        """Return the round with the best value of a metric, the earliest if several have it.

        Args:
            metric: a column. The lowest value is the best if the metric is a loss or an error by
                its name (see ``--monitor``), else the highest.

        Raises:
            UsageError: if no round has this metric.
        """
        measured = [each for each in self.rounds if metric in each.values()]
        if not measured:
            known = (
                f"choose from {', '.join(self.columns)}" if self.columns else "none was measured"
            )
            raise UsageError(f"no round has the metric '{metric}'; {known}")
        sign = 1 if lower_is_better(metric) else -1
        return min(measured, key=lambda each: sign * each.values()[metric])

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
                names = ", ".join(self.columns)
                raise KeyError(f"there is no column '{which}'; the columns are {names}")
            return [each.values().get(which) for each in self.rounds]
        return History(self.rounds[which]) if isinstance(which, slice) else self.rounds[which]

    def __repr__(self) -> str:
        return "\n".join(text_table(aligned(*column) for column in self._table()))

    def _repr_html_(self) -> str:
        names, columns = zip(*self._table(), strict=True)
        rows = zip(*columns, strict=True)
        body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
        head = _cells("th", names)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _table(self) -> list[tuple[str, list[str]]]:
        """Return the name and the cells of each column; a metric may be called like another."""
        values = [each.values() for each in self.rounds]
        return [
            ("round", [str(each.number) for each in self.rounds]),
            ("workers", [str(len(each.participants)) for each in self.rounds]),
            ("examples", [str(each.num_examples) for each in self.rounds]),
            *(
                (one_line(name), [decimal(row[name]) if name in row else "" for row in values])
                for name in self.columns
            ),
        ]


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _round(row: Mapping[str, Any], folder: Path, kept: object) -> Round:
    participants = row["participants"]
    metrics = metrics_of(row)
    made = Round(
        number=row["round"],
        participants=examples_by_worker(participants),
        checkpoint=folder / row["checkpoint"],
        train_loss=mean_train_loss(participants),
        loss=row.get("loss"),
        metrics={n: value for n, value in metrics.items() if not n.startswith(TEST_PREFIX)},
        evaluations={
            each["worker"]: EvalResult(each["loss"], each["num_examples"], each.get("metrics", {}))
            for each in row.get("evaluations", ())
        },
        test={
            n.removeprefix(TEST_PREFIX): v for n, v in metrics.items() if n.startswith(TEST_PREFIX)
        },
        epsilon=row.get("epsilon"),
        seconds=seconds_of(row["timings"]),
        late=row["late"],
        rejected=row["rejected"],
    )
    vars(made)["_kept"] = kept  # not a field, so that it is in no table of the rounds
    return made

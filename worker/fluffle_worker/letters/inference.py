"""Inference with a letters model: classification, scores and confusion matrices."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fluffle_common.cli.output_files import new_figure
from fluffle_common.durable_files import open_regular
from fluffle_common.errors import UsageError
from fluffle_common.protocol.messages.base import Model
from fluffle_common.protocol.messages.fields import Metric
from fluffle_common.tensors.checkpoint import names_in, read_checkpoint
from fluffle_common.tensors.weights import Array, check_finite
from fluffle_worker.letters.images import Images
from fluffle_worker.letters.pixels import SIDE
from fluffle_worker.letters.task import letters_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Score:
    """A confusion matrix: how often class i (row) was predicted as class j (column)."""

    counts: Array  # int64, shape [classes, classes]

    @property
    def total(self) -> int:
        """The number of letters."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """The percentage of correct predictions; 0 if there are no letters."""
        return 100 * float(self.counts.trace()) / max(self.total, 1)


class LettersModel:
    """A model of the letters task, loaded from its file.

    Raises:
        UsageError: if the file is not a model of this task.
    """

    def __init__(self, path: Path) -> None:
        weights, metadata = read_checkpoint(path)
        self.classes = names_in(metadata, "classes")
        if not self.classes:
            raise UsageError(
                f"{path} is not a model of the letters task, because it has no list of classes "
                f"(task of the model: {metadata.get('task') or 'unknown'})"
            )
        dummy_data = np.zeros((1, SIDE, SIDE, 1), np.float32), np.zeros(1, np.int32)
        self._task = letters_task(self.classes, dummy_data, None)
        self._weights = weights
        history = _read_history(path.parent / "history.jsonl")
        self.temperature = temperature_of(history, metadata.get("round"))
        self.participants = participants_of(history)
        try:
            self._task.check(weights)
            check_finite(weights)
        except ValueError as why:
            raise UsageError(
                f"{path} is not a model of the letters task ({why}; "
                f"task of the model: {metadata.get('task') or 'unknown'})"
            ) from None

    def probabilities(self, images: Array) -> Array:
        """Return calibrated probabilities, float64 [n, classes], of images [n, 100, 100, 1]."""
        logits = self._task.logits(self._weights, images).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        with np.errstate(over="ignore"):  # a worker may have reported a temperature near 0
            exponentials = np.exp(logits / self.temperature)
        probabilities: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities

    def score(self, images: Images, which: Array | None = None) -> Score:
        """Classify the images with these indices (default: all), and count the outcomes."""
        indices = np.arange(len(images.targets)) if which is None else which
        counts = np.zeros((len(self.classes), len(self.classes)), np.int64)
        if len(indices):
            predicted = self.probabilities(images.inputs[indices]).argmax(axis=1)
            np.add.at(counts, (images.targets[indices], predicted), 1)
        return Score(counts)

    def predict(self, image: Array) -> dict[str, float]:
        """Return the probability of each class for one image, float32 [100, 100, 1]."""
        probabilities = self.probabilities(image[None])[0]
        return dict(zip(self.classes, map(float, probabilities), strict=True))


def temperature_of(history: Sequence[Mapping[str, Any]], number: str | None) -> float:
    """Return the temperature that the workers fitted for a round's model, 1 if unknown.

    It is fitted after the model is saved, so it is in the history beside the model's file.

    Args:
        history: the lines of the run's history.
        number: the round, as given in the model's file.
    """
    for line in reversed(history):
        if line.get("event") == "evaluated" and str(line.get("round")) == number:
            if (line.get("temperature") or 0) > 0:  # any worker can report another number
                return float(line["temperature"])
    return 1.0


def participants_of(history: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the workers whose updates were counted in any round of a run's history."""
    return frozenset(
        participant["worker"] for line in history for participant in line.get("participants", ())
    )


class _Participant(Model):
    worker: str


class _Line(Model):
    """The fields of a history line that are read here."""

    event: str
    round: int | None = None
    temperature: Metric | None = None
    participants: list[_Participant] = Field(default_factory=list)


def _read_history(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a history up to the first damaged one; none if there is no history."""
    lines: list[dict[str, Any]] = []
    with (
        contextlib.suppress(OSError, ValueError, RecursionError),
        open(path, "rb", opener=open_regular) as file,
    ):
        for text in file:
            line = json.loads(text)
            _Line.model_validate(line)
            lines.append(line)
    return lines


def shown_names(classes: Sequence[str]) -> dict[str, str]:
    """Return each class in upper case, as the letters are drawn, unless two would look alike.

    Example:
        >>> shown_names("ab"), shown_names("aA")
        ({'a': 'A', 'b': 'B'}, {'a': 'a', 'A': 'A'})
    """
    upper = [name.upper() for name in classes]
    alike = len(set(upper)) < len(upper)
    return dict(zip(classes, classes if alike else upper, strict=True))


def confusion_chart(counts: Array, classes: tuple[str, ...], title: str) -> Figure:
    """Draw a confusion matrix, each cell shaded by its share of the row.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = new_figure(6, 5.6)
    axes = figure.subplots()
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    upper = shown_names(classes)
    names = [upper[name] if len(name) == 1 else name for name in classes]
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")
    axes.set_title(title, parse_math=False)
    for row in range(len(names)):
        for column in range(len(names)):
            if counts[row, column]:
                shade = "white" if share[row, column] > 0.5 else "#333333"
                axes.text(column, row, counts[row, column], ha="center", va="center", color=shade)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the row")
    return figure

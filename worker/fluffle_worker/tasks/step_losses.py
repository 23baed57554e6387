"""The losses of a training's steps, for any framework whose device computes asynchronously."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluffle_worker.task import Progress


class StepLosses:
    """Collects the loss of each step, and reports the progress.

    Reading a loss waits until the device has computed it. So each step reads the loss of the
    previous one: this bounds how far the device lags behind the reported progress, without stalling
    the current step.

    Args:
        progress: called after each step, with the step, the steps and the previous step's loss.
        steps: the expected number of steps.
        private: whether no loss may be reported, because a loss is not noised.
    """

    def __init__(self, progress: Progress, steps: int, *, private: bool) -> None:
        self._progress, self._steps, self._private = progress, steps, private
        self._losses: list[Any] = []

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: Any) -> None:
        """Add the loss of the step that was just begun, a number of the framework."""
        previous: float | None = None
        if self._losses:  # keeps only the last one on the device
            previous = self._losses[-1] = float(self._losses[-1])
        self._losses.append(loss)
        done = len(self._losses)
        self._progress(done, max(done, self._steps), None if self._private else previous)

    def metrics(self) -> dict[str, float]:
        """Return the number of steps and, unless it is private, the mean loss."""
        metrics = {"steps": float(len(self._losses))}
        if not self._private:
            metrics["loss"] = float(np.mean([float(one) for one in self._losses]))
        return metrics

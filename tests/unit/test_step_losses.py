"""The losses of a training's steps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from fluffle_worker.tasks.adapted import StepLosses


@dataclass(eq=False)
class OnDevice:
    """A loss that takes memory of a device."""

    value: float

    def __float__(self) -> float:
        return self.value


def test_of_all_losses_only_the_last_takes_memory_of_the_device():
    told: list[tuple[int, int, float | None]] = []
    losses = StepLosses(lambda *step: told.append(step), 3, private=False)
    kept: weakref.WeakSet[OnDevice] = weakref.WeakSet()
    for value in (1.0, 2.0, 6.0):
        loss = OnDevice(value)
        kept.add(loss)
        losses.add(loss)
        del loss
        assert len(kept) == 1
    assert told == [(1, 3, None), (2, 3, 1.0), (3, 3, 2.0)]
    assert losses.metrics() == {"steps": 3.0, "loss": 3.0}

"""Clipping: scaling an update down to a maximum norm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.weights import finite_norm
from fluffle_coordinator.strategy.base import Contribution, parameters_of
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.pipeline import Transform


@dataclass(frozen=True)
class _Clip:
    norm: float
    statistics: frozenset[str] = frozenset()

    def with_statistics(self, names: frozenset[str]) -> _Clip:
        return dataclasses.replace(self, statistics=names)

    def __call__(self, one: Contribution) -> Contribution:
        delta = parameters_of(one.delta, self.statistics)
        before = finite_norm(delta)
        if before <= self.norm:
            return one
        scaled = layout_for(delta).empty()
        for into, values in in_blocks(scaled, delta):
            into[...] = values.astype(np.float64) * (self.norm / before)
        return dataclasses.replace(
            one, delta={**one.delta, **scaled} if self.statistics else scaled
        )


def clip(norm: float) -> Transform:
    """Return a transform that scales updates down to a norm, taken over all parameters together.

    A worker then moves the parameters of the mean by at most its share of ``norm``. Integer
    parameters count towards the norm, and are rounded towards zero. Statistics neither count
    towards the norm nor change.

    Args:
        norm: the largest Euclidean norm, above 0.

    Raises:
        ValueError: if the norm is out of range.

    Example:
        >>> one = Contribution(worker="a", num_examples=1, delta={"w": np.array([3.0, 4.0])})
        >>> clip(1.0)(one).delta["w"]
        array([0.6, 0.8])
    """
    within("norm", norm, 0, above=True)
    return _Clip(norm)

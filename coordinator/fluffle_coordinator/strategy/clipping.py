"""Clipping: scaling an update down to a maximum norm."""

from __future__ import annotations

import dataclasses

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.weights import finite_norm
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.pipeline import Transform


def clip(norm: float) -> Transform:
    """Return a transform that scales updates down to a norm, taken over all tensors together.

    A worker then moves the mean by at most its share of ``norm``. Integer tensors count towards the
    norm, and are rounded towards zero.

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

    def clipped(one: Contribution) -> Contribution:
        before = finite_norm(one.delta)
        if before <= norm:
            return one
        scaled = layout_for(one.delta).empty()
        for into, values in in_blocks(scaled, one.delta):
            into[...] = values.astype(np.float64) * (norm / before)
        return dataclasses.replace(one, delta=scaled)

    return clipped

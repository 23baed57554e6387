"""From the bytes of an update to checked tensors: its form, its values and its metrics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.errors import Cause, MalformedMessage
from fluffle_common.protocol.messages import FirstWeights, Plan, Update
from fluffle_common.protocol.transfer_parts import announced_layout
from fluffle_common.protocol.wire_format import read_groups
from fluffle_common.tensors.compression import check_announced_signature, decompress
from fluffle_common.tensors.groups import EXTRA, GroupedLayout, Groups, check_extra, select_tensors
from fluffle_common.tensors.in_pieces import InPieces
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import (
    NotFinite,
    Weights,
    check_delta,
    check_finite,
    delta_dtype,
)
from fluffle_coordinator.strategy.base import Needs

EVERYTHING = Plan()
"""The plan that asks for the delta of the whole model, and for no extra tensors."""


def check_announced(
    message: Update | FirstWeights, base: Weights | None, plan: Plan = EVERYTHING
) -> GroupedLayout:
    """Check the announcement of an update in parts, before any part is fetched.

    ``base`` is None if these are the first weights.

    Returns:
        The layout of the tensors in the payload.

    Raises:
        MalformedMessage: with the cause ``tensors``, if the announcement is inconsistent, or is not
            a delta for ``base``.
    """
    layout = announced_layout(message)
    if base is None or not isinstance(message, Update):
        return layout
    forms = {group: of.places for group, of in layout.layouts.items()}
    try:
        _check_groups(forms)
        check_announced_signature(forms[MODEL], message.encoding, select_tensors(base, plan.train))
        check_extra(forms.get(EXTRA, {}), plan.extra, base)
    except ValueError as error:
        raise _malformed(error) from None
    return layout


def _malformed(error: ValueError) -> MalformedMessage:
    cause: Cause = "not_finite" if isinstance(error, NotFinite) else "tensors"
    return MalformedMessage(str(error), cause)


def check_metrics(message: Update, needs: Needs) -> None:
    """Check that an update has the metrics that the strategy needs.

    Raises:
        MalformedMessage: if one is missing or out of range.
    """
    for name in (*needs.metrics, *needs.ranges):
        if name not in message.metrics:
            raise MalformedMessage(
                f"the update has no metric '{name}', which the strategy of this run needs; make "
                "the task report this metric"
            )
    for name, (low, high) in needs.ranges.items():
        try:
            within(name, message.metrics[name], low, high)
        except ValueError as error:
            raise MalformedMessage(
                f"the update has a metric that the strategy of this run cannot use: {error}"
            ) from None


def decode_update(
    message: Update, payload: memoryview | InPieces, base: Weights, plan: Plan = EVERYTHING
) -> tuple[Weights, float, Weights]:
    """Read an update's tensors, whole or in pieces, decode them, and check them against the model.

    Returns:
        The delta, with the names, shapes and dtypes of ``base``; its norm (``finite_norm``); and
        the extra tensors, none if the plan asks for none. Tensors without an encoding are views
        into ``payload``; those that the plan does not train are zeros.

    Raises:
        MalformedMessage: with the cause ``tensors`` or ``not_finite``, if it is not a delta for
            ``base``, or its extra tensors are not those that the plan asks for.
    """
    groups: Groups = (
        read_groups(message.tensors, payload)
        if isinstance(payload, memoryview)
        else {MODEL: payload}  # an update with extra tensors is never in pieces
    )
    try:
        trained = select_tensors(base, plan.train)
        delta = decompress(groups[MODEL], message.encoding, trained)
        norm = check_delta(delta, trained)
        _check_groups(groups)
        extra: Weights = groups.get(EXTRA, {})
        check_extra(extra, plan.extra, base)
        check_finite(extra)
    except ValueError as error:
        raise _malformed(error) from None
    if len(trained) < len(base):  # untouched zeros take no memory
        delta = {
            name: delta[name] if name in delta else np.zeros(old.shape, delta_dtype(old.dtype))
            for name, old in base.items()
        }
    return delta, norm, extra


def _check_groups(groups: Mapping[str, object]) -> None:
    unknown = sorted(groups.keys() - {MODEL, EXTRA})
    if unknown:
        raise ValueError(
            f"the update contains tensors of the group '{unknown[0]}', which the coordinator did "
            "not request"
        )

"""From the bytes of an update to a delta that is fit to be averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fluffle_common.errors import Cause, MalformedMessage
from fluffle_common.protocol.codec import announced_layout, read_groups, read_tensors
from fluffle_common.protocol.messages import FirstWeights, Plan, Update
from fluffle_common.tensors.compression import check_announced_signature, decompress
from fluffle_common.tensors.groups import (
    EXTRA,
    GroupedLayout,
    Groups,
    check_extra,
    forms_of,
    select_tensors,
)
from fluffle_common.tensors.pieces import InPieces
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import (
    NotFinite,
    Weights,
    check_delta,
    check_finite,
    delta_dtype,
)

EVERYTHING = Plan()
"""A plan that asks for a delta of the whole model, and for nothing else."""


def check_announced(
    message: Update | FirstWeights, base: Weights | None, plan: Plan = EVERYTHING
) -> GroupedLayout:
    """Look at what an update in parts announces, before any of it is fetched.

    Args:
        message: the announcement.
        base: the model's weights; None for the first ones.
        plan: which tensors were asked for.

    Returns:
        How its tensors lie in what is fetched.

    Raises:
        MalformedMessage: of cause ``tensors``, where that cannot be what it says, or is no delta
            for ``base``.
    """
    layout = announced_layout(message)
    if base is None or not isinstance(message, Update):
        return layout
    forms = {
        group: {name: (place.dtype, place.shape) for name, place in of.places.items()}
        for group, of in layout.layouts.items()
    }
    try:
        _check_groups(forms)
        check_announced_signature(forms[MODEL], message.encoding, select_tensors(base, plan.train))
        check_extra(forms.get(EXTRA, {}), plan.extra, base)
    except ValueError as wrong:
        raise MalformedMessage(str(wrong), "tensors") from None
    return layout


def check_metrics(message: Update, names: Iterable[str]) -> None:
    """Check that an update has the metrics that the strategy needs.

    Raises:
        MalformedMessage: naming the one that is missing.
    """
    for name in names:
        if name not in message.metrics:
            raise MalformedMessage(
                f"the update has no metric '{name}', which the strategy of this run needs; the "
                "task must report it"
            )


def decode_contribution(
    message: Update,
    payload: memoryview | InPieces,
    base: Weights,
    plan: Plan = EVERYTHING,
) -> tuple[Weights, float]:
    """Read an update's tensors, decode them, and check them against the model.

    Args:
        message: the update, with its table of tensors and their encoding.
        payload: the bytes of its tensors; or the tensors themselves, if they stay in pieces.
        base: the weights that it is to be added to.
        plan: which tensors were asked for.

    Returns:
        The delta, in the names, shapes and dtypes of ``base``; views into ``payload`` where nothing
        was encoded, and zeros where nothing was to be trained. And its norm: see ``finite_norm``.

    Raises:
        MalformedMessage: of cause ``tensors`` or ``not_finite``, where it is no delta for ``base``.
    """
    tensors: Weights = (
        payload if isinstance(payload, InPieces) else read_tensors(message.tensors, payload)
    )
    try:
        trained = select_tensors(base, plan.train)
        delta = decompress(tensors, message.encoding, trained)
        norm = check_delta(delta, trained)
    except ValueError as wrong:
        cause: Cause = "not_finite" if isinstance(wrong, NotFinite) else "tensors"
        raise MalformedMessage(str(wrong), cause) from None
    if len(trained) < len(base):  # zeros take no memory before they are written to
        delta = {
            name: delta[name] if name in delta else np.zeros(old.shape, delta_dtype(old.dtype))
            for name, old in base.items()
        }
    return delta, norm


def decode_extra(
    message: Update, payload: memoryview | InPieces, base: Weights, plan: Plan
) -> Weights:
    """Read what an update brings besides its delta, and check it.

    Args:
        message: the update, with its table of tensors.
        payload: as for ``decode_contribution``.
        base: the weights of the model.
        plan: which tensors were asked for.

    Returns:
        The tensors, views into ``payload``; none if none were asked for.

    Raises:
        MalformedMessage: of cause ``tensors`` or ``not_finite``, if it is anything else than what
            was asked for.
    """
    groups: Groups = (
        {MODEL: payload}  # only a delta alone stays in pieces
        if isinstance(payload, InPieces)
        else read_groups(message.tensors, payload)
    )
    found: Weights = groups.get(EXTRA, {})
    try:
        _check_groups(groups)
        check_extra(forms_of(found), plan.extra, base)
        check_finite(found)
    except ValueError as wrong:
        cause: Cause = "not_finite" if isinstance(wrong, NotFinite) else "tensors"
        raise MalformedMessage(str(wrong), cause) from None
    return found


def _check_groups(groups: Mapping[str, object]) -> None:
    unknown = sorted(groups.keys() - {MODEL, EXTRA})
    if unknown:
        raise ValueError(f"tensors of the group '{unknown[0]}' were not asked for")

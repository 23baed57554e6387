"""From the bytes of an update to a delta that is fit to be averaged."""

from __future__ import annotations

from collections.abc import Iterable

from fluffle_common.errors import Cause, MalformedMessage
from fluffle_common.protocol.codec import announced, read_tensors
from fluffle_common.protocol.messages import FirstWeights, Update
from fluffle_common.tensors.compression import check_announced_signature, decompress
from fluffle_common.tensors.layout import Layout
from fluffle_common.tensors.pieces import InPieces
from fluffle_common.tensors.weights import NotFinite, Weights, check_delta


def check_announced(message: Update | FirstWeights, base: Weights | None) -> Layout:
    """Look at what an update in parts announces, before any of it is fetched.

    Args:
        message: the announcement.
        base: the model's weights; None for the first ones.

    Returns:
        How its tensors lie in what is fetched.

    Raises:
        MalformedMessage: of cause ``tensors``, where that cannot be what it says, or is no delta
            for ``base``.
    """
    layout = announced(message)
    if base is None or not isinstance(message, Update):
        return layout
    form = {name: (place.dtype, place.shape) for name, place in layout.places.items()}
    try:
        check_announced_signature(form, message.encoding, base)
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
                f"the update has no metric '{name}', which the strategy of this run needs; let the "
                "task report it"
            )


def decode_contribution(
    message: Update, payload: memoryview | InPieces, base: Weights
) -> tuple[Weights, float]:
    """Read an update's tensors, decode them, and check them against the model.

    Args:
        message: the update, with its table of tensors and their encoding.
        payload: the bytes of its tensors; or the tensors themselves, if they stay in pieces.
        base: the weights that it is to be added to.

    Returns:
        The delta, in the names, shapes and dtypes of ``base``; views into ``payload`` where nothing
        was encoded. And its norm: see ``finite_norm``.

    Raises:
        MalformedMessage: of cause ``tensors`` or ``not_finite``, where it is no delta for ``base``.
    """
    tensors: Weights = (
        payload if isinstance(payload, InPieces) else read_tensors(message.tensors, payload)
    )
    try:
        delta = decompress(tensors, message.encoding, base)
        norm = check_delta(delta, base)
    except ValueError as wrong:
        cause: Cause = "not_finite" if isinstance(wrong, NotFinite) else "tensors"
        raise MalformedMessage(str(wrong), cause) from None
    return delta, norm

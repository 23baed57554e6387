"""The type of ``--compress``."""

from __future__ import annotations

import contextlib

from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.option_group import Parsed

# A sent value and its index take twice the space of a float32: above a half, topk saves nothing.
_MIN_FRACTION, _MAX_FRACTION = 1e-6, 0.5


def _compression(text: str) -> str:
    """Return the compression as a training plan names it.

    Args:
        text: ``int8``, ``topk:FRACTION``, or a codec of the user's own: ``path.py:name`` or an
            installed codec's name, optionally with ``:`` and its settings.
    """
    from fluffle_common.protocol.messages import Compression
    from fluffle_common.tensors.codecs.registry import OWN_NAMES, encoding_of

    if text == "int8":
        return text
    if encoding_of(text) not in OWN_NAMES and (custom := _custom_codec(text)):
        return custom
    with contextlib.suppress(ValueError):
        fraction = Compression.parse(text).fraction
        if fraction is not None and _MIN_FRACTION <= fraction <= _MAX_FRACTION:
            return str(Compression(kind="topk", fraction=fraction))
    raise ValueError(
        f"unknown compression '{text}'; give int8, topk:FRACTION with a fraction from "
        f"{_MIN_FRACTION:f} to {_MAX_FRACTION:g}, or path.py:name for your own codec"
    )


def _custom_codec(text: str) -> str | None:
    """Return a user's codec as a training plan names it; None if ``text`` names no such codec."""
    from fluffle_common.cli.loading import load_codec
    from fluffle_common.protocol.messages import Compression
    from fluffle_common.tensors.codecs.base import UnknownCodec
    from fluffle_common.tensors.codecs.registry import CODECS, encoding_of

    compression = text
    file, dot_py, rest = text.partition(".py:")
    if dot_py:
        attribute, colon, settings = rest.partition(":")
        compression = load_codec(f"{file}.py:{attribute}", "--compress") + colon + settings
    try:
        CODECS.get(encoding_of(compression))
        Compression.parse(compression)
        CODECS.parse(compression)
    except UnknownCodec:
        return None
    except Exception as why:
        raise UsageError(f"--compress {text}: {why}") from None
    return compression


COMPRESS = Parsed("compress", _compression)

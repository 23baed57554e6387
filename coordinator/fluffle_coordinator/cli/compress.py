"""The value of ``--compress``."""

from __future__ import annotations

from typing import Any

import click

from fluffle_common.errors import UsageError

_LEAST_FRACTION, _MOST_FRACTION = 1e-6, 0.5


class CompressType(click.ParamType[Any]):
    """``int8``, ``topk:`` with the fraction of the values that is sent, or a codec of a user's.

    That is ``path.py:name`` or the name of an installed one, perhaps with ``:`` and its settings.
    """

    name = "compress"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Parse it into what a plan says."""
        text = str(value).strip()
        kind, _, number = text.partition(":")
        if text == "int8":
            return text
        other = _other_codec(text)
        if other is not None:
            return other
        try:
            fraction = float(number) if kind == "topk" else 0.0
        except ValueError:
            fraction = 0.0
        # A value and its index take twice the room of a float32: from a half on, nothing is saved.
        if not _LEAST_FRACTION <= fraction <= _MOST_FRACTION:
            self.fail(
                f"'{text}' is not a compression; use int8, or topk with the fraction of the "
                f"values to send, {_LEAST_FRACTION:f} to {_MOST_FRACTION:g}, such as "
                "topk:0.01, or path.py:name, a codec of your own",
                param,
                ctx,
            )
        return f"topk:{fraction:.6f}".rstrip("0")


def _other_codec(text: str) -> str | None:
    """Return what a plan says of a codec that is not fluffle's own; None if there is no such one.

    Raises:
        UsageError: if it is no codec, or does not take these settings.
    """
    from fluffle_common.cli.loading import load_codec
    from fluffle_common.protocol.messages import Compression
    from fluffle_common.tensors.codecs.base import UnknownCodec
    from fluffle_common.tensors.codecs.registry import CODECS, OWN_NAMES, encoding_of

    file, dot_py, rest = text.partition(".py:")
    if dot_py:
        attribute, colon, settings = rest.partition(":")
        how = load_codec(f"{file}.py:{attribute}", "--compress") + colon + settings
    elif encoding_of(text) in OWN_NAMES:
        return None
    else:
        how = text
    try:
        Compression.parse(how)
    except ValueError as why:
        if not dot_py:
            return None
        raise UsageError(f"--compress {text}: {why}") from None
    try:
        CODECS.parse(how)
    except UnknownCodec:
        return None
    except Exception as why:
        raise UsageError(f"--compress {text}: {why}") from None
    return how

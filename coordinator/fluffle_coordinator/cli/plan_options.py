"""The options of ``fluffle coordinator`` for local training and for what updates contain."""

from __future__ import annotations

import contextlib

import click

from fluffle_common.cli.app import FiniteFloat, count
from fluffle_common.cli.config_file import KeyValue
from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.option_group import Parsed, option_group

# A sent value and its index take twice the space of a float32: above a half, topk saves nothing.
_MIN_FRACTION, _MAX_FRACTION = 1e-6, 0.5


def _compression(text: str) -> str:
    """Return the compression as a training plan names it.

    A user's own codec is ``path.py:name`` or an installed codec's name, and may have ``:SETTINGS``.
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

plan_options = option_group(
    click.option("--epochs", type=count(), default=1, help="Number of local epochs per round."),
    click.option(
        "--steps",
        type=count(),
        help="Number of local training steps per round, instead of --epochs.",
    ),
    click.option("--batch-size", type=count(), default=32, help="Local batch size."),
    click.option(
        "--learning-rate",
        type=FiniteFloat(0, min_open=True),
        help="Local learning rate.  [default: the task's own]",
    ),
    click.option(
        "--learning-rate-schedule",
        default="constant",
        metavar="NAME",
        help="How --learning-rate changes over the rounds: constant; cosine (falls to almost 0 in "
        "the last round); exponential:FACTOR (multiplied by FACTOR after each round); or "
        "step:ROUNDS,FACTOR (multiplied by FACTOR after every ROUNDS rounds).",
    ),
    click.option(
        "--config",
        type=KeyValue(),
        multiple=True,
        metavar="KEY=VALUE",
        help="Extra setting, which the workers' tasks read from plan.config. For several settings, "
        "repeat the option.",
    ),
    click.option(
        "--upload-dtype",
        type=click.Choice(["float32", "bf16", "f16"]),
        default="float32",
        help="Data type of the float values in updates: bf16 and f16 halve the bytes by rounding "
        "the values; float32 sends the values unchanged.",
    ),
    click.option(
        "--compress",
        type=COMPRESS,
        metavar="int8|topk:FRACTION|PATH.PY:NAME",
        help="Codec for updates: int8 (8-bit integers with scales; about a quarter of the bytes), "
        "topk:0.01 (only the largest 1 % of the values), or path.py:name (your own codec; see "
        "docs/codecs.md). With int8 and topk, a worker adds the compression error of an update to "
        "its next update.  [default: no compression]",
    ),
    click.option(
        "--train",
        multiple=True,
        metavar="TENSOR",
        help="Name of a tensor to train, or a prefix such as 'head/*'. For several tensors, repeat "
        "the option. Tensors without a matching --train stay unchanged and are not sent back.  "
        "[default: every tensor is trained]",
    ),
)

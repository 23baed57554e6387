"""The options of ``fluffle coordinator`` for local training and for what updates contain."""

from __future__ import annotations

import click

from fluffle_common.cli.app import FiniteFloat, count
from fluffle_common.cli.config_file import KeyValue
from fluffle_coordinator.cli.compress_option import CompressType
from fluffle_coordinator.cli.option_group import option_group

plan_options = option_group(
    click.option("--epochs", type=count(), default=1, help="Local epochs per round."),
    click.option(
        "--steps",
        type=count(),
        help="Local training steps per round, instead of --epochs.",
    ),
    click.option("--batch-size", type=count(), default=32, help="Local batch size."),
    click.option(
        "--learning-rate",
        type=FiniteFloat(0, min_open=True),
        help="Local learning rate.  [default: the task's own]",
        show_default=False,
    ),
    click.option(
        "--learning-rate-schedule",
        default="constant",
        metavar="NAME",
        help=(
            "How --learning-rate changes over the rounds: constant, cosine, exponential:FACTOR, "
            "or step:ROUNDS,FACTOR."
        ),
    ),
    click.option(
        "--config",
        type=KeyValue(),
        multiple=True,
        metavar="KEY=VALUE",
        help="An extra setting for the tasks; may be given several times.",
    ),
    click.option(
        "--upload-dtype",
        type=click.Choice(["float32", "bf16", "f16"]),
        default="float32",
        help=(
            "Type of the floats of updates on the wire: bf16 and f16 round them and halve the "
            "bytes; float32 changes nothing."
        ),
    ),
    click.option(
        "--compress",
        type=CompressType(),
        metavar="int8|topk:FRACTION|PATH.PY:NAME",
        help=(
            "Send updates as 8-bit integers with scales (int8, about a quarter of the bytes), or "
            "only their largest values (topk:0.01 sends one in a hundred), or with your own codec "
            "(docs/codecs.md). What is left out is added to the worker's next update.  "
            "[default: no compression]"
        ),
        show_default=False,
    ),
    click.option(
        "--train",
        multiple=True,
        metavar="TENSOR",
        help=(
            "Train only this tensor of the model, or all with a prefix, such as 'head/*'; may be "
            "given several times. The others stay unchanged and are not sent back.  [default: all]"
        ),
        show_default=False,
    ),
)

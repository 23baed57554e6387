"""The options of ``fluffle coordinator`` for when a round opens and closes, and when a run ends.

The defaults of those for rounds are those of ``Rules``.
"""

from __future__ import annotations

import contextlib

import click

from fluffle_common.cli.app import MOST_COUNT, FiniteFloat, count, seconds
from fluffle_coordinator.cli.option_group import Parsed, option_group
from fluffle_coordinator.machine.rules import Quorum, Rules


def _quorum(text: str) -> Quorum:
    """Parse ``all``, a number of updates (``2``) or a fraction of the cohort (``0.5``, ``50%``)."""
    if text == "all":
        return Quorum()
    if text.isdecimal() and 0 < int(text[:11]) <= MOST_COUNT:
        return Quorum(number=int(text))
    with contextlib.suppress(ValueError):
        fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if 0 < fraction < 1 or (text.endswith("%") and fraction == 1):
            return Quorum(fraction=fraction)
    raise ValueError(
        f"invalid quorum '{text}'; give a number of updates such as 2, a fraction of the "
        "selected workers such as 0.5 or 50%, or all"
    )


round_options = option_group(
    click.option(
        "--min-workers",
        type=count(),
        metavar="N",
        help="Number of workers that must be connected before the first round starts. If you set "
        "this option, the quorum is also computed as if at least N workers were connected: with N "
        "= 4 and --quorum 0.5, a round needs at least 2 updates. With --select poisson or "
        "path.py:name, the quorum does not depend on this option.  [default: --quorum if given as "
        f"a number, else {Rules.min_workers}]",
    ),
    click.option(
        "--wait-workers",
        type=seconds(min_open=True),
        default=Rules.wait_s,
        help="Time limit in seconds for enough workers to connect.",
    ),
    click.option(
        "--quorum",
        type=Parsed("quorum", _quorum),
        default="all",
        metavar="N|FRACTION|all",
        help="Number of updates that must arrive before a round can close: a number such as 2, a "
        "fraction of the selected workers such as 0.5 or 50%, or 'all' for one update from every "
        "selected worker.",
    ),
    click.option(
        "--grace",
        type=seconds(),
        default=Rules.grace_s,
        help="Seconds that a round waits for more updates after it has reached its quorum.",
    ),
    click.option(
        "--deadline",
        type=seconds(min_open=True),
        default=Rules.deadline_s,
        help="Time limit in seconds for a round to reach its quorum.",
    ),
    click.option(
        "--on-deadline",
        type=click.Choice(["reopen", "close", "stop"]),
        default=Rules.on_deadline,
        help="Action when the deadline of a round passes: 'reopen' opens the round again with the "
        "connected workers, 'close' closes the round with the updates that have arrived (at least "
        "--min-updates), and 'stop' ends the run.",
    ),
    click.option(
        "--min-updates",
        type=count(),
        default=Rules.min_updates,
        help="With '--on-deadline close', a round is closed at its deadline only if at least this "
        "many updates have arrived.",
    ),
    click.option(
        "--max-round",
        type=seconds(min_open=True),
        default=Rules.max_round_s,
        metavar="SECONDS",
        help="Maximum time in seconds that a round stays open. Workers that make progress keep a "
        "round open after its --deadline, but never longer than --max-round.",
    ),
    click.option(
        "--stall-timeout",
        type=seconds(min_open=True),
        metavar="SECONDS",
        help="Seconds without progress after which a worker's training or evaluation counts as "
        "failed. Each of these must end within this time: an evaluation, the first step of a "
        "training (including compilation), and the whole training of a task that does not call "
        "'progress'.  [default: no limit, but a warning after 2 minutes without progress, or after "
        "10 minutes if the worker has not reported a step]",
    ),
)

stopping_options = option_group(
    click.option(
        "--monitor",
        metavar="METRIC",
        help="Metric for --target and --patience; the model with the best value of this metric is "
        "kept as best.safetensors. Give a federated metric such as accuracy, or test/NAME for a "
        "metric of your --evaluate function. Lower is better if the name ends with loss, error, "
        "error_rate, mse, mae, mape, nll, entropy or perplexity; otherwise, higher is better.  "
        "[default: the loss, and no best model is kept]",
    ),
    click.option(
        "--target",
        type=FiniteFloat(),
        metavar="VALUE",
        help="End the run when the --monitor metric reaches this value.",
    ),
    click.option(
        "--patience",
        type=count(),
        metavar="ROUNDS",
        help="End the run when the --monitor metric has not improved for this number of rounds.",
    ),
    click.option(
        "--time-budget",
        type=seconds(min_open=True),
        metavar="SECONDS",
        help="Time limit in seconds for all rounds together. The run ends after the round that "
        "exceeds this limit.  [default: no limit]",
    ),
)

"""The advice printed at the end of a run: the command to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from fluffle_common.plural import plural
from fluffle_coordinator.machine.rules import Rules
from fluffle_coordinator.machine.state import State


def after_the_end(folder: Path, committed: int, rules: Rules, *, by_rule: bool = False) -> str:
    """Return the advice after a run that is finished, perhaps early.

    ``by_rule`` says that a rule of early stopping ended the run, and would end it again.

    >>> after_the_end(Path("runs/letters"), 6, Rules(6))
    "'fluffle history runs/letters' shows the rounds; run the same command with --rounds 12 \
(without --fresh) to add rounds, or with --fresh to start a new run"
    >>> after_the_end(Path("runs/letters"), 3, Rules(6))
    "'fluffle history runs/letters' shows the rounds; run the same command (without --fresh) \
to continue with round 4"
    >>> after_the_end(Path("runs/letters"), 3, Rules(6), by_rule=True)
    "'fluffle history runs/letters' shows the rounds; to continue with round 4, change or \
remove the option that ended the run, and run the command again (without --fresh)"
    """
    shows = f"'fluffle history {shlex.quote(str(folder))}' shows the rounds"
    if by_rule:
        return (
            f"{shows}; to continue with round {committed + 1}, change or remove the option that "
            "ended the run, and run the command again (without --fresh)"
        )
    if committed < rules.rounds:
        again = "run the same command (without --fresh) to continue with round"
        return f"{shows}; {again} {committed + 1}"
    if rules.rounds_limit:
        return f"{shows}; run the same command with --fresh to start a new run"
    return (
        f"{shows}; run the same command with --rounds {2 * committed} (without --fresh) to add "
        "rounds, or with --fresh to start a new run"
    )


def done_already(folder: Path, committed: int, rules: Rules) -> str:
    """Return the message for a run that is started again with no rounds left."""
    why = rules.rounds_limit or f"--rounds is {rules.rounds}"
    return (
        f"the run in {folder} is done: it has {plural(committed, 'round')} and "
        f"{why}. {after_the_end(folder, committed, rules)}"
    )


def after_a_stop(state: State, folder: Path) -> str:
    """Return how to continue a run that stopped.

    If workers failed or their updates were rejected, their model may no longer be the run's model.
    No command can continue the run with another model, so the advice then names ``--fresh`` first.
    """
    same = f"run the same command (without --fresh) to continue with round {state.committed + 1}"
    if state.has_weights and (state.failed or state.doubted):
        return (
            "if the model or the classes have changed since this run began, add --fresh to start a "
            f"new run (the run in {folder} is moved aside). Otherwise, fix the workers, and {same}"
        )
    return f"fix the cause, and {same}"

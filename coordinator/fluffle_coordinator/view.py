"""What a run looks like to whoever watches it: one sentence an event, and what is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluffle_common.console import Console
from fluffle_coordinator.run_state import Phase, State

_SENTENCES = {
    "connected": "connected to the broker at {address}",
    "reconnected": "connected to the broker again",
    "disconnected": "lost the broker ({reason}); connecting again",
    "no_broker": "no broker at {address} ({reason}); trying again in {pause_s:.1f} s",
    "standby": "another coordinator has {what}; waiting as a standby",
    "repaired": "{what}",
    "resumed": "going on with run {run} after round {round}",
    "started": "run {run} in {folder}",
    "init": "asking {worker} for the first weights",
    "first_weights": "first weights are there: {tensors} tensors, {parameters:,} parameters",
    "classes": "the classes are {classes}, as {worker} has them",
    "joined": "{worker} joined with {num_examples} examples",
    "left": "{worker} left ({reason})",
    "gone": "{worker} is gone: nothing heard for {silent_s:.0f} s",
    "refused": "refused: {reason}",
    "failure": "round {round}: the task of {worker} failed: {reason}",
    "opened": "round {round}: opened for {asked}, {needed} updates needed",
    "reopened": "{reason}; opened again for {asked}",
    "closed": "{reason}; closed with what is there",
    "counted": "round {round}: update of {worker} counted, {num_examples} examples "
    "({updates}/{needed})",
    "late": "round {round}: update of {worker} came late and was discarded",
    "duplicate": "round {round}: update of {worker} came again, it is counted already",
    "resend": "asking {worker} for its update again: {reason}",
    "rejected": "rejected a message: {reason}",
    "committed": "round {round}: committed with {participants}",
    "evaluated": "round {round}: loss {loss:.4f}{more} on {num_examples} held-out examples",
    "disk": "cannot write to {folder} ({reason}); trying again every {pause_s:.0f} s",
    "waiting": "{reason}",
    "finished": "finished: {reason}",
    "stopped": "stopped: {reason}",
    "interrupted": "stopped; {folder} has everything, the same command goes on from there",
}


class View:
    """Turns what the run tells into lines and bars."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def tell(self, what: str, fields: Mapping[str, Any]) -> None:
        """Write one event."""
        words = {
            key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            for key, value in fields.items()
        }
        if what == "evaluated":
            metrics = fields["metrics"].items()
            words["more"] = "".join(f", {name} {value:.4f}" for name, value in metrics)
        self._console.line(what, _SENTENCES[what].format(**words), fields)

    def show(self, state: State, now: float) -> None:
        """Draw where the run stands."""
        if not self._console.draws:
            return  # this is called at every event: no sentences that nobody sees
        done = min(state.round - 1, state.rules.rounds)
        self._console.bar("rounds", done, state.rules.rounds)
        if state.phase is Phase.OPEN:
            self._console.bar(
                "updates", state.folded, state.needed, f"round {state.round}: {_who(state, now)}"
            )
        else:
            told = waiting_for(state, now) or f"round {state.round}: {state.phase}"
            self._console.bar("updates", 0, state.needed, told)


def waiting_for(state: State, now: float) -> str | None:
    """Say what the run waits for and who is missing; None where it waits for nobody."""
    if not state.link:
        return None
    if state.phase is Phase.WAITING:
        present = ", ".join(sorted(state.workers)) or "nobody"
        if len(state.workers) < state.gate:
            missing = state.gate - len(state.workers)
            return (
                f"waiting for workers: {len(state.workers)} of {state.gate} are here ({present}), "
                f"{missing} missing"
            )
        return None if state.has_weights else f"waiting for first weights from {state.init_asked}"
    if state.phase is Phase.OPEN:
        left_s = max(0.0, state.opened_at + state.rules.deadline_s - now)
        return (
            f"round {state.round}: {state.folded} of {state.needed} updates, "
            f"{left_s:.0f} s to the deadline; {_who(state, now)}"
        )
    if state.phase is Phase.EVALUATING:
        missing_names = sorted(state.asked.keys() - state.evaluations.keys())
        told = ", ".join(missing_names) or "workers: nobody is here"
        return f"waiting for the evaluation by {told}"
    return None


def _who(state: State, now: float) -> str:
    """Say what each worker that has not answered is doing."""
    told = []
    for name in state.missing:
        worker = state.workers.get(name)
        if name in state.failed:
            told.append(f"{name} failed")
        elif worker is None:
            told.append(f"{name} is gone")
        elif state.busy(name):
            steps = f" {worker.step}/{worker.steps}" if worker.steps else ""
            told.append(f"{name} {worker.state}{steps}")
        else:
            heard_s = max(0.0, now - worker.last_seen)
            told.append(f"{name} has not begun (last heard {heard_s:.0f} s ago)")
    short = state.needed - len(state.asked)
    if short > 0:
        told.append(f"{short} more workers needed")
    return ", ".join(told) or "all have answered"

"""Lines of a run's history, with all fields that a coordinator writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN = "0123456789ab"


def participant(worker: str, **fields: Any) -> dict[str, Any]:
    """Return the entry of a counted update."""
    return {
        "worker": worker, "sequence": 1, "num_examples": 5, "train_loss": None, "seconds": None,
        "counted_s": 0.0, "bytes": 0, "norm": None, **fields,
    }  # fmt: skip


def committed(number: int, *participants: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the line of a committed round."""
    return {
        "event": "committed", "run": RUN, "round": number, "base": f"base{number}", "asked": [],
        "participants": list(participants), "opened_at": "1970-01-01T00:00:10.000+00:00",
        "late": 0, "rejected": 0, "late_updates": [], "rejections": [],
        "checkpoint": f"round-{number:04d}.safetensors", "timings": {}, "strategy": "fedavg",
        "committed_at": "1970-01-01T00:00:15.000+00:00", **fields,
    }  # fmt: skip


def evaluated(number: int, **fields: Any) -> dict[str, Any]:
    """Return the line of a model's evaluation."""
    return {
        "event": "evaluated", "round": number, "loss": 0.5, "num_examples": 30,
        "evaluators": ["a"], "evaluations": [], "evaluated_at": "1970-01-01T00:00:16.000+00:00",
        **fields,
    }  # fmt: skip


def scored(number: int, **metrics: float) -> dict[str, Any]:
    """Return the line of the results of the ``evaluate`` hook."""
    return {
        "event": "tested", "round": number, "tested_at": "1970-01-01T00:00:16.000+00:00", **metrics,
    }  # fmt: skip


def ended(number: int, **fields: Any) -> dict[str, Any]:
    """Return the line of a run's end."""
    counts = {"late": 0, "rejected": 0, "late_updates": [], "rejections": []}
    return {
        "event": "ended",
        "round": number,
        "outcome": "finished",
        "reason": "",
        "ended_at": "1970-01-01T00:00:17.000+00:00",
        **counts,
        **fields,
    }


def write_history(folder: Path, *lines: dict[str, Any]) -> None:
    """Write the history of a run folder."""
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "history.jsonl").write_text(text)

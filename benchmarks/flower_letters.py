"""The whole letters job on fluffle and on Flower's two engines; part of ``flower``.

All sides train the same network on the same images with the same batch size and number of rounds,
and evaluate on every client. A job lasts from the start of its first process to the saved model.
The first job of each side is not timed. Flower's clients train as in Flax's tutorials, with JAX's
defaults (see ``flower_side.letters``). Two more variants separate the effects of fluffle's local
training and its compilation cache: *fluffle, first run* starts with an empty cache, and in *flower
direct, fluffle's epoch* Flower's clients use fluffle's task and cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import command, letters_job, stats
from benchmarks.flower_engines import start_direct, start_production
from benchmarks.processes import ROOT, Died, Programs, private_broker, scratch

ROUNDS = 6
FLUFFLE, FIRST = "fluffle", "fluffle, first run"
DIRECT, PRODUCTION = "flower direct", "flower production"
BORROWING = "flower direct, fluffle's epoch"
_LATE_S = 900.0
_LOOK_S = 0.01
_TASK = [ROOT / side for side in ("", "common", "worker")]
Start = Callable[[Programs, Path, Mapping[str, Any], list[dict[str, Any]]], dict[str, int]]


def flower_job(
    start: Start, python: Path, folder: Path, clients: list[Path], cache: Path | None
) -> dict[str, Any]:
    """Run the job on one of Flower's engines.

    Args:
        start: starts that engine.
        python: the Python of Flower's environment.
        folder: the folder to create for logs and the model.
        clients: the data folder of each client.
        cache: the compilation cache, for clients that use fluffle's task; None for plain clients.
    """
    folder.mkdir()
    out, stamps = folder / "model.npz", folder / "stamps"
    stamps.touch()
    config = {"clients": len(clients), "rounds": ROUNDS, "out": str(out), "stamps": str(stamps)}
    config |= {"gate": "", "data": str(clients[0])}
    env = {"XDG_CACHE_HOME": str(cache or folder), "PYTHONPATH": ":".join(map(str, _TASK))}
    with Programs(folder, env) as programs:
        began = time.monotonic()
        plain = cache is None
        start(programs, python, config, [{"data": str(data), "plain": plain} for data in clients])
        while len(stamps.read_text().splitlines()) < ROUNDS or not out.exists():
            if time.monotonic() > began + _LATE_S:
                raise Died(f"no model after {_LATE_S:.0f} s; see {folder}")
            time.sleep(_LOOK_S)
        saved = time.monotonic() - began
    rounds = [float(line.split()[0]) - began for line in stamps.read_text().splitlines()]
    return {"saved_s": round(saved, 3), "round_saved_s": [round(each, 3) for each in rounds]}


def jobs(options: argparse.Namespace) -> dict[str, Any]:
    """Run the job on all sides in turn and return the results."""
    from fluffle_worker.letters.handwriting.drawing import draw_letters

    names = [FLUFFLE, FIRST, DIRECT, BORROWING] + [PRODUCTION] * (not options.direct_only)
    by_side: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with scratch(options.folder) as folder, private_broker(folder / "state") as broker:
        draw_letters(folder / "data", clients=options.clients[0], per_client=250, seed=1)
        clients = sorted((folder / "data").iterdir())

        def run(name: str, job_folder: Path) -> dict[str, Any]:
            cache = job_folder.with_suffix(".cache") if name == FIRST else folder / "cache"
            if name in (FLUFFLE, FIRST):
                return letters_job.job(job_folder, broker.url, clients, ROUNDS, cache)
            start = start_production if name == PRODUCTION else start_direct
            borrowed = cache if name == BORROWING else None
            return flower_job(start, options.python, job_folder, clients, borrowed)

        for number, (name, _) in enumerate(stats.interleaved(names, [1] * (options.repeats + 1))):
            result = run(name, folder / f"job{number}")
            command.report(f"{name}: {result['saved_s']} s")
            if number >= len(names):
                by_side[name].append(result)
    medians = {name: statistics.median(job["saved_s"] for job in by_side[name]) for name in names}
    fastest = min(medians[name] for name in names if name in (DIRECT, PRODUCTION))
    return {
        "clients": len(clients),
        "rounds": ROUNDS,
        "medians_s": {name: round(median, 3) for name, median in medians.items()},
        "over_fastest_flower": round(medians[FLUFFLE] / fastest, 3),
        "jobs": by_side,
    }


def jobs_as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [[name, median] for name, median in results["medians_s"].items()]
    head = [f"letters, {results['clients']} clients, {results['rounds']} rounds", "model saved s"]
    last = f"fluffle over the fastest of Flower's engines {results['over_fastest_flower']:.2f}"
    return f"{command.table(head, rows)}\n{last}"

"""The whole letters job on fluffle and on Flower's two engines; a part of ``flower``.

All train the same network on the same images, in batches of the same size, for as many rounds, each
with an evaluation on every client. A job lasts from the start of its first process to the saved
model; one job of each comes before those that are timed. Flower's clients train by what Flax's
tutorials show and JAX as it comes (see ``flower_side.letters``). What fluffle owes to its local
epoch and to keeping what is compiled is told apart: *fluffle, first run* has nothing compiled yet,
and *flower direct, fluffle's epoch* has Flower's clients borrow fluffle's task and its cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures, letters_job
from benchmarks.flower_sides import start_direct, start_production
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
        python: that of Flower's environment.
        folder: made here; for logs and the model.
        clients: the data of each.
        cache: where what is compiled is kept; None: clients that keep nothing.
    """
    folder.mkdir()
    out, stamps = folder / "model.npz", folder / "stamps"
    stamps.touch()
    told = {"clients": len(clients), "rounds": ROUNDS, "out": str(out), "stamps": str(stamps)}
    told |= {"gate": "", "data": str(clients[0])}
    env = {"XDG_CACHE_HOME": str(cache or folder), "PYTHONPATH": ":".join(map(str, _TASK))}
    with Programs(folder, env) as programs:
        began = time.monotonic()
        plain = cache is None
        start(programs, python, told, [{"data": str(data), "plain": plain} for data in clients])
        while len(stamps.read_text().splitlines()) < ROUNDS or not out.exists():
            if time.monotonic() > began + _LATE_S:
                raise Died(f"no model after {_LATE_S:.0f} s; look into {folder}")
            time.sleep(_LOOK_S)
        saved = time.monotonic() - began
    rounds = [float(line.split()[0]) - began for line in stamps.read_text().splitlines()]
    return {"saved_s": round(saved, 3), "round_saved_s": [round(each, 3) for each in rounds]}


def jobs(options: argparse.Namespace) -> dict[str, Any]:
    """Run the jobs of all of them in turn."""
    from fluffle_worker.letters.handwriting.drawing import draw_letters

    names = [FLUFFLE, FIRST, DIRECT, BORROWING] + [PRODUCTION] * (not options.direct_only)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with scratch(options.folder) as folder, private_broker(folder / "state") as broker:
        draw_letters(folder / "data", clients=options.clients[0], per_client=250, seed=1)
        clients = sorted((folder / "data").iterdir())

        def run(name: str, where: Path) -> dict[str, Any]:
            cache = where.with_suffix(".cache") if name == FIRST else folder / "cache"
            if name in (FLUFFLE, FIRST):
                return letters_job.job(where, broker.url, clients, ROUNDS, cache)
            start = start_production if name == PRODUCTION else start_direct
            borrowed = cache if name == BORROWING else None
            return flower_job(start, options.python, where, clients, borrowed)

        for number, (name, _) in enumerate(figures.interleaved(names, [1] * (options.repeats + 1))):
            told = run(name, folder / f"job{number}")
            print(f"{name}: {told['saved_s']} s", file=sys.stderr, flush=True)
            if number >= len(names):
                found[name].append(told)
    medians = {name: statistics.median(one["saved_s"] for one in found[name]) for name in names}
    fastest = min(medians[name] for name in names if name in (DIRECT, PRODUCTION))
    return {
        "clients": len(clients),
        "rounds": ROUNDS,
        "medians_s": {name: round(median, 3) for name, median in medians.items()},
        "over_fastest_flower": round(medians[FLUFFLE] / fastest, 3),
        "jobs": found,
    }


def jobs_as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    rows = [[name, median] for name, median in told["medians_s"].items()]
    head = [f"letters, {told['clients']} clients, {told['rounds']} rounds", "model saved s"]
    return (
        f"{figures.table(head, rows)}\n"
        f"fluffle over the fastest of Flower's engines {told['over_fastest_flower']:.2f}"
    )

"""Rounds of fluffle, of Flower's two networked engines and of the floor, in one run.

    make bench-flower                  (installs Flower into .venv-flower; not part of any test)
    python -m benchmarks.flower --size-mb 0.1,1.36,10,100 --clients 3
    python -m benchmarks.flower --size-mb 1.36 --clients 10,30
    python -m benchmarks.flower --letters
    python -m benchmarks.flower --simulation

Flower is the published package, unmodified, offline and in its own environment. The **direct**
engine is ``start_server`` and ``start_client`` (gRPC; deprecated since 1.13, but present in 1.42).
The **production** engine is ``flower-superlink``, a ``flower-supernode`` per client and ``flwr
run``.

All sides have the same number of clients, train the same no-op on a model of the same size, perturb
each reply, and use plain FedAvg. With ``--evaluate``, all clients also evaluate each round's model,
as both systems do by default. The evaluation itself takes no time. fluffle's workers send the
result together with their next update; Flower sends the model a second time for it. (The floor does
not evaluate.)

All sides run from beginning to end and take turns, waiting at a gate while others run (see
``comparison`` and ``flower_engines``). If the models are too large for that, each side is started
anew for each block of its rounds. Only fluffle writes every round's model to disk.

``--letters`` runs the whole letters job on each side instead, from the start of the processes to
the saved model: the same network, images and rounds, with evaluation (see ``flower_letters``).

``--simulation`` runs whole simulated jobs on ``fluffle.simulate`` and on Flower's third engine, the
simulation engine (see ``flower_simulation``).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, stats
from benchmarks.comparison import Floor, Fluffle, Measured, Side, compare
from benchmarks.floor import Spec
from benchmarks.flower_engines import FlowerDirect, FlowerProduction
from benchmarks.flower_simulation import simulations, simulations_as_text
from benchmarks.processes import ROOT, Programs, machine, private_broker, scratch
from benchmarks.simulated_jobs import JOBS

PYTHON = ROOT / ".venv-flower" / "bin" / "python"
_MAX_TOGETHER_MB = 400

Starters = dict[str, Callable[[Programs], Side]]


def starters(options: argparse.Namespace, size_mb: float, clients: int, url: str) -> Starters:
    """Return a function per side that starts it."""
    size_bytes, python = round(size_mb * 1e6), options.python
    model: dict[str, Any] = {"size_bytes": size_bytes, "evaluates": options.evaluate}
    return {
        "floor": lambda programs: Floor(programs, Spec(url, clients, size_bytes)),
        "fluffle": lambda programs: Fluffle(programs, url, workers=clients, **model),
        "flower direct": lambda programs: FlowerDirect(programs, python, clients=clients, **model),
        "flower production": lambda programs: FlowerProduction(
            programs, python, clients=clients, **model
        ),
    }


def together(
    folder: Path, start: Starters, sizes: Sequence[int], options: argparse.Namespace
) -> dict[str, Measured]:
    """Start all sides at once and let them take turns."""
    with Programs(folder) as programs:
        fast = [start[name](programs) for name in start if name != "flower production"]
        measured = compare(fast, sizes, report=command.report)
        if not options.direct_only:
            # Its rounds take seconds at any size, so there are few of them.
            sides = [*fast, start["flower production"](programs)]
            sizes = stats.shares(options.slow_rounds, 2)
            again = compare(sides, sizes, report=command.report)
            measured["flower production"] = again["flower production"]
    return measured


def apart(
    folder: Path, start: Starters, sizes: Sequence[int], options: argparse.Namespace
) -> dict[str, Measured]:
    """Start one side at a time, for a block of rounds, to save memory."""
    names = [name for name in start if name != "flower production" or not options.direct_only]
    measured = {name: Measured() for name in names}
    for number, (name, size) in enumerate(stats.interleaved(names, sizes)):
        turn_folder = folder / f"turn{number}"
        turn_folder.mkdir()
        with Programs(turn_folder) as programs:
            block = compare([start[name](programs)], [size], report=command.report)[name]
        shutil.rmtree(turn_folder)
        measured[name].add(block)
    return measured


def rounds(options: argparse.Namespace, size_mb: float, clients: int) -> dict[str, Any]:
    """Run rounds of all sides in turn and return the results."""
    run = apart if options.apart or size_mb * clients > _MAX_TOGETHER_MB else together
    count = options.rounds or stats.enough_rounds(size_mb)
    sizes = stats.shares(count, options.blocks)
    with scratch(options.folder) as folder, private_broker(folder / "state") as broker:
        measured = run(folder, starters(options, size_mb, clients, broker.url), sizes, options)
    return {
        "size_mb": size_mb,
        "clients": clients,
        "rounds": count,
        "evaluates": options.evaluate,
        "started": run.__name__,
        **ratios(measured),
        **{name: side.as_dict() for name, side in measured.items()},
    }


def ratios(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the ratios of fluffle's rounds to the floor's and to each of Flower's engines'."""
    ours = measured["fluffle"].times
    over = {
        name: round(stats.ratio(ours, side.times), 3)
        for name, side in measured.items()
        if name != "fluffle"
    }
    flower = [ratio for name, ratio in over.items() if name != "floor"]
    return {"over": over, "over_fastest_flower": max(flower)}


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    names = ("floor", "fluffle", "flower direct", "flower production")
    rows = [
        [
            f"{run['size_mb']:g} MB, {run['clients']} clients",
            *(run[name]["median_s"] if name in run else None for name in names),
            run["over"]["floor"],
            run["over_fastest_flower"],
        ]
        for run in results["runs"]
    ]
    return command.table(["median s", *names, "over floor", "over Flower"], rows)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    made = command.parser("flower", __doc__)
    made.add_argument("--size-mb", type=command.listed(float), default=[0.1, 1.36, 10.0, 100.0])
    made.add_argument(
        "--clients", type=command.listed(int), default=[3], help="numbers of clients (3)"
    )
    command.add_rounds(made)
    made.add_argument("--blocks", type=int, default=4, help="blocks of rounds per side (4)")
    made.add_argument(
        "--evaluate", action="store_true", help="every client evaluates every round's model"
    )
    made.add_argument("--slow-rounds", type=int, default=4, help="production rounds (4)")
    made.add_argument("--direct-only", action="store_true", help="omit the production engine")
    made.add_argument(
        "--apart",
        action="store_true",
        help="start one side at a time, as always above 400 MB",
    )
    made.add_argument("--letters", action="store_true", help="run the letters job instead")
    made.add_argument("--simulation", action="store_true", help="run simulated jobs instead")
    made.add_argument(
        "--job", nargs="+", choices=JOBS, default=list(JOBS), help="simulated jobs (all)"
    )
    made.add_argument(
        "--num-cpus", type=float, help="Flower's num_cpus of a simulated client (the fastest)"
    )
    made.add_argument("--repeats", type=int, default=3, help="repetitions of a whole job (3)")
    made.add_argument("--python", type=Path, default=PYTHON, help="Flower's Python")
    made.add_argument("--folder", type=Path, help="folder for temporary files")
    return made


def main() -> None:
    """Run the benchmark from the command line."""
    options = parser().parse_args()
    if not options.python.exists():
        raise SystemExit(f"there is no {options.python}; 'make bench-flower' installs Flower there")
    before = machine()
    if options.letters:
        from benchmarks.flower_letters import jobs, jobs_as_text

        results = {**jobs(options), "machine": before}
        command.show(results, options, jobs_as_text)
        return
    if options.simulation:
        command.show({**simulations(options), "machine": before}, options, simulations_as_text)
        return
    runs = [rounds(options, mb, n) for mb in options.size_mb for n in options.clients]
    results = {"runs": runs, "machine": before}
    command.show(results, options, as_text)


if __name__ == "__main__":
    main()

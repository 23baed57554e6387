"""fluffle beside Flower's two networked engines, and the floor, in one run.

    make bench-flower                  (installs Flower into .venv-flower; not a part of any test)
    python -m benchmarks.flower --size-mb 0.1,1.36,10,100 --clients 3
    python -m benchmarks.flower --size-mb 1.36 --clients 10,30
    python -m benchmarks.flower --letters

Flower is the published package, as it comes, in an environment of its own, offline. The **direct**
engine is ``start_server`` and ``start_client`` (gRPC, deprecated since 1.13, still there in 1.42);
the **production** engine is ``flower-superlink``, a ``flower-supernode`` for each client and
``flwr run``. All train the same no-op on a model of the same bytes, each reply perturbed; all get
the same number of clients; strategies are plain FedAvg. Nobody evaluates, unless ``--evaluate`` is
given: then all clients evaluate every round's model, as both systems do by default, which takes no
time by itself; fluffle's say it with their next update, Flower's in an exchange of its own, for
which it sends the model once more. (The floor knows nothing of it.)

Everyone runs from begin to end and takes turns, held at a gate while others run (see ``sides`` and
``flower_sides``); large models are too large for that, and there each is started again for every
block of its rounds. Only fluffle writes every round's model to disk.

``--letters`` runs the whole letters job on each instead, from the start of the processes to the
saved model: the same network, images and rounds, with evaluation (see ``flower_letters``).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, figures
from benchmarks.floor import Spec
from benchmarks.flower_sides import FlowerDirect, FlowerProduction
from benchmarks.processes import ROOT, Programs, machine, private_broker, scratch
from benchmarks.sides import Floor, Fluffle, Measured, Side, compare

PYTHON = ROOT / ".venv-flower" / "bin" / "python"
_MOST_TOGETHER_MB = 400

Starts = dict[str, Callable[[Programs], Side]]


def starts(options: argparse.Namespace, size_mb: float, clients: int, url: str) -> Starts:
    """Return what starts each of them."""
    size_bytes, python = round(size_mb * 1e6), options.python
    what: dict[str, Any] = {"size_bytes": size_bytes, "evaluates": options.evaluate}
    return {
        "floor": lambda programs: Floor(programs, Spec(url, clients, size_bytes)),
        "fluffle": lambda programs: Fluffle(programs, url, workers=clients, **what),
        "flower direct": lambda programs: FlowerDirect(programs, python, clients=clients, **what),
        "flower production": lambda programs: FlowerProduction(
            programs, python, clients=clients, **what
        ),
    }


def together(
    folder: Path, made: Starts, sizes: Sequence[int], options: argparse.Namespace
) -> dict[str, Measured]:
    """Start all of them, and let them take turns."""
    with Programs(folder) as programs:
        quick = [made[name](programs) for name in made if name != "flower production"]
        found = compare(quick, sizes, said=_say)
        if not options.direct_only:
            # Its rounds take seconds at any size: few of them, again beside the others.
            all_of_them = [*quick, made["flower production"](programs)]
            again = compare(all_of_them, figures.shares(options.slow_rounds, 2), said=_say)
            found["flower production"] = again["flower production"]
    return found


def apart(
    folder: Path, made: Starts, sizes: Sequence[int], options: argparse.Namespace
) -> dict[str, Measured]:
    """Start one of them at a time, for a block of rounds, since the memory holds no more."""
    names = [name for name in made if name != "flower production" or not options.direct_only]
    found = {name: Measured() for name in names}
    for number, (name, size) in enumerate(figures.interleaved(names, sizes)):
        place = folder / f"turn{number}"
        place.mkdir()
        with Programs(place) as programs:
            one = compare([made[name](programs)], [size], said=_say)[name]
        shutil.rmtree(place)
        found[name].add(one)
    return found


def rounds(options: argparse.Namespace, size_mb: float, clients: int) -> dict[str, Any]:
    """Let all of them run rounds in turn."""
    way = apart if options.apart or size_mb * clients > _MOST_TOGETHER_MB else together
    count = options.rounds or figures.enough_rounds(size_mb)
    sizes = figures.shares(count, options.blocks)
    with scratch(options.folder) as folder, private_broker(folder / "state") as broker:
        found = way(folder, starts(options, size_mb, clients, broker.url), sizes, options)
    return {
        "size_mb": size_mb,
        "clients": clients,
        "rounds": count,
        "evaluates": options.evaluate,
        "started": way.__name__,
        **ratios(found),
        **{name: side.as_dict() for name, side in found.items()},
    }


def ratios(found: Mapping[str, Measured]) -> dict[str, Any]:
    """Compare fluffle with the floor and with the faster of Flower's engines."""
    ours = found["fluffle"].times
    over = {
        name: round(figures.ratio(ours, side.times), 3)
        for name, side in found.items()
        if name != "fluffle"
    }
    return {"over": over, "over_fastest_flower": max(v for k, v in over.items() if k != "floor")}


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    names = ("floor", "fluffle", "flower direct", "flower production")
    rows = [
        [
            f"{one['size_mb']:g} MB, {one['clients']} clients",
            *(one[name]["median_s"] if name in one else None for name in names),
            one["over"]["floor"],
            one["over_fastest_flower"],
        ]
        for one in told["runs"]
    ]
    return figures.table(["median s", *names, "over floor", "over Flower"], rows)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list(of: Any) -> Any:
    return lambda text: [of(part) for part in text.split(",")]


def main() -> None:
    """Measure, and print."""
    parser = command.parser("flower", __doc__)
    parser.add_argument("--size-mb", type=_list(float), default=[0.1, 1.36, 10.0, 100.0])
    parser.add_argument("--clients", type=_list(int), default=[3], help="numbers of clients (3)")
    command.add_rounds(parser)
    parser.add_argument("--blocks", type=int, default=4, help="blocks they are run in (4)")
    parser.add_argument(
        "--evaluate", action="store_true", help="every client evaluates every round's model"
    )
    parser.add_argument("--slow-rounds", type=int, default=4, help="of the production engine (4)")
    parser.add_argument("--direct-only", action="store_true", help="leave that engine out")
    parser.add_argument(
        "--apart", action="store_true", help="start one at a time; so anyway above 400 MB in all"
    )
    parser.add_argument("--letters", action="store_true", help="the letters job instead")
    parser.add_argument("--repeats", type=int, default=3, help="how often, with --letters (3)")
    parser.add_argument("--python", type=Path, default=PYTHON, help="of Flower's environment")
    parser.add_argument("--folder", type=Path, help="where runs are kept meanwhile")
    options = parser.parse_args()
    if not options.python.exists():
        raise SystemExit(f"there is no {options.python}; 'make bench-flower' installs Flower there")
    before = machine()
    if options.letters:
        from benchmarks.flower_letters import jobs, jobs_as_text

        told = {**jobs(options), "machine": before}
        command.show(told, options, jobs_as_text)
        return
    found = [rounds(options, mb, n) for mb in options.size_mb for n in options.clients]
    told = {"runs": found, "machine": before}
    command.show(told, options, as_text)


if __name__ == "__main__":
    main()

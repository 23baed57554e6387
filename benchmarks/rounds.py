"""Whole rounds of fluffle, and the floor beneath them, measured in the same run.

    python -m benchmarks.rounds --size-mb 10 --workers 3 --rounds 10
    python -m benchmarks.rounds --size-mb 100 --max-message-size 16777216 --json

**fluffle** is a real ``fluffle coordinator`` and real ``fluffle worker`` processes. The task
returns the weights that it was given, as the floor's workers do; with ``--noise`` it adds noise to
them, which costs about as much as copying them (see ``noop``). ``train_s`` says how long that took.
A round lasts from one commit to the next.

**The floor** is what AMQP alone takes for the same bytes (see ``floor``): a coordinator that
publishes, as many workers that send back, bare aio-pika, one process each.

Both keep running from begin to end, on one private broker, and take turns: floor, fluffle, fluffle,
floor, and so on, a block of rounds each. While the floor runs, every worker of fluffle is held at a
gate inside its training (see ``gate``), with the next weights in its hands and nothing on its way;
the first round of every block, which began at that gate, does not count, and of the floor's blocks
neither does the first. ``ratio`` is the median of fluffle's rounds over the median of the floor's.
Since rounds are written while the next are under way, commits may come in pairs: then the mean
says more than the median, and ``mean_ratio`` compares that.

Megabytes are 10^6 bytes. Memory is the peak of each process's resident set; the broker's is given
for either side, its peak being reset before each block. Processor time is per round; ``cpu_ratio``
compares that of all processes, the broker's included, and suffers less from neighbours on the same
machine than time does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import command, figures
from benchmarks.arrays import TENSORS
from benchmarks.floor import Spec
from benchmarks.processes import Programs, machine, private_broker, scratch
from benchmarks.sides import Floor, Fluffle, Measured, compare


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = command.parser("rounds", __doc__)
    made.add_argument("--size-mb", type=float, default=10.0, help="size of the model (10)")
    made.add_argument("--tensors", type=int, default=TENSORS, help="how many it has (8)")
    made.add_argument("--workers", type=int, default=3, help="how many workers (3)")
    command.add_rounds(made)
    made.add_argument("--blocks", type=int, default=5, help="blocks they are run in (5)")
    made.add_argument("--quorum", action="store_true", help="quorum queues instead of classic ones")
    made.add_argument("--max-message-size", type=int, help="the broker's; 16777216 is that of 4.x")
    made.add_argument("--durable-parts", action="store_true", help="the floor's parts are durable")
    made.add_argument("--noise", action="store_true", help="workers add noise to the weights")
    made.add_argument("--dashboard", action="store_true", help="the coordinator shows its page")
    made.add_argument("--folder", type=Path, help="where broker and run are kept meanwhile")
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides and return everything that was found."""
    size_bytes = round(options.size_mb * 1e6)
    queue_type = "quorum" if options.quorum else "classic"
    limit = options.max_message_size
    conf = f"max_message_size = {limit}\n" if limit else ""
    before = machine()
    with (
        scratch(options.folder) as folder,
        private_broker(folder / "state", conf) as broker,
        Programs(folder) as programs,
    ):
        floor = Floor(
            programs,
            Spec(
                broker.url,
                options.workers,
                size_bytes,
                queue_type,
                durable_parts=options.durable_parts,
            ),
        )
        fluffle = Fluffle(
            programs,
            broker.url,
            size_bytes=size_bytes,
            tensors=options.tensors,
            workers=options.workers,
            queue_type=queue_type,
            noise=options.noise,
            options=("--dashboard", "127.0.0.1:0") if options.dashboard else (),
        )
        rounds = options.rounds or figures.enough_rounds(options.size_mb)
        sizes = figures.shares(rounds, options.blocks)
        found = compare([floor, fluffle], sizes, broker_pid=broker.pid, said=_say)
    return {
        "size_mb": options.size_mb,
        "tensors": options.tensors,
        "workers": options.workers,
        "rounds": rounds,
        "blocks": len(sizes),
        "queue_type": queue_type,
        "noise": options.noise,
        "max_message_size": limit,
        "ratio": round(figures.ratio(found["fluffle"].times, found["floor"].times), 3),
        "mean_ratio": round(fmean(found["fluffle"].times) / fmean(found["floor"].times), 3),
        "ratio_by_block": by_block(found),
        "cpu_ratio": round(found["fluffle"].cpu_s_a_round / found["floor"].cpu_s_a_round, 3),
        **{name: side.as_dict() for name, side in found.items()},
        "machine": {**before, "rabbitmq": broker.version},
    }


def by_block(found: Mapping[str, Measured]) -> list[float]:
    """Return the ratio of each pair of blocks: how far one may trust the one over all."""
    pairs = zip(found["fluffle"].blocks, found["floor"].blocks, strict=True)
    return [round(figures.ratio(ours, floor), 3) for ours, floor in pairs]


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    sides = ("floor", "fluffle")

    def workers(side: str, what: str) -> list[float]:
        return [v for who, v in told[side][what].items() if who.startswith("worker") and v]

    def row(label: str, pick: Any) -> list[Any]:
        return [label, *(pick(side) for side in sides)]

    rows = [
        row("round, median s", lambda side: told[side]["median_s"]),
        row("  mean", lambda side: told[side]["mean_s"]),
        row("  lower quartile", lambda side: told[side]["quartiles_s"][0]),
        row("  upper quartile", lambda side: told[side]["quartiles_s"][1]),
        row("cpu s a round: coordinator", lambda s: told[s]["cpu_s_a_round"]["coordinator"]),
        row("  workers, mean", lambda s: fmean(workers(s, "cpu_s_a_round") or [0.0])),
        row("  broker", lambda side: told[side]["cpu_s_a_round"].get("broker")),
        row("peak MB: coordinator", lambda side: told[side]["peak_rss_mb"]["coordinator"]),
        row("  largest worker", lambda side: max(workers(side, "peak_rss_mb"), default=None)),
        row("  broker", lambda side: told[side]["broker_peak_mb"]),
    ]
    rows += [[f"  {k}", None, v] for k, v in told["fluffle"].get("timings", {}).items()]
    rows += [["  train_s", None, told["fluffle"].get("train_s")]]
    head = [f"{told['size_mb']:g} MB, {told['workers']} workers", *sides]
    return (
        f"{figures.table(head, rows)}\n"
        f"ratio {told['ratio']:.2f}  (by block: {', '.join(map(str, told['ratio_by_block']))}); "
        f"of the means {told['mean_ratio']:.2f}; of all processor time {told['cpu_ratio']:.2f}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print."""
    options = parser().parse_args()
    told = measure(options)
    command.show(told, options, as_text)


if __name__ == "__main__":
    main()

"""Time, CPU time and memory of whole rounds, relative to the floor, measured in the same run.

    python -m benchmarks.rounds --size-mb 10 --workers 3 --rounds 10
    python -m benchmarks.rounds --size-mb 100 --max-message-size 16777216 --json

**fluffle** is a real ``fluffle coordinator`` with real ``fluffle worker`` processes. The task
returns the weights that it received, like the floor's workers; with ``--noise`` it adds noise to
them, which costs about as much as copying them (see ``noop``). ``train_s`` is the time for that. A
round lasts from one commit to the next; a version is on disk before any worker trains from it.

**The floor** is the cost of AMQP alone for the same bytes (see ``floor``): a coordinator that
publishes and workers that send back, with bare aio-pika, one process each.

Both run from beginning to end on one private broker and take turns in blocks of rounds: floor,
fluffle, fluffle, floor, and so on. While the floor runs, fluffle's workers wait at a gate inside
their training (see ``gate``), with the next weights received and no message under way. The first
round of each block does not count, because for fluffle it includes the wait at the gate.

``ratio`` is the ratio of the medians of both sides' rounds, ``mean_ratio`` that of the means.
``cpu_ratio`` compares the CPU time of all processes, including the broker; it depends less on other
load on the machine than time does. Memory is the peak resident set of each process; the broker's
peak is reset before each block and given per side. Megabytes are 10^6 bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import command, stats
from benchmarks.arrays import TENSORS
from benchmarks.comparison import Floor, Fluffle, Measured, compare
from benchmarks.floor import Spec
from benchmarks.processes import Programs, machine, private_broker, scratch


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    made = command.parser("rounds", __doc__)
    made.add_argument("--size-mb", type=float, default=10.0, help="size of the model (10)")
    made.add_argument("--tensors", type=int, default=TENSORS, help="number of its tensors (8)")
    made.add_argument("--workers", type=int, default=3, help="number of workers (3)")
    command.add_rounds(made)
    made.add_argument("--blocks", type=int, default=5, help="blocks of rounds per side (5)")
    made.add_argument("--quorum", action="store_true", help="use quorum queues")
    made.add_argument("--max-message-size", type=int, help="the broker's; 16777216 in RabbitMQ 4")
    made.add_argument("--durable-parts", action="store_true", help="make the floor's parts durable")
    made.add_argument("--noise", action="store_true", help="add noise to the weights")
    made.add_argument("--dashboard", action="store_true", help="enable the live page")
    made.add_argument("--folder", type=Path, help="folder for temporary files")
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides and return the results."""
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
        durable = options.durable_parts
        spec = Spec(broker.url, options.workers, size_bytes, queue_type, durable_parts=durable)
        floor = Floor(programs, spec)
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
        rounds = options.rounds or stats.enough_rounds(options.size_mb)
        sizes = stats.shares(rounds, options.blocks)
        measured = compare([floor, fluffle], sizes, broker_pid=broker.pid, report=command.report)
    return {
        "size_mb": options.size_mb,
        "tensors": options.tensors,
        "workers": options.workers,
        "rounds": rounds,
        "blocks": len(sizes),
        "queue_type": queue_type,
        "noise": options.noise,
        "max_message_size": limit,
        "ratio": round(stats.ratio(measured["fluffle"].times, measured["floor"].times), 3),
        "mean_ratio": round(fmean(measured["fluffle"].times) / fmean(measured["floor"].times), 3),
        "ratio_by_block": by_block(measured),
        "cpu_ratio": round(measured["fluffle"].cpu_s_a_round / measured["floor"].cpu_s_a_round, 3),
        **{name: side.as_dict() for name, side in measured.items()},
        "machine": {**before, "rabbitmq": broker.version},
    }


def by_block(measured: Mapping[str, Measured]) -> list[float]:
    """Return the ratio of each pair of blocks; its spread shows how reliable the whole is."""
    pairs = zip(measured["fluffle"].blocks, measured["floor"].blocks, strict=True)
    return [round(stats.ratio(ours, floor), 3) for ours, floor in pairs]


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    sides = ("floor", "fluffle")

    def workers(side: str, what: str) -> list[float]:
        return [v for who, v in results[side][what].items() if who.startswith("worker") and v]

    def row(label: str, pick: Any) -> list[Any]:
        return [label, *(pick(side) for side in sides)]

    rows = [
        row("round, median s", lambda side: results[side]["median_s"]),
        row("  mean", lambda side: results[side]["mean_s"]),
        row("  lower quartile", lambda side: results[side]["quartiles_s"][0]),
        row("  upper quartile", lambda side: results[side]["quartiles_s"][1]),
        row("CPU s/round: coordinator", lambda s: results[s]["cpu_s_a_round"]["coordinator"]),
        row("  workers, mean", lambda s: fmean(workers(s, "cpu_s_a_round") or [0.0])),
        row("  broker", lambda side: results[side]["cpu_s_a_round"].get("broker")),
        row("peak MB: coordinator", lambda side: results[side]["peak_rss_mb"]["coordinator"]),
        row("  largest worker", lambda side: max(workers(side, "peak_rss_mb"), default=None)),
        row("  broker", lambda side: results[side]["broker_peak_mb"]),
    ]
    rows += [[f"  {k}", None, v] for k, v in results["fluffle"].get("timings", {}).items()]
    rows += [["  train_s", None, results["fluffle"].get("train_s")]]
    head = [f"{results['size_mb']:g} MB, {results['workers']} workers", *sides]
    blocks = ", ".join(map(str, results["ratio_by_block"]))
    return (
        f"{command.table(head, rows)}\n"
        f"ratio {results['ratio']:.2f} (by block {blocks}), "
        f"of means {results['mean_ratio']:.2f}, of CPU time {results['cpu_ratio']:.2f}"
    )


def main() -> None:
    """Run the benchmark from the command line."""
    options = parser().parse_args()
    command.show(measure(options), options, as_text)


if __name__ == "__main__":
    main()

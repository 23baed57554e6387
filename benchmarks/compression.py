"""What encoding the updates saves, and what it costs: one job, trained once with each encoding.

    python -m benchmarks.compression --seeds 1,2,3
    python -m benchmarks.compression --seeds 1,2,3 --job digits --rounds 8 --epochs 3

A simulation in one process: the workers' own ``job.execute`` with the real task, the wire's layout,
the coordinator's ``decode_contribution`` and ``fedavg``; only the broker is left out, which changes
no byte.
Accuracy is that of the last round's model on what no worker has seen: another writer's letters, or
a fifth of scikit-learn's digits. Bytes are those of the tensors of one update. Encoding and
decoding are timed on noise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command, figures
from benchmarks.processes import scratch
from fluffle_common.protocol.codec import decode, encode, lay_out
from fluffle_common.protocol.messages import Compression, Fit, Plan, Update
from fluffle_common.tensors.codecs.registry import encoding_of
from fluffle_common.tensors.compression import compress, decompress
from fluffle_common.tensors.weights import Weights, size_bytes
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.decoding import decode_contribution
from fluffle_coordinator.strategy.fedavg import fedavg
from fluffle_worker.error_feedback import Residual
from fluffle_worker.job import Job, execute
from fluffle_worker.machine import Work
from fluffle_worker.task import Task

PLAIN = "none"
ENCODINGS = (PLAIN, "bf16", "f16", "int8", "topk:0.1", "topk:0.01")


class Federation:
    """Workers of one process, their residuals, and the average of what they send."""

    def __init__(self, tasks: Sequence[Task], plan: Plan) -> None:
        self.weights = dict(tasks[0].init(plan.seed))
        self._tasks, self._plan = tasks, plan
        self._residuals = [Residual() for _ in tasks]

    def round(self, number: int) -> int:
        """Train, send and average once; return the bytes of the largest update."""
        state, largest = fedavg.init(self.weights), 0
        for place, task in enumerate(self._tasks):
            message, payload = self._update(place, task, number)
            delta, _ = decode_contribution(message, payload, self.weights)
            one = Contribution(
                worker=message.worker, num_examples=message.num_examples, delta=delta
            )
            state = fedavg.fold(state, one)
            largest = max(largest, len(payload))
        self.weights, _ = fedavg.finish(state, self.weights)
        return largest

    def _update(self, place: int, task: Task, number: int) -> tuple[Update, memoryview]:
        of = {"run": "r", "round": number, "base": f"b{number - 1}"}
        fit = Fit(federation="bench", **of, evaluate=False, plan=self._plan)
        job = Job(Work("fit", **of), fit, self.weights)
        execute(
            job,
            task,
            {"federation": "bench", "worker": f"w{place}"},
            evaluated=lambda: None,
            progress=lambda *_: None,
            residual=lambda: self._residuals[place],
        )
        self._residuals[place] = job.residual
        assert job.answer is not None
        message, tensors = job.answer
        table, pieces = lay_out(tensors)
        told, payload = decode(encode(message.model_copy(update={"tensors": table}), pieces))
        assert isinstance(told, Update)
        return told, payload


def letters(folder: Path, clients: int, per_client: int, seed: int) -> tuple[list[Task], Task]:
    """Draw letters; return the tasks of the workers, and one of a writer apart to evaluate with."""
    from fluffle_worker.letters.handwriting.drawing import draw_letters
    from fluffle_worker.letters.images import read_images
    from fluffle_worker.letters.task import letters_task

    draw_letters(folder, clients=clients + 1, per_client=per_client, seed=seed)
    owners = [read_images(folder / f"client-{number}") for number in range(1, clients + 2)]
    *shares, unseen = [(images.inputs, images.targets) for images in owners]
    tasks: list[Task] = [
        letters_task(owners[0].classes, share, None, place) for place, share in enumerate(shares)
    ]
    return tasks, letters_task(owners[0].classes, shares[0], unseen)


def digits(clients: int, seed: int) -> tuple[list[Task], Task]:
    """Return the tasks of workers with a share of the digits each, and one to evaluate with."""
    from sklearn.datasets import load_digits

    from examples.digits import digits_task

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    pixels, targets = (found.data / 16).astype(np.float32)[order], found.target[order]
    apart = len(order) // 5
    unseen, seen = (pixels[:apart], targets[:apart]), (pixels[apart:], targets[apart:])
    shares = [(seen[0][place::clients], seen[1][place::clients]) for place in range(clients)]
    tasks = [digits_task(share, None, place) for place, share in enumerate(shares)]
    return tasks, digits_task(shares[0], unseen, 0)


def one_run(tasks: Sequence[Task], judge: Task, plan: Plan, rounds: int) -> dict[str, Any]:
    """Train with one encoding."""
    federation = Federation(tasks, plan)
    accuracies, nbytes = [], 0
    for number in range(1, rounds + 1):
        nbytes = federation.round(number)
        found = judge.evaluate(federation.weights)
        assert found is not None
        accuracies.append(round(found.metrics["accuracy"], 4))
    return {
        "accuracies": accuracies,
        "loss": round(found.loss, 4),
        "update_bytes": nbytes,
        "model_bytes": size_bytes(federation.weights),
    }


def seconds_a_100_mb(how: str, weights: Weights) -> tuple[float, float]:
    """Return what encoding and decoding 100 MB of the weights take, once both are warm."""
    scale = 100e6 / size_bytes(weights)
    tensors, left = compress(weights, how, {})
    began = time.perf_counter()
    tensors, left = compress(weights, how, left)
    encoded = time.perf_counter()
    decompress(tensors, encoding_of(how), weights)
    return scale * (encoded - began), scale * (time.perf_counter() - encoded)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train with every encoding, for every seed."""
    from benchmarks.arrays import make_weights

    runs: dict[str, list[dict[str, Any]]] = {how: [] for how in options.encodings}
    for seed in options.seeds:
        if options.job == "digits":
            tasks, judge = digits(options.workers, seed)
        else:
            with scratch() as folder:
                tasks, judge = letters(folder / "data", options.workers, options.per_client, seed)
        for how in options.encodings:
            print(f"seed {seed}, {how}", file=sys.stderr, flush=True)
            plan = Plan(
                seed=seed,
                epochs=options.epochs,
                compress=None if how == PLAIN else Compression.parse(how),
            )
            runs[how].append(one_run(tasks, judge, plan, options.rounds))
    weights = make_weights(int(options.size_mb * 1e6))
    times = {
        how: [round(seconds, 3) for seconds in seconds_a_100_mb(how, weights)]
        for how in options.encodings
        if how != PLAIN
    }
    return {
        "job": options.job,
        "workers": options.workers,
        "rounds": options.rounds,
        "seeds": options.seeds,
        "runs": runs,
        "encode_decode_s_a_100_mb": times,
    }


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    rows = []
    for how, runs in told["runs"].items():
        last = [100 * run["accuracies"][-1] for run in runs]
        nbytes, whole = runs[0]["update_bytes"], runs[0]["model_bytes"]
        loss = statistics.mean(run["loss"] for run in runs)
        found = (nbytes, nbytes / whole, statistics.mean(last), min(last), max(last), loss)
        rows.append([how, *found, *told["encode_decode_s_a_100_mb"].get(how, (None, None))])
    head = ["encoding", "bytes an update", "of plain", "accuracy %", "least", "most", "loss"]
    run = f"{told['workers']} workers, {told['rounds']} rounds, seeds {told['seeds']}"
    return (
        f"{told['job']}, {run}\n"
        f"{figures.table([*head, 'encode s/100 MB', 'decode s/100 MB'], rows)}"
    )


def main() -> None:
    """Measure, and print."""
    parser = command.parser("compression", __doc__)
    parser.add_argument("--job", choices=["letters", "digits"], default="letters", help="(letters)")
    parser.add_argument("--workers", type=int, default=3, help="how many workers (3)")
    parser.add_argument("--epochs", type=int, default=1, help="local epochs of a round (1)")
    parser.add_argument("--per-client", type=int, default=250, help="letters of each (250)")
    parser.add_argument("--rounds", type=int, default=6, help="how many rounds (6)")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(each) for each in text.split(",")],
        default=[1],
        help="of data and first weights, such as 1,2,3 (1)",
    )
    parser.add_argument(
        "--encodings",
        type=lambda text: text.split(","),
        default=list(ENCODINGS),
        help=f"which ({','.join(ENCODINGS)})",
    )
    parser.add_argument("--size-mb", type=float, default=100.0, help="for the times (100)")
    options = parser.parse_args()
    told = measure(options)
    command.show(told, options, as_text)


if __name__ == "__main__":
    main()

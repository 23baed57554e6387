"""Bytes saved and accuracy lost by each encoding of the updates.

    python -m benchmarks.compression --seeds 1,2,3
    python -m benchmarks.compression --seeds 1,2,3 --job digits --rounds 8 --epochs 3

One job is trained once with each encoding, simulated in one process: the workers' ``job.Executor``
with the real task, the messages' layout, the coordinator's ``decode_update`` and ``fedavg``.
Only the broker is left out, which changes no byte.

Accuracy is that of the last model on data that no worker has: another writer's letters, or a fifth
of scikit-learn's digits. Bytes are those of the tensors of one update. Encoding and decoding are
timed on noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.processes import scratch
from fluffle_common.protocol.messages import Compression, Fit, Plan, Update
from fluffle_common.protocol.wire_format import decode, encode, lay_out
from fluffle_common.tensors.codecs.registry import encoding_of
from fluffle_common.tensors.compression import compress, decompress
from fluffle_common.tensors.weights import Weights, size_bytes
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.fedavg import fedavg
from fluffle_coordinator.strategy.update_checks import decode_update
from fluffle_worker.error_feedback import Residual
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.job import Executor, Job
from fluffle_worker.task import Task

PLAIN = "none"
ENCODINGS = (PLAIN, "bf16", "f16", "int8", "topk:0.1", "topk:0.01")


class Federation:
    """Simulated workers with their residuals, and the average of their updates."""

    def __init__(self, tasks: Sequence[Task], plan: Plan) -> None:
        self.weights: Weights = tasks[0].init(plan.seed)
        self._tasks, self._plan = tasks, plan
        self._residuals = [Residual() for _ in tasks]

    def round(self, number: int) -> int:
        """Run one round; return the size of the largest update in bytes."""
        state, largest = fedavg.init(self.weights), 0
        for place, task in enumerate(self._tasks):
            message, payload = self._update(place, task, number)
            delta, _, _ = decode_update(message, payload, self.weights)
            contribution = Contribution(
                worker=message.worker, num_examples=message.num_examples, delta=delta
            )
            state = fedavg.fold(state, contribution)
            largest = max(largest, len(payload))
        self.weights, _ = fedavg.finish(state, self.weights)
        return largest

    def _update(self, place: int, task: Task, number: int) -> tuple[Update, memoryview]:
        fit = Fit(
            federation="bench",
            run="r",
            round=number,
            base=f"b{number - 1}",
            evaluate=False,
            plan=self._plan,
        )
        job = Job(fit, self.weights)
        sender = {"federation": "bench", "worker": f"w{place}"}
        Executor(task, sender, FrozenTensors(task)).execute(
            job,
            evaluated=lambda: None,
            progress=lambda *_: None,
            residual=lambda: self._residuals[place],
        )
        self._residuals[place] = job.residual
        assert job.answer is not None
        message, tensors = job.answer
        table, pieces = lay_out(tensors)
        received, payload = decode(encode(message.model_copy(update={"tensors": table}), pieces))
        assert isinstance(received, Update)
        return received, payload


def letters(folder: Path, clients: int, per_client: int, seed: int) -> tuple[list[Task], Task]:
    """Draw letters; return the workers' tasks, and a task that evaluates on another writer's."""
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
    """Return the workers' tasks, and a task that evaluates on the remaining digits."""
    from sklearn.datasets import load_digits

    from examples.digits import digits_task

    inputs, targets = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(targets))
    inputs, targets = (inputs / 16).astype(np.float32)[order], targets[order]
    held_out = len(order) // 5
    unseen = inputs[:held_out], targets[:held_out]
    inputs, targets = inputs[held_out:], targets[held_out:]
    shares = [(inputs[place::clients], targets[place::clients]) for place in range(clients)]
    tasks = [digits_task(share, None, place) for place, share in enumerate(shares)]
    return tasks, digits_task(shares[0], unseen, 0)


def one_run(tasks: Sequence[Task], judge: Task, plan: Plan, rounds: int) -> dict[str, Any]:
    """Train with one encoding; ``judge`` evaluates the model after each round."""
    federation = Federation(tasks, plan)
    nbytes, evaluations = 0, []
    for number in range(1, rounds + 1):
        nbytes = federation.round(number)
        evaluation = judge.evaluate(federation.weights)
        assert evaluation is not None
        evaluations.append(evaluation)
    return {
        "accuracies": [round(each.metrics["accuracy"], 4) for each in evaluations],
        "loss": round(evaluations[-1].loss, 4),
        "update_bytes": nbytes,
        "model_bytes": size_bytes(federation.weights),
    }


def seconds_a_100_mb(encoding: str, weights: Weights) -> tuple[float, float]:
    """Return the seconds to encode and to decode 100 MB, after a warm-up."""
    scale = 100e6 / size_bytes(weights)
    _, residual = compress(weights, encoding, {})
    began = time.perf_counter()
    tensors, _ = compress(weights, encoding, residual)
    encoded = time.perf_counter()
    decompress(tensors, encoding_of(encoding), weights)
    return scale * (encoded - began), scale * (time.perf_counter() - encoded)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train with each encoding and seed, and time each encoding."""
    from benchmarks.arrays import make_weights

    runs: dict[str, list[dict[str, Any]]] = {encoding: [] for encoding in options.encodings}
    for seed in options.seeds:
        if options.job == "digits":
            tasks, judge = digits(options.workers, seed)
        else:
            with scratch() as folder:
                tasks, judge = letters(folder / "data", options.workers, options.per_client, seed)
        for encoding in options.encodings:
            command.report(f"seed {seed}, {encoding}")
            plan = Plan(
                seed=seed,
                epochs=options.epochs,
                compress=None if encoding == PLAIN else Compression.parse(encoding),
            )
            runs[encoding].append(one_run(tasks, judge, plan, options.rounds))
    weights = make_weights(int(options.size_mb * 1e6))
    times = {
        encoding: [round(seconds, 3) for seconds in seconds_a_100_mb(encoding, weights)]
        for encoding in options.encodings
        if encoding != PLAIN
    }
    return {
        "job": options.job,
        "workers": options.workers,
        "rounds": options.rounds,
        "seeds": options.seeds,
        "runs": runs,
        "encode_decode_s_a_100_mb": times,
    }


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = []
    for encoding, runs in results["runs"].items():
        last = [100 * run["accuracies"][-1] for run in runs]
        nbytes, plain = runs[0]["update_bytes"], runs[0]["model_bytes"]
        loss = statistics.mean(run["loss"] for run in runs)
        times = results["encode_decode_s_a_100_mb"].get(encoding, (None, None))
        accuracies = statistics.mean(last), min(last), max(last)
        rows.append([encoding, nbytes, nbytes / plain, *accuracies, loss, *times])
    head = ["encoding", "bytes/update", "of plain", "accuracy %", "lowest", "highest", "loss"]
    run = f"{results['workers']} workers, {results['rounds']} rounds, seeds {results['seeds']}"
    return (
        f"{results['job']}, {run}\n"
        f"{command.table([*head, 'encode s/100 MB', 'decode s/100 MB'], rows)}"
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("compression", __doc__)
    parser.add_argument("--job", choices=["letters", "digits"], default="letters", help="(letters)")
    parser.add_argument("--workers", type=int, default=3, help="number of workers (3)")
    parser.add_argument("--epochs", type=int, default=1, help="local epochs per round (1)")
    parser.add_argument("--per-client", type=int, default=250, help="letters per worker (250)")
    parser.add_argument("--rounds", type=int, default=6, help="number of rounds (6)")
    parser.add_argument(
        "--seeds", type=command.listed(int), default=[1], help="of data and initial weights (1)"
    )
    all_of_them = ",".join(ENCODINGS)
    parser.add_argument(
        "--encodings", type=command.listed(), default=list(ENCODINGS), help=f"({all_of_them})"
    )
    parser.add_argument("--size-mb", type=float, default=100.0, help="noise to encode (100)")
    options = parser.parse_args()
    command.show(measure(options), options, as_text)


if __name__ == "__main__":
    main()

"""Time of local training on the letters, relative to a bare jitted loop, and of a worker's start.

    python -m benchmarks.epoch --examples 250 --epochs 1
    python -m benchmarks.epoch --data data/client-1 --start-up

The bare loop is what one would write by hand: the same NNX model, split once; one jitted step of
gather, augmentation, gradient and Adam; data on the device; the same batches in the same order; no
checks and no reports, and one wait at the end. fluffle's side is ``LettersTask.train``, from named
NumPy arrays to named NumPy arrays. Both run in one process, in turn.

``--start-up`` also times a worker process from its start until the coordinator has its first
heartbeat and its first weights, and times the imports.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import command, stats
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, Programs, private_broker, scratch

_LATE_S = 120.0
_LOOK_S = 0.01
_FIRST = {"joined": "first_sign_s", "first_weights": "first_weights_s"}


def bare_loop(task: Any, plan: Any) -> Callable[[Mapping[str, Any]], float]:
    """Return ``weights -> mean loss`` for the task's data, augmentation and batches.

    Args:
        task: a ``LettersTask``, whose arrays on the device and order of batches are reused.
        plan: the number of epochs and the batch size.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from fluffle_worker.letters.task import CNN, LEARNING_RATE, shifted

    inputs, targets = task._data.source
    graph, start = nnx.split(CNN(len(task.classes), nnx.Rngs(0)))
    adam = optax.adam(LEARNING_RATE)

    @jax.jit
    def step(state: Any, moments: Any, batch: Any, key: Any) -> Any:
        images = shifted(key, jnp.take(inputs, batch, axis=0))
        labels = jnp.take(targets, batch, axis=0)

        def loss(state: Any) -> Any:
            logits = nnx.merge(graph, state)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        change, moments = adam.update(gradient, moments, state)
        return optax.apply_updates(state, change), moments, value

    def run(_: Mapping[str, Any]) -> float:
        state, moments, losses = start, adam.init(start), []
        key = jax.random.key(plan.seed)
        for number, batch in enumerate(task._data.batches(plan)):
            state, moments, loss = step(state, moments, batch, jax.random.fold_in(key, number))
            losses.append(loss)
        return float(jnp.mean(jnp.stack(losses)))

    return run


def local_fit(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Train with both in turn; the first time of each, which includes compiling, is separate."""
    from fluffle_common.protocol.messages import Plan
    from fluffle_worker.letters.task import task as make
    from fluffle_worker.task import TaskOptions

    task = make(TaskOptions(str(data), "client-1"))
    plan = Plan(epochs=options.epochs, batch_size=options.batch_size)
    weights = task.init(0)
    bare = bare_loop(task, plan)
    functions: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(weights),
        "fluffle": lambda: task.train(weights, plan, lambda *_: None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name, _ in stats.interleaved(list(functions), [1] * (options.repeats + 1)):
        began = time.perf_counter()
        functions[name]()
        seconds[name].append(time.perf_counter() - began)
    later = {name: times[1:] for name, times in seconds.items()}
    return {
        "examples": task.num_examples,
        "steps": task._data.steps(plan),
        **{name: stats.summary(times) for name, times in later.items()},
        "first_s": {name: round(times[0], 3) for name, times in seconds.items()},
        "ratio": round(stats.ratio(later["fluffle"], later["bare"]), 3),
    }


def start_up(folder: Path, data: Path, repeats: int) -> dict[str, Any]:
    """Start a worker repeatedly, each time with a new coordinator; return median times."""
    times: dict[str, list[float]] = {name: [] for name in _FIRST.values()}
    with private_broker(folder / "state") as broker:
        for number in range(repeats + 1):
            with Programs(folder) as programs:
                first = _one_start(programs, broker.url, f"start{number}", data)
            for name, seconds in first.items():
                if number:  # the first start fills the compilation cache
                    times[name].append(seconds)
    imports = {
        module: round(statistics.median(_import_s(module) for _ in range(repeats)), 3)
        for module in (
            "fluffle_common.cli.app",
            "fluffle_worker.service",
            "fluffle_worker.tasks.flax",
        )
    }
    medians = {name: round(statistics.median(each), 3) for name, each in times.items()}
    return {**medians, "import_s": imports}


def _one_start(programs: Programs, url: str, federation: str, data: Path) -> dict[str, float]:
    common = ("--federation", federation, "--url", url, "--log-format", "json")
    programs.start(
        "coordinator", *FLUFFLE, "coordinator", *common, "--run", programs.folder / federation,
        "--rounds", 1, "--quorum", 1,
    )  # fmt: skip
    log, offset = programs.log("coordinator"), 0
    times: dict[str, float] = {}
    began, latest = 0.0, time.monotonic() + _LATE_S
    while len(times) < len(_FIRST):
        events, offset = read_events(log, offset)
        for when, event in events:
            if event["event"] == "connected":
                began = time.time()
                programs.start("worker", *FLUFFLE, "worker", *common, "--data", data)
            elif event["event"] in _FIRST:
                times[_FIRST[event["event"]]] = when - began
        if time.monotonic() > latest:
            raise TimeoutError(f"no worker after {_LATE_S:.0f} s; see {programs.folder}")
        time.sleep(_LOOK_S)
    return times


def _import_s(module: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - began


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [
        [name, results[name]["median_s"], results["first_s"][name]] for name in ("bare", "fluffle")
    ]
    head = [f"{results['steps']} steps, {results['examples']} examples", "median s", "first s"]
    lines = [command.table(head, rows), f"ratio {results['ratio']:.2f}"]
    if "start_up" in results:
        start = results["start_up"]
        lines.append(f"start-up: first heartbeat after {start['first_sign_s']} s")
        lines.append(
            f"first weights after {start['first_weights_s']} s; imports: {start['import_s']}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("epoch", __doc__)
    parser.add_argument("--data", type=Path, help="a folder <class>/<image> (default: drawn)")
    parser.add_argument("--examples", type=int, default=250, help="number of letters to draw (250)")
    parser.add_argument("--epochs", type=int, default=1, help="local epochs (1)")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size (32)")
    parser.add_argument("--repeats", type=int, default=9, help="repetitions (9)")
    parser.add_argument("--start-up", action="store_true", help="also time a worker's start")
    options = parser.parse_args()
    with scratch() as folder:
        data = options.data
        if data is None:
            from fluffle_worker.letters.handwriting.drawing import draw_letters

            draw_letters(folder / "data", clients=1, per_client=options.examples, seed=1)
            data = folder / "data" / "client-1"
        results = local_fit(options, data)
        if options.start_up:
            results["start_up"] = start_up(folder, data.resolve(), 3)
    command.show(results, options, as_text)


if __name__ == "__main__":
    main()

"""One local fit of the letters, beside a bare jitted loop; and what a worker's start takes.

    python -m benchmarks.epoch --examples 250 --epochs 1
    python -m benchmarks.epoch --data data/client-1 --start-up

The bare loop is what one writes without a framework: the same nnx model, split once; one jitted
step of gather, augmentation, gradient and Adam; data on the device; the same order of the same
batches; nothing reported and nothing checked, and one wait at the end. fluffle's side is
``LettersTask.train``, from named NumPy arrays to named NumPy arrays. Both in one process, in turn.

``--start-up`` times a worker process of the letters from its start to its first sign of life and to
the first weights in the coordinator, as the coordinator sees them, and what importing takes.
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

from benchmarks import command, figures
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, Programs, private_broker, scratch

_LATE_S = 120.0
_LOOK_S = 0.01
_FIRST = {"joined": "first_sign_s", "first_weights": "first_weights_s"}


def bare_loop(task: Any, plan: Any) -> Callable[[Mapping[str, Any]], float]:
    """Return ``weights -> mean loss`` for the task's data, augmentation and batches.

    Args:
        task: a ``LettersTask``: its arrays on the device and its order of batches are shared.
        plan: how many epochs, which batch size.
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
    """Train both ways in turn; the first time of each, which compiles, is told apart."""
    from fluffle_common.protocol.messages import Plan
    from fluffle_worker.letters.task import task as make
    from fluffle_worker.task import TaskOptions

    task = make(TaskOptions(str(data), "client-1"))
    plan = Plan(epochs=options.epochs, batch_size=options.batch_size)
    weights = task.init(0)
    bare = bare_loop(task, plan)
    works: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(weights),
        "fluffle": lambda: task.train(weights, plan, lambda *_: None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for name, _ in figures.interleaved(list(works), [1] * (options.repeats + 1)):
        began = time.perf_counter()
        works[name]()
        seconds[name].append(time.perf_counter() - began)
    later = {name: times[1:] for name, times in seconds.items()}
    return {
        "examples": task.num_examples,
        "steps": task._data.steps(plan),
        **{name: figures.summary(times) for name, times in later.items()},
        "first_s": {name: round(times[0], 3) for name, times in seconds.items()},
        "ratio": round(figures.ratio(later["fluffle"], later["bare"]), 3),
    }


def start_up(folder: Path, data: Path, repeats: int) -> dict[str, Any]:
    """Start a worker again and again, each time for a new coordinator, and time what it says."""
    found: dict[str, list[float]] = {name: [] for name in _FIRST.values()}
    with private_broker(folder / "state") as broker:
        for number in range(repeats + 1):
            with Programs(folder) as programs:
                told = _one_start(programs, broker.url, f"start{number}", data)
            for name, seconds in told.items():
                if number:  # the first one compiles what the later ones find in the cache
                    found[name].append(seconds)
    imports = {
        module: round(statistics.median(_import_s(module) for _ in range(repeats)), 3)
        for module in (
            "fluffle_common.cli.app",
            "fluffle_worker.service",
            "fluffle_worker.tasks.flax",
        )
    }
    medians = {name: round(statistics.median(times), 3) for name, times in found.items()}
    return {**medians, "import_s": imports}


def _one_start(programs: Programs, url: str, federation: str, data: Path) -> dict[str, float]:
    common = ("--federation", federation, "--url", url, "--log-format", "json")
    programs.start(
        "coordinator", *FLUFFLE, "coordinator", *common, "--run", programs.folder / federation,
        "--rounds", 1, "--quorum", 1,
    )  # fmt: skip
    log, offset = programs.log("coordinator"), 0
    found: dict[str, float] = {}
    began, latest = 0.0, time.monotonic() + _LATE_S
    while len(found) < len(_FIRST):
        events, offset = read_events(log, offset)
        for when, told in events:
            if told["event"] == "connected":
                began = time.time()
                programs.start("worker", *FLUFFLE, "worker", *common, "--data", data)
            elif told["event"] in _FIRST:
                found[_FIRST[told["event"]]] = when - began
        if time.monotonic() > latest:
            raise TimeoutError(f"the worker has not started; look into {programs.folder}")
        time.sleep(_LOOK_S)
    return found


def _import_s(module: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - began


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    rows = [[name, told[name]["median_s"], told["first_s"][name]] for name in ("bare", "fluffle")]
    head = [f"{told['steps']} steps, {told['examples']} examples", "median s", "first s"]
    lines = [figures.table(head, rows), f"ratio {told['ratio']:.2f}"]
    if "start_up" in told:
        told = told["start_up"]
        lines.append(f"start-up: first sign of life {told['first_sign_s']} s, ")
        lines.append(f"first weights {told['first_weights_s']} s; imports: {told['import_s']}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print."""
    parser = command.parser("epoch", __doc__)
    parser.add_argument("--data", type=Path, help="a folder <class>/<image> (default: drawn)")
    parser.add_argument("--examples", type=int, default=250, help="letters drawn (250)")
    parser.add_argument("--epochs", type=int, default=1, help="local epochs (1)")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size (32)")
    parser.add_argument("--repeats", type=int, default=9, help="how often (9)")
    parser.add_argument("--start-up", action="store_true", help="time a worker's start as well")
    options = parser.parse_args()
    with scratch() as folder:
        data = options.data
        if data is None:
            from fluffle_worker.letters.handwriting.drawing import draw_letters

            draw_letters(folder / "data", clients=1, per_client=options.examples, seed=1)
            data = folder / "data" / "client-1"
        told = local_fit(options, data)
        if options.start_up:
            told["start_up"] = start_up(folder, data.resolve(), 3)
    command.show(told, options, as_text)


if __name__ == "__main__":
    main()

"""A chart of a partition: each client's number of examples per label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluffle.simulation.partition import (
    Divisible,
    Partition,
    counts,
    labels_of,
    parse_partition,
    parts_of,
)
from fluffle_common.cli.output_files import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = 20
"""With more labels than this, colours are indistinguishable, and only the sizes are drawn."""


def plot_partition(
    task: Divisible, *, clients: int = 100, partition: str | Partition = "iid", seed: int = 0
) -> Figure:
    """Draw each client's number of examples per label when a task is divided among the clients.

    Args:
        task: the task with all examples, such as a ``flax_task``.
        clients: the number of clients.
        partition: the partition, as for ``simulate``.
        seed: the seed, as for ``simulate``.

    Returns:
        A matplotlib figure, which a notebook displays, with a stack of labels for each client.

    Raises:
        UsageError: if matplotlib is not installed, or the task cannot be divided in this way.
    """
    figure = new_figure(8, 4.5)
    from matplotlib import colormaps

    labels = labels_of(task)
    held = counts(labels, parts_of(task, parse_partition(partition), clients, seed))
    names: list[str] = [str(value) for value in np.unique(labels)]
    if len(names) > _COLOURS:
        held, names = held.sum(axis=1, keepdims=True), ["all labels"]
    axes = figure.subplots()
    # Steps instead of bars, which would be slow to draw for a thousand clients.
    edges = np.append(np.arange(clients), clients) - 0.5
    tops = np.cumsum(held, axis=1)
    colours = colormaps["tab10" if len(names) <= _COLOURS // 2 else "tab20"]
    for number, name in enumerate(names):
        top = np.append(tops[:, number], tops[-1, number])
        below = np.append((tops - held)[:, number], (tops - held)[-1, number])
        axes.fill_between(
            edges, below, top, step="post", label=name, color=colours(number), linewidth=0
        )
    axes.set(xlabel="client", ylabel="examples", title=f"{partition}, {clients} clients")
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    figure.legend(title="label", loc="outside right upper", reverse=True)
    return figure

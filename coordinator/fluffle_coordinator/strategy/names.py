"""Strategies by name: parts with their arguments, joined by ``+``.

::

    fedadam:lr=0.03              the mean of fedavg, and Adam on the server
    trimmed:0.2                  a mean; the result replaces the model
    clip:10+median+fedavgm       a transform, a mean and a server step

The parts that a name leaves out are those of ``fedavg``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fluffle_common.arguments import nearest, read_arguments, write_arguments
from fluffle_coordinator.strategy import clipping, linear_means, robust_means, server_steps
from fluffle_coordinator.strategy.base import NamedStrategy
from fluffle_coordinator.strategy.dp_fedavg import dp_fedavg
from fluffle_coordinator.strategy.fedavg import FEDAVG
from fluffle_coordinator.strategy.optax_step import optax_step
from fluffle_coordinator.strategy.pipeline import pipeline, replace
from fluffle_coordinator.strategy.scaffold import scaffold
from fluffle_coordinator.strategy.weighted import weighted

Kind = Literal["transform", "mean", "server step", "whole strategy"]
_JOIN = re.compile(r"\+(?=\s*[A-Za-z_])")  # not the plus of 1e+3


@dataclass(frozen=True)
class Part:
    """A named part of a strategy: its place in a pipeline, what makes it, and a description."""

    kind: Kind
    make: Callable[..., Any]
    about: str


PARTS = {
    "clip": Part("transform", clipping.clip, "scales updates down to a maximum norm"),
    FEDAVG.name: Part("mean", weighted, "the mean, weighted by numbers of examples"),
    "uniform": Part("mean", linear_means.uniform, "the mean with equal weights"),
    "qfedavg": Part("mean", linear_means.q_fair, "the mean with more weight for larger losses"),
    "fednova": Part("mean", linear_means.normalised, "the mean progress per local step"),
    "median": Part("mean", robust_means.median, "the median of each coordinate"),
    "trimmed": Part(
        "mean", robust_means.trimmed_mean, "the mean of each coordinate without its extremes"
    ),
    "krum": Part("mean", robust_means.krum, "the update closest to its neighbors"),
    "multikrum": Part(
        "mean", robust_means.multi_krum, "the mean of the m updates that krum ranks best"
    ),
    "rfa": Part("mean", robust_means.rfa, "the geometric median"),
    "dp": Part("mean", dp_fedavg, "clipped updates with noise, for differential privacy"),
    "fedavgm": Part("server step", server_steps.momentum, "momentum"),
    "fedadagrad": Part("server step", server_steps.adagrad, "Adagrad"),
    "fedadam": Part("server step", server_steps.adam, "Adam"),
    "fedyogi": Part("server step", server_steps.yogi, "Yogi"),
    "optax": Part("server step", optax_step, "any optimizer of optax, such as optax:adamw"),
    "scaffold": Part("whole strategy", scaffold, "control variates, for workers whose data differ"),
}
"""The parts by name. ``docs/algorithms.md`` says when to use which."""


def is_name(text: str) -> bool:
    """Whether a text starts with the name of a part."""
    return _JOIN.split(text)[0].partition(":")[0].strip() in PARTS


def named_strategy(text: str) -> NamedStrategy:
    """Return the strategy with a name.

    Args:
        text: one part or several, with at most one mean and one server step.

    Returns:
        The strategy. Its full name has all arguments, defaults included, and the parts in order.

    Raises:
        ValueError: if a part or an argument is wrong; the message suggests the nearest right one.

    Example:
        >>> named_strategy("fedavgm:0.5+clip:10").name
        'clip:norm=10.0+fedavgm:lr=0.5,momentum=0.9'
    """
    # By kind: the full name and the part.
    parts: dict[str, list[tuple[str, Any]]] = {kind: [] for kind in get_args(Kind)}
    for words in _JOIN.split(text):
        name, _, arguments = (word.strip() for word in words.partition(":"))
        if name not in PARTS:
            raise ValueError(f"unknown part '{name}'; {nearest(name, PARTS)}")
        part = PARTS[name]
        try:
            values = read_arguments(part.make, arguments)
            made = part.make(**values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        arguments = write_arguments(values)
        full = f"{name}:{arguments}" if arguments else name
        parts[part.kind].append((full, made))
    for kind in ("mean", "server step", "whole strategy"):
        if len(parts[kind]) > 1:
            raise ValueError(
                f"the strategy has more than one {kind}: "
                f"{' and '.join(full for full, _ in parts[kind])}; give only one {kind}"
            )
    for full, whole in parts.pop("whole strategy"):
        if any(parts.values()):
            raise ValueError(
                f"{full} is a complete strategy and cannot be combined with others; give only "
                f"{full}"
            )
        return NamedStrategy(full, whole, ours=True)
    if [full for full, _ in parts["mean"]] == [FEDAVG.name]:
        parts["mean"].clear()
    full = "+".join(full for of_kind in parts.values() for full, _ in of_kind)
    if not full:
        return FEDAVG
    transforms = [made for _, made in parts["transform"]]
    means = [made for _, made in parts["mean"]] or [weighted()]
    servers = [made for _, made in parts["server step"]] or [replace()]
    strategy = pipeline(*transforms, mean=means[0], server=servers[0])
    return NamedStrategy(full, strategy, ours=True)

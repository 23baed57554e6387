"""The interface of a strategy: the rule by which a round's updates become the next model.

A strategy is a frozen object of pure functions over NumPy arrays. Its *state* is opaque to the
coordinator, which passes it from call to call, and saves what ``dump`` returns in the checkpoint of
every round.

::

    init ──> fold, fold, …, finish ──> fold, fold, …, finish ──> …     (one state, handed on)
    load ─┘                   └─ dump (into the round's checkpoint)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from fluffle_common.tensors.groups import ExtraForm
from fluffle_common.tensors.weights import Array, Weights

S = TypeVar("S")
T = TypeVar("T")

NO_TENSORS: Weights = MappingProxyType[str, Array]({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A decoded and checked update. Do not write to its arrays: most are read-only views.

    Args:
        worker: the worker that sent it.
        num_examples: its number of examples: the worker's claim, within the coordinator's limits.
        delta: trained minus received weights, with the model's names, shapes and dtypes, except
            that integers are int64. All values are finite.
        staleness: how many versions were committed since the one that it was trained from.
        discount: the factor on its weight because of its staleness; 1 in synchronous rounds.
        extra: the tensors that ``Needs.extra`` asks for, in those shapes; floats, all finite.
        metrics: the metrics that the worker measured while training.
        lay_on_disk: moves tensors to disk and returns them as views of the file; returns them
            unchanged if there is no disk to use.
    """

    worker: str
    num_examples: int
    delta: Weights
    staleness: int = 0
    discount: float = 1.0
    extra: Weights = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    lay_on_disk: Callable[[Weights], Weights] = lambda tensors: tensors

    def kept(self) -> Weights:
        """Return the delta on disk, for a state that holds all updates of a round.

        Raises:
            RunError: if the disk refuses. No update is lost: a built-in strategy is called again
                when there is room, and with a user's strategy, the run ends.
        """
        return self.lay_on_disk(self.delta)

    @property
    def weight(self) -> float:
        """Its weight in an average by numbers of examples."""
        return self.num_examples * self.discount


@dataclass(frozen=True, slots=True)
class Needs:
    """The requirements of a strategy. The coordinator refuses a run that does not meet them.

    Args:
        metrics: the metrics that every update must have; an update without them is rejected.
        ranges: the smallest and largest valid value of some of these metrics; an update outside is
            rejected.
        extra: the tensors that workers must send besides their deltas: names with shapes, or
            ``"model"`` for one of the same name and shape for each tensor that they train.
        min_updates: the fewest updates that a round may commit with.
        max_rounds: the most rounds of a run; None sets no bound.
        once: whether a worker may count only once per round and must not affect whether another's
            update counts: synchronous rounds, no late updates, no bounds from other updates' norms.
        rate: the probability with which each worker must be in a round, independently and in
            secret (Poisson sampling), so that a round may have no updates; None for any selection.
        repeatable: whether the same updates give the same model again; false with secret noise.
    """

    metrics: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    extra: ExtraForm | None = None
    min_updates: int = 1
    max_rounds: int | None = None
    once: bool = False
    rate: float | None = None
    repeatable: bool = True


class Strategy(Protocol[S]):
    """The rule by which the updates of a round become the next weights.

    ``fold`` and ``finish`` must not change the weights; they may reuse the memory of the state. A
    class that inherits from this one has the defaults of a strategy that keeps nothing across
    rounds.

    A strategy that accounts for the privacy cost of its models also has ``spent(rounds)``, which
    returns ``epsilon`` and ``delta`` of so many rounds, or an empty mapping if they are not known.
    """

    @property
    def needs(self) -> Needs:
        """Its requirements; none by default."""
        return Needs()

    def init(self, weights: Weights) -> S:
        """Return the initial state of a run."""

    def with_statistics(self, names: frozenset[str]) -> Strategy[S]:
        """Return this strategy for a model in which these tensors are no parameters.

        They are statistics, such as running means, and should become the mean of the workers' ones,
        without a server step. By default, a strategy treats them like all others. Called before
        ``init`` or ``load``, unless there are none.
        """
        return self

    def broadcast(self, state: S) -> Weights:
        """Return the tensors that workers receive besides the model; none by default.

        They are passed to the workers' local rule. Called when a round opens. A state that ``load``
        restored must give the same tensors.
        """
        return NO_TENSORS

    def fold(self, state: S, one: Contribution) -> S:
        """Return the state with one more contribution; they come in the order of arrival."""

    def finish(self, state: S, weights: Weights) -> tuple[Weights, S]:
        """Close a round.

        Args:
            state: the state with all contributions of the round.
            weights: the weights that the round began with.

        Returns:
            The next weights, with the same names, shapes and dtypes, all finite; and the state that
            the next round begins with.
        """

    def dump(self, state: S) -> Weights:
        """Return the tensors to save from the state after a round; none by default."""
        return NO_TENSORS

    def load(self, saved: Weights, weights: Weights) -> S:
        """Restore the state from saved tensors.

        Args:
            saved: the tensors that ``dump`` returned.
            weights: the model that they were saved with.
        """
        return self.init(weights)


def parameters_of(tensors: Weights, statistics: frozenset[str]) -> Weights:
    """Return the tensors that are no statistics."""
    return {n: t for n, t in tensors.items() if n not in statistics} if statistics else tensors


def with_statistics(part: T, names: frozenset[str]) -> T:
    """Return what ``part.with_statistics(names)`` does, or ``part`` if it has no such method."""
    if not names or not hasattr(part, "with_statistics"):
        return part
    made: T = part.with_statistics(names)
    return made


@dataclass(frozen=True)
class NamedStrategy:
    """A strategy with its name.

    Its name in run.json and the history is ``fedavg``, another name from ``names`` with all
    arguments, ``module:name`` or ``file.py:name``.
    """

    name: str
    strategy: Strategy[Any]
    file: str | None = None  # the one that it was loaded from, if any
    ours: bool = False  # part of fluffle, so that its results need no checks and no copies

"""What a strategy is: the rule by which a round's updates become the next model.

A strategy is a frozen object of pure functions over NumPy arrays. Its *state* is whatever its own
functions return: the coordinator passes it on, keeps what ``dump`` makes of it in the checkpoint of
every round, and looks into it nowhere.

::

    init ──> fold, fold, …, finish ──> fold, fold, …, finish ──> …     (one state, handed on)
    load ─┘                   └─ dump (into the round's checkpoint)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

from fluffle_common.tensors.groups import ExtraForm
from fluffle_common.tensors.weights import Array, Weights

S = TypeVar("S")

NO_TENSORS: Weights = MappingProxyType[str, Array]({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A decoded, checked update. Its arrays are read-only in most cases: do not change them.

    Args:
        worker: whose it is.
        num_examples: how many examples it was trained on, as far as that is believed.
        delta: trained - received, with the names and shapes of the model; in its dtypes, of
            integers in int64. All values are finite.
        staleness: how many versions were committed since the one that it was trained from.
        discount: what part of its weight it keeps, for being stale; 1 in synchronous rounds.
        extra: what ``Needs.extra`` asked for, of the shapes that it says; floats, all finite.
        metrics: what the worker measured while training.
        lay_on_disk: returns the same tensors, to be read from disk; in memory, if that is all there
            is.
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
        """Return the delta for a state that holds all updates of a round: it takes no memory.

        Raises:
            RunError: where the disk refuses, which ends the run; no update is lost.
        """
        return self.lay_on_disk(self.delta)

    @property
    def weight(self) -> float:
        """What it weighs in an average by examples."""
        return self.num_examples * self.discount


@dataclass(frozen=True, slots=True)
class Needs:
    """What a strategy asks of the coordinator, which refuses to run it where it cannot give that.

    Args:
        metrics: names of metrics that every update must have; one without is refused.
        extra: the tensors that workers have to send besides their deltas: names with shapes, or
            ``"model"``, which is one for each tensor that they train, of its name and shape.
        min_updates: the fewest updates that a round may be made of.
        min_examples: the fewest examples that a round may be made of.
        max_rounds: the most rounds that a run may have; None sets no bound.
        once: that a worker counts once a round at most, and decides on no other's update:
            synchronous rounds, without late updates and bounds that follow from other updates.
        rate: that each worker is in a round by a chance of its own of this size, drawn in secret,
            so that a round may have no updates (Poisson sampling); None: anyhow.
        repeatable: whether the same updates make the same model again; not so with secret noise.
    """

    metrics: tuple[str, ...] = ()
    extra: ExtraForm | None = None
    min_updates: int = 1
    min_examples: int = 1
    max_rounds: int | None = None
    once: bool = False
    rate: float | None = None
    repeatable: bool = True


NO_NEEDS = Needs()


class Strategy(Protocol[S]):
    """How the updates of a round become the next weights.

    ``fold`` and ``finish`` leave the weights that they are given as they are; of the state, they
    may reuse the memory. A class that inherits from this one has the defaults of a strategy that
    keeps nothing across rounds.
    """

    @property
    def needs(self) -> Needs:
        """What it asks of the coordinator; nothing by default."""
        return NO_NEEDS

    def init(self, weights: Weights) -> S:
        """Return the state that a run begins with."""

    def broadcast(self, state: S) -> Weights:
        """Return the tensors that travel to the workers beside the model; none by default.

        It is asked when a round opens, of the state that the round begins with, and has to return
        the same for what ``load`` makes of that state's ``dump``. A worker's local rule gets them.
        """
        return NO_TENSORS

    def fold(self, state: S, one: Contribution) -> S:
        """Take one contribution in; in the order of arrival, one at a time."""

    def finish(self, state: S, weights: Weights) -> tuple[Weights, S]:
        """Close a round.

        Args:
            state: with all contributions of the round.
            weights: what they were trained from.

        Returns:
            The next weights, of the same names, shapes and dtypes, all finite; and the state that
            the next round begins with.
        """

    def dump(self, state: S) -> Weights:
        """Return what is to be kept of the state of a closed round; nothing by default."""
        return NO_TENSORS

    def load(self, saved: Weights, weights: Weights) -> S:
        """Return the state that ``dump`` returned ``saved`` for.

        Args:
            saved: what ``dump`` returned, by the same names.
            weights: the model of the round that was closed.
        """
        return self.init(weights)


@runtime_checkable
class Accounted(Protocol):
    """A strategy or a mean that counts the privacy that its models cost."""

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return ``epsilon`` and ``delta`` of so many rounds; nothing if it does not count them."""


@dataclass(frozen=True)
class NamedStrategy:
    """A strategy, and what it is called.

    Args:
        name: as run.json and the history have it: ``fedavg``, another name of ``names`` with all
            arguments, ``module:name`` or ``file.py:name``.
        strategy: the strategy.
        file: where it comes from, if that is a file.
        ours: it is fluffle's: what it returns is sound, and is nobody else's.
    """

    name: str
    strategy: Strategy[Any]
    file: str | None = None
    ours: bool = False

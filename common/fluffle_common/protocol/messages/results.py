"""Result messages: what workers send back, and the verdict on an update that does not count."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fluffle_common.protocol.messages.base import Header, TransferHeader
from fluffle_common.protocol.messages.fields import (
    MAX_NUM_EXAMPLES,
    Id,
    Metric,
    Metrics,
    NumExamples,
    Round,
    Seconds,
    Sequence,
    Text,
    WorkerId,
)
from fluffle_common.tensors.table import Encoding


class FirstWeights(TransferHeader):
    """The answer to an ``init_request``.

    Frozen tensors that the task shares are in the group ``frozen``.
    """

    kind: Literal["first_weights"] = "first_weights"
    run: Id
    worker: WorkerId


class Update(TransferHeader):
    """A worker's update: its delta (trained - received weights), encoded by ``encoding`` if set.

    An update carries the ticket of its work: (run, worker, ``sequence``). It is counted at most
    once per ticket, however often it is sent, and only if ``base`` matches the weights that were
    sent out for ``round``. Without a ``sequence``, the round takes its place.
    """

    kind: Literal["update"] = "update"
    run: Id
    round: Annotated[Round, Field(ge=1)]
    base: Id
    sequence: Sequence | None = None
    worker: WorkerId
    num_examples: NumExamples
    seconds: Seconds
    metrics: Metrics = Field(default_factory=dict)
    encoding: Encoding | None = None


class Evaluation(Header):
    """The loss and metrics of a round's committed weights on a worker's held-out data.

    ``num_examples`` is 0 if the worker has no held-out data, so that nobody waits for it.
    """

    kind: Literal["evaluation"] = "evaluation"
    run: Id
    round: Round
    base: Id
    worker: WorkerId
    num_examples: Annotated[int, Field(ge=0, le=MAX_NUM_EXAMPLES)]
    loss: Metric
    metrics: Metrics = Field(default_factory=dict)


class Verdict(Header):
    """Tells a worker that its update does not count; an update that counts gets no verdict.

    ``sequence`` is that of the update. If ``train_again`` is set, the worker must train again when
    it gets the same work again, rather than send the same update.
    """

    kind: Literal["verdict"] = "verdict"
    run: Id
    round: Annotated[Round, Field(ge=1)]
    base: Id
    sequence: Sequence | None = None
    outcome: Literal["late", "rejected"]
    cause: Annotated[str, Field(max_length=64)] | None = None
    reason: Text
    train_again: bool = False

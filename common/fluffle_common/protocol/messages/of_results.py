"""Messages of results: what comes of work, and what becomes of an update."""

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
    """The answer to an ``init_request``."""

    kind: Literal["first_weights"] = "first_weights"
    run: Id
    worker: WorkerId


class Update(TransferHeader):
    """What a worker learnt in a round: the tensors are trained - received, perhaps encoded.

    (run, worker, ``sequence``), the ticket that its work came with, is its identity: it is counted
    at most once, however often it is sent, and only where ``base``, which came with the weights it
    was trained from, is that of ``round``. Without a ``sequence``, it counts as its round's.
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
    """How the weights that ``round`` committed, ``base``, do on a worker's own held-out data.

    ``num_examples`` 0 says that it has none; nobody needs to wait for it then.
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
    """What became of an update that does not count; one that counts is told of by the next work.

    ``sequence`` is that of the ticket that the update brought back. ``train_again``: the same
    update is no answer any more; if its work is asked for again, it is to be trained anew.
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

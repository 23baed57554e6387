"""The work that a coordinator asks of its workers, their results, and the end of a run."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fluffle_common.protocol.messages import fields
from fluffle_common.protocol.messages.base import Header, Model, TransferHeader
from fluffle_common.tensors.table import Encoding

_BUILT_IN_CODECS = ("bf16", "f16", "int8", "topk")


class Compression(Model):
    """The codec ``kind`` that updates must use, with its settings.

    ``fraction`` is the fraction of values that ``topk`` sends. ``settings`` belongs to codecs that
    are not built in.
    """

    kind: Encoding
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    settings: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,=+-]{1,64}$")] | None = None

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.kind == "topk" and self.fraction is None:
            raise ValueError("the codec topk needs a fraction, such as topk:0.01")
        if self.kind != "topk" and self.fraction is not None:
            raise ValueError(f"the codec {self.kind} takes no fraction")
        if self.kind in _BUILT_IN_CODECS and self.settings is not None:
            raise ValueError(f"the codec {self.kind} takes no settings")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an option such as ``topk:0.01`` or ``NAME:SETTINGS``.

        Raises:
            ValueError: if the text is not a codec; the message says what is expected.
        """
        kind, colon, rest = text.partition(":")
        try:
            if kind == "topk":
                return cls(kind=kind, fraction=float(rest))
            return cls(kind=kind, settings=rest if colon else None)
        except ValueError:
            raise ValueError(
                f"'{text[:60]}' is not a codec; expected bf16, f16, int8, topk:0.01 or "
                "NAME[:SETTINGS]"
            ) from None

    def __str__(self) -> str:
        """Format it in the syntax of ``parse``, which is also that of ``Codec.parse``."""
        settings = self.settings
        if self.fraction is not None:
            settings = format(Decimal(repr(self.fraction)), "f")  # never 1e-05
        return self.kind if settings is None else f"{self.kind}:{settings}"


class Plan(Model):
    """The training settings of a round, the same for every worker.

    ``steps``, if set, replaces ``epochs``. ``deadline_s`` counts from the opening of the round.
    ``compress`` is the codec of the updates, or None for plain tensors. ``extra`` lists the extra
    tensors that an update must carry, and ``train`` the tensors of the model that its delta
    contains, or None for all of them (see ``tensors.groups``). ``config`` is for the task's own
    use.
    """

    epochs: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    deadline_s: fields.Seconds | None = None
    compress: Compression | None = None
    extra: fields.Extra | None = None
    train: fields.Train | None = None
    config: fields.Config = Field(default_factory=dict)


class InitRequest(Header):
    """Asks one worker for the first weights."""

    kind: Literal["init_request"] = "init_request"
    run: fields.Id
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Fit(TransferHeader):
    """The work of a round: evaluate the weights (if ``evaluate`` is set), then train them.

    The tensors are the weights that round ``round - 1`` committed (round 0: the first weights), and
    ``base`` is their name. (run, worker, ``sequence``) is the ticket of this work; its update
    carries the same ``base`` and ``sequence``. ``sequence`` grows with every new piece of work that
    a worker gets; in synchronous rounds it is the round. ``attempt`` counts how often the update of
    this ticket was rejected; a new attempt requires the worker to train again. ``frozen`` is the
    digest of the frozen tensors that belong to the model: they are in the group of this name if the
    worker lacks them.
    """

    kind: Literal["fit"] = "fit"
    run: fields.Id
    round: Annotated[fields.Round, Field(ge=1)]
    base: fields.Id
    sequence: fields.Sequence | None = None
    evaluate: bool
    attempt: Annotated[int, Field(ge=0, le=10**6)] = 0
    plan: Plan
    frozen: fields.Digest | None = None


class Evaluate(TransferHeader):
    """Asks for an evaluation of a round's committed weights; sent once, after the last round.

    ``frozen`` is as in a ``fit``.
    """

    kind: Literal["evaluate"] = "evaluate"
    run: fields.Id
    round: fields.Round
    base: fields.Id
    frozen: fields.Digest | None = None


class Stop(Header):
    """The run has ended: ``finished`` after its last round, or ``stopped`` before it."""

    kind: Literal["stop"] = "stop"
    run: fields.Id
    round: fields.Round
    outcome: Literal["finished", "stopped"] = "finished"
    reason: fields.Text


class FirstWeights(TransferHeader):
    """The answer to an ``init_request``.

    Frozen tensors that the task shares are in the group ``frozen``. ``statistics`` names the
    tensors that are no parameters (see ``tensors.groups``).
    """

    kind: Literal["first_weights"] = "first_weights"
    run: fields.Id
    worker: fields.WorkerId
    statistics: fields.TensorNames = ()


class Update(TransferHeader):
    """A worker's update: its delta (trained - received weights), encoded by ``encoding`` if set.

    An update carries the ticket of its work: (run, worker, ``sequence``). It is counted at most
    once per ticket, however often it is sent, and only if ``base`` matches the weights that were
    sent out for ``round``. Without a ``sequence``, the round takes its place.
    """

    kind: Literal["update"] = "update"
    run: fields.Id
    round: Annotated[fields.Round, Field(ge=1)]
    base: fields.Id
    sequence: fields.Sequence | None = None
    worker: fields.WorkerId
    num_examples: fields.NumExamples
    seconds: fields.Seconds
    metrics: fields.Metrics = Field(default_factory=dict)
    encoding: Encoding | None = None


class Evaluation(Header):
    """The loss and metrics of a round's committed weights on a worker's held-out data.

    ``num_examples`` is 0 if the worker has no held-out data, so that nobody waits for it.
    """

    kind: Literal["evaluation"] = "evaluation"
    run: fields.Id
    round: fields.Round
    base: fields.Id
    worker: fields.WorkerId
    num_examples: Annotated[int, Field(ge=0, le=fields.MAX_NUM_EXAMPLES)]
    loss: fields.Metric
    metrics: fields.Metrics = Field(default_factory=dict)


class Verdict(Header):
    """Tells a worker that its update does not count; an update that counts gets no verdict.

    ``sequence`` is that of the update. If ``train_again`` is set, the worker must train again when
    it gets the same work again, rather than send the same update.
    """

    kind: Literal["verdict"] = "verdict"
    run: fields.Id
    round: Annotated[fields.Round, Field(ge=1)]
    base: fields.Id
    sequence: fields.Sequence | None = None
    outcome: Literal["late", "rejected"]
    cause: Annotated[str, Field(max_length=64)] | None = None
    reason: fields.Text
    train_again: bool = False

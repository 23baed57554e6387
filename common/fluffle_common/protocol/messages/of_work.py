"""Messages of work: what a coordinator asks of its workers, and how a run ends."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fluffle_common.protocol.messages.base import Header, Model, TransferHeader
from fluffle_common.protocol.messages.fields import (
    Config,
    Extra,
    Id,
    Round,
    Seconds,
    Sequence,
    Text,
    Train,
)
from fluffle_common.tensors.table import Encoding

# fluffle's own codecs take these settings and no others; those of others take any.
_OWN_CODECS = {"bf16": False, "f16": False, "int8": False, "topk": True}


class Compression(Model):
    """How updates are wanted: the codec ``kind``, with its settings.

    ``fraction`` is ``topk``'s: of the values, how many are sent. ``settings`` is for codecs that
    are not fluffle's own.
    """

    kind: Encoding
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    settings: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,=+-]{1,64}$")] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        takes_fraction = _OWN_CODECS.get(self.kind, False)
        if takes_fraction != (self.fraction is not None):
            needs = "needs a fraction" if takes_fraction else "takes no fraction"
            raise ValueError(f"the codec {self.kind} {needs}")
        if self.kind in _OWN_CODECS and self.settings is not None:
            raise ValueError(f"the codec {self.kind} takes no settings")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a text such as ``topk:0.01`` or ``NAME:SETTINGS`` says.

        Raises:
            ValueError: saying what is expected instead.
        """
        kind, colon, rest = text.partition(":")
        try:
            if kind == "topk":
                return cls(kind=kind, fraction=float(rest))
            return cls(kind=kind, settings=rest if colon else None)
        except ValueError:
            raise ValueError(
                f"'{text[:60]}' is not a codec; bf16, f16, int8, topk:0.01 or NAME[:SETTINGS] "
                "is expected"
            ) from None

    def __str__(self) -> str:
        """Return it as a text that ``parse``, and a codec, understands."""
        number = self.fraction
        settings = self.settings if number is None else format(Decimal(repr(number)), "f")
        return self.kind if settings is None else f"{self.kind}:{settings}"


class Plan(Model):
    """How to train in this round; the same for every worker.

    ``deadline_s`` counts from the opening of the round; ``compress`` says by which codec
    updates are encoded (see ``tensors.codecs``), None that they are plain; ``extra`` says which
    tensors an update has to bring besides, and ``train`` which of the model's it brings, None all
    of them (see ``tensors.groups``); ``config`` is free for a task's
    own use.
    """

    epochs: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None  # so many instead of ``epochs``
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    deadline_s: Seconds | None = None
    compress: Compression | None = None
    extra: Extra | None = None
    train: Train | None = None
    config: Config = Field(default_factory=dict)


class InitRequest(Header):
    """Asks one worker for the first weights."""

    kind: Literal["init_request"] = "init_request"
    run: Id
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Fit(TransferHeader):
    """The work of a round: evaluate these weights (if ``evaluate``), then train them.

    The tensors are the weights that round ``round - 1`` committed (round 0: the first weights).
    ``base`` names them: what is learnt from them says so, and is worth nothing elsewhere.
    (run, worker, ``sequence``) is the ticket of this piece of work, which its update brings back.
    ``sequence`` grows with every new piece of work that a worker is given; where each is asked once
    a round, it is the round. ``attempt`` counts how often the update of this ticket was rejected:
    at another attempt, the same update is no answer, and the weights are trained anew.
    """

    kind: Literal["fit"] = "fit"
    run: Id
    round: Annotated[Round, Field(ge=1)]
    base: Id
    sequence: Sequence | None = None
    evaluate: bool
    attempt: Annotated[int, Field(ge=0, le=10**6)] = 0
    plan: Plan


class Evaluate(TransferHeader):
    """Evaluate the weights that ``round`` committed: sent once, after the last round."""

    kind: Literal["evaluate"] = "evaluate"
    run: Id
    round: Round
    base: Id


class Stop(Header):
    """The run has ended; there is no more work in it.

    ``outcome``: all its rounds are done, or it stopped before its end.
    """

    kind: Literal["stop"] = "stop"
    run: Id
    round: Round
    outcome: Literal["finished", "stopped"] = "finished"
    reason: Text

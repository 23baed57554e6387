"""Messages of presence: who is there, and whether it is in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from fluffle_common.protocol.messages.base import PROTOCOL, Header, Model
from fluffle_common.protocol.messages.fields import (
    Classes,
    Id,
    Metric,
    NumExamples,
    Round,
    Sequence,
    TaskName,
    Text,
    WorkerId,
)


class ModelForm(Model):
    """What a worker's model is made of: the names, dtypes and shapes of its tensors.

    ``digest`` is the same for the same form; ``summary`` says the form in a few words.
    """

    digest: Id
    summary: Annotated[str, Field(max_length=300)]


class _Presence(Header):
    """Who a worker is, and what it does.

    ``round`` of ``run`` is what it works on or did last, beginning with the weights ``base``, and
    ``sequence`` is the ticket of that, where it trains.
    ``model`` is what its own task would begin with; None where that is not known.
    """

    worker: WorkerId
    session: Id
    num_examples: NumExamples
    task: TaskName
    classes: Classes = ()
    model: ModelForm | None = None
    heartbeat_s: Annotated[float, Field(gt=0, le=60)]
    state: Literal["idle", "receiving", "evaluating", "training", "sending"] = "idle"
    run: Id | None = None
    round: Round = 0
    base: Id | None = None
    sequence: Sequence | None = None
    step: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0)] = 0
    loss: Metric | None = None


class Hello(_Presence):
    """A worker has connected, or connected again. ``session`` is new at every process start.

    ``protocols`` are the versions that it speaks, ``features`` what it can do besides.
    """

    kind: Literal["hello"] = "hello"
    protocols: Annotated[tuple[int, ...], Strict(False), Field(min_length=1, max_length=16)] = (
        PROTOCOL,
    )
    features: Annotated[
        tuple[Annotated[str, Field(max_length=64)], ...], Strict(False), Field(max_length=32)
    ] = ()


class Heartbeat(_Presence):
    """Every ``heartbeat_s`` seconds; it repeats the hello, for a coordinator that started later."""

    kind: Literal["heartbeat"] = "heartbeat"


class Bye(Header):
    """A worker leaves on purpose."""

    kind: Literal["bye"] = "bye"
    worker: WorkerId
    session: Id
    reason: Text


class Failure(Header):
    """A worker's task failed in this round; the worker itself stays."""

    kind: Literal["failure"] = "failure"
    worker: WorkerId
    session: Id
    run: Id
    round: Round
    reason: Text


class Welcome(Header):
    """The answer to a hello: you are in; this is where the run stands."""

    kind: Literal["welcome"] = "welcome"
    run: Id
    round: Round
    rounds: Round


class Refusal(Header):
    """The answer to a hello that cannot be accepted; ``session`` says whose hello it was.

    ``code`` says in one word what is wrong: ``protocol`` (the version), ``malformed`` (the hello
    itself), ``classes`` or ``model``. A worker of another version is refused in that version, of
    which ``protocol``, ``federation``, ``kind``, ``session`` and ``reason`` never change.
    """

    kind: Literal["refusal"] = "refusal"
    session: Id
    code: Annotated[str, Field(max_length=64)] | None = None
    reason: Text


class Echo(Header):
    """Sent by a coordinator to itself, the way that signs of life come.

    Once it is back, everything that was in that queue before it has been read.
    """

    kind: Literal["echo"] = "echo"
    session: Id
    number: Annotated[int, Field(ge=1)]

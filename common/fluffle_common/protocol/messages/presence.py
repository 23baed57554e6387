"""Presence messages: which workers are connected, and whether they may join."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from fluffle_common.protocol.messages import fields
from fluffle_common.protocol.messages.base import PROTOCOL, Header, Model


class ModelForm(Model):
    """A fingerprint of the names, dtypes and shapes of a model's tensors.

    ``digest`` identifies them; ``summary`` describes them in a few words.
    """

    digest: fields.Id
    summary: Annotated[str, Field(max_length=300)]


class _Presence(Header):
    """A worker's identity and current state.

    ``run``, ``round``, ``base`` and ``sequence`` identify the work that the worker is doing or did
    last; ``sequence`` is None if that was not training. ``model`` is the form of its task's initial
    weights, if known. ``loss`` is the training loss at ``step`` of ``steps``.
    ``incomplete_bytes`` is how many bytes have arrived of messages that are still incomplete, as
    over a slow line: it shows that they need not be sent again. ``features`` lists
    its optional capabilities, and ``frozen`` the digests of the frozen tensors that it holds (see
    ``tensors.frozen``).
    """

    worker: fields.WorkerId
    session: fields.Id
    num_examples: fields.NumExamples
    task: fields.TaskName
    classes: fields.Classes = ()
    model: ModelForm | None = None
    heartbeat_s: Annotated[float, Field(gt=0, le=60)]
    state: Literal["idle", "receiving", "evaluating", "training", "sending"] = "idle"
    run: fields.Id | None = None
    round: fields.Round = 0
    base: fields.Id | None = None
    sequence: fields.Sequence | None = None
    step: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0)] = 0
    loss: fields.Metric | None = None
    incomplete_bytes: Annotated[int, Field(ge=1)] | None = None
    features: Annotated[
        tuple[Annotated[str, Field(max_length=64)], ...],
        Strict(False),
        Field(max_length=32, fail_fast=True),
    ] = ()
    frozen: Annotated[
        tuple[fields.Digest, ...], Strict(False), Field(max_length=16, fail_fast=True)
    ] = ()


class Hello(_Presence):
    """A worker has connected or reconnected.

    ``session`` is new at every process start. ``protocols`` lists the protocol versions that the
    worker supports.
    """

    kind: Literal["hello"] = "hello"
    protocols: Annotated[
        tuple[int, ...], Strict(False), Field(min_length=1, max_length=16, fail_fast=True)
    ] = (PROTOCOL,)


class Heartbeat(_Presence):
    """Sent every ``heartbeat_s`` seconds.

    It repeats the hello's fields for a coordinator that started later.
    """

    kind: Literal["heartbeat"] = "heartbeat"


class Bye(Header):
    """A worker leaves on purpose."""

    kind: Literal["bye"] = "bye"
    worker: fields.WorkerId
    session: fields.Id
    reason: fields.Text


class Failure(Header):
    """A worker's task failed in this round; the worker stays connected."""

    kind: Literal["failure"] = "failure"
    worker: fields.WorkerId
    session: fields.Id
    run: fields.Id
    round: fields.Round
    reason: fields.Text


class Welcome(Header):
    """Accepts a worker's hello and tells it the run's progress: ``round`` of ``rounds``."""

    kind: Literal["welcome"] = "welcome"
    run: fields.Id
    round: fields.Round
    rounds: fields.Round


class Refusal(Header):
    """Refuses the hello of ``session``.

    ``code`` is what does not match: ``malformed`` (the hello itself), ``classes``, ``model`` or
    ``frozen`` (the worker takes no frozen tensors). A worker with another protocol version is
    refused in that version, without a ``code``; the fields ``protocol``, ``federation``, ``kind``,
    ``session`` and ``reason`` are the same in all versions.
    """

    kind: Literal["refusal"] = "refusal"
    session: fields.Id
    code: Annotated[str, Field(max_length=64)] | None = None
    reason: fields.Text


class Echo(Header):
    """Sent by a coordinator to itself through the presence queue.

    When it arrives, the coordinator has read everything that was in the queue before it.
    """

    kind: Literal["echo"] = "echo"
    session: fields.Id
    number: Annotated[int, Field(ge=1)]

"""The messages: what a coordinator and a worker say to each other.

Every message is a small, frozen header; some carry tensors behind it (see ``codec``). A wrong type
is a ``MalformedMessage`` with the reason, never a guess. An unknown key is passed over, so that a
later version may add some, unless the message lists it as ``critical``. The field names here are
the names on the wire, in the journal and in the documentation.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

import msgpack
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from fluffle_common.errors import MalformedMessage
from fluffle_common.tensors.table import (
    MAX_TENSORS,
    MOST_TENSORS_KEPT,
    TABLES_KEPT,
    Encoding,
    TensorEntry,
)

PROTOCOL: Literal[2] = 2
"""The version of the protocol that is spoken here."""

MAX_NUM_EXAMPLES = 10**12
MAX_METRICS = MAX_METRIC_NAME = MAX_ID = 64
MAX_CLASS_NAME = 100
# A worker says these of itself every few seconds, and the coordinator keeps them of each.
MAX_TASK_CHARACTERS = 200
MAX_CLASSES, MAX_CLASSES_BYTES = 5_000, 32 * 2**10

# Names end up in queue names and routing keys. A federation has no dot, so that its names on the
# broker cannot be mistaken for another federation's.
FEDERATION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
WORKER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
# fluffle's own codecs have one spelling each; those of others take settings of any kind.
_OWN_CODEC = re.compile(r"bf16|f16|int8|topk:0\.[0-9]{0,5}[1-9]")
_OTHER_CODEC = re.compile(
    r"(?!(bf16|f16|int8|topk)(:|$))[a-z0-9][a-z0-9_-]{0,31}(:[A-Za-z0-9_.,=+-]{1,64})?"
)

Federation = Annotated[str, Field(pattern=FEDERATION_PATTERN)]
WorkerId = Annotated[str, Field(pattern=WORKER_PATTERN)]
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Round = Annotated[int, Field(ge=0, le=10**9)]
Sequence = Annotated[int, Field(ge=1, le=10**15)]
NumExamples = Annotated[int, Field(ge=1, le=MAX_NUM_EXAMPLES)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Metric = Annotated[float, Field(allow_inf_nan=False)]
Metrics = Annotated[
    dict[Annotated[str, Field(max_length=MAX_METRIC_NAME)], Metric], Field(max_length=MAX_METRICS)
]
Text = Annotated[str, Field(max_length=2000)]
TaskName = Annotated[str, Field(max_length=MAX_TASK_CHARACTERS)]


def _not_too_long(classes: tuple[str, ...]) -> tuple[str, ...]:
    size_bytes = sum(len(name.encode()) for name in classes)
    if size_bytes > MAX_CLASSES_BYTES:
        raise ValueError(
            f"the names of {len(classes)} classes have {size_bytes} bytes, "
            f"at most {MAX_CLASSES_BYTES} are taken"
        )
    return classes


def names_a_codec(how: str) -> str:
    """Check that a plan can ask for a codec in these words; return them.

    Raises:
        ValueError: saying what is expected instead.
    """
    if _OWN_CODEC.fullmatch(how) or _OTHER_CODEC.fullmatch(how):
        return how
    raise ValueError(
        f"'{how[:60]}' names no codec; bf16, f16, int8, topk:0.01 or NAME[:SETTINGS] is expected"
    )


Compress = Annotated[str, AfterValidator(names_a_codec)]
Classes = Annotated[
    tuple[Annotated[str, Field(max_length=MAX_CLASS_NAME)], ...],
    Strict(False),
    Field(max_length=MAX_CLASSES),
    AfterValidator(_not_too_long),
]
Value = bool | int | float | Annotated[str, Field(max_length=2000)]
Extension = Annotated[dict[Annotated[str, Field(max_length=100)], Value], Field(max_length=100)]
Config = Annotated[dict[Annotated[str, Field(max_length=100)], Value], Field(max_length=100)]

Critical = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=64)], ...],
    Strict(False),
    Field(max_length=32),
]


_IDENTITY = ("kind", "run", "round", "worker")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


_TABLES: dict[bytes, tuple[TensorEntry, ...]] = {}


def _checked_once(table: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Check a table that has been checked before by looking for it.

    What is packed into the same bytes is of the same types and values throughout.
    """
    if not isinstance(table, list) or len(table) > MOST_TENSORS_KEPT:
        return check(table)
    try:
        packed = msgpack.packb(table)
    except (TypeError, ValueError, OverflowError):
        return check(table)
    known = _TABLES.get(packed)
    if known is None:
        known = check(table)
        if len(_TABLES) >= TABLES_KEPT:
            del _TABLES[next(iter(_TABLES))]  # the oldest
        _TABLES[packed] = known
    return known


class Transfer(_Model):
    """A payload that travels apart from its message, cut into ``part`` messages.

    ``digest`` is BLAKE3, in hexadecimal, of the parts' own BLAKE3 one after the other: so each part
    can be hashed as it comes, in any order, and none can be another than was announced. BLAKE3
    takes a third of the time of SHA-256, of which a round of large models has ten hashes. None:
    its sender does not say.
    """

    id: Id
    parts: Annotated[int, Field(ge=1, le=10**6)]
    nbytes: Annotated[int, Field(ge=1)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class Plan(_Model):
    """How to train in this round; the same for every worker.

    ``deadline_s`` counts from the opening of the round; ``compress`` names the codec of updates,
    with its settings (see ``tensors.codecs``), or None for plain ones; ``config`` is free for a
    task's own use.
    """

    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    deadline_s: Seconds | None = None
    compress: Compress | None = None
    config: Config = Field(default_factory=dict)


class _Header(_Model):
    """What every message says first.

    ``critical`` names the keys without which the message would be misunderstood: whoever does not
    know one of them refuses the message. ``ext`` is for private use, and flat: it is passed over.
    """

    protocol: Literal[2] = PROTOCOL
    federation: Federation
    critical: Critical | None = None
    ext: Extension | None = None
    pad: bytes = b""  # fills the header up, so that the payload starts at a multiple of 64 bytes

    @property
    def identity(self) -> str:
        """What makes two messages the same message: the AMQP ``message_id``, kept on a resend."""
        told = [str(value) for value in told_of(self, _IDENTITY).values()]
        sequence = getattr(self, "sequence", None)
        if sequence not in (None, getattr(self, "round", None)):
            told.append(str(sequence))
        return "/".join(told)


class _WithTensors(_Header):
    """A message whose payload is tensors."""

    tensors: Annotated[
        tuple[TensorEntry, ...],
        Strict(False),
        Field(max_length=MAX_TENSORS),
        WrapValidator(_checked_once),
    ] = ()
    transfer: Transfer | None = None


# --- coordinator to worker ---------------------------------------------------------------------


class Welcome(_Header):
    """The answer to a hello: you are in; this is where the run stands."""

    kind: Literal["welcome"] = "welcome"
    run: Id
    round: Round
    rounds: Round


class Refusal(_Header):
    """The answer to a hello that cannot be accepted; ``session`` says whose hello it was.

    ``code`` says in one word what is wrong: ``protocol`` (the version), ``malformed`` (the hello
    itself), ``classes`` or ``model``. A worker of another version is refused in that version, of
    which ``protocol``, ``federation``, ``kind``, ``session`` and ``reason`` never change.
    """

    kind: Literal["refusal"] = "refusal"
    session: Id
    code: Annotated[str, Field(max_length=64)] | None = None
    reason: Text


class Verdict(_Header):
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


class InitRequest(_Header):
    """Asks one worker for the first weights."""

    kind: Literal["init_request"] = "init_request"
    run: Id
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Fit(_WithTensors):
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


class Evaluate(_WithTensors):
    """Evaluate the weights that ``round`` committed: sent once, after the last round."""

    kind: Literal["evaluate"] = "evaluate"
    run: Id
    round: Round
    base: Id


class Stop(_Header):
    """The run has ended; there is no more work in it.

    ``outcome``: all its rounds are done, or it stopped before its end.
    """

    kind: Literal["stop"] = "stop"
    run: Id
    round: Round
    outcome: Literal["finished", "stopped"] = "finished"
    reason: Text


# --- worker to coordinator ---------------------------------------------------------------------


class ModelForm(_Model):
    """What a worker's model is made of: the names, dtypes and shapes of its tensors.

    ``digest`` is the same for the same form; ``summary`` says the form in a few words.
    """

    digest: Id
    summary: Annotated[str, Field(max_length=300)]


class _Presence(_Header):
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


class Bye(_Header):
    """A worker leaves on purpose."""

    kind: Literal["bye"] = "bye"
    worker: WorkerId
    session: Id
    reason: Text


class Failure(_Header):
    """A worker's task failed in this round; the worker itself stays."""

    kind: Literal["failure"] = "failure"
    worker: WorkerId
    session: Id
    run: Id
    round: Round
    reason: Text


class FirstWeights(_WithTensors):
    """The answer to an ``init_request``."""

    kind: Literal["first_weights"] = "first_weights"
    run: Id
    worker: WorkerId


class Update(_WithTensors):
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


class Evaluation(_Header):
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


# --- the coordinator to itself -----------------------------------------------------------------


class Echo(_Header):
    """Sent by a coordinator to itself, the way that signs of life come.

    Once it is back, everything that was in that queue before it has been read.
    """

    kind: Literal["echo"] = "echo"
    session: Id
    number: Annotated[int, Field(ge=1)]


# --- both ways ---------------------------------------------------------------------------------


class Part(_Header):
    """One piece of a payload too large for one message; ``part`` counts from 0."""

    kind: Literal["part"] = "part"
    transfer: Id
    part: Annotated[int, Field(ge=0)]


class Happening(_Model):
    """Something that happened; ``fields`` is what is known of it."""

    event: Annotated[str, Field(min_length=1, max_length=64)]
    time: Annotated[str, Field(max_length=40)]
    run: Id | None = None
    fields: dict[str, Any] = Field(default_factory=dict)

    @property
    def moment(self) -> datetime | None:
        """Return when it happened; None where ``time`` does not say so, with its zone."""
        try:
            at = datetime.fromisoformat(self.time)
        except ValueError:
            return None
        return at if at.tzinfo else None


class _Journalled(_Header):
    """An entry of the journal.

    (``session``, ``number``) is its identity: ``number`` counts the events that one process of a
    coordinator tells, from 1, so that a reader can pass over what was sent twice.
    """

    kind: str
    session: Id
    number: Annotated[int, Field(ge=1)]

    @property
    def identity(self) -> str:
        """See above."""
        return f"{self.kind}/{self.session}/{self.number}"


class Event(_Journalled, Happening):
    """One event, as the journal keeps it."""

    kind: Literal["event"] = "event"


class Events(_Journalled):
    """Many events that were told at once; the first has ``number``, the others follow."""

    kind: Literal["events"] = "events"
    events: Annotated[tuple[Happening, ...], Strict(False), Field(min_length=1, max_length=1000)]

    def each(self) -> list[Event]:
        """Return them one by one."""
        ids: dict[str, Any] = {"federation": self.federation, "session": self.session}
        return [
            Event(
                **ids, number=number, event=one.event, time=one.time, run=one.run, fields=one.fields
            )
            for number, one in enumerate(self.events, start=self.number)
        ]


def told_of(message: BaseModel, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return those of some fields that a message has a value for."""
    values = message.__dict__
    return {name: values[name] for name in fields if values.get(name) is not None}


WithTensors = Fit | Evaluate | FirstWeights | Update
ToWorker = Welcome | Refusal | Verdict | InitRequest | Fit | Evaluate | Stop
FromWorker = Hello | Heartbeat | Bye | Failure | FirstWeights | Update | Evaluation
Message = ToWorker | FromWorker | Echo | Part | Event | Events


def kinds_of(messages: Any) -> tuple[str, ...]:
    """Return the kinds of a union of messages, such as ``ToWorker``."""
    return tuple(one.model_fields["kind"].default for one in get_args(messages))


_adapter: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of every header; binary data is a string there."""
    schema = _adapter.json_schema()
    for one in schema["$defs"].values():
        if "kind" in one.get("properties", {}):
            one["required"] = ["protocol", "kind", *one["required"]]
    entry = schema["$defs"]["TensorEntry"]  # a tuple in Python, a map on the wire
    schema["$defs"]["TensorEntry"] = {
        "type": "object",
        "properties": dict(zip(TensorEntry._fields, entry["prefixItems"], strict=True)),
        "required": list(TensorEntry._fields),
        "additionalProperties": False,
    }
    return schema


def parse(header: Any) -> Message:
    """Turn a decoded header into its message.

    Raises:
        MalformedMessage: naming the first field that is wrong, and what is wrong with it.
    """
    kind = header.get("kind") if isinstance(header, dict) else None
    if not isinstance(kind, str):  # pydantic would print it, however deep it is nested
        raise MalformedMessage(f"kind: a string is expected, not {type(kind).__name__}")
    try:
        message = _adapter.validate_python(header)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "header"
        raise MalformedMessage(f"{where}: {first['msg']}"[:500]) from None
    if message.critical is not None:
        unknown = [name for name in message.critical if name not in type(message).model_fields]
        if unknown:
            raise MalformedMessage(f"critical: this side does not know '{unknown[0]}'"[:500])
    return message

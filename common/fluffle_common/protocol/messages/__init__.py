"""The messages between coordinator and workers.

Every message is a small, frozen header; some carry tensors behind it (see ``codec``). A value of
the wrong type raises ``MalformedMessage``; nothing is coerced. Unknown keys are ignored, so that
later versions can add some, unless the message lists them as ``critical``. The field names are
those on the wire, in the journal and in the documentation.
"""

from fluffle_common.protocol.messages.base import (
    PROTOCOL,
    Part,
    TensorHeader,
    Transfer,
    present_fields,
)
from fluffle_common.protocol.messages.exchange import Exchange
from fluffle_common.protocol.messages.fields import (
    FEDERATION_PATTERN,
    MAX_CLASS_NAME,
    MAX_CLASSES,
    MAX_CLASSES_BYTES,
    MAX_ID,
    MAX_METRIC_NAME,
    MAX_METRICS,
    MAX_NUM_EXAMPLES,
    MAX_TASK_CHARACTERS,
    WORKER_PATTERN,
)
from fluffle_common.protocol.messages.journal import Event, EventRecord, Events
from fluffle_common.protocol.messages.parsing import (
    FromWorker,
    Message,
    ToWorker,
    WithTensors,
    json_schema,
    kinds_of,
    parse,
)
from fluffle_common.protocol.messages.presence import (
    Bye,
    Echo,
    Failure,
    Heartbeat,
    Hello,
    ModelForm,
    Refusal,
    Welcome,
)
from fluffle_common.protocol.messages.results import (
    Evaluation,
    FirstWeights,
    Update,
    Verdict,
)
from fluffle_common.protocol.messages.work import (
    Compression,
    Evaluate,
    Fit,
    InitRequest,
    Plan,
    Stop,
)
from fluffle_common.tensors.table import TensorEntry

__all__ = [
    "FEDERATION_PATTERN",
    "MAX_CLASSES",
    "MAX_CLASSES_BYTES",
    "MAX_CLASS_NAME",
    "MAX_ID",
    "MAX_METRICS",
    "MAX_METRIC_NAME",
    "MAX_NUM_EXAMPLES",
    "MAX_TASK_CHARACTERS",
    "PROTOCOL",
    "WORKER_PATTERN",
    "Bye",
    "Compression",
    "Echo",
    "Evaluate",
    "Evaluation",
    "Event",
    "EventRecord",
    "Events",
    "Exchange",
    "Failure",
    "FirstWeights",
    "Fit",
    "FromWorker",
    "Heartbeat",
    "Hello",
    "InitRequest",
    "Message",
    "ModelForm",
    "Part",
    "Plan",
    "Refusal",
    "Stop",
    "TensorEntry",
    "TensorHeader",
    "ToWorker",
    "Transfer",
    "Update",
    "Verdict",
    "Welcome",
    "WithTensors",
    "json_schema",
    "kinds_of",
    "parse",
    "present_fields",
]

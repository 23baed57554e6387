"""The messages: what a coordinator and a worker say to each other.

Every message is a small, frozen header; some carry tensors behind it (see ``codec``). A wrong type
is a ``MalformedMessage`` with the reason, never a guess. An unknown key is passed over, so that a
later version may add some, unless the message lists it as ``critical``. The field names here are
the names on the wire, in the journal and in the documentation.
"""

from fluffle_common.protocol.messages.base import (
    PROTOCOL,
    Part,
    TensorHeader,
    Transfer,
    told_of,
)
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
from fluffle_common.protocol.messages.of_exchange import (
    Exchange,
)
from fluffle_common.protocol.messages.of_journal import (
    Event,
    Events,
    Happening,
)
from fluffle_common.protocol.messages.of_presence import (
    Bye,
    Echo,
    Failure,
    Heartbeat,
    Hello,
    ModelForm,
    Refusal,
    Welcome,
)
from fluffle_common.protocol.messages.of_results import (
    Evaluation,
    FirstWeights,
    Update,
    Verdict,
)
from fluffle_common.protocol.messages.of_work import (
    Compression,
    Evaluate,
    Fit,
    InitRequest,
    Plan,
    Stop,
)
from fluffle_common.protocol.messages.parsing import (
    FromWorker,
    Message,
    ToWorker,
    WithTensors,
    json_schema,
    kinds_of,
    parse,
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
    "Events",
    "Exchange",
    "Failure",
    "FirstWeights",
    "Fit",
    "FromWorker",
    "Happening",
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
    "told_of",
]

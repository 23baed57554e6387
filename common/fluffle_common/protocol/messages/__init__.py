"""The messages between the coordinator and the workers.

Every message is a small, frozen header; some carry tensors behind it (see ``wire_format``). A value
of the wrong type raises ``MalformedMessage``; nothing is coerced. Unknown keys are ignored, so that
later versions can add some, unless the message lists them as ``critical``. The field names are
those on the wire, in the journal and in the documentation.
"""

from fluffle_common.protocol.messages.base import *
from fluffle_common.protocol.messages.fields import *
from fluffle_common.protocol.messages.journal import *
from fluffle_common.protocol.messages.parsing import *
from fluffle_common.protocol.messages.presence import *
from fluffle_common.protocol.messages.work import *

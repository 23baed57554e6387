"""Run events: a frozen class for each kind, with typed fields and a sentence for the log.

Coordinator and worker report what happens as these events, and the log, the journal, the live page
and ``fluffle explain`` show them. Names and fields are those on the wire (``docs/protocol.md``).

>>> Counted(round=7, worker="north", num_examples=80, updates=2).sentence()
'round 7: update of north counted, 80 examples (2/?)'
>>> Left(worker="north", reason="told to stop").fields()
{'worker': 'north', 'reason': 'told to stop'}
"""

from fluffle_common.protocol.events.base import *
from fluffle_common.protocol.events.rounds import *
from fluffle_common.protocol.events.runs import *
from fluffle_common.protocol.events.worker_log import *

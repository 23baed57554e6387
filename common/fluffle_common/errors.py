"""The exceptions that fluffle raises on purpose.

::

    FluffleError                one line for the user: the cause, then the remedy
    ├── UsageError              the command or its input is invalid             exit code 2
    ├── BrokerError             no broker answers or can be started             exit code 3
    ├── RunError                the run cannot continue as configured           exit code 4
    ├── TaskError               the user's task, data or strategy failed        exit code 5
    ├── RefusedError            this worker may not join; the text says why     exit code 6
    ├── MalformedMessage        an invalid message
    └── LinkLost                the connection was lost during an operation

``MalformedMessage`` and ``LinkLost`` are handled internally and never reach a user.
"""

from typing import Literal, get_args

Cause = Literal[
    "malformed",  # it cannot be decoded, or a field is invalid
    "kind",  # its kind does not belong in this queue
    "run",  # it belongs to another run
    "round",  # it belongs to a round that is not open
    "tensors",  # its tensors do not match the model or what was announced
    "not_finite",  # a tensor holds NaN or infinity
    "norm",  # its norm is far larger than that of other updates
    "sender",  # it comes from a worker or user that it should not come from
    "exchange",  # nobody handles this ``exchange``, or its handler failed
    "sealed",  # its payload is encrypted
]
"""Why a message is rejected."""
CAUSES: tuple[Cause, ...] = get_args(Cause)


class FluffleError(Exception):
    """Base class; the text is one line that a user can act on."""

    exit_code = 1


class UsageError(FluffleError):
    """The command or its input is invalid."""

    exit_code = 2


class BrokerError(FluffleError):
    """No broker answers, or none can be started."""

    exit_code = 3


class RunError(FluffleError):
    """The run cannot continue as configured."""

    exit_code = 4


class TaskError(FluffleError):
    """The user's task, data or strategy failed."""

    exit_code = 5


class RefusedError(FluffleError):
    """This worker may not join the federation; the text says why."""

    exit_code = 6


class MalformedMessage(FluffleError):
    """An invalid message.

    Args:
        reason: what is wrong; people read it in the ``rejected`` queue.
        cause: the same as one of ``CAUSES``, for counting.
    """

    def __init__(self, reason: str, cause: Cause = "malformed") -> None:
        super().__init__(reason)
        self.cause: Cause = cause


class LinkLost(FluffleError):
    """The connection to the broker was lost; the outcome of the operation is unknown."""

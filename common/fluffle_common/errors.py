"""Every error fluffle raises on purpose.

::

    FluffleError                one line for the user: the cause, then the remedy
    ├── UsageError              the command was called wrongly                  exit code 2
    ├── BrokerError             no broker, or one that cannot be started        exit code 3
    ├── RunError                the run cannot go on as configured              exit code 4
    ├── TaskError               the user's task, data or strategy failed        exit code 5
    ├── RefusedError            the other side refused us, and said why         exit code 6
    ├── MalformedMessage        bytes that are not a message of ours
    └── LinkLost                the connection went; whatever was under way has an unknown outcome

``MalformedMessage`` and ``LinkLost`` are handled inside and never reach a user.
"""

from typing import Literal, get_args

Cause = Literal[
    "malformed",
    "kind",
    "run",
    "round",
    "tensors",
    "not_finite",
    "norm",
    "sender",
    "exchange",
    "sealed",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
"""Why a message is refused: not a message; of the wrong kind for its queue; of another run; of a
round that is not open; not the model's tensors; NaN or infinite; far larger than
the others; in another's name."""


class FluffleError(Exception):
    """An error whose text is one line that a user can act on."""

    exit_code = 1


class UsageError(FluffleError):
    """The command was called wrongly."""

    exit_code = 2


class BrokerError(FluffleError):
    """No broker answers, or one cannot be started."""

    exit_code = 3


class RunError(FluffleError):
    """The run cannot go on as configured."""

    exit_code = 4


class TaskError(FluffleError):
    """The user's code failed, a task or a strategy, or the data that a task was given."""

    exit_code = 5


class RefusedError(FluffleError):
    """The other side refused us and said why."""

    exit_code = 6


class MalformedMessage(FluffleError):
    """Bytes that are not a message of ours; the text is the reason given in ``rejected``.

    Args:
        reason: what is wrong, for people.
        cause: the same as one of ``CAUSES``, for counting.
    """

    def __init__(self, reason: str, cause: Cause = "malformed") -> None:
        super().__init__(reason)
        self.cause: Cause = cause


class LinkLost(FluffleError):
    """The connection to the broker went; what was under way has an unknown outcome."""

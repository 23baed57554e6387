"""Messages of protocols in several phases, such as secure aggregation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fluffle_common.protocol.messages.base import TensorHeader
from fluffle_common.protocol.messages.fields import Id, Round, WorkerId


class Exchange(TensorHeader):
    """One message of a protocol that fluffle does not know itself, in either direction.

    ``name`` says of which protocol, and so who handles it; what is said in which ``phase`` is the
    protocol's own. ``worker`` is the worker that sends it; None if the coordinator does. Tensors
    travel in the message itself, never in parts.
    """

    kind: Literal["exchange"] = "exchange"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    phase: Annotated[str, Field(min_length=1, max_length=64)]
    run: Id
    round: Round
    worker: WorkerId | None = None

    @property
    def identity(self) -> str:
        """What makes two of them the same: see ``Header.identity``."""
        return f"{super().identity}/{self.name}/{self.phase}"

"""The message of multi-phase protocols, such as secure aggregation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fluffle_common.protocol.messages.base import TensorHeader
from fluffle_common.protocol.messages.fields import Id, Round, WorkerId


class Exchange(TensorHeader):
    """A message of a user-defined protocol, in either direction.

    ``name`` identifies the protocol and selects the handler; the meaning of ``phase`` is up to the
    protocol. ``worker`` is the sender, or None if the coordinator sends the message. Tensors travel
    in the message itself, never in parts.
    """

    kind: Literal["exchange"] = "exchange"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    phase: Annotated[str, Field(min_length=1, max_length=64)]
    run: Id
    round: Round
    worker: WorkerId | None = None

    @property
    def identity(self) -> str:
        """The header's identity, followed by ``name`` and ``phase``."""
        return f"{super().identity}/{self.name}/{self.phase}"

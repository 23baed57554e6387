"""The record of a node in the file ``node.json``.

Other packages find the broker through the key ``url`` of that file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fluffle_common.durable_files import replacing

Origin = Literal["installed", "unpacked", "docker"]


@dataclass(frozen=True)
class Ports:
    """The ports of a node on the loopback interface; 0 chooses a free one."""

    amqp: int = 5673
    management: int = 15673
    prometheus: int = 15693
    epmd: int = 0  # through which the nodes of a cluster find each other
    distribution: int = 0  # where other Erlang nodes and rabbitmqctl reach this one


@dataclass(frozen=True)
class NodeInfo:
    """A node that was started."""

    url: str
    management_url: str
    prometheus_url: str
    node_name: str
    ports: Ports
    pid: int | None  # of the Erlang VM; None in a container
    born: str | None  # the start time of ``pid``; together they identify the process
    started_as: Origin
    version: str  # of RabbitMQ; empty until the node is ready
    folder: Path  # with all files of the node: configuration, data and logs

    @property
    def logs(self) -> Path:
        """The folder with the node's logs."""
        return self.folder / "log"


def broker_folder(state: Path) -> Path:
    """Return the folder with the files of a state folder's node."""
    return state.absolute() / "broker"


def load(folder: Path) -> NodeInfo | None:
    """Read the record of a node; None if it is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        fields = json.loads((folder / "node.json").read_text())
        return NodeInfo(**{**fields, "ports": Ports(**fields["ports"]), "folder": folder})
    return None


def save(info: NodeInfo) -> None:
    """Write the record atomically, readable only by its owner."""
    fields = {**dataclasses.asdict(info), "folder": str(info.folder)}
    with replacing(info.folder / "node.json") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps(fields, indent=2).encode() + b"\n")


def remove(folder: Path) -> None:
    """Delete the record of a node."""
    (folder / "node.json").unlink(missing_ok=True)

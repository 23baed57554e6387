"""What is known of a node, and the file ``node.json`` it is kept in.

Other parts of fluffle find the broker by the key ``url`` of that file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Origin = Literal["installed", "unpacked", "docker"]


@dataclass(frozen=True)
class Ports:
    """The ports of a node, all on the loopback interface; 0 means: choose a free one."""

    amqp: int = 5673
    management: int = 15673
    prometheus: int = 15693
    epmd: int = 0
    """Where Erlang nodes find each other: the nodes of one cluster share it (and their cookie)."""
    distribution: int = 0
    """Where other Erlang nodes, and rabbitmqctl, reach this one."""


@dataclass(frozen=True)
class NodeInfo:
    """A node that was started."""

    url: str
    management_url: str
    prometheus_url: str
    node_name: str
    ports: Ports
    pid: int | None
    """The Erlang VM; None in a container."""
    born: str | None
    """When ``pid`` was born: together they name one process for good."""
    started_as: Origin
    version: str
    """Of RabbitMQ; empty until the node has told it."""
    folder: Path
    """All files of the node: configuration, data and logs."""

    @property
    def logs(self) -> Path:
        """The folder with the node's logs."""
        return self.folder / "log"


def broker_folder(state: Path) -> Path:
    """Name the folder with the files of the node that belongs to a state folder."""
    return state.absolute() / "broker"


def load(folder: Path) -> NodeInfo | None:
    """Read the record of a node; None where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        fields = json.loads((folder / "node.json").read_text())
        return NodeInfo(**{**fields, "ports": Ports(**fields["ports"]), "folder": folder})
    return None


def save(info: NodeInfo) -> None:
    """Write the record in one step: readers find the old one or the new one."""
    fields = {**dataclasses.asdict(info), "folder": str(info.folder)}
    descriptor, scratch = tempfile.mkstemp(prefix=".node-", dir=info.folder)  # of mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(fields, file, indent=2)
            file.write("\n")
        Path(scratch).replace(info.folder / "node.json")
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def remove(folder: Path) -> None:
    """Forget the node."""
    (folder / "node.json").unlink(missing_ok=True)

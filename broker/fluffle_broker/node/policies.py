"""Policies that limit a federation's queues: printed for rabbitmqctl, or set through the API."""

from __future__ import annotations

import json
import shlex
import urllib.error
from collections.abc import Sequence

from fluffle_common.errors import BrokerError
from fluffle_common.protocol.topology import Policy
from fluffle_common.transport.rabbitmq.management import (
    REQUEST_ERRORS,
    Management,
    fault_and_remedy,
)

_APPLY_TO = "queues"
_INSTEAD = "or print the commands for an administrator with 'fluffle broker apply-policy --print'"


def shell_lines(policies: Sequence[Policy], vhost_name: str) -> list[str]:
    """Return the commands to run on the broker's machine."""
    return [
        shlex.join(
            [
                *("rabbitmqctl", "set_policy", "--vhost", vhost_name),
                *("--priority", str(one.priority), "--apply-to", _APPLY_TO),
                *(one.name, one.pattern, json.dumps(one.definition)),
            ]
        )
        for one in policies
    ]


def apply(policies: Sequence[Policy], api: Management, *, keep: bool = False) -> None:
    """Set policies in a vhost through the management API.

    Existing policies of the same name are replaced, unless ``keep`` is set, because an operator may
    have changed them.

    Raises:
        BrokerError: if the API does not answer, or the user may not set policies.
    """
    path = f"/api/policies/{api.quoted_vhost}"
    try:
        existing = {one["name"] for one in api.ask(path)}
        for one in policies:
            if not (keep and one.name in existing):
                value = {
                    "pattern": one.pattern,
                    "definition": one.definition,
                    "priority": one.priority,
                    "apply-to": _APPLY_TO,
                }
                api.ask(f"{path}/{one.name}", put=value)
    except urllib.error.HTTPError as no:
        raise BrokerError(
            f"user '{api.user}' cannot set policies on the broker at {api.base} ({no.code} "
            f"{no.reason}); check the password and the vhost in --url, give this user the tag "
            f"'policymaker' and permissions in the vhost, {_INSTEAD}"
        ) from None
    except REQUEST_ERRORS as why:
        fault, remedy = fault_and_remedy(why)
        raise BrokerError(
            f"the management API at {api.base} {fault}; {remedy}, {_INSTEAD}"
        ) from None

"""The limits of a federation's queues, as policies: printed for rabbitmqctl, or set by the API."""

from __future__ import annotations

import json
import shlex
import urllib.error
from collections.abc import Sequence

from fluffle_common.errors import BrokerError
from fluffle_common.protocol.topology import Policy
from fluffle_common.transport.rabbitmq.management import UNTOLD, ask, vhost
from fluffle_common.transport.rabbitmq.urls import parse_urls

_APPLY_TO = "queues"
_INSTEAD = "or let --print write the lines for whoever may"


def shell_lines(policies: Sequence[Policy], where: str) -> list[str]:
    """Write out what to type where the broker runs, for the vhost ``where``."""
    return [
        shlex.join(
            [
                *("rabbitmqctl", "set_policy", "--vhost", where),
                *("--priority", str(one.priority), "--apply-to", _APPLY_TO),
                *(one.name, one.pattern, json.dumps(one.definition)),
            ]
        )
        for one in policies
    ]


def apply(policies: Sequence[Policy], url: str, base: str, *, keep: bool = False) -> None:
    """Set them in the vhost of the broker at ``url``, by its management API.

    Args:
        policies: what to set; one of the same name is replaced.
        url: the broker's AMQP URL, for the vhost, the user and the password in it.
        base: where its management API is.
        keep: leave those alone that are there, as an operator may have changed them.

    Raises:
        BrokerError: if the API does not answer, or the user may not.
    """
    try:
        there = {one["name"] for one in ask(base, f"/api/policies/{vhost(url)}", url)}
        for one in policies:
            if not (keep and one.name in there):
                value = {
                    "pattern": one.pattern,
                    "definition": one.definition,
                    "priority": one.priority,
                    "apply-to": _APPLY_TO,
                }
                ask(base, f"/api/policies/{vhost(url)}/{one.name}", url, put=value)
    except urllib.error.HTTPError as no:
        if no.code not in (401, 403):
            raise BrokerError(
                f"the management API at {base} refuses a policy ({no.code} {no.reason}); check "
                f"the vhost in --url, {_INSTEAD}"
            ) from None
        user = parse_urls(url)[0].user or "guest"
        raise BrokerError(
            f"user '{user}' may not set policies on the broker at {base}; give it the tag "
            f"'policymaker' and rights in the vhost, {_INSTEAD}"
        ) from None
    except UNTOLD as why:
        reason = getattr(why, "reason", None) or why
        raise BrokerError(
            f"the management API at {base} does not answer ({reason}); name its address with "
            f"--management, {_INSTEAD}"
        ) from None

"""Requests to the management API of a private node, which is faster than rabbitmqctl."""

from __future__ import annotations

import base64
import http.client
import json
from typing import Any

from fluffle_broker.node.record import NodeInfo


def manage(info: NodeInfo, method: str, path: str, body: Any = None) -> Any:
    """Send one request as guest; return the decoded response, None if it is empty."""
    link = http.client.HTTPConnection("127.0.0.1", info.ports.management, timeout=60)
    login = base64.b64encode(b"guest:guest").decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    try:
        link.request(method, f"/api/{path}", body=json.dumps(body), headers=headers)
        answer = link.getresponse()
        text = answer.read()
        assert answer.status < 300, text
        return json.loads(text) if text else None
    finally:
        link.close()


def add_vhost(info: NodeInfo, name: str) -> None:
    """Create a vhost in which guest may do everything."""
    manage(info, "PUT", f"vhosts/{name}", {})
    everything = dict.fromkeys(("configure", "write", "read"), ".*")
    manage(info, "PUT", f"permissions/{name}/guest", everything)

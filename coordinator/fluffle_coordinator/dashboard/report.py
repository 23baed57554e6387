"""The report of a run: the live page, frozen into one file that needs no network.

The file embeds the page's own HTML, style and scripts (``static/``) and the snapshot that they
draw. That snapshot has the shape of ``/api/board`` but is computed from the run folder.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from fluffle_common.cli.console import json_line
from fluffle_common.durable_files import open_regular
from fluffle_common.errors import UsageError
from fluffle_common.protocol.events import from_fields
from fluffle_coordinator.dashboard.snapshot import ending, named, results
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.storage.history import merged, read_history_lines
from fluffle_coordinator.storage.round_stats import seconds_of
from fluffle_coordinator.storage.run_checkpoints import checkpoint_files
from fluffle_coordinator.storage.run_file import read_run_file

# In dependency order.
_SCRIPTS = ("dom.js", "chart.js", "results.js", "workers.js", "panels.js", "page.js")
MAX_DETAILED = 1000
"""The rounds whose details a page has: for 30,000, a browser needs minutes to draw them."""
_MAX_CELLS, _MAX_REJECTIONS = 40_000, 1000  # of a page; the JSON has all
_LIVE_ONLY = re.compile(r"<!-- live -->.*?<!-- /live -->", re.DOTALL)
_IMPORTS = re.compile(r"^import .*;\n", re.MULTILINE)


def read_report(folder: Path, now: float, most: int = sys.maxsize) -> dict[str, Any]:
    """Return everything that a report shows, including the SHA-256 of every checkpoint.

    ``most`` limits the details of rounds and the checkpoints to those of the last rounds.

    Raises:
        UsageError: if the folder holds no run, or its files cannot be read.
    """
    lines = read_history_lines(folder)
    rows, last = merged(lines), lines[-1:]
    files = list(checkpoint_files(folder).values())
    checkpoints = list(filter(None, map(_checkpoint, files[-most:])))
    end = next((line for line in last if line["event"] == "ended"), None)
    data = snapshot(rows, read_run_file(folder), checkpoints, end, now)
    data["totals"]["checkpoints"] = len(files) - len(files[-most:]) + len(checkpoints)
    return {**data, "rounds": data["rounds"][-most:]}


def snapshot(
    rows: Iterable[Mapping[str, Any]],
    identity: Mapping[str, Any],
    checkpoints: Sequence[Mapping[str, Any]],
    end: Mapping[str, Any] | None,
    now: float,
) -> dict[str, Any]:
    """Return everything that a report shows as plain data, one key per section.

    ``rows`` is the history, one row per round; ``identity`` the content of ``run.json``; ``end``
    the history's ``ended`` line, None if the run has not ended.
    """
    view = RunView(whole=True)
    view.remember(rows)
    configurations = _used(identity.get("configurations", ()))
    planned = configurations[-1].get("rules", {}).get("rounds") if configurations else None
    done = f"{view.committed} of {planned}" if planned else str(view.committed)
    words = f"{done} rounds are committed; the run had not ended when this report was written"
    if end is not None:
        words = ending(from_fields(str(end.get("outcome")), end))
    run = {
        "federation": str(identity.get("federation") or "a federation"),
        "source": "history",
        "run": str(identity.get("run", "")),
        "version": version("fluffle"),
        "phase": "waiting" if end is None else "ended",
        "outcome": None if end is None else end.get("outcome"),
        "words": words,
        "round": view.committed,
        "rounds": planned,
        "committed": view.committed,
    }
    return {
        "now": now,
        "run": run,
        "totals": {
            "opened_at": view.done[0].opened_at if view.done else None,
            "updates": sum(len(each.answers) for each in view.done),
            "seconds": sum(seconds_of(each.timings) for each in view.done),
            "checkpoints": len(checkpoints),
        },
        **results(view),
        "configurations": configurations,
        "checkpoints": list(checkpoints),
    }


def _used(configurations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the configurations under which a round of the run was committed, and the last."""
    used: list[Mapping[str, Any]] = []
    until = math.inf  # the first round that belongs to a later configuration
    for each in reversed(configurations):
        from_round = each.get("from_round", 0)
        if from_round < until:
            used.append(each)
        until = min(until, from_round)
    return used[::-1]


def page(data: Mapping[str, Any]) -> str:
    """Return the HTML that shows a snapshot; nothing in the data can act as markup or script."""
    refused = {**data["rejected"], "latest": data["rejected"]["latest"][-_MAX_REJECTIONS:]}
    data = {**data, **named(data["rounds"], _MAX_CELLS), "rejected": refused}
    icon = base64.b64encode(_static("icon.svg").encode()).decode()
    style, theme = _static("page.css"), _static("theme.js")
    script = "\n".join(_IMPORTS.sub("", _static(name)) for name in _SCRIPTS)
    script = re.sub(r"^export ", "", script, flags=re.MULTILINE)
    policy = (
        '<meta http-equiv="Content-Security-Policy" content="'
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f'style-src {_hash(style)}; script-src {_hash(theme)} {_hash(script)}">'
    )
    # JSON has these characters only inside strings, where the escape means the same.
    text = json_line(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    html = _LIVE_ONLY.sub("", _static("page.html"))
    for part, replacement in (
        ('href="icon.svg"', f'href="data:image/svg+xml;base64,{icon}"'),
        ('src="icon.svg"', f'src="data:image/svg+xml;base64,{icon}"'),
        ('<link rel="stylesheet" href="page.css">', f"<style>{style}</style>"),
        ('<script src="theme.js"></script>', f"<script>{theme}</script>"),
        (
            '<script src="page.js" type="module"></script>',
            f'<script type="module">{script}</script>',
        ),
        (
            "<body>",
            f'<body data-frozen>\n<script type="application/json" id="snapshot">{text}</script>',
        ),
        ("<title>fluffle</title>", f"<title>{escape(data['run']['federation'])}: report</title>"),
        ('<meta charset="utf-8">', f'<meta charset="utf-8">\n  {policy}'),
    ):
        assert part in html, part
        html = html.replace(part, replacement, 1)
    return html


def _static(name: str) -> str:
    return (files("fluffle_coordinator.dashboard") / "static" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """Return the Content-Security-Policy source expression that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _checkpoint(path: Path) -> dict[str, Any] | None:
    """Describe a checkpoint; None if a coordinator with --keep-checkpoints has just removed it."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"file": path.name, "size_bytes": file.tell(), "sha256": digest}
    except FileNotFoundError:
        return None
    except OSError as why:
        raise UsageError(f"{path} cannot be read ({why.strerror})") from None

"""The report of a run as one HTML page: it needs no script, no network and no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from string import Template

from fluffle_common.clock import timestamp
from fluffle_coordinator.dashboard.charts import Series, Square, line_chart, matrix, stacked_bars
from fluffle_coordinator.dashboard.report_numbers import PHASES, Cell, Numbers, RoundRow, WorkerRow
from fluffle_coordinator.observe import formatting


def page(numbers: Numbers) -> str:
    """Return the page; everything in it that came from outside is escaped."""
    template = (
        files("fluffle_coordinator.dashboard").joinpath("report_page.html").read_text("utf-8")
    )
    sections = (
        _curves, _participation, _time, _refused, _rounds, _configuration, _versions, _checkpoints,
    )  # fmt: skip
    return Template(template).substitute(
        title=escape(numbers.federation or "a federation"),
        subtitle=_subtitle(numbers),
        tiles="\n".join(_tiles(numbers)),
        sections="\n".join(section(numbers) for section in sections),
        footer=escape(
            f"Written by fluffle {version('fluffle')}, {formatting.moment(timestamp())}."
        ),
    )


# --- the top -----------------------------------------------------------------------------------


def _subtitle(numbers: Numbers) -> str:
    told = [f"run <code>{escape(numbers.run or '?')}</code>"]
    if numbers.rounds:
        began, ended = numbers.rounds[0].opened_at, numbers.rounds[-1].committed_at
        if began and ended:
            told.append(escape(f"{formatting.moment(began)} to {formatting.moment(ended)}"))
    return " · ".join(told)


def _tiles(numbers: Numbers) -> Iterable[str]:
    rounds = numbers.rounds
    rules = numbers.configurations[-1].get("rules", {}) if numbers.configurations else {}
    wanted = f" of {rules['rounds']}" if "rounds" in rules else ""
    yield _tile(f"{len(rounds)}{wanted}", "rounds committed")
    for name in numbers.metrics[:1]:
        values = [one.metrics[name] for one in rounds if name in one.metrics]
        yield _tile(formatting.as_metric(name)(values[-1]), f"federated {name}")
    losses = [one.loss for one in rounds if one.loss is not None]
    if losses:
        yield _tile(f"{losses[-1]:.4f}", "federated loss")
    yield _tile(str(len(numbers.workers)), "workers")
    yield _tile(f"{sum(one.participants for one in rounds):,}", "updates counted")
    took = [one.seconds for one in rounds if one.seconds is not None]
    if took:
        yield _tile(formatting.duration(sum(took)), "in committed rounds")
    late, rejected = sum(one.late for one in rounds), sum(one.rejected for one in rounds)
    yield _tile(str(late), "late", "odd" if late else "")
    yield _tile(str(rejected), "rejected", "bad" if rejected else "")


def _tile(value: str, words: str, kind: str = "") -> str:
    return f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


# --- the sections ------------------------------------------------------------------------------


def _curves(numbers: Numbers) -> str:
    rounds = numbers.rounds
    at = [one.number for one in rounds]
    figures = []
    for name in numbers.metrics:
        values = [one.metrics.get(name) for one in rounds]
        limits = (0.0, 1.0) if name == "accuracy" else None
        series = [Series(f"federated {name}", "one", values)]
        chart = line_chart(f"{name} by round", at, series, formatting.as_metric(name), limits)
        figures.append(_figure(f"Federated {name}", "", chart))
    losses = [
        Series("federated loss", "two", [one.loss for one in rounds]),
        Series("training loss", "three", [one.train_loss for one in rounds]),
    ]
    losses = [one for one in losses if any(value is not None for value in one.values)]
    if losses:
        keys = _keys((one.colour, one.name) for one in losses)
        chart = line_chart("loss by round", at, losses, formatting.short)
        figures.insert(1, _figure("Loss", keys, chart))
    if not figures:
        return _section("Curves", "No round has been evaluated yet.", "")
    words = (
        "The model of each round on the held-out data of the workers, weighted by their number of "
        "examples. Training loss is what they report of their own training in that round."
    )
    return _section("Curves", words, f'<div class="pair">{"".join(figures)}</div>')


def _participation(numbers: Numbers) -> str:
    at = [one.number for one in numbers.rounds]
    most = max((cell.num_examples for row in numbers.workers for cell in row.cells), default=1)
    rows = [
        (row.name, [_square(row, n, cell, most) for n, cell in zip(at, row.cells, strict=True)],
         f"{row.counted} of {len(at)}")
        for row in numbers.workers
    ]  # fmt: skip
    keys = _keys(
        (f"cell {kind}", words)
        for kind, words in (
            ("counted", "counted, with its number of examples"),
            ("late", "late, discarded"),
            ("no-answer", "asked, no answer counted"),
            ("absent", "not asked"),
        )
    )
    table = _table(
        ("worker", "counted #", "late #", "rejected #", "training, mean #", "sent #"),
        (
            (row.name, str(row.counted), str(row.late), str(row.rejected),
             "" if row.train_s is None else formatting.duration(row.train_s),
             formatting.size(row.bytes))
            for row in numbers.workers
        ),
    )  # fmt: skip
    words = "Who was in the average of which round."
    chart = f'<div class="wide">{matrix("participation by worker and round", at, rows)}</div>'
    return _section("Participation", words, f"{keys}{chart}{table}", long=True)


def _square(row: WorkerRow, number: int, cell: Cell, most: int) -> Square:
    examples = f", {cell.num_examples:,} examples" if cell.num_examples else ""
    told = f"{row.name}, round {number}: {cell.answer}{examples}"
    text = {"counted": formatting.count(cell.num_examples), "late": "late"}.get(cell.answer, "")
    return Square(cell.answer.replace(" ", "-"), text, told, cell.num_examples / max(1, most))


def _time(numbers: Numbers) -> str:
    timed = [one for one in numbers.rounds if one.phases is not None]
    if not timed:
        return _section("Time", "The history of this run does not tell where its time went.", "")
    sums = {name: sum((one.phases or {})[name] for one in timed) for name in PHASES}
    whole = sum(sums.values()) or 1.0
    keys = _keys(
        (name, f"{name} {formatting.duration(sums[name])} ({formatting.share(sums[name] / whole)})")
        for name in PHASES
    )
    chart = stacked_bars(
        "seconds of each phase by round",
        [one.number for one in timed],
        [one.phases for one in timed],
        {name: name for name in PHASES},
        formatting.duration,
    )
    words = (
        "From one commit to the next, along the path of the update that was counted last: waiting "
        "for workers or for those who did not answer; training as that worker measured it; "
        "transfer, with the worker's evaluation before it trained; checking and averaging; the "
        "checkpoint, on disk."
    )
    return _section("Time", words, f'{keys}<div class="wide">{chart}</div>')


def _refused(numbers: Numbers) -> str:
    odd = [one for one in numbers.rounds if one.late or one.rejected]
    if not odd:
        return _section("Late and rejected", "No update came late and no message was rejected.", "")
    at = [one.number for one in numbers.rounds]
    stacks = [{"late": one.late, "rejected": one.rejected} for one in numbers.rounds]
    chart = stacked_bars(
        "late and rejected by round",
        at,
        stacks,
        {"late": "odd", "rejected": "bad"},
        formatting.short,
        height=150,
    )
    keys = _keys((("odd", "late: discarded"), ("bad", "rejected: put into the rejected queue")))
    told = _table(
        ("during round #", "cause", "reason ~", "message", "worker", "of round #"),
        (
            tuple(formatting.words(one.get(key)) for key in
                  ("during", "cause", "reason", "kind", "worker", "round"))
            for one in numbers.rejections
        ),
    )  # fmt: skip
    missing = sum(one.rejected for one in odd) - len(numbers.rejections)
    more = f"<p>Of {missing} more the history does not tell why.</p>" if missing > 0 else ""
    words = "By the round that was open when they came."
    body = f'{keys}<div class="wide">{chart}</div>{told if numbers.rejections else ""}{more}'
    return _section("Late and rejected", words, body, long=True)


def _rounds(numbers: Numbers) -> str:
    names = numbers.metrics
    columns = ("round #", "committed", "updates #", "examples #", "train loss #", "loss #",
               *(f"{name} #" for name in names), "received #", "took #", "late #",
               "rejected #")  # fmt: skip
    return _section("Rounds", "", _table(columns, (_row(one, names) for one in numbers.rounds)),
                    long=True)  # fmt: skip


def _row(one: RoundRow, metrics: Sequence[str]) -> tuple[str, ...]:
    return (
        str(one.number),
        formatting.moment(one.committed_at) if one.committed_at else "",
        str(one.participants),
        f"{one.num_examples:,}",
        formatting.four(one.train_loss),
        formatting.four(one.loss),
        *(formatting.four(one.metrics.get(name)) for name in metrics),
        formatting.size(one.bytes) if one.bytes else "",
        "" if one.seconds is None else formatting.duration(one.seconds),
        str(one.late or ""),
        str(one.rejected or ""),
    )


def _configuration(numbers: Numbers) -> str:
    if not numbers.configurations:
        return _section("Configuration", "This run did not note how it was configured.", "")
    flat = [formatting.flat(one) for one in numbers.configurations]
    changes = [
        (after.get("from round", ""), name, before.get(name, "-"), after.get(name, "-"))
        for before, after in pairwise(flat)
        for name in sorted({**before, **after})
        if before.get(name) != after.get(name) and name not in ("from round", "since")
    ]
    body = _settings(
        (name, value)
        for name, value in flat[-1].items()
        if name not in ("from round", "since") and not name.startswith("versions ")
    )
    words = "How the coordinator was started."
    if changes:
        words = "How the coordinator was started the last time, and what changed before that."
        body += "<h3>Changes</h3>" + _table(
            ("from round #", "setting", "was ~", "became ~"), changes
        )
    return _section("Configuration", words, body)


def _versions(numbers: Numbers) -> str:
    told = numbers.configurations[-1].get("versions", {}) if numbers.configurations else {}
    if not told:
        return ""
    listed = _settings((str(name), str(value)) for name, value in told.items())
    return _section("Versions", "What the coordinator ran on.", listed)


def _checkpoints(numbers: Numbers) -> str:
    rows = (
        (one.file, formatting.size(one.size_bytes), _Code(one.sha256))
        for one in numbers.checkpoints
    )
    words = "The model after each round, round 0 being the first weights."
    return _section("Checkpoints", words, _table(("file", "size #", "SHA-256"), rows), long=True)


# --- pieces of HTML ----------------------------------------------------------------------------


class _Code(str):
    """Text that is shown as code."""

    __slots__ = ()


def _section(heading: str, words: str, body: str, *, long: bool = False) -> str:
    told = f"<p>{escape(words)}</p>" if words else ""
    kind = ' class="long"' if long else ""
    return f"<section{kind}><h2>{escape(heading)}</h2>{told}{body}</section>"


def _figure(caption: str, keys: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}{keys}</figcaption>{chart}</figure>"


def _keys(keys: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<li class="{kind}">{escape(words)}</li>' for kind, words in keys)
    return f'<ul class="keys">{items}</ul>'


def _settings(pairs: Iterable[tuple[str, str]]) -> str:
    listed = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs
    )
    return f'<dl class="settings">{"".join(listed)}</dl>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a column whose name ends in ``#`` is of numbers, in ``~`` of long texts."""
    kinds = [{"#": ' class="n"', "~": ' class="w"'}.get(name[-1], "") for name in columns]
    heads = "".join(
        f"<th{kind}>{escape(name.rstrip(' #~'))}</th>"
        for name, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_cell(value)}</td>" for value, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{heads}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _cell(value: str) -> str:
    return f"<code>{escape(value)}</code>" if isinstance(value, _Code) else escape(value)

"""The chart of a run's history."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from fluffle_coordinator.cli import history_chart as history_chart_module
from fluffle_coordinator.cli.coordinator import plot
from fluffle_coordinator.cli.history_chart import history_chart
from fluffle_coordinator.storage import history


def test_the_chart_of_many_rounds_has_few_ticks():
    pytest.importorskip("matplotlib")
    numbers = range(1, 501)
    figure = history_chart(numbers, {"loss": [1 / n for n in numbers], "accuracy": [0.5] * 500})
    assert {line.get_marker() for axes in figure.axes for line in axes.lines} == {"None"}
    ticks = figure.axes[0].get_xticks()
    assert 3 < len(ticks) < 20
    assert all(tick == int(tick) for tick in ticks)


def test_a_notebook_displays_a_chart_without_pyplot():
    pytest.importorskip("matplotlib")
    image = history_chart([1, 2], {"loss": [1.0, 0.5]})._repr_png_()
    assert image.startswith(b"\x89PNG")


def test_a_metric_of_every_second_round_is_a_curve():
    pytest.importorskip("matplotlib")
    numbers = range(1, 101)
    tested = [0.5 if n % 2 == 0 else None for n in numbers]
    figure = history_chart(numbers, {"test/accuracy": tested, "mae": [None] * 100})
    curve, empty = figure.axes[0].lines
    assert list(curve.get_xdata()) == list(range(2, 101, 2))
    assert list(curve.get_ydata()) == [0.5] * 50
    assert not len(empty.get_xdata())


def test_a_worker_cannot_prevent_the_drawing_with_an_extreme_loss(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    losses = (1.7e308, -1.7e308, 0.5)
    figure = history_chart([1, 2, 3], {"loss": losses, "accuracy": losses})
    figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_draws_every_metric_also_of_a_run_that_is_only_tested(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    row = {"round": 1, "test/loss": 0.5, "test/mae": 0.25}
    monkeypatch.setattr(history, "read_history", lambda _: [row])
    drawn = []
    monkeypatch.setattr(
        history_chart_module,
        "history_chart",
        lambda *given: drawn.append(given) or history_chart(*given),
    )
    flags = ["--run", str(tmp_path), "--out", str(tmp_path / "history.png")]
    CliRunner().invoke(plot, flags, catch_exceptions=False)
    assert drawn == [([1], {"test/loss": [0.5], "test/mae": [0.25]})]


def test_a_backend_that_is_not_installed_does_not_prevent_a_chart(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys\n"
        "from fluffle_coordinator.cli.coordinator import plot\n"
        "from fluffle_coordinator.storage import history\n"
        "history.read_history = lambda _: [{'round': 1, 'loss': 0.5}]\n"
        "plot(['--run', '.', '--out', sys.argv[1]])\n"
    )
    chart = tmp_path / "history.png"
    # Jupyter names its own for all commands, which may have another environment's packages.
    environment = {**os.environ, "MPLBACKEND": "nowhere"}
    subprocess.run([sys.executable, "-c", code, chart], env=environment, check=True)
    assert chart.read_bytes().startswith(b"\x89PNG")

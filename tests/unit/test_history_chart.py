"""The chart of a run's history."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import fluffle
from fluffle_coordinator.cli import history_chart as history_chart_module
from fluffle_coordinator.cli.history import plot
from fluffle_coordinator.cli.history_chart import history_chart
from tests.history_lines import committed, evaluated, participant, scored, write_history


def test_the_chart_of_many_rounds_has_few_ticks():
    pytest.importorskip("matplotlib")
    figure = history_chart([{"round": n, "loss": 1 / n, "accuracy": 0.5} for n in range(1, 501)])
    assert {line.get_marker() for axes in figure.axes for line in axes.lines} == {"None"}
    ticks = figure.axes[0].get_xticks()
    assert 3 < len(ticks) < 20
    assert all(tick == int(tick) for tick in ticks)


def test_a_notebook_displays_a_chart_without_pyplot():
    pytest.importorskip("matplotlib")
    image = history_chart([{"round": 1, "loss": 0.5}])._repr_png_()
    assert image.startswith(b"\x89PNG")


def test_a_metric_of_every_second_round_is_a_curve():
    pytest.importorskip("matplotlib")
    tested = {n: {"test/accuracy": 0.5} if n % 2 == 0 else {} for n in range(1, 101)}
    figure = history_chart([{"round": n, **metrics} for n, metrics in tested.items()])
    (curve,) = figure.axes[0].lines
    assert list(curve.get_xdata()) == list(range(2, 101, 2))
    assert list(curve.get_ydata()) == [0.5] * 50


def test_a_worker_cannot_prevent_the_drawing_with_an_extreme_loss(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    losses = (1.7e308, -1.7e308, 0.5)
    figure = history_chart(
        [{"round": n, "loss": loss, "accuracy": loss} for n, loss in enumerate(losses, 1)]
    )
    figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "lines",
    [
        [committed(1), scored(1, **{"test/loss": 0.5, "test/mae": 0.25})],
        [committed(1, participant("a", train_loss=0.75), epsilon=2.0), evaluated(1, 字=0.5)],
    ],
)
def test_the_command_draws_every_column_of_the_history(tmp_path, monkeypatch, lines):
    pytest.importorskip("matplotlib")
    write_history(tmp_path, *lines)
    drawn = []

    def draw(rounds):
        figure = history_chart(rounds)
        drawn.extend(line.get_label() for axes in figure.axes for line in axes.lines)
        return figure

    monkeypatch.setattr(history_chart_module, "history_chart", draw)
    flags = [str(tmp_path), "--out", str(tmp_path / "history.png")]
    CliRunner().invoke(plot, flags, catch_exceptions=False)
    assert sorted(drawn) == sorted(fluffle.Run(tmp_path).history.columns)
    assert len(drawn) >= 2


def test_a_backend_that_is_not_installed_does_not_prevent_a_chart(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys\n"
        "from fluffle_coordinator.cli.history import plot\n"
        "plot([sys.argv[1], '--out', sys.argv[2]])\n"
    )
    write_history(tmp_path, committed(1), evaluated(1))
    chart = tmp_path / "history.png"
    # Jupyter names its own for all commands, which may have another environment's packages.
    environment = {**os.environ, "MPLBACKEND": "nowhere"}
    subprocess.run([sys.executable, "-c", code, tmp_path, chart], env=environment, check=True)
    assert chart.read_bytes().startswith(b"\x89PNG")

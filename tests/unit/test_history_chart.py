"""The chart of a run's history."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fluffle_coordinator.cli.history_table import draw_history


def test_the_chart_of_many_rounds_has_few_ticks(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda _figure: None)
    rounds = [{"round": number, "loss": 1 / number, "accuracy": 0.5} for number in range(1, 501)]
    draw_history(rounds, tmp_path / "history.png")
    figure = plt.gcf()
    monkeypatch.undo()
    ticks = figure.axes[0].get_xticks()
    assert {line.get_marker() for axes in figure.axes for line in axes.lines} == {"None"}
    assert figure.axes[-1].get_legend()  # an earlier axis lies below the curve of the loss
    plt.close(figure)
    assert (tmp_path / "history.png").stat().st_size > 1000
    assert 3 < len(ticks) < 20
    assert all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("losses", "bottom"), [((0.5, 0.2), 0), ((-1, -2), -2.05), ((1, -1), -1.1)]
)
def test_the_chart_shows_losses_below_zero(tmp_path, monkeypatch, losses, bottom):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda _figure: None)
    rounds = [{"round": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    draw_history(rounds, tmp_path / "history.png")
    figure = plt.gcf()
    monkeypatch.undo()
    low, high = figure.axes[0].get_ylim()
    plt.close(figure)
    assert low == pytest.approx(bottom)
    assert high > max(losses)


def test_a_worker_cannot_prevent_the_drawing_with_an_extreme_loss(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    losses = (1.7e308, -1.7e308, 0.5)
    rounds = [
        {"round": number, "loss": loss, "accuracy": loss} for number, loss in enumerate(losses)
    ]
    draw_history(rounds, tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


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

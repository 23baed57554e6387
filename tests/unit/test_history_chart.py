"""The chart of a run's history."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fluffle_coordinator.cli.history_chart import history_figure

pytest.importorskip("matplotlib")


def panels(figure):
    return [[line.get_label() for line in axes.lines] for axes in figure.axes]


def test_the_chart_of_many_rounds_has_few_ticks():
    rounds = [{"round": number, "loss": 1 / number, "accuracy": 0.5} for number in range(1, 501)]
    figure = history_figure(rounds)
    assert {line.get_marker() for axes in figure.axes for line in axes.lines} == {"None"}
    for axes in figure.axes:
        assert axes.get_legend()
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 3 < len(ticks) < 20
        assert all(tick == int(tick) for tick in ticks)


def test_a_metric_shares_its_panel_with_its_test():
    measured = {"mae": 0.5, "test/mae": 0.6, "test/loss": 0.1, "recall": 0.2, "f1": 0.3}
    updates = [{"worker": "a", "num_examples": 1, "train_loss": 0.4}]
    figure = history_figure([{"round": 1, "participants": updates, "epsilon": 2.0, **measured}])
    losses, *others = panels(figure)
    assert losses == ["train_loss", "test/loss"]
    assert others == [["mae", "test/mae"], ["recall"], ["f1"], ["epsilon"]]


def test_the_chart_shows_losses_below_zero_and_gaps():
    figure = history_figure([{"round": 1, "loss": -1.0}, {"round": 2}, {"round": 3, "loss": 1.0}])
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low < -1
    assert high > 1


def test_a_worker_cannot_prevent_the_drawing_with_an_extreme_loss(tmp_path) -> None:
    losses = (1.7e308, -1.7e308, 0.5)
    rounds = [
        {"round": number, "loss": loss, "accuracy": loss} for number, loss in enumerate(losses)
    ]
    history_figure(rounds).savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_a_backend_that_is_not_installed_does_not_prevent_a_chart(tmp_path) -> None:
    code = (
        "import sys\n"
        "from fluffle_coordinator.cli.coordinator import plot\n"
        "from fluffle_coordinator.storage import history\n"
        "history.read_history = lambda _: [{'round': 1, 'test/loss': 0.5}]\n"
        "plot(['--run', '.', '--out', sys.argv[1]])\n"
    )
    chart = tmp_path / "history.png"
    # Jupyter names its own for all commands, which may have another environment's packages.
    environment = {**os.environ, "MPLBACKEND": "nowhere"}
    subprocess.run([sys.executable, "-c", code, chart], env=environment, check=True)
    assert chart.read_bytes().startswith(b"\x89PNG")

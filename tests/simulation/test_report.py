"""The report of a simulation with many clients, in a real browser."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

import fluffle
from fluffle_coordinator.cli.run_folder import report
from tests.browser import chromium, window
from tests.simulation.test_simulation import Adder


@pytest.mark.parametrize("width", [1280, 390])
def test_of_many_clients_a_report_shows_those_that_are_looked_for(width, tmp_path):
    tasks = {f"client-{number:03}": Adder(1.0, 10 + number) for number in range(200)}
    fluffle.simulate(tasks, rounds=2, folder=tmp_path)
    CliRunner().invoke(report, [str(tmp_path)], catch_exceptions=False)
    address = (tmp_path / "report.html").as_uri()
    with chromium() as browser, window(browser, address, width=width) as shown:
        names = shown.page.locator("#workers tr th")
        assert shown.wait("#workers tr th") == "client-000"
        assert names.count() == 25
        shown.page.locator("#workers-more").click()
        assert names.count() == 50
        shown.page.select_option("#workers-order", "num_examples")
        assert names.first.inner_text() == "client-199"
        shown.page.fill("#workers-name", "12")
        assert sorted(names.all_inner_texts()) == sorted(name for name in tasks if "12" in name)
        assert not shown.page.locator("#workers-more").is_visible()
        assert shown.page.evaluate("document.documentElement.scrollWidth") == width
        assert shown.complaints == []

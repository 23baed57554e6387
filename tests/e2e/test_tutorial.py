"""The tutorial and the README's Python do what they say, block after block, in one session."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluffle_broker.node.node import NodeInfo
from fluffle_common.cli.config_file import options_from
from fluffle_coordinator.cli.coordinator import coordinator
from tests.e2e.manage import add_vhost, manage
from tests.e2e.programs import ROOT

TUTORIAL = ROOT / "docs/tutorial.md"
README = ROOT / "README.md"
URL = "amqp://127.0.0.1:5673/"


@pytest.fixture
def rabbit_url(broker_node: NodeInfo) -> Iterator[str]:
    """Yield the URL of a vhost, since all blocks use the same name of a federation."""
    vhost = f"tutorial-{uuid.uuid4().hex[:8]}"
    add_vhost(broker_node, vhost)
    yield f"{broker_node.url}{vhost}"
    manage(broker_node, "DELETE", f"vhosts/{vhost}")


def blocks(language: str, page: Path = TUTORIAL) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def rows(history: str) -> dict[int, list[float]]:
    cells = [line.split() for line in history.splitlines()]
    return {int(row[0]): [*map(float, row[1:])] for row in cells if row and row[0].isdigit()}


@pytest.mark.rabbit
def test_every_block_runs_after_those_before(
    rabbit_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block.replace(URL, rabbit_url), "docs/tutorial.md", "exec"), session)
        run = session.get("run")
        if block.endswith("\nrun\n"):
            shown, printed = rows(blocks("text")[0]), rows(str(run))
            assert list(shown) == [1, 8]
            for number, figures in shown.items():
                assert printed[number] == pytest.approx(figures, abs=0.01)  # CPUs differ a little
        if "evaluate=test" in block:
            assert run.reason.endswith("of the test images are classified correctly")
            assert run.history["test/accuracy"][-1] > 0.85
        elif run is not None:
            assert run.reason.endswith("rounds are done")
            assert run.history["accuracy"][-1] > 0.8
    assert sum(URL in block for block in blocks("python")) == 1


@pytest.mark.rabbit
def test_the_block_of_the_readme_can_be_pasted(
    rabbit_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # the block says to start Python there
    (block,) = [one for one in blocks("python", README) if "fluffle.run(" in one]
    assert URL in block
    session: dict[str, object] = {}
    exec(compile(block.replace(URL, rabbit_url), "README.md", "exec"), session)
    assert session["run"].history["accuracy"][-1] > 0.8


def test_the_file_that_describes_a_federation_names_options_that_there_are() -> None:
    import tomllib

    (text,) = blocks("toml")
    given = {name.replace("-", "_"): value for name, value in tomllib.loads(text).items()}
    assert options_from(coordinator, given, "the tutorial")["quorum"].number == 3

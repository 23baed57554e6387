"""The tutorial does what it says, block after block, in one Python session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fluffle_common.cli.config_file import options_from
from fluffle_coordinator.cli.coordinator import coordinator
from tests.e2e.programs import ROOT

TEXT = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
URL = "amqp://127.0.0.1:5673/"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.rabbit
def test_every_block_runs_after_those_before(
    rabbit_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block.replace(URL, rabbit_url), "docs/tutorial.md", "exec"), session)
        run = session.get("run")
        if "evaluate=test" in block:
            assert run.reason.endswith("of the test are right")
            assert run.history["test/accuracy"][-1] > 0.85
        elif run is not None:
            assert run.reason.endswith("rounds are done")
            assert run.history["accuracy"][-1] > 0.8
    assert sum(URL in block for block in blocks("python")) == 1


def test_the_file_that_describes_a_federation_names_options_that_there_are() -> None:
    import tomllib

    (text,) = blocks("toml")
    given = {name.replace("-", "_"): value for name, value in tomllib.loads(text).items()}
    assert options_from(coordinator, given, "the tutorial")["quorum"].number == 3

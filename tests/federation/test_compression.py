"""Whole federations whose coordinator wants its updates in fewer bytes."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import fluffle
from fluffle_coordinator.cli.run_folder import replay
from tests.federation.pull_task import COUNT, Pull, target

ROUNDS = 8
PLAIN_BYTES = 4 * COUNT


# ``most``: bytes of an update, as a part of a plain one's. ``off``: how much of the way is left at
# the end; owners who disagree so much never stop pulling, and what top-k holds back pulls late.
@pytest.mark.parametrize(
    ("options", "most", "off"),
    [
        ({"compress": "int8"}, 0.3, 0.01),
        ({"upload_dtype": "bf16"}, 0.51, 0.01),
        ({"compress": "topk:0.3"}, 0.61, 0.4),
    ],
)
def test_it_converges_in_fewer_bytes(tmp_path, options, most, off):
    found = fluffle.run(
        [Pull(1), Pull(2)], rounds=ROUNDS, folder=tmp_path, keep_updates=True, **options
    )
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    committed = [line for line in map(json.loads, lines) if line["event"] == "committed"]
    assert len(committed) == ROUNDS
    sent = [one["bytes"] for line in committed for one in line["participants"]]
    assert max(sent) < most * PLAIN_BYTES

    wanted = (target(1) + target(2)) / 2
    start_off = np.sqrt(np.mean(wanted**2))
    assert np.sqrt(np.mean((found.weights["w"] - wanted) ** 2)) < off * start_off

    again = CliRunner().invoke(replay, [str(tmp_path), "--round", str(ROUNDS)])
    assert again.exit_code == 0, again.output

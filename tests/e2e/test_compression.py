"""Whole federations whose coordinator wants its updates in fewer bytes."""

import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.programs import FLUFFLE, ROOT, Federation
from tests.e2e.pull_task import COUNT, target

pytestmark = pytest.mark.rabbit
TASK = f"{ROOT / 'tests/e2e/pull_task.py'}:task"
ROUNDS = 8
PLAIN_BYTES = 4 * COUNT


# ``most``: bytes of an update, as a part of a plain one's. ``off``: how much of the way is left at
# the end; owners who disagree so much never stop pulling, and what top-k holds back pulls late.
@pytest.mark.parametrize(
    ("flags", "most", "off"),
    [
        (["--compress", "int8"], 0.3, 0.01),
        (["--upload-dtype", "bf16"], 0.51, 0.01),
        (["--compress", "topk:0.3"], 0.61, 0.4),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_it_converges_in_fewer_bytes(federation: Federation, flags, most, off) -> None:
    coordinator = federation.coordinator(
        "--quorum", 2, "--rounds", ROUNDS, "--keep-updates", *flags
    )
    workers = [federation.worker(f"owner-{seed}", task=TASK) for seed in (1, 2)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]
    lines = (federation.run / "history.jsonl").read_text().splitlines()
    committed = [line for line in map(json.loads, lines) if line["event"] == "committed"]
    assert len(committed) == ROUNDS
    sent = [one["bytes"] for line in committed for one in line["participants"]]
    assert max(sent) < most * PLAIN_BYTES

    wanted = (target(1) + target(2)) / 2
    found = load_file(federation.run / f"round-{ROUNDS:04d}.safetensors")["w"]
    start_off = np.sqrt(np.mean(wanted**2))
    assert np.sqrt(np.mean((found - wanted) ** 2)) < off * start_off

    again = subprocess.run(
        [FLUFFLE, "replay", federation.run, "--round", str(ROUNDS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr

"""A codec and a local rule from a user's own files, named on the command line."""

import json
import re
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.programs import FLUFFLE, ROOT, Federation

pytestmark = pytest.mark.rabbit
SIGNS = re.search(r"```python\n# signs.py\n(.*?)```", (ROOT / "docs/codecs.md").read_text(), re.S)
PROXIMAL = f"{ROOT / 'tests/federation/proximal.py'}:proximal"
TASK = """
import numpy as np
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.task import TrainResult

class Pull:
    num_examples = 1
    def __init__(self):
        self.local_rule = BoundRule()
    def init(self, seed):
        return {"w": np.zeros(4000, np.float32)}
    def evaluate(self, weights):
        return None
    def train(self, weights, plan, progress):
        state = self.local_rule.begin(weights)
        for step in (1, 2):
            gradient, state = self.local_rule.gradient({"w": weights["w"] - 1}, weights, state)
            weights = {"w": weights["w"] - np.float32(0.5) * gradient["w"]}
            progress(step, 2, None)
        self.local_rule.end(weights, state)
        return TrainResult(weights, 1)

def task(options):
    return Pull()
"""


def test_both_are_named_on_the_command_line(federation: Federation, tmp_path) -> None:
    assert SIGNS is not None
    signs, task = tmp_path / "signs.py", tmp_path / "pull.py"
    signs.write_text(SIGNS.group(1))
    task.write_text(TASK)
    coordinator = federation.coordinator(
        "--quorum", 1, "--rounds", 1, "--compress", f"{signs}:Signs", "--keep-updates"
    )
    flags = ("--codec", f"{signs}:Signs", "--local-rule", PROXIMAL)
    worker = federation.worker("owner-1", *flags, task=f"{task}:task")
    assert [program.end() for program in (coordinator, worker)] == [0, 0]
    # 0.5, then half of 0.5 - 0.5 * 0.5 more; all alike, the signs lose nothing.
    np.testing.assert_allclose(load_file(federation.run / "round-0001.safetensors")["w"], 0.625)
    lines = map(json.loads, (federation.run / "history.jsonl").read_text().splitlines())
    (committed,) = [line for line in lines if line["event"] == "committed"]
    assert committed["participants"][0]["bytes"] < 5000

    def replay(*more: str) -> subprocess.CompletedProcess[str]:
        words = [FLUFFLE, "replay", str(federation.run), "--round", "1", *more]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    again = replay("--codec", f"{signs}:Signs")
    assert again.returncode == 0, again.stdout + again.stderr
    without = replay()
    assert without.returncode == 2
    assert "unknown codec 'signs'" in without.stderr
    assert "--codec" in without.stderr

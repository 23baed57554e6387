"""Federations with a codec or a local rule from a user's file."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from fluffle_common.cli.loading import load_object
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.messages import Compression, Plan
from fluffle_common.tensors.codecs.registry import CODECS, Registry
from fluffle_coordinator.cli.plan_options import COMPRESS
from fluffle_worker.local import loading
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.loading import find_rule, use_local_rule
from fluffle_worker.task import EvalResult, TrainResult
from fluffle_worker.tasks.flax import flax_task
from tests.federation.harness import Adder

ROOT = Path(__file__).parents[2]
PROXIMAL = f"{Path(__file__).parent / 'proximal.py'}:proximal"
INSTALLED = object()
SIZE = 2000  # float32, each 1.0, which the codec of the docs encodes without loss
DOCS = [(ROOT / "docs" / name).read_text() for name in ("codecs.md", "tasks.md")]
BLOCKS = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", "".join(DOCS), re.S)


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that writes an edited example of the docs to disk and returns its path."""
    monkeypatch.setattr(CODECS, "_codecs", dict(CODECS._codecs))

    def write(name: str, *changes: tuple[str, str], into: str = "") -> str:
        text = dict(BLOCKS)[name]
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / (into or name)
        path.write_text(text)
        return str(path)

    return write


def registry_with(path: str) -> Registry:
    """Return the codecs of a worker with ``--codec``."""
    codecs = Registry()
    codecs.add(load_object(f"{path}:Signs", "--codec"), path)
    return codecs


# --- codecs --------------------------------------------------------------------------------------


def test_a_federation_uses_a_codec_from_a_file(federated, documented):
    path = documented("signs.py")
    how = COMPRESS.convert(f"{path}:Signs", None, None)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=3, plan=Plan(compress=Compression.parse(how)))
        for value, name in ((1.0, "a"), (3.0, "b")):
            task = Adder(federation.loop, value, size=SIZE)
            federation.worker(name, task, codecs=registry_with(path))
        assert (await coordinator.end()).outcome == "finished"
        federation.check_averages({"a": 1.0, "b": 3.0})
        sent = [one["bytes"] for line in federation.history() for one in line["participants"]]
        assert len(sent) == 6
        assert max(sent) < SIZE + 1000
        assert not coordinator.log.of("rejected")

    federated(scenario)


def test_a_worker_without_the_codec_names_it_and_the_round_continues(federated, documented):
    path = documented("signs.py")
    how = COMPRESS.convert(f"{path}:Signs", None, None)

    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=2, number=2, plan=Plan(compress=Compression.parse(how))
        )
        for name in "ab":
            task = Adder(federation.loop, size=SIZE)
            federation.worker(name, task, codecs=registry_with(path))
        lacking = Adder(federation.loop, size=SIZE)
        c = federation.worker("c", lacking, codecs=Registry())
        await coordinator.end()
        assert federation.participants() == [["a", "b"]] * 2
        federation.check_averages({"a": 1.0, "b": 1.0})
        (event, *_) = c.log.of("failure")
        assert "codec 'signs', which this worker does not have" in event["reason"]
        assert "--codec path.py:name" in event["reason"]
        assert lacking.trained == []  # no wasted training
        assert any("--codec path.py:name" in str(one) for one in coordinator.log.of("failure"))

    federated(scenario)


def test_settings_that_a_workers_codec_refuses_are_reported(federated, documented):
    path = documented("signs.py")
    how = COMPRESS.convert(f"{path}:Signs:4", None, None)
    old = documented("signs.py", ("return cls()", "return cls(int(text))"), into="old.py")

    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=1, number=1, min_workers=2, plan=Plan(compress=Compression.parse(how))
        )
        federation.worker("a", Adder(federation.loop, size=SIZE), codecs=registry_with(path))
        b = federation.worker("b", Adder(federation.loop, size=SIZE), codecs=registry_with(old))
        await coordinator.end()
        reason = b.log.of("failure")[0]["reason"]
        assert re.search(
            r"^the codec 'signs' rejects the .* --compress signs:4: Val.*\(old.py:\d+\)$",
            reason,
        )
        (trace,) = b.log.of("traceback")
        assert "return cls(int(text))" in trace["text"]

    federated(scenario)


def test_a_failing_encode_costs_its_worker_the_round(federated, documented):
    path = documented("signs.py")
    how = COMPRESS.convert(f"{path}:Signs", None, None)
    broken = documented("signs.py", ("np.sign(tensor)", "np.no_sign(tensor)"), into="broken.py")

    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=2, number=1, min_workers=2, plan=Plan(compress=Compression.parse(how))
        )
        federation.worker("a", Adder(federation.loop, size=SIZE), codecs=registry_with(path))
        task = Adder(federation.loop, size=SIZE, steps=1)
        b = federation.worker("b", task, codecs=registry_with(broken))
        await coordinator.end()
        assert federation.participants() == [["a"]] * 2
        reason = b.log.of("failure")[0]["reason"]
        assert re.search(r"'signs' fails to encode tensor 'w': Attr.* \(broken.py:\d+\)", reason)
        (trace,) = b.log.of("traceback")  # once, and only from the user's file
        assert "np.no_sign(tensor)" in trace["text"]
        assert "fluffle_" not in trace["text"].replace("fluffle_user", "")

    federated(scenario)


def test_an_update_that_cannot_be_decoded_is_rejected_and_trained_again(federated, documented):
    good = documented("signs.py")
    fails_once = (
        "sign, size = parts",
        "Signs.calls = getattr(Signs, 'calls', 0) + 1\n"
        "        sign, size = parts if Signs.calls > 1 else 0",
    )
    bad = documented("signs.py", fails_once, into="bad.py")
    how = COMPRESS.convert(f"{bad}:Signs", None, None)

    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=1, number=2, plan=Plan(compress=Compression.parse(how))
        )
        for name in "ab":
            task = Adder(federation.loop, size=SIZE)
            federation.worker(name, task, codecs=registry_with(good))
        await coordinator.end()
        federation.check_averages({"a": 1.0, "b": 1.0})
        assert federation.participants() == [["a", "b"]]
        (event,) = coordinator.log.of("rejected")
        assert "'signs' fails to decode tensor 'w': TypeError" in event["reason"]
        assert "(bad.py:" in event["reason"]

    federated(scenario)


# --- local rules ---------------------------------------------------------------------------------


class Pull:
    """A NumPy task that steps towards ``target`` and applies a local rule."""

    num_examples = 10

    def __init__(self, target: float) -> None:
        self.target, self.local_rule = target, BoundRule()

    def init(self, seed: int) -> Any:
        return {"w": np.zeros(3, np.float32)}

    def evaluate(self, weights: Any) -> EvalResult:
        return EvalResult(0.0, 1)

    def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
        state = self.local_rule.begin(weights)
        for number in range(1, 6):
            gradient = {"w": weights["w"] - np.float32(self.target)}
            gradient, state = self.local_rule.gradient(gradient, weights, state)
            weights = {"w": weights["w"] - np.float32(0.5) * gradient["w"]}
            progress(number, 5, None)
        self.local_rule.end(weights, state)
        return TrainResult(weights, self.num_examples)


def pulled(start: float, targets: list[float], mu: float) -> float:
    """Return a weight after a round in which each worker takes five steps."""
    ends = []
    for target in targets:
        w = start
        for _ in range(5):
            w -= 0.5 * (w - target + mu * (w - start))
        ends.append(w)
    return float(np.mean(ends))


@pytest.mark.parametrize(("rule", "mu"), [(PROXIMAL, 0.5), (None, 0.0)])
def test_a_federation_uses_a_local_rule_from_a_file(federated, rule, mu):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=3)
        for name, target in (("a", 1.0), ("b", 3.0)):
            task = Pull(target)
            if rule:
                use_local_rule(task, rule)
            federation.worker(name, task)
        await coordinator.end()
        expected = 0.0
        for number in (1, 2, 3):
            expected = pulled(expected, [1.0, 3.0], mu)
            np.testing.assert_allclose(federation.weights(number)["w"], expected, rtol=1e-5)

    federated(scenario)


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.numpy.zeros(()))

    def __call__(self, inputs: Any) -> Any:
        return self.w[...] + 0 * inputs


def flax_pull(target: float, **options: Any) -> Any:
    """Return ``Pull`` as a Flax task with one example, five epochs and plain SGD."""
    data = np.zeros(1, np.float32), np.full(1, target, np.float32)
    return flax_task(
        Line, lambda outputs, targets: (outputs - targets) ** 2 / 2, optax.sgd(0.5), data, **options
    )


@pytest.mark.usefixtures("compiled_elsewhere")
def test_flax_tasks_use_the_same_local_rule_file(federated):
    plan = Plan(epochs=5)
    proximal = load_object(PROXIMAL, "--local-rule")
    a, b = flax_pull(1.0, local_rule=proximal), flax_pull(3.0)
    use_local_rule(b, PROXIMAL)
    for task in (a, b):  # compile now, because VirtualLoop allows no thread to take long
        task.train(task.init(0), plan, lambda *_: None)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, plan=plan)
        for name, task in (("a", a), ("b", b)):
            federation.worker(name, task)
        await coordinator.end()
        expected = 0.0
        for number in (1, 2):
            expected = pulled(expected, [1.0, 3.0], 0.5)
            np.testing.assert_allclose(federation.weights(number)["w"], expected, rtol=1e-5)

    federated(scenario)


def test_a_failing_rule_costs_its_worker_the_round(federated, documented):
    broken = documented("proximal.py", ("state[name]", "state[name + '?']"))

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, number=1, min_workers=2)
        federation.worker("a", Adder(federation.loop, size=3))  # slower
        task = Pull(3.0)
        use_local_rule(task, f"{broken}:proximal")
        b = federation.worker("b", task)
        await coordinator.end()
        assert federation.participants() == [["a"]] * 2
        reason = b.log.of("failure")[0]["reason"]
        assert re.search(r"^gradient\(\) of the local rule .*:proximal fails: KeyError", reason)
        assert "(proximal.py:" in reason
        (trace,) = b.log.of("traceback")
        assert "state[name + '?']" in trace["text"]
        assert "bound.py" not in trace["text"]

    federated(scenario)


@pytest.mark.usefixtures("compiled_elsewhere")
def test_a_rule_that_fails_during_compilation_is_reported(documented):
    path = documented("proximal.py", ("state[name]", "state[name + '?']"))
    task = flax_pull(1.0)
    use_local_rule(task, f"{path}:proximal")
    with pytest.raises(TaskError, match=r"gradient\(\) of .* KeyError.*\(proximal.py:\d+\)"):
        task.train(task.init(0), Plan(), lambda *_: None)


# --- invalid rules, and the state of rules -------------------------------------------------------


def rule_of(**methods: Any) -> BoundRule:
    plain = {
        "begin": lambda received, broadcast, kept: kept,
        "gradient": lambda gradient, weights, state: (gradient, state),
        "end": lambda trained, state: {},
    }
    return BoundRule(SimpleNamespace(**{**plain, **methods}), "r")


def test_the_state_of_a_rule_is_kept_for_later_rounds_of_the_run():
    rule = rule_of(end=lambda trained, state: trained)

    def trains(run: str, number: int) -> Any:
        rule.of_work((run, number, number))
        kept = rule.begin({"w": np.zeros(1)})
        rule.end({"w": np.full(1, number)}, kept)
        return kept["w"].tolist() if kept else None

    assert trains("r", 1) is None
    assert trains("r", 2) == [1]
    assert trains("r", 2) == [1]  # again, as after a lost update
    assert trains("r", 5) == [2]
    assert trains("r", 2) == [2]  # of a restored coordinator; the oldest state that is left
    assert trains("another", 6) is None


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (lambda g, w, s: g, "returned a dict; expected a pair (gradient, state)"),
        (lambda g, w, s: ({}, s), "'w' is only in its input"),
        (
            lambda g, w, s: ({"w": np.zeros(2)}, s),
            "returned the tensor 'w' with the shape (2,); expected the shape (1,)",
        ),
    ],
)
def test_a_gradient_of_another_shape_is_refused(gradient, message):
    rule = rule_of(gradient=gradient)
    with pytest.raises(TaskError) as wrong:
        rule.gradient({"w": np.zeros(1)}, {"w": np.zeros(1)}, None)
    assert message in str(wrong.value)


def test_end_must_return_a_mapping():
    with pytest.raises(TaskError, match="end.. of the local rule r returned a NoneType"):
        rule_of(end=lambda trained, state: None).end({}, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Proximal", "is a class; create an object of the class, and give this object instead"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_an_object_that_is_no_rule_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        use_local_rule(Pull(1.0), PROXIMAL.replace(":proximal", f":{name}"))


def test_an_object_without_the_methods_is_no_rule(tmp_path):
    (tmp_path / "none.py").write_text("rule = 3\n")
    with pytest.raises(UsageError, match="has no method 'begin'"):
        use_local_rule(Pull(1.0), f"{tmp_path}/none.py:rule")


def test_a_rule_is_refused_if_the_task_applies_none():
    with pytest.raises(UsageError, match="applies no local rules; make the task with flax_task"):
        use_local_rule(SimpleNamespace(), PROXIMAL)


def test_an_installed_rule_is_found_by_its_name(monkeypatch):
    entry_points = [EntryPoint("fedprox", f"{__name__}:INSTALLED", loading.GROUP)]
    entry_points += [EntryPoint("broken", "nowhere_to_be_found:rule", loading.GROUP)]
    monkeypatch.setattr(loading, "installed", lambda group: {one.name: one for one in entry_points})
    assert find_rule("fedprox") is INSTALLED
    with pytest.raises(TaskError, match="rule 'broken' .* fails to load: ModuleNotFoundError"):
        find_rule("broken")


def test_an_unknown_rule_is_refused_with_the_installed_ones():
    with pytest.raises(UsageError, match=r"unknown local rule 'fedprox' .* choose from clip, "):
        find_rule("fedprox")

"""The built-in local rules: their gradients, names and errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.local import loading
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.clip import Clip
from fluffle_worker.local.dp_sgd import DpSgd
from fluffle_worker.local.loading import Chain, find_rule
from fluffle_worker.local.proximal import Proximal
from fluffle_worker.local.scaffold import Scaffold

Arrays = dict[str, np.ndarray]


pytestmark = pytest.mark.usefixtures("compiled_elsewhere")


def tensors(seed: int, first: tuple[int, ...] = ()) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 2), "b": (2,)}
    return {n: rng.normal(size=(*first, *s)).astype(np.float32) for n, s in shapes.items()}


def flat(named: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(named[name])) for name in sorted(named)])


# --- clip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("norm", [0.25, 100.0])
def test_a_gradient_is_no_longer_than_its_norm_and_keeps_its_direction(make, norm):
    gradient = tensors(0)
    given = {name: make(one) for name, one in gradient.items()}
    clipped, _ = Clip(norm).gradient(given, given, None)
    length = np.linalg.norm(flat(gradient))
    np.testing.assert_allclose(flat(clipped), flat(gradient) * min(1, norm / length), rtol=1e-6)
    assert {one.dtype.name for one in clipped.values()} == {"float32"}


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_a_gradient_of_16_bits_is_clipped_although_its_squares_overflow(make):
    given = {"w": make(np.full(4, 300, np.float16)), "b": make(np.full(12, 300, np.float16))}
    clipped, _ = Clip(4.0).gradient(given, given, None)
    assert flat(clipped).tolist() == [1.0] * 16
    assert {one.dtype.name for one in clipped.values()} == {"float16"}


def test_a_gradient_of_zeros_stays_one():
    zeros = {"w": np.zeros(3, np.float32)}
    assert Clip(1.0).gradient(zeros, zeros, None)[0]["w"].tolist() == [0, 0, 0]


# --- scaffold ----------------------------------------------------------------------------------


def test_scaffold_is_the_papers_option_two():
    """Compare with algorithm 1 of Karimireddy et al. (2020) on quadratics in NumPy."""
    rate, steps, rng = 0.05, 4, np.random.default_rng(1)
    targets = [rng.normal(size=3), rng.normal(size=3)]
    x, c, own = np.zeros(3), np.zeros(3), [np.zeros(3), np.zeros(3)]
    rule, kept, broadcast, model = Scaffold(), [{}, {}], {"w": np.zeros(3)}, {"w": np.zeros(3)}
    for _ in range(5):
        ends, changes, trained, extras = [], [], [], []
        for k, target in enumerate(targets):
            y = x.copy()
            for _ in range(steps):
                y -= rate * ((y - target) * (k + 1) - own[k] + c)
            new = own[k] - c + (x - y) / (steps * rate)
            ends.append(y)
            changes.append(new - own[k])
            own[k] = new

            state = rule.begin(model, broadcast, kept[k])
            weights = model["w"].copy()
            for _ in range(steps):
                gradient = {"w": (weights - target) * (k + 1)}
                changed, state = rule.gradient(gradient, {"w": weights}, state)
                weights = weights - rate * changed["w"]
            kept[k], extra = rule.end({"w": weights}, state)
            trained.append(weights)
            extras.append(extra["w"])
        x, c = np.mean(ends, axis=0), c + np.mean(changes, axis=0)
        model = {"w": np.mean(trained, axis=0)}
        broadcast = {"w": broadcast["w"] + np.mean(extras, axis=0)}
        np.testing.assert_allclose(model["w"], x, rtol=1e-12)
        np.testing.assert_allclose(broadcast["w"], c, rtol=1e-10)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_control_variate_of_16_bit_weights_is_the_mean_of_many_gradients(make, dtype):
    model = {"w": make(np.zeros(8), jnp.dtype(dtype))}
    given = np.random.default_rng(0).normal(0.5, 1, (300, 8)).astype(jnp.dtype(dtype))
    rule = Scaffold()
    state = rule.begin(model, {"w": make(np.zeros(8, np.float32))}, {})
    for one in given:
        _, state = rule.gradient({"w": make(one)}, model, state)
    kept, extra = rule.end(model, state)
    for found in (kept["w"], extra["w"]):
        np.testing.assert_allclose(found, given.astype(np.float64).mean(axis=0), rtol=1e-4)


def test_scaffold_without_a_server_that_takes_part_is_refused():
    with pytest.raises(TaskError, match="--strategy scaffold"):
        BoundRule(Scaffold(), "scaffold").begin({"w": np.zeros(1)})


# --- dp_sgd ------------------------------------------------------------------------------------


def test_dp_sgd_without_noise_is_the_mean_of_the_clipped_gradients():
    rule, gradients = DpSgd(0.5, 0.0), tensors(3, (7,))
    private, _ = rule.gradient(gradients, {}, rule.begin({}, {}, {}))
    expected = np.zeros(8)
    for number in range(7):
        one = flat({name: array[number] for name, array in gradients.items()})
        expected += one * min(1, 0.5 / np.linalg.norm(one)) / 7
    np.testing.assert_allclose(flat(private), expected, rtol=1e-5)


def test_dp_sgd_clips_with_the_highest_precision_of_the_device():
    rule, gradients = DpSgd(0.5, 0.0), tensors(3, (7,))
    state = rule.begin({}, {}, {})
    program = jax.jit(rule.gradient).lower(gradients, {}, state).as_text()
    dots = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == len(gradients)
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_the_noise_of_dp_sgd_has_the_size_that_the_proof_needs_and_is_never_the_same():
    rule, size = DpSgd(2.0, 1.5), 20_000
    zeros = {"w": np.zeros((4, size), np.float32)}
    first, after = rule.gradient(zeros, {}, rule.begin({}, {}, {}))
    second, _ = rule.gradient(zeros, {}, after)
    other, _ = rule.gradient(zeros, {}, rule.begin({}, {}, {}))
    for one in (first, second, other):  # 1.5 * 2 / 4, of 20,000 draws: five sigmas
        assert float(np.std(one["w"])) == pytest.approx(0.75, rel=5 / np.sqrt(2 * size))
    assert abs(float(np.corrcoef(first["w"], second["w"])[0, 1])) < 5 / np.sqrt(size)
    assert abs(float(np.corrcoef(first["w"], other["w"])[0, 1])) < 5 / np.sqrt(size)


def test_the_noise_of_dp_sgd_has_more_random_bits_than_one_float32():
    """Of 2**23 equally likely values, a million draws would be only 942,000 different ones."""
    rule, zeros = DpSgd(1.0, 1.0), {"w": np.zeros((1, 10**6), np.float32)}
    private, _ = rule.gradient(zeros, {}, rule.begin({}, {}, {}))
    assert len(np.unique(private["w"])) > 970_000


def test_a_rule_of_single_examples_returns_one_gradient():
    rule = BoundRule(DpSgd(1.0, 0.0), "dp_sgd")
    gradients = tensors(3, (7,))
    changed, _ = rule.gradient(gradients, {}, rule.begin({}))
    assert {name: one.shape for name, one in changed.items()} == {"w": (3, 2), "b": (2,)}


# --- chains ------------------------------------------------------------------------------------


class Remembers:
    """A rule that counts rounds in the tensor that it keeps."""

    def begin(self, received: Any, broadcast: Any, kept: Any) -> Any:
        return kept.get("n", 0) + broadcast.get("by", 1)

    def gradient(self, gradient: Any, weights: Any, state: Any) -> Any:
        return {name: one + state for name, one in gradient.items()}, state

    def end(self, trained: Any, state: Any) -> Any:
        return {"n": state}, {"by": 1}


def test_the_rules_of_a_chain_follow_each_other_and_keep_what_is_their_own():
    chain = Chain([Remembers(), Proximal(1.0), Remembers()])
    state = chain.begin({"w": 1.0}, {"by": 2}, {"0/n": 10, "2/n": 100})
    changed, state = chain.gradient({"w": 0.0}, {"w": 3.0}, state)
    assert changed == {"w": (10 + 2) + (3.0 - 1.0) + (100 + 2)}
    assert chain.end({"w": 3.0}, state) == ({"0/n": 12, "2/n": 102}, {"by": 1})


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("proximal:0.1", Proximal(0.1)),
        ("proximal:mu=1e-2", Proximal(0.01)),
        ("clip:1", Clip(1.0)),
        ("clip:1e+3", Clip(1000.0)),
        ("dp_sgd:1,1.1", DpSgd(1.0, 1.1)),
        ("dp_sgd:noise=1.1, clip=1", DpSgd(1.0, 1.1)),
    ],
)
def test_a_rule_is_named_with_its_settings(name, rule):
    assert find_rule(name) == rule


def test_rules_are_chained_with_a_plus(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from fluffle_worker.local.proximal import Proximal\nrule = Proximal(1.0)\n"
    )
    chain = find_rule(f"clip:2+{tmp_path}/mine.py:rule+proximal:1")
    changed, _ = chain.gradient(
        {"w": np.float32([4.0])}, {"w": np.float32([3.0])}, chain.begin({"w": 0.0}, {}, {})
    )
    assert changed["w"].tolist() == [2 + 3 + 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("proxmal:0.1", "unknown local rule 'proxmal' .* did you mean 'proximal'"),
        ("momentum", "choose from clip, dp_sgd, proximal, scaffold .*path.py:name"),
        (
            "proximal",
            "invalid settings '' for .*: the argument 'mu' is missing.*; expected proximal:MU",
        ),
        (
            "dp_sgd:1",
            "invalid settings '1' for .*: the argument 'noise' is missing.*; expected dp_sgd:CLIP",
        ),
        ("dp_sgd:1,2,3", "invalid settings '1,2,3' .*; expected dp_sgd:CLIP,NOISE"),
        ("dp_sgd:clip=1,niose=2", "did you mean 'noise'.*; expected dp_sgd:CLIP,NOISE"),
        ("dp_sgd:1,clip=2", "'clip' is given twice; expected dp_sgd:CLIP,NOISE"),
        ("scaffold:1", "invalid settings '1' .*no arguments are accepted.*; expected scaffold"),
        ("clip:much", "'clip': norm='much' is not valid; expected a number"),
        ("clip:0", "'norm' .* is 0; expected a finite number above 0"),
        ("proximal:-1", "'mu' .* is -1; expected a finite number of 0 or more"),
        ("dp_sgd:1,nan", "noise='nan' is not valid; expected a number"),
        ("clip:inf", "norm='inf' is not valid; expected a number"),
        ("clip:1+dp_sgd:1,1", "needs the gradient of each example, .*; put \\w+ first"),
        ("clip:1+", "unknown local rule ''"),
    ],
)
def test_what_names_no_rule_is_refused_with_what_would(name, message):
    with pytest.raises(UsageError, match=message):
        find_rule(name)


def test_settings_that_an_installed_rule_rejects_are_named(monkeypatch):
    def odd(size: int):
        raise ValueError(f"{size} is even")

    monkeypatch.setattr(loading, "installed", lambda _: {"odd": None})
    monkeypatch.setattr(loading, "load_installed", lambda *_: odd)
    with pytest.raises(UsageError, match="'odd' rejects the settings '2': ValueError: 2 is even"):
        find_rule("odd:2")


@pytest.mark.parametrize("what", ["received", "broadcast", "kept"])
def test_a_rule_cannot_change_in_place_what_it_is_given(what):
    class Writes:
        def begin(self, received, broadcast, kept):
            given = {"received": received, "broadcast": broadcast, "kept": kept}
            for array in given[what].values():
                array[...] = 100

        def gradient(self, gradient, weights, state):
            return gradient, state

        def end(self, trained, state):
            return {"n": np.ones(2)}

    rule = BoundRule(Writes())
    model, broadcast = {"w": np.zeros((2, 2), np.float32)}, {"c": np.zeros(2)}
    rule.of_work(("r", 1, 1))
    rule.end(model, None)
    rule.of_work(("r", 2, 2), broadcast)
    with pytest.raises(TaskError, match=r"begin\(\) of the local rule Writes fails: .*read-only"):
        rule.begin(model)
    assert not model["w"].any()
    assert not broadcast["c"].any()

"""``import fluffle``: every public name, models in files and in modules, the history of a run."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import nnx

import fluffle
from fluffle_common.tensors.checkpoint import save_checkpoint
from tests.history_lines import committed, ended


def test_every_public_name_is_there_and_documented():
    others = {"Progress", "Weights"}  # types
    for name in set(fluffle.__all__) - others:
        assert getattr(fluffle, name).__doc__, name
    assert set(fluffle.__all__) <= set(dir(fluffle))
    assert fluffle.__version__ == version("fluffle")
    with pytest.raises(AttributeError, match="module 'fluffle' has no attribute 'nothing'"):
        fluffle.nothing  # noqa: B018


def test_type_checkers_are_told_of_every_public_name():
    text = Path(fluffle.__file__).read_text()
    imported = {
        line.split()[-1] for line in text.splitlines() if line.startswith("    from fluffle")
    }
    assert imported == set(fluffle._MODULES)


def test_a_star_import_and_help_leave_out_what_needs_a_missing_package():
    code = """if True:
        import sys
        sys.modules["torch"] = sys.modules["sklearn"] = None
        from fluffle import *
        import fluffle, pydoc
        assert {"run", "flax_task"} <= globals().keys()
        assert not {"torch_task", "sklearn_task"} & globals().keys()
        assert "Run a federation to its end" in pydoc.render_doc(fluffle)
        assert {name for name in dir(fluffle) if name[0] != "_"} == set(fluffle.__all__)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_import_loads_what_is_used_and_no_more():
    code = """if True:
        import sys, fluffle
        assert not {"numpy", "jax", "click", "aio_pika", "fluffle_common"} & sys.modules.keys()
        fluffle.run, fluffle.Run, fluffle.Strategy, fluffle.Task, fluffle.load_model
        assert not {"jax", "flax", "optax", "matplotlib", "sklearn", "torch"} & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


class Model(nnx.Module):
    def __init__(self, rngs, width=3):
        self.hidden = nnx.Linear(2, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.hidden(inputs))


def task():
    inputs = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    return fluffle.flax_task(
        Model,
        lambda outputs, targets: ((outputs - targets) ** 2).mean(axis=-1),
        optax.sgd(0.1),
        (inputs, np.ones((8, 3), np.float32)),
    )


def test_a_model_file_fills_a_module(tmp_path):
    weights = task().init(1)
    file = tmp_path / "model.safetensors"
    save_checkpoint(file, weights, {})
    loaded = fluffle.load_model(file)
    assert loaded.keys() == weights.keys()
    for source in (file, loaded):
        module = Model(nnx.Rngs(7))
        assert (np.asarray(module.hidden.kernel[...]) != weights["hidden/kernel"]).any()
        fluffle.load_into(module, source)
        np.testing.assert_array_equal(module.hidden.kernel[...], weights["hidden/kernel"])
        np.testing.assert_array_equal(module.norm.mean[...], weights["norm/mean"])


def test_a_part_of_a_model_fills_that_part_of_a_module():
    weights = {n: one for n, one in task().init(1).items() if n.startswith("hidden/")}
    module = Model(nnx.Rngs(7))
    scale = np.asarray(module.norm.scale[...])
    with pytest.raises(fluffle.UsageError, match="unknown norm/bias, norm/mean"):
        fluffle.load_into(module, weights)
    fluffle.load_into(module, weights, federated=nnx.PathContains("hidden"))
    np.testing.assert_array_equal(module.hidden.kernel[...], weights["hidden/kernel"])
    np.testing.assert_array_equal(module.norm.scale[...], scale)


def test_a_module_of_another_form_is_left_as_it_was_and_a_difference_is_named(tmp_path):
    weights = {name: tensor for name, tensor in task().init(1).items() if name != "norm/var"}
    weights["extra"] = np.zeros(1)
    module = Model(nnx.Rngs(7), width=4)
    before = np.asarray(module.hidden.kernel[...])
    with pytest.raises(fluffle.UsageError) as wrong:
        fluffle.load_into(module, weights)
    assert str(wrong.value) == (
        "the module Model does not fit the model: tensor names differ from the model's: "
        "missing extra; unknown norm/var"
    )
    with pytest.raises(fluffle.UsageError) as wrong:
        fluffle.load_into(module, task().init(1))
    assert str(wrong.value) == (
        "the module Model does not fit the model: tensor 'hidden/bias' has shape (4,); the model "
        "has (3,)"
    )
    np.testing.assert_array_equal(module.hidden.kernel[...], before)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_checkpoint(file, {"w": np.zeros(4)}, {})
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(fluffle.UsageError, match="the model does not match the digest in the file"):
        fluffle.load_model(str(file))
    with pytest.raises(fluffle.UsageError, match="there is no model file"):
        fluffle.load_model(tmp_path / "absent")


def test_arrays_of_any_framework_fill_a_module():
    class Tensor:
        shape, dtype = (1,), "torch.float32"

        def __array__(self, dtype=None, copy=None):
            return np.ones(1, np.float32)

    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    fluffle.load_into(model, {"kernel": model.kernel[...], "bias": Tensor()})
    assert model.bias[...].tolist() == [1.0]


def test_the_parameters_of_both_ways_to_run_are_shown():
    assert inspect.signature(fluffle.arun) == inspect.signature(fluffle.run)


def test_an_argument_of_another_type_is_named(tmp_path):
    file, model = tmp_path / "m.safetensors", nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    for wrong in ({"w": np.zeros(1)}, None, nnx.Linear):
        with pytest.raises(fluffle.UsageError, match="expected a module of Flax or PyTorch"):
            fluffle.save_model(file, wrong)
        with pytest.raises(fluffle.UsageError, match="expected a module of Flax or PyTorch"):
            fluffle.load_into(wrong, {})
    for filters in ({"frozen": nnx.BatchStat}, {"federated": nnx.BatchStat}, {"frozen": True}):
        with pytest.raises(
            fluffle.UsageError, match="no tensor of the module Linear|r has no tensor left"
        ):
            fluffle.save_model(file, model, **filters)
    assert not file.exists()
    for source in (None, 3, object()):
        with pytest.raises(
            fluffle.UsageError,
            match="expected the path of a model file, or a mapping of .* example run.weights",
        ):
            fluffle.load_into(model, source)
    with pytest.raises(
        fluffle.UsageError,
        match="does not fit the model: tensor 'bias' is float32; expected float64",
    ):
        fluffle.load_into(model, {"kernel": model.kernel[...], "bias": [0.0]})
    with pytest.raises(fluffle.UsageError, match="a NoneType cannot be divided"):
        fluffle.plot_partition(None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_s": -1},
        {"step_s": math.nan},
        {"step_s": "1"},
        {"fit_s": math.inf},
        {"bytes_per_s": 0},
        {"bytes_per_s": None},
    ],
)
def test_a_device_of_impossible_speed_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(fluffle.UsageError, match=rf"Device\({name}={value}\) is not valid; "):
        fluffle.Device(**wrong)


@pytest.mark.parametrize(
    ("adapter", "module", "remedy"),
    [
        ("flax", "jax", "'fluffle[worker]'"),
        ("sklearn", "sklearn.base", "scikit-learn"),
        ("torch", "torch", "'fluffle[torch]'"),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(monkeypatch, adapter, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"fluffle_worker.tasks.{adapter}", raising=False)
    monkeypatch.delitem(vars(fluffle), f"{adapter}_task", raising=False)
    expected = f"{adapter}_task needs the module '{module}'; run pip install {remedy}"
    with pytest.raises(ModuleNotFoundError, match=re.escape(expected)):
        getattr(fluffle, f"{adapter}_task")


def test_a_history_has_rows_and_columns():
    rounds = [
        fluffle.Round(1, {"a": 10}, Path("x"), loss=0.5, metrics={"accuracy": 0.2}),
        fluffle.Round(2, {"a": 10, "b": 5}, Path("x"), loss=0.25, metrics={"accuracy": 0.4}),
        fluffle.Round(3, {"b": 5}, Path("x"), train_loss=0.1, test={"accuracy": 0.3}, epsilon=2.0),
    ]
    history = fluffle.History(tuple(rounds))
    assert history["loss"] == [0.5, 0.25, None]
    assert history["test/accuracy"] == [None, None, 0.3]
    assert history.columns == ("loss", "accuracy", "train_loss", "test/accuracy", "epsilon")
    assert (len(history), history[-1], history[1:]) == (
        3,
        rounds[2],
        fluffle.History(tuple(rounds[1:])),
    )
    assert [one.num_examples for one in history] == [10, 15, 5]
    assert (history.best().number, history.best("accuracy").number) == (2, 2)
    assert history.best("test/accuracy").number == 3
    with pytest.raises(fluffle.UsageError, match="no round has the metric 'f1'; choose from loss"):
        history.best("f1")
    with pytest.raises(KeyError, match="the columns are loss"):
        history["f1"]


def test_a_metric_may_be_called_like_another_column():
    metrics = {"examples": 7.0, "workers": 9.0}
    history = fluffle.History((fluffle.Round(1, {"a": 10}, Path("x"), metrics=metrics),))
    head, row = repr(history).splitlines()
    assert head.split() == ["round", "workers", "examples", "examples", "workers"]
    assert row.split() == ["1", "1", "10", "7.0000", "9.0000"]
    assert history._repr_html_().count("<td>") == 5


def test_a_run_is_read_once_so_that_its_history_and_its_end_fit_together(tmp_path):
    lines, end = [committed(1), committed(2)], ended(1, reason="interrupted")
    file = tmp_path / "history.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (lines[0], end)))
    run = fluffle.Run(tmp_path)
    with file.open("a") as history:
        history.write(f"{json.dumps(lines[1])}\n")
    assert (len(run.history), run.reason) == (1, "interrupted")
    again = fluffle.Run(tmp_path)
    assert (len(again.history), again.reason) == (2, "")


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(fluffle.UsageError, match="there is no history in"):
        fluffle.Run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"run": "r", "federation": "f"}))
    with pytest.raises(fluffle.UsageError, match="has not committed any rounds yet"):
        fluffle.Run(tmp_path)


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fluffle", "no-such"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fluffle: unknown command 'no-such'; see 'fluffle --help'\n"

"""Loading of users' tasks: import, checks and errors."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from click.testing import CliRunner
from flax import nnx

from fluffle_common.cli.loading import load_object
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.model_form import form_from
from fluffle_common.tensors.layout import DTYPES
from fluffle_common.user_errors import full_trace, one_line
from fluffle_worker.cli import worker
from fluffle_worker.local.persistent_tensors import claim
from fluffle_worker.signature import UNKNOWN, difference, signature_of_task
from fluffle_worker.task import TaskOptions, classes_of, num_examples_of
from fluffle_worker.task_loading import check_task, load_factory
from fluffle_worker.tasks.flax import flax_task

OPTIONS = TaskOptions("data", "w")
TASK = """
class Task:
    num_examples = 3
    def init(self, seed): return {}
    def train(self, weights, plan, progress): return None
    def evaluate(self, weights): return None

def task(options):
    return Task()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder for task files and unload their modules afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- finding -----------------------------------------------------------------------------------


def test_a_task_file_s_neighbour_is_found_also_later(here):
    (here / "sub").mkdir()
    write(here / "sub", "near_by.py", "VALUE = 3\n")
    write(here / "sub", "near_too.py", "VALUE = 4\n")
    late = TASK.replace("return Task()", "import near_too; return Task()")
    assert load_factory(f"{write(here / 'sub', 'stream.py', 'import near_by' + late)}:task")(
        OPTIONS
    )


def test_a_module_s_neighbour_is_found_also_later(here):
    write(here, "near_three.py", "")
    write(here, "a_task.py", TASK.replace("return Task()", "import near_three; return Task()"))
    assert load_factory("a_task:task")(OPTIONS)


def test_a_file_that_two_options_name_is_loaded_once_until_it_changes(here):
    file = write(here, "shared_file.py", "seen = []\nadd = seen.append\nseen_by = seen.copy\n")
    load_object(f"{file}:add", "--evaluate")(1)
    assert load_object(f"{file}:seen_by", "--on-round")() == [1]
    write(here, "shared_file.py", "seen_by = lambda: 'another'\n")
    assert load_object(f"{file}:seen_by", "--on-round")() == "another"
    del sys.modules["shared_file"]
    assert load_object(f"{file}:seen_by", "--on-round")() == "another"
    assert "shared_file" in sys.modules


def test_a_task_that_changes_the_folder_moves_no_state_and_hides_no_local_rule(here, monkeypatch):
    (here / "elsewhere").mkdir()
    leaves = f"import os; os.chdir({str(here / 'elsewhere')!r}); import numpy\n"
    one_tensor = TASK.replace("return {}", "return {'w': numpy.zeros(1)}")
    with_rule = one_tensor.replace(
        "return Task()", "t = Task(); t.local_rule = BoundRule(); return t"
    )
    write(
        here, "leaves.py", f"{leaves}from fluffle_worker.local.bound import BoundRule\n{with_rule}"
    )
    write(here, "rules.py", "from fluffle_worker.local.clip import Clip\nclipped = Clip(1)\n")
    settings: dict[str, Any] = {}

    def stop(**given: Any) -> None:
        settings.update(given)
        raise UsageError("stop here")

    monkeypatch.setattr("fluffle_worker.settings.WorkerSettings", stop)
    command = ["--federation", "f", "--id", "w", "--data", "d", "--task", "leaves.py:task"]
    command += ["--local-rule", "rules.py:clipped"]
    assert str(CliRunner().invoke(worker, command).exception) == "stop here"
    assert settings["state_dir"] == here / "runs/workers/f/w"


def test_two_workers_cannot_share_a_state_folder(here):
    def started_as(worker_id: str) -> str:
        command = ["--federation", "f", "--id", worker_id, "--data", "d", "--task", "no.py:task"]
        return str(CliRunner().invoke(worker, [*command, "--state-dir", "kept"]).exception)

    assert "no.py" in started_as("a")  # the folder is free
    assert started_as("b").startswith(
        f"the state folder {here / 'kept'} belongs to worker f/a, but this is worker f/b; "
    )
    assert "no.py" in started_as("a")  # restarted


def test_a_chosen_state_folder_that_cannot_be_written_is_an_error_at_the_start(here):
    write(here, "kept", "a file")
    command = ["--federation", "f", "--id", "a", "--data", "d", "--state-dir", "kept/a"]
    found = str(CliRunner().invoke(worker, command).exception)
    assert found == (
        f"cannot use the state folder {here / 'kept/a'} (Not a directory); choose another folder "
        "with --state-dir"
    )


def test_a_state_folder_whose_owner_is_a_pipe_is_an_error_at_the_start(here):
    (here / "kept").mkdir()
    os.mkfifo(here / "kept/owner.txt")
    with pytest.raises(UsageError, match=r"cannot use the state folder .* \(not a regular file\)"):
        claim(here / "kept", "f/a")


def test_a_task_file_replaces_no_module_of_its_name(here):
    import queue

    task = load_factory(f"{write(here, 'queue.py', TASK)}:task")(OPTIONS)
    assert sys.modules["queue"] is queue
    assert type(task).__module__ in sys.modules  # so that it can be pickled


@pytest.mark.parametrize("name", ["tabnanny", "xml.dom.pulldom", "__main__"])
def test_a_task_file_replaces_no_module_that_is_imported_later(here, monkeypatch, name):
    if name != "__main__":
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert load_factory(f"{write(here, f'{name}.py', TASK)}:task")(OPTIONS)
    assert not hasattr(importlib.import_module(name), "Task")


@pytest.mark.parametrize(
    "change", ["sys.path.remove(sys.path[0])", "sys.path.clear()", "sys.path = []"]
)
def test_a_task_file_that_changes_the_search_path_breaks_no_later_import(here, change, monkeypatch):
    before = list(dict.fromkeys(sys.path))
    monkeypatch.setattr(sys, "path", list(before))
    text = f"import sys; {change}; sys.path.append('/added')\n{TASK}"
    assert load_factory(f"{write(here, 'stream.py', text)}:task")(OPTIONS)
    assert sys.path == (before if "remove" in change else []) + ["/added"] + (
        [] if "remove" in change else before
    ) + [str(here)]


@pytest.mark.parametrize(
    "name",
    [".:task", "..stream:task", "./stream:task", "a/b:task", "a.txt:task", "a.pyc:task", "a.py"],
)
def test_a_task_is_in_a_module_or_a_python_file(here, name):
    for other in ("a.txt", "a.pyc"):
        write(here, other, TASK)
    with pytest.raises(
        UsageError, match=f"--task expects module:name or path.py:name, not '{name}"
    ):
        load_factory(name)(OPTIONS)


def test_a_notebook_is_to_be_exported(here):
    with pytest.raises(UsageError) as wrong:
        load_factory("lab/nb.ipynb:task")
    assert str(wrong.value) == (
        "--task cannot load the notebook lab/nb.ipynb; export it with 'jupyter nbconvert --to "
        "script lab/nb.ipynb', and give lab/nb.py:task"
    )
    with pytest.raises(UsageError, match="--evaluate cannot load the notebook nb.ipynb"):
        load_object("nb.ipynb:score", "--evaluate")
    with pytest.raises(UsageError, match="^--evaluate expects path.py:name, not 'score'$"):
        load_object("score", "--evaluate")


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        ("cnn_of_mine", "or, if the module is your own, put cnn_of_mine.py"),
        ("optax.nothing", "fluffle[worker]"),
        ("torch.nothing", "fluffle[torch]"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_missing_module_is_named_with_what_brings_it(here, monkeypatch, module, remedy, late):
    text = TASK.replace("return Task()", f"import {module}") if late else f"import {module}\n{TASK}"
    with pytest.raises(UsageError) as wrong:
        load_factory(f"{write(here, 'stream.py', text)}:task")(OPTIONS)
    assert remedy in str(wrong.value)
    assert ("fluffle[" in str(wrong.value)) == ("fluffle[" in remedy)
    assert f"(stream.py:{9 if late else 1})" in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_module_missing_in_a_task_of_fluffle_has_no_place(monkeypatch):
    for name in [one for one in sys.modules if one.startswith("fluffle_worker.letters")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax", None)  # as if it were not installed
    with pytest.raises(UsageError, match="'jax', which is not installed; run pip install"):
        load_factory("fluffle_worker.letters.task:task")(OPTIONS)


@pytest.mark.parametrize(
    "broken",
    [
        "raise KeyError('x')",
        "import sys; sys.exit(3)",
        "import asyncio; raise asyncio.CancelledError",
        "raise GeneratorExit",
        "import sys; del sys.modules[__name__]; raise KeyError('x')",
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_fails_while_it_is_loaded_is_told_with_file_and_line(here, capsys, broken, late):
    text = TASK.replace("return Task()", broken) if late else f"{broken}\n"
    with pytest.raises(TaskError) as wrong:
        load_factory(f"{write(here, 'stream.py', text)}:task")(OPTIONS)
    assert f"(stream.py:{9 if late else 1})" in str(wrong.value)
    stderr = capsys.readouterr().err
    assert "\\n" not in stderr  # a line a line
    assert len(stderr.splitlines()) > 3
    assert "Traceback" in stderr
    assert broken in stderr
    assert "task_loading.py" not in stderr


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_while_a_task_loads_is_no_error_of_the_task(here, late):
    broken = "raise KeyboardInterrupt"
    text = TASK.replace("return Task()", broken) if late else f"{broken}\n"
    with pytest.raises(KeyboardInterrupt):
        load_factory(f"{write(here, 'stream.py', text)}:task")(OPTIONS)


# --- errors of a user's code -------------------------------------------------------------------


def failed(make: Any) -> BaseException:
    try:
        make()
    except BaseException as why:
        return why
    raise AssertionError("it does not fail")


def test_an_error_deep_in_a_library_names_the_user_s_own_line():
    why = failed(lambda: np.linalg.inv(np.zeros((2, 2))))
    assert one_line(why).startswith("LinAlgError: Singular matrix (test_task_loading.py:")
    assert "linalg" in full_trace(why)


@pytest.mark.parametrize("untellable", [RuntimeError, SystemExit])
def test_an_error_that_cannot_be_told_is_told_by_its_type(untellable):
    class Untold(Exception):
        def __str__(self):
            raise untellable

    def fail():
        raise Untold

    assert one_line(failed(fail)).startswith("Untold (test_task_loading.py:")


def test_of_an_error_that_quotes_megabytes_the_middle_is_omitted():
    def fail():
        raise ValueError("begins " + "x\n" * 10**6 + "ends")

    trace = full_trace(failed(fail))
    assert "ValueError: begins" in trace
    assert " characters omitted …\n" in trace
    assert trace.endswith("ends")
    assert len(trace) < 101_000
    assert one_line(failed(fail)).startswith("ValueError: begins x")


def test_a_reason_can_always_be_sent():
    def fail():
        raise OSError("no file \udc80\n" + "x" * 1000)

    line = one_line(failed(fail))
    line.encode()
    assert len(line) <= 500
    assert "\n" not in line
    assert line.endswith(")")


# --- what a task says of itself ----------------------------------------------------------------


def own(**fields: Any) -> Any:
    nothing = {"init": len, "train": len, "evaluate": len, "num_examples": 3}
    return SimpleNamespace(**(nothing | fields))


def test_counts_and_classes_of_any_kind_will_do():
    for number in (np.int64(7), np.array(7), jnp.asarray(7), 7.0, np.float32(7)):
        task = check_task("t", own(num_examples=number, classes=np.array(["a", "b"])))
        assert (num_examples_of(task), type(num_examples_of(task))) == (7, int)
        assert classes_of(task) == ("a", "b")
    assert classes_of(own(classes=range(2))) == ("0", "1")
    assert classes_of(own(classes=None)) == ()


def test_a_task_that_ignores_the_option_classes_is_refused(here):
    ignores = TASK.replace("num_examples = 3", "num_examples, classes = 3, ['b', 'a']")
    name = f"{write(here, 'ignores.py', ignores)}:task"
    assert load_factory(name)(TaskOptions("data", "w", classes=("a", "b")))
    message = f"--classes names a, b, c, but the task {name} has the classes b, a; let the task use"
    with pytest.raises(UsageError, match=f"^{re.escape(message)} options.classes$"):
        load_factory(name)(TaskOptions("data", "w", classes=("a", "b", "c")))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_examples": 0}, "no examples"),
        ({"num_examples": None}, "num_examples None; expected a whole number"),
        ({"num_examples": 2.5}, "num_examples 2.5; expected a whole number"),
        ({"num_examples": "7"}, "num_examples '7'; expected a whole number"),
        ({"classes": 10}, "has classes 10; expected a sequence of class names"),
        ({"classes": "abc"}, "has classes 'abc'; expected a sequence of class names"),
        ({"classes": {"a"}}, "has classes {'a'}; expected a sequence of class names"),
        ({"classes": iter("ab")}, "has classes <str.*; expected a sequence of class names"),
        ({"classes": ["a", ""]}, r"has classes \('a', ''\); expected different names"),
        ({"classes": ["a", "a"]}, r"has classes \('a', 'a'\); expected different names"),
        ({"frozen": {"w": 1}}, "has frozen {'w': 1}; expected a method"),
        ({"model_form": {}}, "has model_form {}; expected a method"),
        ({"use_frozen": True}, "has use_frozen True; expected a method"),
        ({"keep_in": "state"}, "has keep_in 'state'; expected a method"),
        ({"only_reads": bool}, "has only_reads <class 'bool'>; expected True or False"),
        ({"share_frozen": len}, "has share_frozen .*; expected True or False"),
        ({"statistics": "var"}, "has statistics 'var'; expected a list of names of tensors"),
        ({"statistics": [1]}, r"has statistics \[1\]; expected a list of names of tensors"),
        ({"statistics": {"var": 1}}, "has statistics {'var': 1}; expected a list of names"),
        ({"local_rule": "clip:1"}, r"has local_rule 'clip:1'; expected a BoundRule \(docs/tasks"),
    ],
)
def test_what_cannot_be_said_is_refused_when_loaded(fields, named):
    with pytest.raises(TaskError, match=named):
        check_task("t", own(**fields))


@pytest.mark.parametrize("name", ["init", "train", "evaluate"])
def test_an_object_that_lacks_a_method_is_refused(name):
    with pytest.raises(UsageError, match=rf"^the task t is .*, which has no method '{name}'"):
        check_task("t", own(**{name: None}))


@pytest.mark.parametrize("attribute", ["num_examples", "keep_in", "model_form", "share_frozen"])
def test_an_attribute_that_raises_is_named_with_its_place(here, capsys, attribute):
    broken = TASK.replace("num_examples = 3", f"{attribute} = property(lambda self: 1 / 0)")
    name = f"{write(here, 'stream.py', broken)}:task"
    with pytest.raises(TaskError, match="cannot start: ZeroDivisionError: .*stream.py:"):
        load_factory(name)(OPTIONS)
    assert "Traceback" in capsys.readouterr().err


# --- the form of a model -----------------------------------------------------------------------


def making(**tensors: Any) -> Any:
    return own(init=lambda seed: tensors)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (np.zeros(2, bool), "'x' is bool, which is not supported; .* uint8"),
        (np.zeros(2, complex), "'x' is complex128, .* real and imaginary parts"),
        (np.array([None]), "'x' is object, .* keep this tensor out"),
        (np.array(["a"]), "'x' is <U1, .* keep this tensor out"),
        (np.zeros(2, ml_dtypes.float8_e4m3fn), "'x' is float8_e4m3fn, .* use bfloat16"),
        (np.zeros(2, ml_dtypes.int4), "'x' is int4, .* int8"),
        (np.zeros(2, np.longdouble), "'x' is .*float64"),
        (np.zeros((1,) * 33), "'x' has 33 dimensions; reshape it to at most 32"),
    ],
)
def test_what_does_not_travel_is_refused_with_its_remedy(tensor, named):
    with pytest.raises(TaskError, match=named):
        signature_of_task(making(w=np.zeros(2), x=tensor))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"x" * 501: np.zeros(1)}, "name of 501 characters; use a name of at most 500"),
        ({"": np.zeros(1)}, "empty name"),
        ({3: np.zeros(1)}, "has a name of type int"),
        ({"\udc80": np.zeros(1)}, r"tensor '\\udc80' has a name that is not valid Unicode"),
        ({"__metadata__": np.zeros(1)}, "the name '__metadata__', .* rename this tensor"),
        ({"strategy/m": np.zeros(1)}, "'strategy/m' begins with 'strategy/', .* rename this"),
        ({}, "no tensors"),
    ],
)
def test_names_that_cannot_travel_are_refused(tensors, named):
    with pytest.raises(TaskError, match=named):
        signature_of_task(own(init=lambda seed: tensors))


def test_nested_weights_are_refused_with_a_flat_name():
    task = making(body={"w": np.zeros(2)})
    with pytest.raises(
        TaskError, match=r"a nested mapping under 'body'; expected a flat .* such as 'body/w'"
    ):
        signature_of_task(task)


def test_a_form_is_told_in_short_and_its_digest_knows_no_order():
    w, n = np.zeros((300, 4), np.float32), np.zeros((), np.int64)
    form, other = (form_from(signature_of_task(t)) for t in (making(w=w, n=n), making(n=n, w=w)))
    assert form.summary == "2 tensors, 1,201 parameters: float32 1, int64 1"
    assert form.digest == other.digest == "c7a99ca8e815d968"
    for changed in (making(w=w.T, n=n), making(v=w, n=n), making(w=w.astype(float), n=n)):
        assert form_from(signature_of_task(changed)).digest != form.digest


def test_a_task_whose_init_fails_is_loaded_and_says_so(capsys):
    def init(seed):
        raise NotImplementedError

    assert signature_of_task(own(init=init)) == UNKNOWN
    assert (
        "cannot make the first weights: NotImplementedError (test_task_load"
        in capsys.readouterr().err
    )
    assert difference(signature_of_task(making(w=np.zeros(1))), UNKNOWN) is None


@pytest.mark.parametrize(
    "form", [3, {"w": 3}, {"w": SimpleNamespace(dtype="no", shape=())}, NotImplementedError()]
)
def test_a_task_whose_form_cannot_be_told_says_which_method_fails(capsys, form):
    def model_form():
        if isinstance(form, Exception):
            raise form
        return form

    assert signature_of_task(own(model_form=model_form)) == UNKNOWN
    stderr = capsys.readouterr().err
    assert "the task's model_form() fails, so nobody can check" in stderr
    assert "init()" not in stderr


def test_a_task_that_can_say_its_form_makes_no_weights():
    def model_form():
        return jax.eval_shape(lambda: {"w": jax.numpy.zeros((2, 3))})

    (entry,) = signature_of_task(own(init=None, model_form=model_form))
    assert entry == ("w", np.dtype("float32"), (2, 3))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"b": np.zeros(2), "a": np.zeros(1)}, None),
        ({"a": np.zeros(1)}, "tensor 'b' is only in this task's model"),
        (
            {"a": np.zeros(1), "b": np.zeros(2), "d": np.zeros(1), "c": np.zeros(1)},
            "tensor 'c' and 1 more are not in this task's model",
        ),
        (
            {"a": np.zeros(1), "b": np.zeros(2), "x" * 300: np.zeros(1)},
            f"tensor '{'x' * 100}' is not in this task's model",
        ),
        (
            {"a": np.zeros(1), "b": np.zeros(3)},
            "tensor 'b' is float64 of shape (3,) in the federation, but float64 of shape (2,) in "
            "this task",
        ),
        (
            {"a": np.zeros(1, np.float32), "b": np.zeros(2, np.int32)},
            "tensor 'a' is float32 of shape (1,) in the federation, but float64 of shape (1,) in "
            "this task",
        ),
        (
            {"a": np.zeros(1), "b": np.zeros(2, np.float32)},
            "tensor 'b' is float32 of shape (2,) in the federation, but float64 of shape (2,) in "
            "this task; with JAX, set JAX_ENABLE_X64 for all workers or for no worker",
        ),
    ],
)
def test_a_difference_names_the_first_tensor(theirs, message):
    ours = signature_of_task(making(a=np.zeros(1), b=np.zeros(2)))
    found = difference(signature_of_task(making(**theirs)), ours)
    assert found == (
        message and f"the federation's model differs from this task's model: {message}"
    )


class Net(nnx.Module):
    """A layer in half precision, optionally with a colliding tensor name."""

    dtype: Any = jax.numpy.bfloat16

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(2, 1, rngs=rngs, param_dtype=self.dtype)

    def __call__(self, inputs: Any) -> Any:
        return self.dense(inputs)


class Colliding(Net):
    dtype = jax.numpy.float32

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        setattr(self, "dense/kernel", nnx.Param(jax.numpy.zeros(3)))


def flax(model: Any) -> Any:
    data = np.zeros((4, 2), np.float32), np.zeros(4, np.float32)
    return flax_task(model, lambda o, t: (o[:, 0] - t) ** 2, optax.sgd, data, data)


def test_a_flax_model_says_its_form_without_being_made(monkeypatch):
    task = flax(Colliding.__base__)
    monkeypatch.setattr(task, "init", None)
    if "bfloat16" in DTYPES:
        form = form_from(signature_of_task(task))
        assert form.summary == "2 tensors, 3 parameters: bfloat16 2"
    else:
        with pytest.raises(TaskError, match="'dense/bias' is bfloat16, which is not supported"):
            signature_of_task(task)


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(TaskError, match="two tensors of the model have the name 'dense/kernel'"):
        flax(Colliding)

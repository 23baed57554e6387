"""Modules of PyTorch of many kinds: each is trained as plain PyTorch trains it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fluffle
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.frozen import frozen_of
from fluffle_common.tensors.weights import Weights, check_signature
from fluffle_worker.local.clip import Clip
from fluffle_worker.local.dp_sgd import DpSgd
from fluffle_worker.task import RoundPlan
from fluffle_worker.tasks.examples import index_batches

torch = pytest.importorskip("torch", reason="PyTorch is an optional dependency")

from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from fluffle_worker.tasks.torch import TorchTask, torch_task  # noqa: E402

RATE, PLAN = 0.05, RoundPlan(epochs=3, batch_size=5, seed=4, run="r", round=1, sequence=1)
RNG = np.random.default_rng(0)
INPUTS = torch.from_numpy(RNG.normal(size=(12, 3)).astype(np.float32))
TARGETS = torch.from_numpy(RNG.normal(size=12).astype(np.float32))
TOKENS = torch.from_numpy(RNG.integers(10, size=(12, 3)))


def first_column(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(0))


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cells = kind(1, 5, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Any) -> Any:
        return self.head(self.cells(inputs[..., None])[0][:, -1])[:, 0]


class Embedded(nn.Module):
    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, tokens: Any) -> Any:
        return self.head(self.table(tokens).mean(1))[:, 0]


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, inputs: Any) -> Any:
        return self.linear(inputs)[:, 0]


class Remembering(Line):
    """A module that keeps its last outputs, with their graph."""

    last: Any = None

    def forward(self, inputs: Any) -> Any:
        self.last = super().forward(inputs)
        return self.last


def remembering() -> nn.Module:
    module = Remembering()
    module(INPUTS)
    return module


class ByFunctions(nn.Module):
    """A module with attributes that are functions, which refer to it and to its layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = self.layer = nn.Linear(3, 4)
        weight = self.weight = nn.Parameter(torch.ones(4))
        self.body = lambda inputs, *, scale=2.0: torch.tanh(scale * layer(inputs))
        self.outputs = lambda inputs: self.body(inputs) @ weight

    def forward(self, inputs: Any) -> Any:
        return self.outputs(inputs)


def powers(layer: nn.Module) -> Callable[..., Any]:
    call = layer.forward

    def power(inputs: Any, number: int = 2) -> Any:
        return power(call(inputs), number - 1) if number else inputs

    return power


class ByOtherFunctions(Line):
    """A module whose functions are in containers, hooks, partials, defaults and one another."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        scale, shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))
        self.parts, self.scale, self.shift = nn.ModuleList([first, second]), scale, shift
        inner = lambda inputs: 2 * first(inputs)  # noqa: E731
        self.bodies = {"first": [lambda inputs: -inner(inputs)]}
        self.body = functools.partial(lambda by, inputs: by * second(inputs), scale)
        self.activation = lambda inputs, by=scale: torch.tanh(by * inputs)
        self.linear.register_forward_hook(lambda _, __, outputs: outputs + shift)
        self.third = nn.Linear(3, 3)
        self.power = powers(self.third)  # calls itself, and a method

    def forward(self, inputs: Any) -> Any:
        inputs = self.power(self.bodies["first"][0](inputs))
        return super().forward(self.activation(self.body(inputs)))


def old_weight_norm() -> nn.Module:
    return first_column(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))


def pruned() -> nn.Module:
    layer = nn.Linear(3, 4)
    prune.l1_unstructured(layer, "weight", 0.3)
    return first_column(layer, nn.Tanh(), nn.Linear(4, 1))


def halving(parameters: Any, lr: float) -> Any:
    """SGD with a schedule of its own: the rate halves every two steps."""
    optimizer = torch.optim.SGD(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def of_the_table(parameters: Any, lr: float) -> Any:
    """SparseAdam, which takes sparse gradients only."""
    return torch.optim.SparseAdam(list(parameters)[:1], lr=lr)


def squared(outputs: Any, targets: Any) -> Any:
    return (outputs - targets) ** 2


def task_of(model: Any = Line, inputs: Any = INPUTS, **changes: Any) -> TorchTask:
    options = {"optimizer": torch.optim.SGD, "learning_rate": RATE, "device": "cpu", **changes}
    return torch_task(model, squared, options.pop("optimizer"), (inputs, TARGETS), **options)


def train(task: TorchTask, plan: Plan = PLAN) -> Weights:
    return task.train(task.init(0), plan, lambda *_: None).weights


def by_torch(module: nn.Module, weights: Weights, optimizer: Any, inputs: Any) -> dict[str, Any]:
    """Train a module with plain PyTorch on the same batches with the same random numbers."""
    module.load_state_dict({name: torch.tensor(one) for name, one in weights.items()})
    steps = optimizer(module.parameters(), lr=RATE)
    with torch.random.fork_rng([]):
        for number, batch in enumerate(index_batches(PLAN, 12, 0)):
            seed = np.random.default_rng((PLAN.seed, 0, number)).integers(2**63)
            torch.manual_seed(int(seed))
            steps.zero_grad()
            rows = torch.from_numpy(batch).long()
            squared(module(inputs[rows]), TARGETS[rows]).mean().backward()
            steps.step()
    return {name: one.numpy() for name, one in module.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "inputs", "optimizer"),
    [
        (
            lambda: first_column(
                nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)
            ),
            INPUTS,
            torch.optim.Adam,
        ),
        (
            lambda: first_column(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1)),
            INPUTS,
            functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
        ),
        (Line, INPUTS, halving),
        (lambda: Recurrent(nn.LSTM), INPUTS, torch.optim.SGD),
        (lambda: Recurrent(nn.GRU), INPUTS, torch.optim.SGD),
        (Embedded, TOKENS, torch.optim.SGD),
        (lambda: Embedded(sparse=True), TOKENS, of_the_table),
        (
            lambda: first_column(
                nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1)
            ),
            INPUTS,
            torch.optim.SGD,
        ),
        pytest.param(
            old_weight_norm,
            INPUTS,
            torch.optim.SGD,
            marks=pytest.mark.filterwarnings("ignore::FutureWarning"),
        ),
        (pruned, INPUTS, torch.optim.SGD),
        (remembering, INPUTS, torch.optim.SGD),
        (ByFunctions, INPUTS, torch.optim.SGD),
        (ByOtherFunctions, INPUTS, torch.optim.SGD),
    ],
)
def test_a_training_is_what_plain_pytorch_makes_of_it(
    model: Callable[[], nn.Module], inputs: Any, optimizer: Any
) -> None:
    task = task_of(model, inputs, optimizer=optimizer)
    weights = task.init(0)
    expected = by_torch(model(), weights, optimizer, inputs)
    found = train(task)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        np.testing.assert_allclose(one, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)


class Holder:
    """An object that is no module and calls a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.call = function


class ByAHolder(Line):
    """A module whose function, which calls its layer, is found by no search."""

    def __init__(self, hold: Callable[[nn.Module], Any] = lambda layer: layer) -> None:
        super().__init__()
        self.holder = Holder(hold(self.linear))

    def forward(self, inputs: Any) -> Any:
        return self.holder.call(inputs)[:, 0]


@pytest.mark.parametrize("rule", [None, DpSgd(1.0, 0.0)])
@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: lambda inputs: +layer(inputs),
        lambda layer: (holder := Holder(layer)) and (lambda inputs: +holder.call(inputs)),
        lambda layer: lambda inputs, weight=layer.weight: inputs @ weight.T,
    ],
)
def test_a_module_that_calls_the_layer_of_its_original_is_refused(hold: Any, rule: Any) -> None:
    pytest.importorskip("jax")
    task = task_of(functools.partial(ByAHolder, hold), local_rule=rule)
    with pytest.raises(TaskError, match=r"uses the tensor 'linear\.\w+' of the module that model="):
        train(task)


def test_a_module_may_call_a_frozen_layer_of_its_original_or_hold_its_own() -> None:
    class Frozen(ByAHolder):
        def __init__(self) -> None:
            super().__init__(lambda layer: lambda inputs: +layer(inputs))
            self.linear.requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Any) -> Any:
            return self.scale * super().forward(inputs)

    for model in (ByAHolder, Frozen):
        task = task_of(model)
        weights = task.init(0)
        expected = by_torch(model(), {**weights, **task.frozen()}, torch.optim.SGD, INPUTS)
        for name, one in train(task).items():
            np.testing.assert_allclose(one, expected[name], rtol=1e-5, err_msg=name)


def test_a_loss_that_uses_the_original_is_refused() -> None:
    module = Line()

    def decayed(outputs: Any, targets: Any) -> Any:
        return squared(outputs, targets) + module.linear.weight.square().sum()

    task = torch_task(lambda: module, decayed, torch.optim.SGD, (INPUTS, TARGETS), device="cpu")
    for _ in range(2):  # the hooks of the first training are gone
        with pytest.raises(TaskError, match=r"the loss uses the tensor 'linear\.weight' of"):
            train(task)
    decayed(module(INPUTS), TARGETS).mean().backward()
    assert module.linear.weight.grad is not None


def test_a_loss_may_use_a_layer_of_the_original_that_the_task_freezes():
    module = Line()

    def decayed(outputs: Any, targets: Any) -> Any:
        return squared(outputs, targets) + module.linear.weight.square().sum()

    task = torch_task(
        lambda: module,
        decayed,
        torch.optim.SGD,
        (INPUTS, TARGETS),
        frozen=lambda name: name == "linear.weight",
        device="cpu",
    )
    assert not np.array_equal(train(task)["linear.bias"], task.init(0)["linear.bias"])


def test_a_loss_per_example_may_use_a_tensor_that_was_computed_before():
    pytest.importorskip("jax")
    weights = torch.ones(2, requires_grad=True)
    computed = weights * weights  # part of a graph that outlives the steps

    def weighted(outputs: Any, targets: Any) -> Any:
        return squared(outputs, targets) * computed.sum()

    task = torch_task(
        Line, weighted, torch.optim.SGD, (INPUTS, TARGETS), local_rule=DpSgd(1.0, 0.0), device="cpu"
    )
    assert not np.array_equal(train(task)["linear.bias"], task.init(0)["linear.bias"])
    assert weights.grad is None


def test_a_module_that_changes_its_inputs_leaves_the_held_out_data_as_they_are():
    class Centred(Line):
        def forward(self, inputs: Any) -> Any:
            return super().forward(inputs.sub_(0.5))

    inputs = INPUTS.numpy().copy()
    task = task_of(Centred, inputs, valid_data=(inputs, TARGETS))
    weights = task.init(0)
    expected = task_of(Line).init(0)  # the same weights
    wrong = (
        (inputs - 0.5) @ expected["linear.weight"][0] + expected["linear.bias"] - TARGETS.numpy()
    )
    for _ in range(2):
        assert task.evaluate(weights).loss == pytest.approx((wrong**2).mean(), rel=1e-5)
        train(task)
    np.testing.assert_array_equal(inputs, INPUTS.numpy())


def test_the_trained_model_is_scored_with_its_frozen_statistics():
    class Counting(nn.Module):
        """Batch normalization, and a buffer that does not travel but counts."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def forward(self, inputs: Any) -> Any:
            if self.training:
                self.count += 1
            return self.head(self.norm(inputs))[:, 0] + self.count

    task = task_of(
        Counting,
        INPUTS + 3,
        valid_data=(INPUTS, TARGETS),
        frozen=lambda name: name.startswith("norm."),
        score_trained=True,
    )
    result = task.train(task.init(0), PLAN, lambda *_: None)
    expected = task.evaluate(result.weights).loss
    assert result.metrics["personal_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_expanded_buffer_travels_and_is_loaded():
    class Expanded(Line):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((1,), 2.0).expand(3))

    task, module = task_of(Expanded), Expanded()
    trained = train(task)
    assert trained["scale"].tolist() == [2, 2, 2]
    fluffle.load_into(module, {**trained, "scale": np.arange(3, dtype=np.float32)})
    assert module.scale.tolist() == [0, 1, 2]


def test_a_rule_changes_sparse_gradients_too():
    dense, sparse = (
        train(task_of(functools.partial(Embedded, sparse=one), TOKENS, local_rule=Clip(0.1)))
        for one in (False, True)
    )
    for name, one in dense.items():
        np.testing.assert_allclose(sparse[name], one, rtol=1e-6)


def test_frozen_tensors_of_8_bits_have_a_digest():
    class Quantized(Line):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.arange(3.0).to(torch.float8_e4m3fn))

    frozen = task_of(Quantized, frozen=lambda name: name == "codes").frozen()
    assert frozen["codes"].dtype == np.dtype(ml_dtypes.float8_e4m3fn)
    assert frozen["codes"].astype(int).tolist() == [0, 1, 2]
    assert frozen_of(frozen).digest
    with pytest.raises(ValueError, match=r"'codes' is float8_e4m3fn, .* use bfloat16"):
        check_signature(task_of(Quantized).model_form())


def test_a_users_function_may_use_another_task():
    teacher = task_of(valid_data=(INPUTS, TARGETS))
    weights = teacher.init(0)

    def of_the_teacher(outputs: Any, targets: Any) -> Any:
        return torch.tensor(teacher.evaluate(weights).loss)

    student = task_of(valid_data=(INPUTS, TARGETS), metrics={"teacher": of_the_teacher})
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(student.evaluate(weights)), daemon=True)
    thread.start()
    thread.join(60)
    assert found[0].metrics["teacher"] == pytest.approx(found[0].loss)


# --- dp_sgd ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch.func.vmap
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (
            lambda: first_column(
                nn.Linear(3, 4), nn.GroupNorm(1, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)
            ),
            INPUTS.double(),
        ),
        (Embedded, TOKENS),
        (lambda: nn.Sequential(nn.LSTM(3, 1, batch_first=True), Head()), INPUTS[:, None]),
    ],
)
def test_gradients_of_examples_have_the_gradient_of_the_batch_as_their_mean(
    model: Callable[[], nn.Module], inputs: Any
) -> None:
    pytest.importorskip("jax")
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    told = {"model": lambda: model().to(dtype), "inputs": inputs}
    expected = train(task_of(**told))
    for name, one in train(task_of(**told, local_rule=DpSgd(1e9, 0.0))).items():
        np.testing.assert_allclose(one, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


class Head(nn.Module):
    def forward(self, outputs: Any) -> Any:
        return outputs[0][:, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": lambda: Recurrent(nn.GRU)},
            r"each example, but .*vmap cannot compute it \(RuntimeError: .* use another layer",
        ),
        ({"model": lambda: Embedded(sparse=True), "inputs": TOKENS}, "vmap cannot compute"),
    ],
)
def test_a_layer_that_vmap_lacks_is_an_error_that_names_the_reason(
    options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("jax")
    with pytest.raises(TaskError, match=message):
        train(task_of(**options, local_rule=DpSgd(1.0, 1.0)))


def test_dp_sgd_accepts_batch_normalization_that_uses_the_statistics_it_received():
    pytest.importorskip("jax")

    class Still(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    expected = train(task_of(Still))
    for name, one in train(task_of(Still, local_rule=DpSgd(1e9, 0.0))).items():
        np.testing.assert_allclose(one, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_loss_that_is_no_tensor_is_named_with_dp_sgd_too():
    pytest.importorskip("jax")
    data = INPUTS, TARGETS
    task = torch_task(Line, lambda *_: 0.5, torch.optim.SGD, data, local_rule=DpSgd(1.0, 1.0))
    with pytest.raises(TaskError, match="loss= returned 0.5; expected a tensor"):
        train(task)


def test_an_error_in_a_process_of_a_data_loader_is_named_without_its_traceback():
    from torch._utils import ExceptionWrapper

    from fluffle_common.user_errors import one_line

    try:
        raise KeyError("no such file: 7.png")
    except KeyError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 1")
    with pytest.raises(KeyError) as caught:
        wrapped.reraise()
    expected = "KeyError: Caught KeyError in DataLoader worker process 1. KeyError: 'no such file: "
    assert one_line(caught.value).startswith(expected)

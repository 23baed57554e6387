"""The output of ``confusion`` and ``predict``."""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fluffle_common.cli.app import MOST_SEED
from fluffle_common.cli.output_files import save_chart
from fluffle_common.errors import FluffleError, UsageError
from fluffle_common.tensors.checkpoint import read_checkpoint, save_checkpoint
from fluffle_worker.letters import inference as use
from fluffle_worker.letters.cli import confusion, letters, predict
from fluffle_worker.letters.images import held_out_split, read_images
from fluffle_worker.letters.inference import Score, participants_of, temperature_of
from fluffle_worker.letters.task import letters_task, task
from fluffle_worker.task import TaskOptions

CLASSES = ("a", "b")


def _write(path: Path, level: int) -> None:
    """Write an image of a single grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.zeros((100, 100), np.uint8)
    grey[10:90, 10:90] = level
    Image.fromarray(grey).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that classifies dark letters as a and bright ones as b, and a folder where that
    is correct for the training letters and wrong for the held-out ones."""
    folder = tmp_path_factory.mktemp("run")
    for name in CLASSES:
        for number in range(10):
            _write(folder / f"client-1/{name}/{number}.png", {"a": 30, "b": 230}[name])
    images = read_images(folder / "client-1")
    for index in held_out_split(images, 0)[1]:
        _write(images.paths[index], {0: 230, 1: 30}[int(images.targets[index])])
    nothing = np.zeros((1, 100, 100, 1), np.float32), np.zeros(1, np.int32)
    weights = {
        name: np.zeros_like(value)
        for name, value in letters_task(CLASSES, nothing, None).init(0).items()
    }
    weights["conv1/kernel"][2, 2, 0, 0] = 1
    weights["conv2/kernel"][1, 1, 0, 0] = 1
    weights["dense/kernel"][::16, 1] = 1
    weights["dense/bias"][0] = 600
    save_checkpoint(
        folder / "round-0001.safetensors", weights, {"classes": '["a", "b"]', "round": "1"}
    )
    (folder / "history.jsonl").write_text(
        json.dumps({"event": "committed", "round": 1, "participants": [{"worker": "client-1"}]})
        + "\n"
    )
    return folder


@pytest.fixture(scope="module")
def model(made: Path) -> use.LettersModel:
    return use.LettersModel(made / "round-0001.safetensors")


@pytest.fixture
def folder(
    made: Path, model: use.LettersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Copy the model and the data into the test's folder; the model is compiled once."""
    monkeypatch.setattr(use, "LettersModel", lambda path: model)
    return Path(shutil.copytree(made, tmp_path / "run"))


def _call(command: click.Command, *words: object) -> Result:
    done = CliRunner().invoke(command, [str(word) for word in words])
    if isinstance(done.exception, FluffleError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def _confusion(folder: Path, *words: object, data: str = "client-1") -> Result:
    model, out = folder / "round-0001.safetensors", folder / "c.png"
    done = _call(confusion, "--model", model, "--data", folder / data, "--out", out, *words)
    assert out.stat().st_size > 1000
    return done


@pytest.mark.parametrize("classes", ["3", "[]", "[" * 100_000])
def test_a_file_whose_classes_are_no_list_is_no_model_of_letters(tmp_path, classes):
    metadata = {"classes": classes, "task": "t"}
    save_checkpoint(tmp_path / "m.safetensors", {"w": np.zeros(1)}, metadata)
    with pytest.raises(
        UsageError, match=r"not a model of the letters task, .* \(task of the model: t\)"
    ):
        use.LettersModel(tmp_path / "m.safetensors")


def test_of_a_workers_folder_only_what_it_holds_out_is_scored(folder):
    output = _confusion(folder).stdout.splitlines()
    assert output[0] == "accuracy 0.00 % of 2 held-out letters"
    assert output[1].startswith("not scored: the 18 letters that a worker with --seed 0 trains on")
    assert _confusion(folder).stderr == ""


def test_what_is_held_out_is_what_the_task_itself_holds_out(folder):
    made = task(TaskOptions(data=str(folder / "client-1"), worker="client-1", seed=5))
    _, held_out = held_out_split(read_images(folder / "client-1"), 5)
    assert made.num_examples == 18
    assert len(held_out) == 2
    output = _confusion(folder, "--seed", 5).stdout
    assert output.startswith("accuracy 100.00 % of 2 ")  # others than those that are wrong


def test_the_largest_seed_is_one(folder):
    options = TaskOptions(str(folder / "client-1"), "client-1", seed=2**63 - 1)
    assert task(options).classes == CLASSES


def test_a_worker_says_what_is_odd_about_its_folder(folder, capsys):
    (folder / "client-1/a/1.heic").touch()
    task(TaskOptions(data=str(folder / "client-1"), worker="client-1"))
    assert capsys.readouterr().err == "fluffle: ignored 1 file: .heic 1\n"


def test_all_tells_held_out_and_training_apart(folder):
    output = _confusion(folder, "--all").stdout.splitlines()
    assert output[0] == "accuracy 0.00 % of 2 held-out letters, 100.00 % of 18 training letters"


def test_an_unseen_writer_is_scored_whole(folder):
    (folder / "client-1").rename(folder / "writer-2")
    done = _confusion(folder, "--unseen", data="writer-2")
    assert done.stdout.startswith("accuracy 90.00 % of 20 letters that no worker trained on\n")
    assert done.stderr == ""


def test_a_folder_that_seems_to_be_called_wrongly_is_said(folder):
    done = _confusion(folder, "--unseen")
    assert "client-1 took part in this run" in done.stderr
    assert done.stdout.startswith("accuracy 90.00 % of 20 letters\n")
    (folder / "client-1").rename(folder / "writer-2")
    assert "use --unseen to score all its letters" in _confusion(folder, data="writer-2").stderr


def test_a_folder_whose_name_can_be_no_worker_s_id_is_scored(folder):
    (folder / "client-1").rename(folder / "病院")
    done = _confusion(folder, "--unseen", data="病院")
    assert done.stdout.startswith("accuracy 90.00 % of 20 letters that no worker trained on\n")


def test_all_and_unseen_exclude_each_other(folder):
    with pytest.raises(UsageError, match="--all conflicts with --unseen"):
        _confusion(folder, "--all", "--unseen")


def test_one_letter_alone_holds_nothing_out(folder):
    _write(folder / "one/a/1.png", 30)
    with pytest.raises(FluffleError, match="use --all to score this letter"):
        _confusion(folder, data="one")
    assert _confusion(folder, "--all", data="one").stdout.startswith(
        "accuracy 100.00 % of 1 training letters\n"
    )


def test_prediction_and_scoring_read_alike_and_say_what_is_odd(folder):
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png"):
        _write(folder / "odd" / name, 230)
    for path in (folder / "odd").rglob("*.png"):
        with Image.open(path) as image:
            inverted = np.uint8(255) - np.asarray(image)
        Image.fromarray(inverted.astype(np.uint16) * 257).save(path)
    image = folder / "odd/a/0.png"
    done = _call(predict, "--model", folder / "round-0001.safetensors", "--image", image)
    assert done.stdout.startswith(f"{image}: B ")
    assert "1 of 1 images have a bright border" in done.stderr
    (folder / "odd/a/1.txt").touch()
    stderr = _confusion(folder, "--unseen", data="odd").stderr
    assert "4 of 4 images have a bright border" in stderr
    assert "ignored 1 file: .txt 1" in stderr


def test_an_image_that_cannot_be_read_does_not_keep_the_others_from_being_named(folder):
    good, bad = folder / "client-1/a/0.png", folder / "bad.png"
    bad.write_bytes(b"")
    words = ("--model", folder / "round-0001.safetensors", "--image", bad, good)
    done = CliRunner().invoke(predict, [str(word) for word in words])
    assert f"{good}: " in done.stdout
    assert isinstance(done.exception, UsageError)
    assert "it is empty, or not a PNG" in str(done.exception)


def test_the_temperature_is_explained_where_it_is_used():
    assert "temperature" in _call(predict, "--help").stdout


def test_a_model_without_a_temperature_is_not_calibrated():
    line = {"event": "evaluated", "round": 1}
    assert temperature_of([line], "1") == 1
    assert temperature_of([line, {**line, "temperature": 2}], "1") == 2
    assert temperature_of([{**line, "temperature": 2}], "2") == 1
    assert temperature_of([{**line, "temperature": -1}], "1") == 1
    assert temperature_of([{**line, "temperature": None}], "1") == 1


@pytest.mark.parametrize(
    "odd",
    ["[1]", '"x"', "[" * 100_000, '{"event": "evaluated", "temperature": "hot"}', "{}",
     '{"event": "committed", "participants": [7]}', '{"event": "evaluated", "temperature": NaN}'],
)  # fmt: skip
def test_a_history_is_read_up_to_a_line_that_no_coordinator_writes(tmp_path, odd):
    history = tmp_path / "history.jsonl"
    first = {"event": "evaluated", "round": 1, "temperature": 2}
    history.write_text(f"{json.dumps(first)}\n{odd}\n{json.dumps({**first, 'round': 2})}\n")
    assert use._read_history(history) == [first]
    assert use._read_history(tmp_path / "none") == []


@pytest.mark.parametrize("temperature", [5e-324, 1.0, 1.7e308])
def test_whatever_temperature_workers_report_probabilities_are_numbers(made, temperature):
    model = use.LettersModel(made / "round-0001.safetensors")
    model.temperature = temperature
    probabilities = model.probabilities(np.zeros((1, 100, 100, 1), np.float32))
    assert np.isfinite(probabilities).all()
    assert probabilities.argmax() == 0


def test_the_participants_of_all_rounds_are_known():
    lines = [
        {"event": "committed", "participants": [{"worker": "x"}]},
        {"event": "evaluated"},
        {"event": "committed", "participants": [{"worker": "y"}]},
    ]
    assert participants_of(lines) == {"x", "y"}


def test_a_score_of_nothing_is_zero():
    assert (Score(np.zeros((2, 2), np.int64)).accuracy, Score(np.eye(2)).accuracy) == (0, 100)


def test_further_writers_are_no_clients(tmp_path):
    done = _call(letters, tmp_path / "d", "--clients", 2, "--per-client", 10)
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "client-1",
        "client-2",
        "writer-3",
    ]
    assert "2 clients and 1 more writer with 10 letters each" in done.stdout
    _call(letters, tmp_path / "e", "--clients", 3, "--per-client", 10, "--unseen", 0)
    names = sorted(path.name for path in (tmp_path / "e").iterdir())
    assert names == ["client-1", "client-2", "client-3"]
    for mine, theirs in (("writer-3", "client-3"), ("client-1", "client-1")):
        first, second = (
            sorted((tmp_path / "d" / mine).rglob("*.png")),
            sorted((tmp_path / "e" / theirs).rglob("*.png")),
        )
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_what_a_killed_drawing_left_behind_is_no_dead_end(tmp_path):
    (tmp_path / ".unfinished/client-1/a").mkdir(parents=True)
    _call(letters, tmp_path, "--clients", 1, "--per-client", 10, "--unseen", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["client-1"]


def test_any_name_of_a_class_can_be_drawn(tmp_path):
    names = ("$x_{", "字", "a\\b")
    chart = use.confusion_chart(np.eye(3, dtype=np.int64), names, "100 % of $HOME/$x")
    save_chart(chart, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_model_with_nan_is_no_model_of_letters(made, tmp_path):
    weights, metadata = read_checkpoint(made / "round-0001.safetensors")
    weights["dense/bias"] = np.full(2, np.nan, np.float32)
    save_checkpoint(tmp_path / "m.safetensors", weights, metadata)
    with pytest.raises(
        UsageError, match=r"not a model of the letters task \(tensor 'dense/bias' .* NaN"
    ):
        use.LettersModel(tmp_path / "m.safetensors")


def test_the_largest_seed_is_accepted(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(2):
        Image.new("L", (100, 100), 100 * number).save(tmp_path / "a" / f"{number}.png")
    assert task(TaskOptions(data=str(tmp_path), worker="w", seed=MOST_SEED)).num_examples == 1

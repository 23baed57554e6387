"""The commands ``fluffle letters``, ``predict`` and ``confusion``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import SEED, count
from fluffle_common.cli.console import warn
from fluffle_common.cli.output_files import CHART_FILE, draw_into_files, save_chart
from fluffle_common.cli.printing import echo, echo_json
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.installed import needs
from fluffle_common.plural import plural

if TYPE_CHECKING:
    from fluffle_worker.letters.images import Images
    from fluffle_worker.letters.inference import LettersModel, Score

_FILE = click.Path(path_type=Path, dir_okay=False)
_model_option = click.option(
    "--model",
    type=_FILE,
    required=True,
    metavar="FILE",
    help="Model file of a round, such as runs/letters/round-0006.safetensors.",
)
_NEEDS = "this command needs JAX and Pillow", "worker"


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--clients",
    type=count(),
    default=3,
    help="Number of data owners, each with a handwriting of their own.",
)
@click.option("--per-client", type=count(10), default=250, help="Number of letters per writer.")
@click.option(
    "--unseen",
    type=count(0),
    default=1,
    help="Number of additional writers, whose letters are only for scoring a model; no worker "
    "should train on them.",
)
@click.option("--seed", type=SEED, default=1, help="Seed for the generated handwriting.")
def letters(out: Path, clients: int, per_client: int, unseen: int, seed: int) -> None:
    """Draw letters A to J in the handwriting of different writers.

    Each writer has a personal slant, size, pen and tremor, and prefers some of the shapes of each
    letter. OUT/client-N/<letter>/ has the letters of data owner N. OUT/writer-N/<letter>/ has the
    letters of the additional writers. To score a model on the letters of these writers, use
    'fluffle confusion --unseen'.
    """
    with needs(*_NEEDS):
        from fluffle_worker.letters.handwriting.drawing import draw_letters
    with click.progressbar(length=(clients + unseen) * per_client, label="drawing") as bar:
        draw_letters(
            out,
            clients=clients,
            per_client=per_client,
            unseen=unseen,
            seed=seed,
            progress=lambda: bar.update(1),
        )
    more = f" and {plural(unseen, 'more writer')}" if unseen else ""
    echo(f"{plural(clients, 'client')}{more} with {per_client} letters each in {out}")


@click.command()
@_model_option
@click.option(
    "--image",
    "images",
    type=_FILE,
    required=True,
    multiple=True,
    metavar="PNG",
    help="Image of one white letter on a black background. The image may have any size and color "
    "mode. For several images, repeat the option, or list more files after the first one, as in "
    "--image *.png.",
)
@click.argument("more", nargs=-1, type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the scores of all classes, as JSON.")
def predict(model: Path, images: tuple[Path, ...], more: tuple[Path, ...], as_json: bool) -> None:
    """Classify the letter in an image, and show the confidence.

    The confidence is calibrated, so that predictions with a confidence of 90 % are correct about
    90 % of the time. To calibrate it, the command divides the model's outputs by a temperature that
    the workers determine on held-out letters.

    \b
      fluffle predict --model runs/letters/round-0006.safetensors --image a.png
    """
    with needs(*_NEEDS):
        from fluffle_worker.letters.images import inverted_note
        from fluffle_worker.letters.inference import LettersModel, shown_names
        from fluffle_worker.letters.pixels import read_pixels
    loaded = LettersModel(model)
    shown = shown_names(loaded.classes)
    predictions, pictures, unreadable = [], [], []
    for path in (*images, *more):
        try:
            picture = read_pixels(path)
        except UsageError as why:
            unreadable.append(str(why))
            continue
        pictures.append(picture)
        scores = loaded.predict(picture)
        letter = max(scores, key=scores.__getitem__)
        confidence = scores[letter]
        predictions.append(
            {"image": str(path), "letter": letter, "confidence": confidence, "scores": scores}
        )
        if not as_json:
            echo(f"{path}: {shown[letter]}  {100 * confidence:.1f} %")
    if as_json:
        echo_json(predictions)
    for note in inverted_note(pictures):
        warn(note)
    if unreadable:
        for reason in unreadable[:-1]:
            warn(reason)
        raise UsageError(unreadable[-1])


@click.command(context_settings={"show_default": True})
@_model_option
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Folder of letter images, laid out as <class>/<image>.",
)
@click.option("--out", type=CHART_FILE, required=True, metavar="PNG", help="Image file to write.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Score all letters, and show the accuracy on the held-out letters and on the training "
    "letters.",
)
@click.option(
    "--unseen",
    is_flag=True,
    help="Score all letters in the folder. Use this option only if no worker trained on them.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    help="The --seed of the worker that trained on this folder; this seed determines the held-out "
    "letters.",
)
def confusion(**options: Any) -> None:
    """Draw the confusion matrix of a model on a folder of letters.

    A model performs better on the letters that it was trained on than on other letters. Therefore,
    by default, the command scores only the held-out letters of the worker that trained on the
    folder. The folder must not have changed since the training. If no worker trained on the folder,
    use --unseen.
    """
    with needs(*_NEEDS):
        from fluffle_worker.cli import id_from
        from fluffle_worker.letters.images import read_images
        from fluffle_worker.letters.inference import LettersModel, confusion_chart
    if options["everything"] and options["unseen"]:
        raise UsageError("--all conflicts with --unseen; use only one of them")
    model, data, out = options["model"], options["data"], options["out"]
    loaded = LettersModel(model)
    images = read_images(data, loaded.classes, "the model")
    for note in images.notes:
        warn(note)
    trained = id_from(str(data)) in loaded.participants
    if options["unseen"] and trained:
        warn(
            f"the worker {data.name} took part in this run; if this worker trained on {data}, "
            "remove --unseen"
        )
    elif loaded.participants and not (options["unseen"] or trained):
        warn(
            f"this run has no participant with the name {data.name}; if no worker trained on "
            f"{data}, use --unseen to score all its letters"
        )
    score, of_what, lines = _scored(loaded, images, options, trained)
    title = f"{model.stem} on {data.name}: {score.accuracy:.2f} %\nof {of_what}"
    draw_into_files()
    save_chart(confusion_chart(score.counts, loaded.classes, title), out)
    for line in lines:
        echo(line)
    echo(f"matrix written to {out}")


def _scored(
    model: LettersModel, images: Images, options: Mapping[str, Any], trained: bool
) -> tuple[Score, str, list[str]]:
    """Score the selected letters; return the score, a description of them, and lines to print."""
    from fluffle_worker.letters.images import held_out_split

    if options["unseen"]:
        score = model.score(images)
        of_what = f"{score.total} letters"
        if not trained:
            of_what += " that no worker trained on"
        return score, of_what, [f"accuracy {score.accuracy:.2f} % of {of_what}"]
    train, held_out = held_out_split(images, options["seed"])
    if options["everything"]:
        score = model.score(images)
        of_what = f"all {score.total} letters, including {len(train)} training letters"
        parts = {"held-out": model.score(images, held_out), "training": model.score(images, train)}
        figures = [
            f"{part.accuracy:.2f} % of {part.total} {name} letters"
            for name, part in parts.items()
            if part.total
        ]
        return score, of_what, [f"accuracy {', '.join(figures)}"]
    if not len(held_out):
        raise TaskError(
            f"{options['data']} has only one letter, so no letter is held out; use --all to "
            "score this letter"
        )
    score = model.score(images, held_out)
    of_what = f"{score.total} held-out letters"
    not_scored = (
        f"not scored: the {len(train)} letters that a worker with --seed {options['seed']} trains "
        "on; use --all to score them too"
    )
    return score, of_what, [f"accuracy {score.accuracy:.2f} % of {of_what}", not_scored]

"""``fluffle letters``, ``predict`` and ``confusion``: letters, and what a model makes of them."""

from __future__ import annotations

from pathlib import Path

import click

from fluffle_common.cli import SEED, count
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.printing import echo, echo_json

_FILE = click.Path(path_type=Path, dir_okay=False)
_NEEDS_WORKER = "this command needs JAX and Pillow: pip install 'fluffle[worker]'"


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--clients", type=count(), default=3, help="How many writers.")
@click.option("--per-client", type=count(10), default=250, help="Letters of each.")
@click.option("--seed", type=SEED, default=1, help="The same seed, the same letters.")
def letters(out: Path, clients: int, per_client: int, seed: int) -> None:
    """Draw handwritten letters A to J into OUT/client-N/<letter>/, as different people would.

    Every client is a writer of its own: slant, size, pen, tremor, and which of several shapes of a
    letter it prefers.
    """
    try:
        from fluffle_worker.letters.drawing import draw_letters
    except ImportError:
        raise UsageError(_NEEDS_WORKER) from None
    with click.progressbar(length=clients * per_client, label="drawing") as bar:
        draw_letters(
            out,
            clients=clients,
            per_client=per_client,
            seed=seed,
            progress=lambda done, _: bar.update(done - bar.pos),
        )
    echo(f"{clients} clients with {per_client} letters each in {out}")


@click.command()
@click.option("--model", type=_FILE, required=True, metavar="FILE", help="A round's model file.")
@click.option(
    "--image",
    "images",
    type=_FILE,
    required=True,
    multiple=True,
    metavar="PNG",
    help="An image; may be given several times.",
)
@click.argument("more", nargs=-1, type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the scores of all classes.")
def predict(model: Path, images: tuple[Path, ...], more: tuple[Path, ...], as_json: bool) -> None:
    """Name the letter in an image.

    \b
      fluffle predict --model runs/letters/round-0006.safetensors --image a.png b.png
    """
    try:
        from fluffle_worker.letters.images import read_image
        from fluffle_worker.letters.use import LettersModel
    except ImportError:
        raise UsageError(_NEEDS_WORKER) from None
    loaded = LettersModel(model)
    told = []
    for path in (*images, *more):
        found = loaded.predict(read_image(path))
        told.append(
            {
                "image": str(path),
                "letter": found.label,
                "confidence": found.confidence,
                "scores": found.scores,
            }
        )
        if not as_json:
            echo(f"{path}: {found.label.upper()}  {100 * found.confidence:.1f} %")
    if as_json:
        echo_json(told)


@click.command()
@click.option("--model", type=_FILE, required=True, metavar="FILE", help="A round's model file.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="A folder <class>/<image>.",
)
@click.option("--out", type=_FILE, required=True, metavar="PNG", help="Where to draw the matrix.")
def confusion(model: Path, data: Path, out: Path) -> None:
    """Count which letters of a folder a model takes for which, and draw the matrix."""
    try:
        from fluffle_worker.letters.images import read_images
        from fluffle_worker.letters.use import LettersModel, confusion_counts, draw_confusion
    except ImportError:
        raise UsageError(_NEEDS_WORKER) from None
    loaded = LettersModel(model)
    images = read_images(data, loaded.classes)
    for reason in images.skipped:
        echo(f"fluffle: skipped: {reason}", err=True)
    named = loaded.probabilities(images.inputs).argmax(axis=1)
    counts = confusion_counts(images.targets, named, len(loaded.classes))
    accuracy = 100 * counts.trace() / counts.sum()
    title = f"{model.stem} on {data}: {accuracy:.2f} % of {counts.sum()} letters"
    try:
        draw_confusion(counts, loaded.classes, title, out)
    except ImportError:
        raise UsageError("charts need matplotlib: pip install 'fluffle[plot]'") from None
    except OSError as why:
        raise TaskError(f"cannot write {out} ({why.strerror})") from None
    echo(f"accuracy {accuracy:.2f} %")
    echo(f"matrix of {counts.sum()} letters written to {out}")

"""The files that commands write for people: pages and charts."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from fluffle_common.durable_files import replacing
from fluffle_common.errors import UsageError
from fluffle_common.installed import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OutputFile(click.Path):
    """The type of an option that names a file to write; ``what`` has the format of ``suffix``."""

    def __init__(self, suffix: str, what: str) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self._suffix, self._what = suffix, what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; raise ``UsageError`` if its suffix is that of another format."""
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() not in ("", self._suffix):
            given = f"{param.opts[0]} {path}" if param else str(path)
            raise UsageError(f"{given} must end with {self._suffix}, because {self._what}")
        return path


CHART_FILE = OutputFile(".png", "the chart is a PNG image")


@contextlib.contextmanager
def output_file(path: Path, option: str = "--out") -> Iterator[IO[bytes]]:
    """Yield the file that an option names, replaced on success; errors are ``UsageError``."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as why:
        raise UsageError(
            f"cannot write {path} ({why.strerror}); choose another file with {option}"
        ) from None


def draw_into_files() -> None:
    """Let matplotlib draw without a display; Jupyter's MPLBACKEND may name a missing package."""
    os.environ["MPLBACKEND"] = "agg"


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches; raise ``UsageError`` without matplotlib."""
    with needs("charts need matplotlib", "plot"):
        from matplotlib.figure import Figure

    class Chart(Figure):
        def _repr_png_(self) -> bytes:  # for a notebook in which ``pyplot`` was never used
            image = io.BytesIO()
            self.savefig(image, format="png")
            return image.getvalue()

    return Chart(figsize=(width, height), layout="constrained")


def save_chart(figure: Figure, path: Path, option: str = "--out") -> None:
    """Write a figure to the PNG file that an option names; raise what ``output_file`` does."""
    with output_file(path, option) as file, warnings.catch_warnings():
        # A character that the font lacks becomes a box.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, dpi=150, format="png")

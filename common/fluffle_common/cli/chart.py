"""The figure of a chart. Importing this module imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Chart(Figure):
    """A figure that a notebook displays, even if ``pyplot`` was never used in it."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()

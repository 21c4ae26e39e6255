"""Figures for light and dark pages."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

_INK = {"light": "#222832", "dark": "#ced6dd"}
_LINES = "axes.edgecolor axes.labelcolor text.color xtick.color ytick.color".split()


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
      name: of its files.
      draw: what fills the axes.
      size: in inches.
    """

    name: str
    draw: Callable[[plt.Axes], None]
    size: tuple[float, float] = (6.5, 4.0)

    def save(self, folder: Path) -> None:
        for theme, ink in _INK.items():
            style = {key: ink for key in _LINES} | {
                "svg.hashsalt": self.name,  # the same file at each build
                "svg.fonttype": "none",
                "font.family": "sans-serif",
                "axes.spines.top": False,
                "axes.spines.right": False,
            }
            with plt.rc_context(style):
                figure, axes = plt.subplots(figsize=self.size, layout="constrained")
                self.draw(axes)
                path = folder / f"{self.name}_{theme}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
                plt.close(figure)

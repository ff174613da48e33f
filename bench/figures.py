"""How every plot begins and ends: a figure without frames, and a file with a caption below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CAPTION_WIDTH = 210


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure, and its panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    made, panels = pyplot.subplots(
        1,
        columns,
        figsize=(width, height),
        squeeze=False,
        layout=ConstrainedLayoutEngine(wspace=0.05),
    )
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
    return made, list(panels[0])


def save(made: Any, path: Path, caption: Sequence[str] = ()) -> Path:
    """Writes a figure and lets go of it."""
    from matplotlib import pyplot

    lines = [part for text in caption for part in textwrap.wrap(text, _CAPTION_WIDTH)]
    if lines:
        made.supxlabel("\n".join(lines), fontsize=7.5, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=130)
    pyplot.close(made)
    return path

"""Milliseconds on a logarithmic axis, ours between its floors and the fastest exact peer; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cells import short

# Okabe and Ito's colours, told apart by the colour-blind; shapes and strokes say the same once more.
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "packed": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "plain": {"color": "#56B4E9", "marker": "^", "linestyle": "-"},
    "best exact peer": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "torch, not exact": {"color": "#CC79A7", "marker": "D", "linestyle": "-"},
    "read floor": {"color": "#333333", "marker": "", "linestyle": "--"},
    "product floor": {"color": "#009E73", "marker": "", "linestyle": ":"},
    "read floor of codes": {"color": "#333333", "marker": "", "linestyle": "--"},
    "product floor of codes": {"color": "#009E73", "marker": "", "linestyle": "--"},
}


class Panel(NamedTuple):
    """series: milliseconds by name, one for each place of the x axis; None where there is none.

    places: words, which stand side by side, or numbers on a logarithmic axis.
    """

    title: str
    xlabel: str
    places: Sequence[str] | Sequence[int]
    series: dict[str, list[float | None]]


def draw(panels: Sequence[Panel], path: Path, title: str = "", columns: int = 2) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(7.5, 5.2 * columns), 3.4 * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        words = isinstance(panel.places[0], str)
        x = range(len(panel.places)) if words else panel.places
        for name, values in panel.series.items():
            heights = [math.nan if value is None else value for value in values]
            axes.plot(x, heights, label=name, linewidth=1.8, markersize=5, **STYLES[name])
        axes.set_yscale("log")
        if words:
            axes.set_xticks(x, panel.places)
        else:
            axes.set_xscale("log")
            axes.set_xticks(x, [short(int(place)) for place in panel.places])
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel("median of a call, ms")
        axes.grid(True, which="major", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def floors(cell: dict[str, Any], users: int, count: int, r: int, itemsize: int) -> tuple[float, float]:
    """Milliseconds of one read of the table and of its float32 products, at the ceilings measured beside the cell."""
    elements = cell["N"] * r
    read = elements * itemsize / cell["read_ceiling_gb_per_s"] / 1e6
    return read, 2.0 * users * count * elements / cell["fma_ceiling_gflop_per_s"] / 1e6

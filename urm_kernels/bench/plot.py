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
    "packed, exact": {"color": "#0072B2", "marker": "*", "linestyle": "", "markersize": 11},
    "packed int8, exact": {"color": "#0072B2", "marker": "d", "linestyle": "", "markersize": 8},
    "packed in blocks, exact": {"color": "#000000", "marker": "P", "linestyle": "", "markersize": 8},
    "recall=.99": {"color": "#56B4E9", "marker": "X", "linestyle": "", "markersize": 8},
    "faiss IVFFlat": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "faiss IVFPQFastScan + refine": {"color": "#E69F00", "marker": "D", "linestyle": "-"},
    "faiss PQFastScan + refine": {"color": "#CC79A7", "marker": "v", "linestyle": "-"},
    "faiss HNSW": {"color": "#009E73", "marker": "^", "linestyle": "--"},
    "hnswlib": {"color": "#009E73", "marker": "<", "linestyle": ":"},
    "ScaNN": {"color": "#7F3C8D", "marker": "o", "linestyle": "-"},
    "ScaNN, two leaves a row": {"color": "#7F3C8D", "marker": "p", "linestyle": ":"},
    "explore_topk": {"color": "#777777", "marker": "h", "linestyle": "-."},
}
_STROKE = {"linewidth": 1.8, "markersize": 5}


class Panel(NamedTuple):
    """series: milliseconds by name, one for each place of the x axis; None where there is none.

    places: words, which stand side by side, or numbers on a logarithmic axis.
    """

    title: str
    xlabel: str
    places: Sequence[str] | Sequence[int]
    series: dict[str, list[float | None]]

    def draw_in(self, axes: Any) -> None:
        from matplotlib.ticker import NullFormatter

        words = isinstance(self.places[0], str)
        x = range(len(self.places)) if words else self.places
        for name, values in self.series.items():
            heights = [math.nan if value is None else value for value in values]
            axes.plot(x, heights, label=name, **_STROKE | STYLES[name])
        if words:
            axes.set_xticks(x, self.places)
        else:
            axes.set_xscale("log")
            axes.set_xticks(x, [short(int(place)) for place in self.places])
            axes.xaxis.set_minor_formatter(NullFormatter())


class RecallPanel(NamedTuple):
    """series: (recall, milliseconds) by name, in ascending order; the axis of recall widens towards 1."""

    title: str
    series: dict[str, list[tuple[float, float]]]
    xlabel: str = "recall"

    def draw_in(self, axes: Any) -> None:
        for name, points in self.series.items():
            axes.plot(
                [_nines(recall) for recall, _ in points],
                [ms for _, ms in points],
                label=name,
                **_STROKE | STYLES[name],
            )
        ticks = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
        axes.set_xlim(_nines(ticks[0]), _nines(1) + 0.2)
        axes.set_xticks([_nines(recall) for recall in ticks], [f"{recall:g}" for recall in ticks])


def _nines(recall: float) -> float:
    """1 for .9, 2 for .99; 1 itself is where .9999 would be."""
    return -math.log10(max(1 - recall, 1e-4))


def draw(panels: Sequence[Panel | RecallPanel], path: Path, title: str = "", columns: int = 2) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(7.5, 5.2 * columns), 3.4 * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw_in(axes)
        axes.set_yscale("log")
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
    abreast = len(handles) if len(handles) <= 5 else 4
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=abreast, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def floors(cell: dict[str, Any], users: int, count: int, r: int, itemsize: int) -> tuple[float, float]:
    """Milliseconds of one read of the table and of its float32 products, at the ceilings measured beside the cell."""
    elements = cell["N"] * r
    read = elements * itemsize / cell["read_ceiling_gb_per_s"] / 1e6
    return read, 2.0 * users * count * elements / cell["fma_ceiling_gflop_per_s"] / 1e6

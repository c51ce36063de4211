"""The section of docs/benchmarks.md that was measured on a GPU."""

from __future__ import annotations

from typing import Any

from render_cpu import Figures, ms, table

from urm_kernels.bench.cells import short
from urm_kernels.bench.plot import Panel

_FIGURE = "bench_gpu.png"
_K = 1000  # of the figure


def latency(record: dict[str, Any], name: str) -> tuple[str, Figures]:
    device = record["device"]
    fine = [cell for cell in record["latency"] if cell["status"] == "ok"]
    cells = [cell for cell in fine if not cell.get("float8")]
    text = [
        f"## GPU\n\n{device['name']} ({device['memory_gib']} GiB, compute capability {device['capability']}), torch "
        f"{device['torch']}, Triton {device['triton']}, CUDA {device['cuda']}. `make gpu-acceptance`, kept in "
        f"`bench/results/{name}`.\n\n"
        "Results are checked against float64 first. *Graph*: a replayed CUDA graph; *call*: a plain call, host\n"
        "included. *Floor*: the larger of one read of the table at the copy bandwidth and the products at torch's\n"
        "bfloat16 rate, measured beside it. *torch*: products in bfloat16, which round; *scores, then topk*: our scan\n"
        "with all scores written. Which bars are met is said in [gpu.md](gpu.md).\n"
    ]
    header = ["r", "(B, M)", "k", "graph, ms", "call", "floor", "torch", "scores, then topk", "torch / graph"]
    for rows in sorted({cell["N"] for cell in cells}, reverse=True):
        lines = [_line(cell) for cell in cells if cell["N"] == rows]
        text.append(f"### N = {rows:,}, bf16\n\n{table(header, lines)}")
    if scaled := [cell for cell in fine if cell.get("float8")]:
        lines = [[f"{cell['N']:,}", *_line(cell)] for cell in scaled]
        text.append(f"### float8 with a scale a row\n\n{table(['N', *header], lines)}")
    if packed := [cell for cell in record.get("packed", []) if cell["status"] == "ok"]:
        text.append(_packed(packed))
    if others := [cell for cell in record.get("functions", []) if cell["status"] == "ok"]:
        text.append(f"### Other functions, bf16\n\n{_functions(others)}")
    panels = []
    for rows, r in sorted({(cell["N"], cell["r"]) for cell in cells if cell["k"] == _K}, reverse=True):
        shown = [cell for cell in cells if (cell["N"], cell["r"], cell["k"]) == (rows, r, _K)]
        panels.append(_panel(sorted(shown, key=lambda cell: (cell["B"] * cell["M"], cell["B"])), rows, r))
    if not panels:
        return "\n".join(text), {}
    text.append(f"![latency on a GPU](figures/{_FIGURE})\n")
    return "\n".join(text), {_FIGURE: (panels, f"{device['name']}, bfloat16 tables, k = {_K}, replayed graph")}


def _line(cell: dict[str, Any]) -> list[str]:
    return [
        str(cell["r"]),
        f"({cell['B']}, {cell['M']})",
        f"{cell['k']:,}",
        f"**{ms(cell['graph_ms'])}**",
        ms(cell["ms"]),
        ms(cell["floor_ms"]),
        ms(cell["peers_ms"]["torch"]),
        ms(cell["peers_ms"]["half_fused"]),
        f"{cell['peers_ms']['torch'] / cell['graph_ms']:.2f}",
    ]


def _packed(cells: list[dict[str, Any]]) -> str:
    """Cells of packed tables, then what the encoder takes."""
    scans, encoders = [cell for cell in cells if "graph_ms" in cell], [cell for cell in cells if "rows_per_s" in cell]
    text = [
        "### Packed tables, bf16\n",
        "The floor: one read of the codes at the copy bandwidth, or their products at the measured rate of `mma.sync`\n"
        "on bytes. *Plain*: the same call without codes, replayed; its bits are what a packed table's are compared\n"
        "with. *Survive*: pairs of user and row that the first bounds leave, of all; *scored*: pairs scored exactly,\n"
        "for each result.\n",
    ]
    header = ["data", "codes", "N", "(B, M)", "graph, ms", "call", "floor", "of floor", "plain", "plain / graph"]
    lines = [
        [
            cell["kind"],
            cell["codes"],
            f"{cell['N']:,}",
            f"({cell['B']}, {cell['M']})",
            f"**{ms(cell['graph_ms'])}**",
            ms(cell["ms"]),
            ms(cell["floor_ms"]),
            f"{cell['of_floor']:.2f}",
            ms(cell["peers_ms"]["plain"]),
            f"{cell['peers_ms']['plain'] / cell['graph_ms']:.2f}",
            f"{100 * cell['survivors'] / cell['pairs']:.3f} %",
            f"{cell['scored'] / (cell['B'] * cell['k']):.1f}",
        ]
        for cell in scans
    ]
    text.append(table([*header, "survive", "scored"], lines))
    for cell in encoders:
        text.append(f"Encoding, {cell['codes']}: {cell['rows_per_s'] / 1e6:,.0f} million rows a second.\n")
    return "\n".join(text)


def _functions(cells: list[dict[str, Any]]) -> str:
    """The floor: bytes at the copy bandwidth, or multiply-adds at torch's float32 rate, whichever takes longer."""
    lines = []
    for cell in cells:
        ours = cell["graph_ms"] or cell["ms"]
        candidates = f"{cell['C']:,}" + ", shared" * cell["shared"] if cell["C"] else "-"
        graph = ms(cell["graph_ms"]) if cell["graph_ms"] else "-"
        torch = cell["peers_ms"]["torch"]
        shape = f"({cell['B']}, {cell['M']})"
        times = [f"**{graph}**", ms(cell["ms"]), ms(cell["floor_ms"]), ms(torch), f"{torch / ours:.2f}"]
        lines.append([cell["function"], f"{cell['N']:,}", shape, candidates, *times])
    header = ["function", "N", "(B, M)", "candidates", "graph, ms", "call", "floor", "torch, fp32", "torch / ours"]
    return table(header, lines)


def _panel(cells: list[dict[str, Any]], rows: int, r: int) -> Panel:
    elements = float(rows * r)
    series: dict[str, list[float | None]] = {
        "ours": [cell["graph_ms"] for cell in cells],
        "torch, not exact": [cell["peers_ms"]["torch"] for cell in cells],
        "read floor": [2 * elements / cell["ceilings"]["copy_gb_per_s"] / 1e6 for cell in cells],
        "product floor": [
            2 * cell["B"] * cell["M"] * elements / cell["ceilings"]["bf16_tflop_per_s"] / 1e9 for cell in cells
        ],
    }
    places = [f"({cell['B']}, {cell['M']})" for cell in cells]
    return Panel(f"N = {short(rows)}, r = {r}", "(B, M)", places, series)

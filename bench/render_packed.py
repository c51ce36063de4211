"""The sections of docs/benchmarks.md on packed tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from render_cpu import Figures, bars, beside, machine, ms, peers_left_out, table

from urm_kernels.bench.cells import short
from urm_kernels.bench.plot import Panel

_HOW = """A packed table's result is the plain one's bit for bit, and that one is checked against float64. *Read floor*:
one read of the codes that a scan starts with. *Product floor*: all integer products of codes, at the rate that
registers alone reach. *Left*: pairs of user and item that the first bounds could not rule out; *scored*: pairs that
were scored exactly. Bars and figures speak of int4, which is what `pack()` makes unless told otherwise, and for the
data kind `iid` of int8: so many of its rows are close to the best that bounds of 4 bits say little.
"""
_HOW_LARGE = """As above. Peers that do not fit into the memory beside each other are measured one after the other, each
in turns with ours.
"""


def latency(record: dict[str, Any], name: str) -> tuple[str, Figures]:
    return _section(record, name, f"## CPU: packed tables\n\n{_made(record, 'make bench', name)}\n{_HOW}")


def grid(record: dict[str, Any], name: str) -> tuple[str, Figures]:
    title = "## CPU: packed tables of ten million rows"
    return _section(record, name, f"{title}\n\n{_made(record, 'make bench-full', name)}\n{_HOW_LARGE}")


def _made(record: dict[str, Any], command: str, name: str) -> str:
    return f"{machine(record['machine'])} `{command}`, kept in `bench/results/{name}`.\n"


def _section(record: dict[str, Any], name: str, head: str) -> tuple[str, Figures]:
    cells = record["cells"]
    found = sorted((cell for cell in cells if "codes" in cell), key=_order)
    text = [head, bars([cell for cell in cells if "beside_ms" not in cell])]
    lines = [cell for cell in cells if "beside_ms" in cell]
    if lines:
        text.append(beside(lines))
    text += [_table([cell for cell in found if cell["N"] == rows], rows) for rows in sorted({c["N"] for c in found})]
    if left_out := peers_left_out(cells):
        text.append(left_out)
    reasons = Counter(cell["not_measured"] for cell in cells if "not_measured" in cell)
    text += [f"Not measured ({count} cells): {reason}.\n" for reason, count in reasons.items()]
    # One width and k: others beside them would be other curves.
    shown = [cell for cell in found if (cell["r"], cell["k"]) == (128, 1000)]
    if not shown:
        return "\n".join(text), {}
    figure = f"bench_{name.removesuffix('.json')}.png"
    text.append(f"![latency of packed tables by shape](figures/{figure})\n")
    rows = ", ".join(short(count) for count in sorted({cell["N"] for cell in shown}))
    panels = [_panel([c for c in shown if c["data"] == data]) for data in dict.fromkeys(c["data"] for c in shown)]
    return "\n".join(text), {figure: (panels, f"score_topk of packed tables on a CPU, N = {rows}, r = 128, k = 1000")}


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["N"], -cell["r"], cell["data"], cell["B"] * cell["M"], cell["B"], cell["k"]


def _table(found: Sequence[dict[str, Any]], rows: int) -> str:
    """A line for each codes of a cell, that of the bars in bold."""
    lines = []
    for cell in found:
        peer = f"{cell['best_peer']} {ms(cell['best_peer_ms'])}" if cell["best_peer"] else "-"
        for name, did in cell["codes"].items():
            time = f"**{ms(did['ms'])}**" if name == cell["judged"] else ms(did["ms"])
            left, scored = (f"{100 * share:.2g} %" for share in did["survivors"])
            extra = did["extra_bytes"]
            lines.append(
                [
                    cell["data"],
                    str(cell["r"]),
                    f"({cell['B']}, {cell['M']})",
                    f"{cell['k']:,}",
                    name,
                    f"{did['bytes_a_row']:.0f}",
                    f"{did['build_s']:.2f}",
                    f"{time} ({ms(did['low_ms'])} - {ms(did['high_ms'])})",
                    ms(cell["plain_ms"]),
                    peer,
                    ms(did["read_floor_ms"]),
                    f"{100 * did['of_read_bandwidth']:.0f} %",
                    ms(did["product_floor_ms"]),
                    f"{100 * did['of_code_rate']:.0f} %",
                    f"{left}, {scored}",
                    "-" if extra is None else f"{extra / 2**20:.1f}",
                ]
            )
    header = [
        "data", "r", "(B, M)", "k", "codes", "bytes a row", "pack, s", "packed, ms", "plain, ms", "best exact peer, ms",
        "read floor", "/ packed", "product floor", "/ packed", "left, scored", "MiB",
    ]  # fmt: skip
    return f"### Packed, N = {rows:,}\n\n{table(header, lines)}"


def _panel(found: Sequence[dict[str, Any]]) -> Panel:
    series: dict[str, list[float | None]] = {
        "packed": [cell["ms"] for cell in found],
        "plain": [cell["plain_ms"] for cell in found],
        "best exact peer": [cell.get("best_peer_ms") for cell in found],
        "read floor of codes": [cell["read_floor_ms"] for cell in found],
        "product floor of codes": [cell["product_floor_ms"] for cell in found],
    }
    return Panel(
        f"{found[0]['data']}, {found[0]['judged']}", "(B, M)", [f"({c['B']}, {c['M']})" for c in found], series
    )

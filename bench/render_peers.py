"""The section of docs/benchmarks.md on approximate peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peers import TARGETS, fastest
from render_cpu import Figures, machine, ms, table

from urm_kernels.bench.plot import RecallPanel

_EXACT = {name: f"{name}, exact" for name in ("packed", "packed int8", "packed in blocks")}  # in the figure
_NOT_DRAWN = ("plain",)
_FIGURE = "bench_peers_cpu.png"
_HOW = """Recall is the mean share of the exact k best rows, of {users} users. Peers search every query and merge by the
maximum; all of their settings are tried, and a cell has the fastest that reaches the recall, with the recall
it has; "-" and the best recall where none does. Ours take part with what they are: exact, whatever recall is
asked for, except for `recall=.99` (2-bit codes). Every way has {threads} threads and its own batch interface.
Ways take turns, in each of which a way answers all batches one after another, so that its index is as warm as
its own calls keep it. IVFPQFastScan rescores up to 10 k rows a query, PQFastScan up to 64 k, ScaNN up to
3000; graphs have 16 links and are made by inner product (explore_topk's by cosine), and others may do better
(`bench/approximate_peers.py`). IVFFlat has 2,048 lists by distance (4,096 of 1e7 rows), of which at most 1,024 are
read; by product, and not spherical, they were faster on clustered rows: (1, 8) 1.36 ms at .9966 of 1e6 rows, in an
experiment that was not kept. ScaNN reads up to 512 of sqrt(N) leaves. *Bytes a row*: index and rows, all that a
search needs. *Build*: seconds as they came; those of graphs (HNSW, hnswlib, explore_topk) and of 1e7 rows while others
used the cores as well. The figure draws the settings of a way that none of its others beats, and recall above .9999
at 1.
"""


def recall(record: dict[str, Any], name: str) -> tuple[str, Figures]:
    tables = record["tables"]
    about = tables[0]["machine"]
    text = [
        f"## CPU: approximate peers at equal recall\n\n{machine(about)} `make bench-peers`, kept in "
        f"`bench/results/{name}`.\n",
        _HOW.format(users=tables[0]["users"], threads=about["threads"]),
    ]
    panels = []
    for found in tables:
        commit = found["machine"]["commit"]
        later = "" if commit == about["commit"] else f", commit {commit}"
        text.append(f"### {found['data']}, N = {found['N']:,}, r = {found['r']}, k = {found['k']}{later}\n")
        text.append(_table(found))
        text += [f"{peer} is left out: {reason}.\n" for peer, reason in found["left_out"].items()]
        panels += [_panel(cell, found) for cell in found["cells"] if cell["M"] > 1]
    text.append(f"![recall against milliseconds](figures/{_FIGURE})\n")
    return "\n".join(text), {_FIGURE: (panels, f"Max over M on a CPU, r = {tables[0]['r']}, k = 100")}


def _table(found: dict[str, Any]) -> str:
    cells = found["cells"]
    header = ["", "build, s", "bytes a row"]
    header += [f"({cell['B']}, {cell['M']}) at {target:g}, ms" for cell in cells for target in TARGETS]
    header.append(f"setting of ({cells[-1]['B']}, {cells[-1]['M']}) at {TARGETS[-1]:g}")
    lines = []
    for name, build in found["builds"].items():
        line = [name, f"{build['build_s']:.1f}", f"{build['bytes_a_row']:.0f}"]
        line += [_reached(cell["ways"], name, target) for cell in cells for target in TARGETS]
        last = fastest(cells[-1]["ways"], name, TARGETS[-1])
        lines.append([*line, ", ".join(f"{knob} {value}" for knob, value in last["setting"].items()) if last else ""])
    return table(header, lines)


def _reached(ways: Sequence[dict[str, Any]], name: str, target: float) -> str:
    way = fastest(ways, name, target)
    if way is None:
        best = max(way["recall"] for way in ways if way["name"] == name)
        return f"- ({_share(best)})"
    others = [found["ms"] for other in {w["name"] for w in ways} if (found := fastest(ways, other, target))]
    time = f"**{ms(way['ms'])}**" if way["ms"] == min(others) else ms(way["ms"])
    return f"{time} ({_share(way['recall'])})"


def _share(recall: float) -> str:
    return "1" if recall == 1 else f"{int(recall * 1e4) / 1e4:.4f}".removeprefix("0")


def _panel(cell: dict[str, Any], found: dict[str, Any]) -> RecallPanel:
    series = {}
    for name in dict.fromkeys(way["name"] for way in cell["ways"]):
        if name not in _NOT_DRAWN:
            series[_EXACT.get(name, name)] = _front([way for way in cell["ways"] if way["name"] == name])
    return RecallPanel(f"{found['data']}, N = {found['N']:.0e}, (B, M) = ({cell['B']}, {cell['M']})", series)


def _front(ways: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(recall, ms) of the settings that no other one beats in both."""
    found: list[tuple[float, float]] = []
    for way in sorted(ways, key=lambda way: (-way["recall"], way["ms"])):
        if not found or way["ms"] < found[-1][1]:
            found.append((way["recall"], way["ms"]))
    return found[::-1]

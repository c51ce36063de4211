"""The sections of docs/benchmarks.md that were measured on a CPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from urm_kernels.bench.cells import DTYPES, short
from urm_kernels.bench.plot import Panel, RecallPanel, floors

Figures = dict[str, tuple[Sequence[Panel | RecallPanel], str]]

_SCAN = re.compile(r"(fp32|bf16) r=(\d+) B=(\d+) M=(\d+) k=(\d+)")


class Scan(NamedTuple):
    """A record of a scan with what its name says."""

    N: int
    dtype: str
    r: int
    B: int
    M: int
    k: int
    record: dict[str, Any]

    @property
    def floors(self) -> tuple[float, float]:
        return floors(self.record, self.B, self.M, self.r, DTYPES[self.dtype].itemsize)

    @property
    def best(self) -> float | None:
        return self.record.get("best_peer_ms")


def scans(cells: Iterable[dict[str, Any]]) -> list[Scan]:
    """Those whose name is a scan's and nothing else, and that were measured."""
    found = []
    for cell in cells:
        match = _SCAN.fullmatch(cell["cell"])
        if match and "ms" in cell:
            found.append(Scan(cell["N"], match[1], *map(int, match.groups()[1:]), cell))
    return sorted(found, key=lambda scan: scan[:6])


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)) + "\n"


def ms(value: float | None) -> str:
    """Three digits: more would be noise."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:#.3g}"


def latency(record: dict[str, Any], name: str) -> tuple[str, Figures]:
    cells = record["cells"]
    found = scans(cells)
    text = [f"## CPU: one table\n\n{machine(record['machine'])} `make bench`, kept in `bench/results/{name}`.\n"]
    text += [bars(cells), *tables(found), peers_left_out(cells)]
    k = _shown_k(found)
    groups = sorted({(scan.N, scan.dtype, scan.r) for scan in found}, key=lambda group: (group[1] != "fp32", group))
    panels = [
        by_shape([scan for scan in found if scan[:3] == group and scan.k == k], f"{group[1]}, r = {group[2]}")
        for group in groups
    ]
    if not found:
        return "\n".join(text), {}
    figure = f"bench_{name.removesuffix('.json')}.png"
    rows = ", ".join(short(count) for count in sorted({scan.N for scan in found}))
    text.append(f"![latency by shape](figures/{figure})\n")
    return "\n".join(text), {figure: (panels, f"score_topk on a CPU, N = {rows}, k = {k}")}


def grid(record: dict[str, Any], name: str) -> tuple[str, Figures]:
    cells = record["cells"]
    found = scans(cells)
    text = [
        f"## CPU: the full grid\n\n{machine(record['machine'])} `make bench-full`, kept in `bench/results/{name}`.\n"
    ]
    text += [*tables(found), peers_left_out(cells)]
    without = {cell["not_measured"]: cell for cell in cells if "not_measured" in cell}
    text += [f"Not measured, {short(cell['N'])} rows and more: {reason}.\n" for reason, cell in without.items()]
    figures: Figures = {}
    widest, k = max((scan.r for scan in found), default=0), _shown_k(found)
    shown = [scan for scan in found if scan.r == widest and scan.k == k]
    if shown:
        groups = sorted({(scan.dtype, scan.N) for scan in shown}, key=lambda group: (group[0] != "fp32", group))
        panels = [
            by_shape([s for s in shown if (s.dtype, s.N) == group], f"{group[0]}, N = {short(group[1])}")
            for group in groups
        ]
        figures["bench_grid_shapes.png"] = panels, f"score_topk on a CPU, r = {widest}, k = {k}"
        text.append("![latency by shape](figures/bench_grid_shapes.png)\n")
        shapes = sorted({(s.B, s.M) for s in shown}, key=lambda shape: shape[0] * shape[1])
        shapes = sorted({shapes[0], shapes[len(shapes) // 2], shapes[-1]})  # the smallest, a middle one, the largest
        panels = [
            by_rows(of_kind, f"{dtype}, (B, M) = ({shape[0]}, {shape[1]})")
            for dtype in DTYPES
            for shape in shapes
            if (of_kind := [s for s in shown if (s.dtype, s.B, s.M) == (dtype, *shape)])
        ]
        figures["bench_grid_rows.png"] = panels, f"score_topk on a CPU against N, r = {widest}, k = {k}"
        text.append("![latency against N](figures/bench_grid_rows.png)\n")
    return "\n".join(text), figures


def _shown_k(found: Sequence[Scan]) -> int:
    """Of the figures: 100, or what there is."""
    ks = {scan.k for scan in found}
    return 100 if 100 in ks or not ks else min(ks)


def bars_only(record: dict[str, Any], name: str) -> tuple[str, Figures]:
    what = "## CPU: tables that change, candidates, denominators"
    text = [f"{what}\n\n{machine(record['machine'])} `make bench`, kept in `bench/results/{name}`.\n"]
    return "\n".join([*text, beside(record["cells"])]), {}


def beside(cells: Iterable[dict[str, Any]]) -> str:
    """Cells that have no peers, only other ways beside them."""
    lines = []
    for cell in cells:
        others = ", ".join(f"{key.removesuffix('_ms')} {ms(value)}" for key, value in cell.get("beside_ms", {}).items())
        lines.append([cell["cell"], ms(cell.get("ms")), others or "-", cell["bar"], verdict(cell)])
    return table(["cell", "ours, ms", "beside it, ms", "bar", ""], lines)


def machine(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    return (
        f"{about['processor']} ({about['system']}), {about['cores']} cores, {about['threads']} threads, instruction "
        f"set {about['instruction_set']}; {versions}; commit {about['commit']}, {about['date']}."
    )


def verdict(cell: dict[str, Any]) -> str:
    return {True: "met", False: "**missed**", None: "-"}[cell.get("met")]


def bars(cells: Sequence[dict[str, Any]]) -> str:
    """Every bar, the missed ones first."""
    barred = [cell for cell in cells if cell.get("met") is not None]
    missed = [cell for cell in barred if not cell["met"]]
    lines = []
    for cell in missed + [cell for cell in barred if cell["met"]]:
        if "peers_ms" in cell:
            ratios = sorted(cell["ratios"].items(), key=lambda peer: peer[1])
            there = f"{100 * cell['of_read_bandwidth']:.0f} % of bandwidth; "
            if "of_code_rate" in cell:
                there += f"{100 * cell['of_code_rate']:.0f} % of the code rate; "
            there += ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in ratios)
        elif cell.get("extra_bytes") is not None:
            there = f"{cell['extra_bytes'] / 2**20:.1f} MiB"
        else:
            there = f"{ms(cell['ms'])} ms"
        lines.append([cell["cell"], cell["bar"], there, verdict(cell)])
    head = f"Bars: {len(barred) - len(missed)} met, {len(missed)} missed.\n\n"
    return head + table(["cell", "bar", "measured (peers: their time over ours)", ""], lines)


def tables(found: Sequence[Scan]) -> list[str]:
    """One table for each N and dtype."""
    out = []
    for rows, dtype in sorted(
        {(scan.N, scan.dtype) for scan in found}, key=lambda group: (group[1] != "fp32", group[0])
    ):
        lines = []
        for scan in found:
            if (scan.N, scan.dtype) != (rows, dtype):
                continue
            record, (read, multiply) = scan.record, scan.floors
            spread = f" ({ms(record['low_ms'])} - {ms(record['high_ms'])})" if "low_ms" in record else ""
            extra = record.get("extra_bytes")
            faster = record.get("faster_by")
            lines.append(
                [
                    str(scan.r),
                    f"({scan.B}, {scan.M})",
                    f"{scan.k:,}",
                    f"**{ms(record['ms'])}**{spread}",
                    ms(read),
                    ms(multiply),
                    record.get("best_peer") or "-",
                    ms(scan.best),
                    "-" if faster is None else f"{faster:.2f}",
                    "-" if extra is None else f"{extra / 2**20:.1f}",
                ]
            )
        header = [
            "r",
            "(B, M)",
            "k",
            "ours, ms",
            "read floor",
            "product floor",
            "best exact peer",
            "ms",
            "/ ours",
            "MiB",
        ]
        out.append(f"### N = {rows:,}, {dtype}\n\n{table(header, lines)}")
    return out


def peers_left_out(cells: Iterable[dict[str, Any]]) -> str:
    """Who was skipped, a line for each reason with the number of cells."""
    reasons: dict[str, int] = {}
    for cell in cells:
        for peer, reason in cell.get("skipped", {}).items():
            # Seconds and sizes differ from cell to cell; the JSON has them.
            kind = re.sub(r"[\d.,]+ (s|GiB)\b", r"... \1", reason)
            kind = re.sub(r" (at N|at k) = [\d,]+", "", kind)
            reasons[f"{peer}: {kind}"] = reasons.get(f"{peer}: {kind}", 0) + 1
    lines = [f"* {reason} ({count} cell{'s' if count > 1 else ''})" for reason, count in reasons.items()]
    return "Skipped:\n\n" + "\n".join(lines) + "\n" if lines else ""


def by_shape(found: Sequence[Scan], title: str) -> Panel:
    found = sorted(found, key=lambda scan: (scan.B * scan.M, scan.B))
    return Panel(title, "(B, M)", [f"({scan.B}, {scan.M})" for scan in found], _series(found))


def by_rows(found: Sequence[Scan], title: str) -> Panel:
    return Panel(title, "items N", [scan.N for scan in found], _series(found))


def _series(found: Sequence[Scan]) -> dict[str, list[float | None]]:
    return {
        "ours": [scan.record["ms"] for scan in found],
        "best exact peer": [scan.best for scan in found],
        "read floor": [scan.floors[0] for scan in found],
        "product floor": [scan.floors[1] for scan in found],
    }

"""Cells as aligned tables for a terminal, and as a report to paste."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from .cells import short
from .machine import own_version


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Columns padded to one width; those of `left` to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            text.ljust(width) if place in left else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def table(cells: Iterable[dict[str, Any]]) -> list[str]:
    lines = [("N", "cell", "ms", "low - high", "GB/s", "of read", "of FMA", "extra MiB", "best exact peer", "ms", "by")]
    for cell in cells:
        extra = cell["extra_bytes"]
        lines.append(
            (
                short(cell["N"]),
                cell["cell"],
                number(cell["ms"], 2),
                f"{cell['low_ms']:.2f} - {cell['high_ms']:.2f}",
                number(cell["gb_per_s"], 1),
                number(cell["of_read_bandwidth"], 2),
                number(cell["of_fma_rate"], 2),
                number(None if extra is None else extra / 2**20, 1),
                cell["best_peer"] or "-",
                number(cell.get("best_peer_ms"), 2),
                number(cell.get("faster_by"), 2),
            )
        )
    return aligned(lines, left={1, 8})


LEGEND = (
    "ms: median of calls in turns with the peers; low - high: the fastest and the slowest of them. of read: share",
    "of the bandwidth of one read of memory; of FMA: float32 products over the measured rate, above 1 where bounds",
    "need cheaper ones. best exact peer: the fastest of those that find the same top k; by: its time over ours.",
)


def others(cells: Iterable[dict[str, Any]]) -> list[str]:
    """All peers of each cell, and who was skipped, with the reason; a reason of several cells once."""
    lines: list[str] = []
    skipped: dict[str, str] = {}
    for cell in cells:
        name = f"N={short(cell['N'])} {cell['cell']}"
        for peer, ms in sorted(cell["peers_ms"].items(), key=lambda entry: entry[1]):
            exact = "" if cell["peers_exact"][peer] else f", not exact: {cell['agreement'][peer]:.1%} of the ids"
            lines.append(f"{name}: {peer} {ms:.2f} ms ({cell['ratios'][peer]:.2f} times ours{exact})")
        for peer, reason in cell["skipped"].items():
            skipped.setdefault(f"skipped: {peer}: {reason}", name)
    return lines + list(skipped)


def report(machine: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Everything a reader needs to judge the figures, to paste into an issue."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    read, fma = (
        f"{min(each):.1f} to {max(each):.1f}"
        for each in ([cell[f"{name}_per_s"] for cell in cells] for name in ("read_ceiling_gb", "fma_ceiling_gflop"))
    )
    lines = [
        f"urm_kernels {own_version()}, {versions}",
        f"{machine['processor']} ({machine['system']}), {machine['cores']} cores, {machine['threads']} threads, "
        f"instruction set {machine['instruction_set']}, {machine['date']}",
        f"ceilings measured in the same turns: reads {read} GB/s, float32 multiply-adds {fma} GFLOP/s",
        "results checked against float64 before timing",
        "",
        *table(cells),
        "",
        *LEGEND,
        *others(cells),
    ]
    return "```\n" + "\n".join(lines) + "\n```"

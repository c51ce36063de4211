"""What must be reached, judged: a cell's bars in words, and whether they are met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from urm_kernels.bench import Spread

_SHARES = {"of_read_bandwidth": "of bandwidth", "of_code_rate": "of the code rate"}


def verdict(bars: Mapping[str, float], record: Mapping[str, Any]) -> dict[str, Any]:
    """`met` is None where there is no bar, or nobody to compare with.

    bars: least values by what they are of: a share in the record, or how many times faster than a package ("torch"),
    than the "fastest" exact peer, or than all exact "others", which are those that no bar names.
    """
    words, met = [], []
    for who, bar in bars.items():
        if who in _SHARES:
            words.append(f">= {bar:.0%} {_SHARES[who]}")
            met.append(record[who] >= bar)
            continue
        named = _named(who, bars, record)
        words.append(f">= {bar:g}x {who}" + ("" if named else " (not measured)"))
        met += [record["ratios"][name] >= bar for name in named]
    return {"bar": ", ".join(words) or "none", "met": all(met) if met else None}


def _named(who: str, bars: Mapping[str, float], record: Mapping[str, Any]) -> list[str]:
    """The record's peers that a bar speaks of."""
    ratios, exact = record["ratios"], record["peers_exact"]
    if who == "fastest":
        return [record["best_peer"]] if record["best_peer"] else []
    if who == "others":
        return [name for name in ratios if exact[name] and name.split()[0] not in bars]
    return [name for name in ratios if name.startswith(who)]


def line(
    name: str, ours: Spread, beside: Mapping[str, Spread], bar: str, met: bool | None, **more: Any
) -> dict[str, Any]:
    """The record of a cell that has no peers, only other ways beside it."""
    return {
        "cell": name,
        **ours.milliseconds(),
        "beside_ms": {other: spread.milliseconds()["ms"] for other, spread in beside.items()},
        "bar": bar,
        "met": met,
        **more,
    }

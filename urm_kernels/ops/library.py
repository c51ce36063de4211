"""What the ops share: registration, reading a table that others update, and errors in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import freshness, updates
from ..backends.codes import Cells, Codes
from ..backends.table_view import TableView

_library = torch.library.Library("urm_kernels", "DEF")

# The codes are not a list of tensors, for which torch.vmap has no fallback.
TABLE = (
    "Tensor items, Tensor? bias, Tensor? row_scale, Tensor? alive, int log, Tensor? code_rotation, "
    "Tensor? code_reference, Tensor? code_blocks, Tensor? code_fine, Tensor? code_order, Tensor? code_bias, "
    "Tensor? code_cells, Tensor? code_cell_reference, Tensor? code_cell_most, int code_cell_rows, int codes_from"
)
TABLE_SIZE = 16  # arguments

# torch's CPU allocator has no exception of its own.
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines ``urm_kernels::name``; returns what calls it."""
    _library.define(name + schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"urm_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.urm_kernels, name).default


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """Registers the autograd formula of ``urm_kernels::name``."""
    torch.library.register_autograd(f"urm_kernels::{name}", backward, setup_context=setup_context, lib=_library)


def no_second_derivative(ctx: Any, *_grads: Any) -> Any:
    raise RuntimeError(
        "urm_kernels: second derivatives are not available; detach the gradient, or score in plain torch"
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class unchanged:
    """Around a call with gradients, whose backward reads the table itself: it must hold every update before, and an
    update meanwhile, which came too early for autograd to notice, is an error as it would be later."""

    def __init__(self, log: int, *tensors: Tensor | None) -> None:
        self._tensors = tensors if log and not torch.compiler.is_compiling() else ()
        if self._tensors and (found := updates.find(log)) is not None:
            found.flush()
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [t._version for t in self._tensors if t is not None and not t.is_inference()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *failed: Any) -> None:
        if failed[0] is None and self._now() != self._versions:
            raise RuntimeError("items: the table was updated during a call that needs its gradient; call again")


class reading:
    """Around what reads a table: gives it as one version, whatever others update meanwhile."""

    def __init__(
        self,
        items: Tensor,
        bias: Tensor | None,
        row_scale: Tensor | None,
        alive: Tensor | None,
        log: int,
        rotation: Tensor | None,
        reference: Tensor | None,
        blocks: Tensor | None,
        fine: Tensor | None,
        order: Tensor | None,
        code_bias: Tensor | None,
        cells: Tensor | None,
        cell_reference: Tensor | None,
        cell_most: Tensor | None,
        cell_rows: int,
        codes_from: int,
    ) -> None:
        codes = None
        if rotation is not None and reference is not None and blocks is not None:
            codes = Codes(rotation, reference, blocks, fine)
            if order is not None and cells is not None and cell_reference is not None:
                codes = codes._replace(cells=Cells(order, code_bias, cells, cell_reference, cell_most, cell_rows))
        self._table = TableView(items, bias, row_scale, alive, None, codes)
        self._log = updates.find(log) if log else None
        self._codes_from = freshness.find(codes_from) if codes_from else None

    def _sources(self) -> tuple[Tensor | None, ...]:
        """What the codes were made from."""
        codes, bias = self._table.codes, self._table.bias
        copied = codes is not None and codes.cells is not None and codes.cells.bias is not None
        return self._table.items, self._table.row_scale, bias if copied else None

    def __enter__(self) -> TableView:
        if self._codes_from is not None and not self._codes_from.fresh(*self._sources()):
            raise RuntimeError("items: factors changed since pack(): call refresh()")
        if self._log is None:
            return self._table
        self._version, overlay = self._log.pin()
        return self._table._replace(overlay=overlay)

    def __exit__(self, *_failed: Any) -> None:
        if self._log is not None:
            self._log.unpin(self._version)


def memory_in_words(error: RuntimeError, what: str) -> None:
    """Raises MemoryError where torch's RuntimeError says that the CPU has no memory; returns where it says else."""
    if any(words in str(error) for words in _NO_MEMORY):
        raise MemoryError(f"{what}: {error}") from error


def check_rows(name: str, rows: Tensor | None, count: int) -> None:
    """Row indices, or -1 for a pad. Looked at on the CPU only: elsewhere that would wait for the device."""
    if rows is None or rows.numel() == 0 or rows.device.type != "cpu":
        return
    low, high = (int(bound) for bound in rows.aminmax())
    if low < -1 or high >= count:
        bad = low if low < -1 else high
        raise ValueError(f"{name}: row indices from 0 to {count - 1}, or -1 for a pad, are wanted, {bad} came")


def compute_dtype(queries: Tensor, items: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (queries.dtype, items.dtype) else torch.float32

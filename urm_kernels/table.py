"""ItemTable: a catalogue as a torch module that changes while it is read."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, table_file
from .backends.codes import BLOCK, Cells, Codes
from .backends.table_view import rows_of_bits
from .factorize import factorize
from .interop import as_tensor, is_read_only
from .names import Names, as_names
from .table_changes import ROW_PARTS, ChangingTable
from .table_codes import CELL_PARTS, CODE_PARTS, PACKED_PARTS

_PARTS = (*ROW_PARTS, "text_projection", "alive", "ids", "id_text", "id_offsets")


_tables: weakref.WeakSet[ItemTable] = weakref.WeakSet()


class Serving(NamedTuple):
    """What a scoring function reads of a table: the first arguments of every op (urm_kernels.ops)."""

    items: Tensor
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    alive: Tensor | None = None
    log: int = 0
    code_rotation: Tensor | None = None
    code_reference: Tensor | None = None
    code_blocks: Tensor | None = None
    code_fine: Tensor | None = None
    code_order: Tensor | None = None
    code_bias: Tensor | None = None
    code_cells: Tensor | None = None
    code_cell_reference: Tensor | None = None
    code_cell_most: Tensor | None = None
    code_cell_rows: int = 0
    codes_from: int = 0


class ItemTable(ChangingTable):
    """Item factors with what belongs to them; pass it wherever a function takes ``items``.

    An item's row may have two parts, a learned one and one projected from its content (the paper's V_dis + V_trans)::

        V = factors + text @ text_projection          # [N, r]

    They are kept apart, so that both can be trained: calls that need a gradient form V each time, all others read the
    sum that :meth:`refresh` made.

    Rows are added, changed and removed in place, also while other threads read: each call sees the whole of an update
    or nothing of it. Row numbers never shift; a removed row leaves a tombstone until :meth:`compact`.

    Args:
        factors: [N, r] float32, float16, bfloat16, float64 or float8_e4m3fn. Not copied.
        text: [N, t] content vectors, any float dtype.
        text_projection: [t, r]; given with ``text``.
        row_scale: [N], a factor of each row's dots with the queries (one fp32 rounding); for float8 factors.
        bias: [N] added to every score; scoring functions then take no ``bias=`` of their own.
        ids: the caller's own names of the rows, all different: int64 [N], or N strings. Results speak of rows, see
            :meth:`to_external` and :meth:`rows_of`.
        trainable: factors, text_projection and bias become parameters; otherwise they are buffers.

    Arrays with ``__dlpack__`` are taken like tensors. Memory: what the arguments hold; with text, N r elements more;
    with ids, 16 N bytes for finding rows by them. :meth:`memory` tells.
    """

    def __init__(
        self,
        factors: Tensor,
        *,
        text: Tensor | None = None,
        text_projection: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
        ids: Any = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        read_only = any(is_read_only(part) for part in (factors, text, row_scale, bias))
        factors = as_tensor("factors", factors)
        text, text_projection = as_tensor("text", text), as_tensor("text_projection", text_projection)
        row_scale, bias, ids = as_tensor("row_scale", row_scale), as_tensor("bias", bias), as_names("ids", ids)
        checks.flag("trainable", trainable)
        checks.table(factors, text, text_projection, row_scale, bias, trainable)
        names = None
        if ids is not None:
            if isinstance(ids, Tensor):
                checks.same_device("ids", ids, factors.device)
            names = Names.of(ids, factors.shape[0])
        tensors = {
            "factors": factors,
            "text": text,
            "text_projection": text_projection,
            "row_scale": row_scale,
            "bias": bias,
        }
        self._start(tensors, names, trainable)
        if read_only:
            self._read_only = self.factors.data_ptr()

    def _start(
        self,
        tensors: dict[str, Tensor | None],
        names: Names | None,
        trainable: bool,
        facts: table_file.Facts = table_file.NO_FACTS,
    ) -> None:
        self.trainable = trainable
        self._names = names
        self._read_only = None
        self._volatile()
        for part in _PARTS:
            self._hold(part, tensors.get(part))
        self.register_buffer("encoded", None, persistent=False)
        if names is not None:
            self._hold_names(names)
        codes = None
        if "code_blocks" in tensors:
            codes = Codes(*(tensors.get(part) for part in CODE_PARTS))  # type: ignore[arg-type]
            if facts.cell_rows:
                held = [tensors.get(part) for part in CELL_PARTS]
                cells = Cells(*held, rows=facts.cell_rows)  # type: ignore[arg-type, call-arg, misc]
                codes = codes._replace(cells=cells)
        self._hold_codes(codes)
        self.code_changed = facts.changed
        self._begin(same_rows=True)

    def _volatile(self) -> None:
        """What belongs to this object in this process, and is neither copied nor pickled."""
        self._lock, self._fetch = threading.RLock(), threading.RLock()
        self._room = {}
        self._log = self._sum_from = self._codes_from = None
        _tables.add(self)

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        if self.trainable and tensor is not None and name in ("factors", "text_projection", "bias"):
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        else:
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def extra_repr(self) -> str:
        rows, r = self.factors.shape
        parts = [f"{rows} x {r}", str(self.factors.dtype).removeprefix("torch.")]
        parts += [name for name in ("text", "row_scale", "bias") if getattr(self, name) is not None]
        if self._names is not None:
            parts.append("string ids" if self._names.are_strings else "ids")
        if self.is_packed:
            parts.append("packed" if self.code_order is None else "packed in blocks")
        if self.alive is not None:
            parts.append(f"{rows - self.count()} removed")
        return ", ".join(parts)

    def count(self) -> int:
        """Rows that have not been removed."""
        if self.alive is None:
            return len(self)
        return int(rows_of_bits(self.alive, torch.arange(len(self), device=self.alive.device)).sum())

    @classmethod
    def from_dense(
        cls, W: Tensor, rank: int, *, seed: int = 0, whiten: bool = False
    ) -> tuple[ItemTable, Tensor, float]:
        """The best factors of a dense matrix, ``W ~ V @ projection.T``; see :func:`urm_kernels.factorize.factorize`.

        ``hidden @ projection`` are the queries: a model's scores ``hidden @ W.T`` become ``queries @ V.T``.

        Returns (table of float32 factors [N, rank], projection [d, rank] float32, share of ``W.square().sum()`` kept).
        """
        found = factorize(as_tensor("W", W), rank, seed=seed, whiten=whiten)
        return cls(found.factors), found.projection, found.energy_kept

    def serving(self) -> Serving:
        """The tensors that a scoring function reads; V is formed with its gradient where one is needed.

        Raises RuntimeError where a part changed since V was made.
        """
        if torch.compiler.is_compiling():
            return self._serving(self._log.key if self._log is not None else 0)
        with self._fetch:
            log = self._log
            # Whoever put another tensor in the place of a part (functional_call, say) reads that one.
            held = log is None or log.tensors["factors"].data_ptr() == self.factors.data_ptr()
            return self._serving(log.key if held and log is not None else 0, held)

    def _serving(self, log: int, held: bool = True) -> Serving:
        items, bias = self.factors, self.bias
        if self.trainable and not torch.is_grad_enabled():
            # An alias keeps the memory while the call runs, also where another one appends.
            items, bias = items.detach(), None if bias is None else bias.detach()
        if self.text is not None:
            sources = (self.factors, self.text_projection)
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources):
                return Serving(self._sum(self.factors, self.text), bias, self.row_scale, self.alive)
            if not torch.compiler.is_compiling() and not self._sum_is_fresh():
                raise RuntimeError("items: factors, text or text_projection changed since refresh(): call refresh()")
            assert self.encoded is not None
            items = self.encoded
        table = Serving(items, bias, self.row_scale, self.alive, log)
        codes = self.codes()
        if codes is None or not held:
            return table
        assert self._codes_from is not None
        table = Serving(*table[:5], *codes[:4])
        if (cells := codes.cells) is not None:
            table = Serving(*table[:9], *cells)
        return table._replace(codes_from=self._codes_from.key)

    def to_external(self, ids: Tensor) -> Any:
        """The caller's names of result rows (int64, any shape): int64, pads stay -1, or for string ids a NumPy array of
        str in the same shape, pads None. Without ids, rows are their own names."""
        ids = as_tensor("ids", ids)
        with self._fetch:
            names, rows = self._names, len(self)
        checks.rows("ids", ids.flatten() if isinstance(ids, Tensor) else ids, rows, None, pads=True)
        return ids if names is None else names.names(ids)

    def rows_of(self, external: Any) -> Tensor:
        """The rows of the caller's names: an int64 tensor of any shape, or for string ids a (nested) sequence of str.

        Raises ValueError where one is not in the table, or has been removed.
        """
        with self._fetch:
            names, alive, rows = self._names, self.alive, len(self)
        external = as_names("external", external)
        if names is not None:
            return names.rows(external, alive).to(self.factors.device)
        checks.rows("external", external.flatten() if isinstance(external, Tensor) else external, rows, None)
        if alive is not None and external.numel():
            there = rows_of_bits(alive, external)
            if not there.all():
                raise ValueError(f"external: row {int(external[~there][0])} has been removed")
        return external

    def memory(self) -> dict[str, int]:
        """Bytes by part, with room for rows to come, and "total".

        Packed in blocks also "changed", not part of the total: the codes of rows updated or appended since
        :meth:`pack`, which lie among rows that they are not like. Where that is much of "code_blocks", packing anew
        pays.
        """
        held = {name: getattr(self, name) for name in (*_PARTS, *PACKED_PARTS, "encoded")}
        used = {n: self._room.get(n, t).nbytes for n, t in held.items() if t is not None}
        if self._names is not None:
            used["index of ids"] = self._names.index_bytes()
        used["total"] = sum(used.values())
        if self.code_cell_rows and self.code_blocks is not None:
            used["changed"] = self.code_changed * self.code_blocks.shape[1] // BLOCK
        return used

    def clone(self) -> ItemTable:
        """A copy in memory of its own, which may be changed where this table may not."""
        with self._lock:
            if self._log is not None:
                self._log.flush()
            tensors = {name: t.detach().clone() for name in _PARTS if (t := getattr(self, name)) is not None}
            tensors |= {name: t.clone() for name in PACKED_PARTS if (t := getattr(self, name)) is not None}
            return self._made(tensors, self.trainable, self._facts())

    def _facts(self) -> table_file.Facts:
        return table_file.Facts(self.code_cell_rows, self.code_changed)

    @classmethod
    def _made(cls, tensors: dict[str, Tensor], trainable: bool, facts: table_file.Facts) -> ItemTable:
        """A table of tensors that belong together."""
        table = cls.__new__(cls)
        nn.Module.__init__(table)
        names = None
        if "ids" in tensors or "id_offsets" in tensors:
            names = Names(tensors.get("ids"), tensors.get("id_text"), tensors.get("id_offsets"))
        table._start(dict(tensors), names, trainable, facts)
        return table

    def save(self, path: table_file.Path) -> None:
        """Writes all parts, tombstones and names to one .safetensors file, which appears whole or not at all."""
        with self._lock:
            if self._log is not None:
                self._log.flush()
            parts = (*_PARTS, *PACKED_PARTS)
            tensors = {name: tensor for name in parts if (tensor := getattr(self, name)) is not None}
            rows, rank = self.factors.shape
            table_file.write(path, tensors, rows, rank, self._facts())

    @classmethod
    def load(
        cls, path: table_file.Path, *, mmap: bool = True, device: str | torch.device = "cpu", trainable: bool = False
    ) -> ItemTable:
        """Reads what :meth:`save` wrote. The description is validated before anything is allocated.

        With ``mmap``, on the CPU, nothing is read until it is needed, and the table may be larger than the free memory;
        it is read-only until cloned (an edit in place would change this process's pages, never the file), and the file
        must not be cut short meanwhile. A table with text is summed at once, which reads it. A trainable table is read
        into memory, since its parameters change.

        Raises ValueError in words for a file that is damaged or is no table, OSError for one that cannot be read.
        """
        checks.flag("mmap", mmap)
        mmap = mmap and not trainable
        tensors, facts = table_file.read(path, mmap=mmap, device=device)
        table = cls._made(tensors, trainable, facts)
        if mmap and table.factors.device.type == "cpu":
            table._read_only = table.factors.data_ptr()
        return table

    def _apply(self, fn: Any, recurse: bool = True) -> ItemTable:
        with self._lock:
            if self._log is not None:
                self._log.flush()
            dtype = self.factors.dtype
            super()._apply(fn, recurse)
            self._room.clear()
            if self._names is not None:
                self._names = self._names.with_tensors(self.ids, self.id_text, self.id_offsets)
            self._begin(same_rows=self.factors.dtype == dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A table's rows are its state: parts may come with other sizes, or not at all."""
        with self._lock:
            self._check_state(state_dict, prefix)
            if self._log is not None:
                self._log.flush()  # an older update, written later, would replace what is loaded
            for name in _PARTS:
                held, given = getattr(self, name), state_dict.get(prefix + name)
                if isinstance(given, Tensor) and (held is None or held.shape != given.shape):
                    kept = given.dtype if held is None else held.dtype
                    fresh = torch.empty(given.shape, dtype=kept, device=self.factors.device)
                    if isinstance(held, nn.Parameter):
                        held.data = fresh
                    else:
                        setattr(self, name, fresh)
                elif given is None and held is not None and name == "alive":
                    self.alive = None
            self._room.clear()
            super()._load_from_state_dict(state_dict, prefix, *rest)
            names = None
            if self.ids is not None or self.id_offsets is not None:
                names = Names(self.ids, self.id_text, self.id_offsets)
            self._names = names
            self._begin()

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rows are read by address: parts have to be of one table before they get that far."""
        parts = {name: state_dict.get(prefix + name, getattr(self, name)) for name in _PARTS}
        if prefix + "alive" not in state_dict:
            parts["alive"] = None
        shapes = {name: list(part.shape) for name, part in parts.items() if part is not None}
        rows, rank = shapes["factors"] if len(shapes["factors"]) == 2 else (-1, -1)
        wanted = table_file.wanted_shapes(rows, rank)
        for name, shape in shapes.items():
            if len(shape) != len(wanted[name]) or any(
                w not in (None, s) for w, s in zip(wanted[name], shape, strict=True)
            ):
                raise ValueError(f"{prefix}{name}: shape {wanted[name]} is wanted beside the other parts, {shape} came")

    def state_dict(self, *args: Any, **options: Any) -> Any:
        if self._log is not None:
            self._log.flush()
        return super().state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        if self._log is not None:
            self._log.flush()
        state = self.__dict__.copy()
        for name in ("_lock", "_fetch", "_room", "_log", "_names", "_sum_from", "_codes_from"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._volatile()
        self._names = None
        if self.ids is not None or self.id_offsets is not None:
            self._names = Names(self.ids, self.id_text, self.id_offsets)
        self._begin(same_rows=True)


def _after_fork() -> None:
    # A lock may have been held by a thread that the child does not have.
    for table in list(_tables):
        table._lock, table._fetch = threading.RLock(), threading.RLock()
        if table._names is not None:
            table._names.unlock()


os.register_at_fork(after_in_child=_after_fork)

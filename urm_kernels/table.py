"""ItemTable: a catalogue as a torch module that changes while it is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, table_file
from .backends.table_view import bits_of_rows, gather_rows, rows_of_bits
from .factorize import factorize
from .interop import as_tensor
from .names import Names
from .updates import UpdateLog, write_rows

_ROWS = ("factors", "text", "row_scale", "bias")  # one row an item
_PARTS = (*_ROWS, "text_projection", "alive", "ids", "id_text", "id_offsets")


class Serving(NamedTuple):
    """What a scoring function reads of a table: the first arguments of every op (urm_kernels.ops)."""

    items: Tensor
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    alive: Tensor | None = None
    log: int = 0


class ItemTable(nn.Module):
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

    Arrays with ``__dlpack__`` are taken like tensors. Memory: what the arguments hold; with text, N r elements more; with
    ids, 16 N bytes for finding rows by them. :meth:`memory` tells.
    """

    factors: Tensor
    text: Tensor | None
    text_projection: Tensor | None
    row_scale: Tensor | None
    bias: Tensor | None
    alive: Tensor | None
    ids: Tensor | None
    id_text: Tensor | None
    id_offsets: Tensor | None
    encoded: Tensor | None

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
        factors = as_tensor("factors", factors)
        text, text_projection = as_tensor("text", text), as_tensor("text_projection", text_projection)
        row_scale, bias, ids = as_tensor("row_scale", row_scale), as_tensor("bias", bias), as_tensor("ids", ids)
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

    def _start(self, tensors: dict[str, Tensor | None], names: Names | None, trainable: bool) -> None:
        self.trainable = trainable
        self._names = names
        self._read_only: int | None = None
        self._volatile()
        for part in _PARTS:
            self._hold(part, tensors.get(part))
        self.register_buffer("encoded", None, persistent=False)
        if names is not None:
            self._hold_names(names)
        self._begin()

    def _volatile(self) -> None:
        """What belongs to this object in this process, and is neither copied nor pickled."""
        self._lock = threading.RLock()  # of writers; readers take it to fetch tensors that belong together
        self._room: dict[str, Tensor] = {}  # with room for further rows: parts are views of these
        self._log: UpdateLog | None = None

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        if self.trainable and tensor is not None and name in ("factors", "text_projection", "bias"):
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        else:
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def _hold_names(self, names: Names) -> None:
        device = self.factors.device
        for name, tensor in (("ids", names.ids), ("id_text", names.text), ("id_offsets", names.offsets)):
            setattr(self, name, None if tensor is None else tensor.to(device))
        self._names = names

    def _begin(self) -> None:
        """After every change of the tensors themselves: the sum of the parts, and a log for their updates."""
        with self._lock:
            if self.text is not None:
                self.encoded = self._encode(self.factors, self.text)
            self._remember()
            tensors = {name: tensor for name in _ROWS if (tensor := getattr(self, name)) is not None}
            if self.encoded is not None:
                tensors["encoded"] = self.encoded
            # On a GPU calls and updates are in the order of their stream.
            self._log = None
            if self.factors.device.type == "cpu":
                self._log = UpdateLog(tensors, "factors" if self.encoded is None else "encoded", self._remember)

    def _encode(self, factors: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            return self._sum(factors, text)

    def _sum(self, factors: Tensor, text: Tensor) -> Tensor:
        assert self.text_projection is not None
        wide = torch.promote_types(factors.dtype, torch.float32)
        return (factors.to(wide) + text.to(wide) @ self.text_projection.to(wide)).to(factors.dtype)

    def _remember(self) -> None:
        """What ``encoded`` was made from."""
        self._made_from = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        if self.encoded is None:
            return []
        sources = (self.factors, self.text, self.text_projection)
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in sources if t is not None]

    def __len__(self) -> int:
        """Rows, removed ones included."""
        return self.factors.shape[0]

    def extra_repr(self) -> str:
        rows, r = self.factors.shape
        parts = [f"{rows} x {r}", str(self.factors.dtype).removeprefix("torch.")]
        parts += [name for name in ("text", "row_scale", "bias") if getattr(self, name) is not None]
        if self._names is not None:
            parts.append("string ids" if self._names.are_strings else "ids")
        if self.alive is not None:
            parts.append(f"{rows - self.count()} removed")
        return ", ".join(parts)

    def count(self) -> int:
        """Rows that have not been removed."""
        if self.alive is None:
            return len(self)
        return int(rows_of_bits(self.alive, torch.arange(len(self), device=self.alive.device)).sum())

    @classmethod
    def from_dense(cls, W: Tensor, rank: int, *, seed: int = 0, whiten: bool = False) -> tuple[ItemTable, Tensor, float]:
        """The best factors of a dense item matrix, ``W ~ V @ projection.T``; see :func:`urm_kernels.factorize.factorize`.

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
        with self._lock:
            log = self._log
            # Whoever put another tensor in the place of a part (functional_call, say) reads that one.
            held = log is not None and log.tensors["factors"].data_ptr() == self.factors.data_ptr()
            return self._serving(log.key if held and log is not None else 0)

    def _serving(self, log: int) -> Serving:
        items = self.factors
        if self.text is not None:
            sources = (self.factors, self.text_projection)
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources):
                return Serving(self._sum(self.factors, self.text), self.bias, self.row_scale, self.alive)
            if not torch.compiler.is_compiling() and self._versions() != self._made_from:
                raise RuntimeError("items: factors, text or text_projection changed since refresh(): call refresh()")
            assert self.encoded is not None
            items = self.encoded
        return Serving(items, self.bias, self.row_scale, self.alive, log)

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        if self._read_only == self.factors.data_ptr():
            raise RuntimeError(f"{what}: this table is a map of its file and read-only; change a clone() of it")
        with self._lock:
            yield

    def refresh(self) -> None:
        """Forms V = factors + text @ text_projection anew, after training or an edit in place of either.

        Not while other threads read. Nothing to do for a table without text. Memory: V, and V in float32 meanwhile.
        """
        with self._lock:
            if self._log is not None:
                self._log.flush()
            self._begin()

    def update(
        self,
        rows: Tensor,
        factors: Tensor | None = None,
        *,
        text: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Replaces parts of rows; parts that are not given stay. Readers see all of it or nothing.

        Equals ``table.factors[rows] = factors`` and so on, while no other thread reads.

        Args:
            rows: int64 [n], all different, of rows that have not been removed.
            factors: [n, r]; text: [n, t]; row_scale, bias: [n]. Converted to the table's dtypes.

        Memory: the new rows, until no call that began before is left.
        """
        rows = as_tensor("rows", rows)
        self._check_rows(rows)
        with self._changing("update"):
            values = self._values(len(rows), factors=factors, text=text, row_scale=row_scale, bias=bias)
            if not values:
                raise ValueError("update: factors, text, row_scale or bias is wanted, none came")
            if self.encoded is not None and ("factors" in values or "text" in values):
                if self._versions() != self._made_from:
                    raise RuntimeError("update: factors, text or text_projection changed since refresh(): call refresh()")
                assert self.text is not None
                parts = (values[n] if n in values else self._current(n, rows) for n in ("factors", "text"))
                values["encoded"] = self._encode(*parts)
            if self._log is not None:
                self._log.write(rows, values)
                return
            for name, value in values.items():
                write_rows(getattr(self, name), rows, value)
            self._remember()

    def _current(self, name: str, rows: Tensor) -> Tensor:
        if self._log is not None:
            return self._log.current(name, rows)
        return gather_rows(getattr(self, name).detach(), rows)

    def append(
        self,
        factors: Tensor,
        *,
        text: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
        ids: Any = None,
    ) -> Tensor:
        """Adds rows at the end; returns their numbers, int64 [n]. Every part that the table has is wanted, ids too.

        Readers that began before do not see them. Tables grow by a quarter when they are full, so that a row costs the
        same however many come one by one. Of a trainable table the parameters stay the same objects, but an optimizer's
        state is not grown with them.
        """
        factors = as_tensor("factors", factors)
        if not isinstance(factors, Tensor) or factors.dim() != 2:
            raise ValueError(f"factors: shape [n, r] with r = {self.factors.shape[1]} is wanted")
        count, before = factors.shape[0], len(self)
        with self._changing("append"):
            checks.number_of_rows("factors", before + count)
            values = self._values(count, factors=factors, text=text, row_scale=row_scale, bias=bias)
            missing = [n for n in _ROWS if getattr(self, n) is not None and n not in values]
            if missing or (ids is None) != (self._names is None):
                wanted = missing[0] if missing else "ids"
                what = "is wanted, as the table has it" if missing or ids is None else "came, but the table has none"
                raise ValueError(f"{wanted}: {what}")
            names = None
            if self._names is not None:
                more = Names.of(as_tensor("ids", ids), count)
                names = self._known_names().joined(more, self.alive)
            if self.encoded is not None:
                values["encoded"] = self._encode(values["factors"], values["text"])
            grown = {name: self._with_room(name, before + count) for name in values}
            with torch.no_grad():
                for name, value in values.items():
                    grown[name][before:] = value
            for name, tensor in grown.items():
                held = getattr(self, name)
                if isinstance(held, nn.Parameter):
                    held.data = tensor
                    held.grad = None
                else:
                    setattr(self, name, tensor)
            if self.alive is not None:
                there = torch.ones(before + count, dtype=torch.bool, device=self.alive.device)
                there[:before] = rows_of_bits(self.alive, torch.arange(before, device=self.alive.device))
                self.alive = bits_of_rows(there)
            if names is not None:
                self._hold_names(names)
            self._move_log(grown)
        return torch.arange(before, before + count, device=self.factors.device)

    def _with_room(self, name: str, rows: int) -> Tensor:
        """The part as a view of more rows of its memory; of new memory, a quarter larger, where it is full."""
        held = getattr(self, name).detach()
        room = self._room.get(name)
        if room is None or room.data_ptr() != held.data_ptr() or len(room) < rows:
            if self._log is not None:
                self._log.flush()
            room = held.new_empty((rows + rows // 4 + 16, *held.shape[1:]))
            room[: len(held)] = held
            self._room[name] = room
        return room[:rows]

    def _move_log(self, grown: dict[str, Tensor]) -> None:
        if self._log is None:
            return
        if all(self._log.tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in grown.items()):
            self._log.extend(grown)
        else:
            # Readers of the old memory keep it, and their log.
            self._log = UpdateLog(grown, self._log.items, self._remember)
        self._remember()

    def remove(self, rows: Tensor) -> None:
        """Marks rows (int64 [n]) as removed: no function returns them again. Their memory stays until :meth:`compact`."""
        rows = as_tensor("rows", rows)
        self._check_rows(rows, all_different=False)
        with self._changing("remove"):
            there = torch.ones(len(self), dtype=torch.bool, device=self.factors.device)
            if self.alive is not None:
                there = rows_of_bits(self.alive, torch.arange(len(self), device=self.alive.device))
            there[rows] = False
            self.alive = bits_of_rows(there)

    def compact(self) -> Tensor:
        """Drops removed rows; the others move up. Returns the new number of every old row, int64 [N], -1 for removed.

        Calls that began before still see the old rows. Memory: the table a second time, until they are done.
        """
        with self._changing("compact"):
            rows, device = len(self), self.factors.device
            if self.alive is None:
                return torch.arange(rows, device=device)
            there = rows_of_bits(self.alive, torch.arange(rows, device=device))
            kept = there.nonzero().flatten()
            if self._log is not None:
                self._log.flush()
            names = None
            if self._names is not None:
                names = self._known_names().kept(kept)
            for name in _ROWS:
                held = getattr(self, name)
                if held is None:
                    continue
                packed = gather_rows(held.detach(), kept)
                if isinstance(held, nn.Parameter):
                    held.data, held.grad = packed, None
                else:
                    setattr(self, name, packed)
            self.alive = None
            self._room.clear()
            if names is not None:
                self._hold_names(names)
            self._begin()
            moved = torch.full((rows,), -1, dtype=torch.int64, device=device)
            moved[kept] = torch.arange(len(kept), device=device)
            return moved

    def _check_rows(self, rows: Any, all_different: bool = True) -> None:
        checks.rows("rows", rows, len(self), self.factors.device)
        if all_different and len(rows.unique()) != len(rows):
            raise ValueError("rows: all different is wanted, some came twice")
        if self.alive is not None and len(rows):
            there = rows_of_bits(self.alive, rows)
            if not there.all():
                raise ValueError(f"rows: row {int(rows[~there][0])} has been removed")

    def _values(self, count: int, **given: Any) -> dict[str, Tensor]:
        """New rows of the parts that were given, checked and in the table's dtypes."""
        values = {}
        for name, value in given.items():
            if value is None:
                continue
            held, value = getattr(self, name), as_tensor(name, value)
            if held is None:
                raise ValueError(f"{name}: came, but the table has none")
            checks.floats(name, value, float8=held.dtype == torch.float8_e4m3fn)
            checks.same_device(name, value, self.factors.device)
            if value.shape != (count, *held.shape[1:]):
                raise ValueError(f"{name}: shape {[count, *held.shape[1:]]} is wanted, {list(value.shape)} came")
            values[name] = value.detach().to(held.dtype)
        return values

    def _known_names(self) -> Names:
        assert self._names is not None
        return self._names

    def to_external(self, ids: Tensor) -> Any:
        """The caller's names of result rows (int64, any shape): int64, pads stay -1, or for string ids a NumPy array of
        str in the same shape, pads None. Without ids, rows are their own names."""
        ids = as_tensor("ids", ids)
        return ids if self._names is None else self._names.names(ids)

    def rows_of(self, external: Any) -> Tensor:
        """The rows of the caller's names: an int64 tensor of any shape, or for string ids a (nested) sequence of str.

        Raises ValueError where one is not in the table, or has been removed.
        """
        external = as_tensor("external", external)
        with self._lock:
            if self._names is not None:
                return self._names.rows(external, self.alive).to(self.factors.device)
            checks.rows("external", external.flatten() if isinstance(external, Tensor) else external, len(self), None)
            if self.alive is not None and external.numel():
                there = rows_of_bits(self.alive, external)
                if not there.all():
                    raise ValueError(f"external: row {int(external[~there][0])} has been removed")
            return external

    def memory(self) -> dict[str, int]:
        """Bytes by part, with room for rows to come, and "total"."""
        held = {name: getattr(self, name) for name in (*_PARTS, "encoded")}
        used = {n: self._room.get(n, t).nbytes for n, t in held.items() if t is not None}
        if self._names is not None:
            used["index of ids"] = self._names.index_bytes()
        return used | {"total": sum(used.values())}

    def clone(self) -> ItemTable:
        """A copy in memory of its own, which may be changed where this table may not."""
        with self._lock:
            if self._log is not None:
                self._log.flush()
            tensors = {name: t.detach().clone() for name in _PARTS if (t := getattr(self, name)) is not None}
            return self._made(tensors, self.trainable)

    @classmethod
    def _made(cls, tensors: dict[str, Tensor], trainable: bool) -> ItemTable:
        """A table of tensors that belong together."""
        table = cls.__new__(cls)
        nn.Module.__init__(table)
        names = None
        if "ids" in tensors or "id_offsets" in tensors:
            names = Names(tensors.get("ids"), tensors.get("id_text"), tensors.get("id_offsets"))
        table._start(dict(tensors), names, trainable)
        return table

    def save(self, path: table_file.Path) -> None:
        """Writes all parts, tombstones and names to one .safetensors file, which appears whole or not at all."""
        with self._lock:
            if self._log is not None:
                self._log.flush()
            tensors = {name: tensor for name in _PARTS if (tensor := getattr(self, name)) is not None}
            table_file.write(path, tensors, *self.factors.shape)

    @classmethod
    def load(
        cls, path: table_file.Path, *, mmap: bool = True, device: str | torch.device = "cpu", trainable: bool = False
    ) -> ItemTable:
        """Reads what :meth:`save` wrote. The description is validated before anything is allocated.

        With ``mmap``, on the CPU, nothing is read until it is needed, and the table may be larger than the free memory;
        it is read-only until cloned (an edit in place would change this process's pages, never the file), and the file
        must not be cut short meanwhile. A table with text is summed at once, which reads it.

        Raises ValueError in words for a file that is damaged or is no table, OSError for one that cannot be read.
        """
        checks.flag("mmap", mmap)
        tensors = table_file.read(path, mmap=mmap, device=device)
        table = cls._made(tensors, trainable)
        if mmap and table.factors.device.type == "cpu":
            table._read_only = table.factors.data_ptr()
        return table

    def _apply(self, fn: Any, recurse: bool = True) -> ItemTable:
        with self._lock:
            if self._log is not None:
                self._log.flush()
            super()._apply(fn, recurse)
            self._room.clear()
            if self._names is not None:
                self._names = self._names.with_tensors(self.ids, self.id_text, self.id_offsets)
            self._begin()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A table's rows are its state: parts may come with other sizes, or not at all."""
        with self._lock:
            for name in _PARTS:
                held, given = getattr(self, name), state_dict.get(prefix + name)
                if isinstance(given, Tensor) and (held is None or held.shape != given.shape):
                    if isinstance(held, nn.Parameter):
                        held.data = held.data.new_empty(given.shape)
                    else:
                        device = self.factors.device
                        setattr(self, name, torch.empty_like(given, device=device))
                elif given is None and held is not None and name in ("alive",):
                    self.alive = None
            self._room.clear()
            super()._load_from_state_dict(state_dict, prefix, *rest)
            names = None
            if self.ids is not None or self.id_offsets is not None:
                names = Names(self.ids, self.id_text, self.id_offsets)
            self._names = names
            self._begin()

    def state_dict(self, *args: Any, **options: Any) -> Any:
        if self._log is not None:
            self._log.flush()
        return super().state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        if self._log is not None:
            self._log.flush()
        state = self.__dict__.copy()
        for name in ("_lock", "_room", "_log", "_names"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._volatile()
        self._names = None
        if self.ids is not None or self.id_offsets is not None:
            self._names = Names(self.ids, self.id_text, self.id_offsets)
        self._begin()

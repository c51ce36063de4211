"""How an ItemTable changes: rows are added, replaced and removed, also while other threads read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .backends.table_view import gather_rows, more_bits, rows_lie_apart, rows_of_bits, without_bits
from .interop import as_tensor
from .names import Names, as_names
from .updates import UpdateLog, write_rows

ROW_PARTS = ("factors", "text", "row_scale", "bias")  # one row an item


class ChangingTable(nn.Module):
    """The part of :class:`urm_kernels.ItemTable` that changes it."""

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

    _lock: threading.RLock  # of writers, who may wait for readers while they hold it
    _fetch: threading.RLock  # of readers while they take tensors that belong together, and of who replaces these
    _room: dict[str, Tensor]  # with room for further rows: parts are views of these
    _log: UpdateLog | None
    _names: Names | None
    _read_only: int | None  # the address that a file is mapped to
    _made_from: list[tuple[int, int]]

    def __len__(self) -> int:
        """Rows, removed ones included."""
        return self.factors.shape[0]

    def _hold_names(self, names: Names) -> None:
        device = self.factors.device
        for name, tensor in (("ids", names.ids), ("id_text", names.text), ("id_offsets", names.offsets)):
            setattr(self, name, None if tensor is None else tensor.to(device))
        self._names = names

    def _begin(self) -> None:
        """After every change of the tensors themselves: the sum of the parts, and a log for their updates."""
        with self._fetch:
            if self.text is not None:
                self.encoded = self._encode(self.factors, self.text)
            self._remember()
            tensors = {name: tensor for name in ROW_PARTS if (tensor := getattr(self, name)) is not None}
            if self.encoded is not None:
                tensors["encoded"] = self.encoded
            # On a GPU calls and updates are in the order of their stream.
            self._log = None
            if self.factors.device.type == "cpu":
                self._log = UpdateLog(tensors, "factors" if self.encoded is None else "encoded", self._own_write)

    def _encode(self, factors: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            return self._sum(factors, text)

    def _sum(self, factors: Tensor, text: Tensor) -> Tensor:
        assert self.text_projection is not None
        dtypes = (factors.dtype, text.dtype, self.text_projection.dtype)
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return (factors.to(wide) + text.to(wide) @ self.text_projection.to(wide)).to(factors.dtype)

    def _remember(self) -> None:
        """What ``encoded`` was made from."""
        self._made_from = self._versions()

    @contextmanager
    def _own_write(self) -> Iterator[None]:
        """Around a change that keeps V right where it was right before; readers look at this between changes only."""
        if self.encoded is None:
            yield
            return
        with self._fetch:
            right = self._versions() == self._made_from
            yield
            if right:
                self._remember()

    def _versions(self) -> list[tuple[int, int]]:
        if self.encoded is None:
            return []
        sources = (self.factors, self.text, self.text_projection)
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in sources if t is not None]

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        with self._lock:
            if self._read_only == self.factors.data_ptr():
                raise RuntimeError(f"{what}: this table's memory is read-only; change a clone() of it")
            if any(not rows_lie_apart(t) for name in ROW_PARTS if (t := getattr(self, name)) is not None):
                raise RuntimeError(f"{what}: rows of this table share memory; change a clone() of it")
            yield

    def _check_fresh(self, what: str) -> None:
        if self._versions() != self._made_from:
            raise RuntimeError(f"{what}: factors, text or text_projection changed since refresh(): call refresh()")

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
        with self._changing("update"):
            self._check_rows(rows)
            values = self._values(len(rows), factors=factors, text=text, row_scale=row_scale, bias=bias)
            if not values:
                raise ValueError("update: factors, text, row_scale or bias is wanted, none came")
            if self.encoded is not None and ("factors" in values or "text" in values):
                self._check_fresh("update")
                assert self.text is not None
                parts = (values[n] if n in values else self._current(n, rows) for n in ("factors", "text"))
                values["encoded"] = self._encode(*parts)
            if self._log is not None:
                self._log.write(rows, values)
                return
            with self._own_write():
                for name, value in values.items():
                    write_rows(getattr(self, name), rows, value)

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
        count = factors.shape[0]
        with self._changing("append"):
            before = len(self)
            checks.number_of_rows("factors", before + count)
            values = self._values(count, factors=factors, text=text, row_scale=row_scale, bias=bias)
            missing = [n for n in ROW_PARTS if getattr(self, n) is not None and n not in values]
            if missing or (ids is None) != (self._names is None):
                wanted = missing[0] if missing else "ids"
                what = "is wanted, as the table has it" if missing or ids is None else "came, but the table has none"
                raise ValueError(f"{wanted}: {what}")
            alive = None if self.alive is None else more_bits(self.alive, before, before + count)
            names = None
            if self._names is not None:
                more = Names.of(as_names("ids", ids), count)
                names = self._names.joined(more, alive, self._joined)
            if self.encoded is not None:
                self._check_fresh("append")
                values["encoded"] = self._encode(values["factors"], values["text"])
            grown = {name: self._with_room(name, before + count) for name in values}
            with self._own_write():
                with torch.no_grad():
                    for name, value in values.items():
                        grown[name][before:] = value
                with self._fetch:
                    self._put(grown)
                    self.alive = alive
                    if names is not None:
                        self._hold_names(names)
                    self._move_log(grown)
        return torch.arange(before, before + count, device=self.factors.device)

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Replaces parts; a parameter stays the same object."""
        for name, tensor in tensors.items():
            held = getattr(self, name)
            if isinstance(held, nn.Parameter):
                held.data, held.grad = tensor, None
                torch.autograd.graph.increment_version(held)
            else:
                setattr(self, name, tensor)

    def _joined(self, name: str, more: Tensor) -> Tensor:
        """A part that names are made of, and more of it behind."""
        before = len(getattr(self, name))
        joined = self._with_room(name, before + len(more))
        joined[before:] = more
        return joined

    def _with_room(self, name: str, rows: int) -> Tensor:
        """The part as a view of more rows of its memory; of new memory, a quarter larger, where it is full."""
        held = getattr(self, name).detach()
        room = self._room.get(name)
        if room is None or room.data_ptr() != held.data_ptr() or len(room) < rows:
            if self._log is not None:
                self._log.flush()
            with torch.inference_mode(False):
                room = torch.empty((rows + rows // 4 + 16, *held.shape[1:]), dtype=held.dtype, device=held.device)
            room[: len(held)] = held
            self._room[name] = room
        return room[:rows]

    def _move_log(self, grown: dict[str, Tensor]) -> None:
        if self._log is None:
            return
        held = {name: getattr(self, name) for name in grown}  # parameters themselves: autograd watches these
        if all(self._log.tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in held.items()):
            self._log.extend(held)
        else:
            # Readers of the old memory keep it, and their log.
            self._log = UpdateLog(held, self._log.items, self._own_write)

    def remove(self, rows: Tensor) -> None:
        """Marks rows (int64 [n]) as removed: no function returns them again.

        Their memory stays until :meth:`compact`.
        """
        rows = as_tensor("rows", rows)
        with self._changing("remove"):
            self._check_rows(rows, all_different=False)
            self.alive = without_bits(self.alive, rows, len(self))

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
                names = self._names.kept(kept)
            held = {name: tensor for name in ROW_PARTS if (tensor := getattr(self, name)) is not None}
            packed = {name: gather_rows(tensor.detach(), kept) for name, tensor in held.items()}
            with self._fetch:
                self._put(packed)
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

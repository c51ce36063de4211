"""How an ItemTable changes: rows are added, replaced and removed, also while other threads read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .backends.codes import BLOCK, Cells
from .backends.table_view import gather_rows, more_bits, rows_lie_apart, rows_of_bits, without_bits
from .freshness import MadeFrom
from .interop import as_tensor
from .names import Names, as_names
from .table_cells import blocks_of_cells, check_rows, order_of_moved
from .table_codes import PackableTable
from .updates import UpdateLog, write_rows

ROW_PARTS = ("factors", "text", "row_scale", "bias")  # one row an item


class ChangingTable(PackableTable):
    """The part of :class:`urm_kernels.ItemTable` that changes it."""

    text: Tensor | None
    text_projection: Tensor | None
    bias: Tensor | None
    alive: Tensor | None
    ids: Tensor | None
    id_text: Tensor | None
    id_offsets: Tensor | None

    _room: dict[str, Tensor]  # with room for further rows: parts are views of these
    _names: Names | None
    _read_only: int | None  # the address that a file is mapped to
    _sum_from: MadeFrom | None  # what `encoded` was made from

    def __len__(self) -> int:
        """Rows, removed ones included."""
        return self.factors.shape[0]

    def _hold_names(self, names: Names) -> None:
        device = self.factors.device
        for name, tensor in (("ids", names.ids), ("id_text", names.text), ("id_offsets", names.offsets)):
            setattr(self, name, None if tensor is None else tensor.to(device))
        self._names = names

    def _begin(self, *, same_rows: bool = False, order: Tensor | None = None) -> None:
        """After every change of the tensors themselves: the sum of the parts, codes (kept for the same rows; in an
        order, where one is given), and a log for their updates."""
        with self._fetch:
            self._sum_from = None
            if self.text is not None:
                self.encoded = self._encode(self.factors, self.text)
                self._sum_from = MadeFrom(*self._summands())
            # A sum formed anew may round otherwise.
            if same_rows and self.text is None:
                self._hold_codes(self.codes())
            else:
                self._renew_codes(order)
            tensors = {name: tensor for name in ROW_PARTS if (tensor := getattr(self, name)) is not None}
            if self.encoded is not None:
                tensors["encoded"] = self.encoded
            # On a GPU calls and updates are in the order of their stream.
            self._log = None
            if self.factors.device.type == "cpu":
                items = "factors" if self.encoded is None else "encoded"
                self._log = UpdateLog(tensors, items, self._own_write, self._write_codes_of)

    def _encode(self, factors: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            return self._sum(factors, text)

    def _sum(self, factors: Tensor, text: Tensor) -> Tensor:
        assert self.text_projection is not None
        dtypes = (factors.dtype, text.dtype, self.text_projection.dtype)
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return (factors.to(wide) + text.to(wide) @ self.text_projection.to(wide)).to(factors.dtype)

    def _summands(self) -> tuple[Tensor | None, ...]:
        return self.factors, self.text, self.text_projection

    def _sum_is_fresh(self) -> bool:
        return self._sum_from is None or self._sum_from.fresh(*self._summands())

    @contextmanager
    def _own_write(self) -> Iterator[None]:
        """Around a change that keeps V and codes right where they were right before."""
        with ExitStack() as both:
            if self._sum_from is not None:
                both.enter_context(self._sum_from.own_write(*self._summands()))
            if self._codes_from is not None:
                both.enter_context(self._codes_from.own_write(*self._code_sources()))
            yield

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in (*self._summands(), *self._code_sources()) if t is not None]

    def _follow(self) -> None:
        """During an own write, after parts have moved to other memory."""
        if self._sum_from is not None:
            self._sum_from = self._sum_from.successor(*self._summands())
        if self._codes_from is not None:
            self._codes_from = self._codes_from.successor(*self._code_sources())

    def _write_codes_of(self, rows: Tensor, values: dict[str, Tensor]) -> None:
        items = values.get("encoded", values.get("factors"))
        assert items is not None
        self._write_codes(rows, items, values.get("row_scale"), values.get("bias"))

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        with self._lock:
            if self._read_only == self.factors.data_ptr():
                raise RuntimeError(f"{what}: this table's memory is read-only; change a clone() of it")
            if any(not rows_lie_apart(t) for name in ROW_PARTS if (t := getattr(self, name)) is not None):
                raise RuntimeError(f"{what}: rows of this table share memory; change a clone() of it")
            yield

    def _check_fresh(self, what: str) -> None:
        if not self._sum_is_fresh():
            raise RuntimeError(f"{what}: factors, text or text_projection changed since refresh(): call refresh()")

    def refresh(self) -> None:
        """Forms V = factors + text @ text_projection and the codes of a packed table anew, after training or an edit in
        place.

        Not while other threads read. Nothing to do for a table with neither. Memory: V, and V in float32 meanwhile.
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
            rows, order = rows.sort()
            with self._own_write():
                for name, value in values.items():
                    write_rows(getattr(self, name), rows, value[order])
                items, row_scale = self._coded()
                scale, bias = (None if part is None else part[rows] for part in (row_scale, self.bias))
                self._write_codes(rows, gather_rows(items, rows), scale, bias)

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
            if self.code_cell_rows:
                check_rows(before + count)
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
                more_codes = self._with_more_codes(grown, before)
                with self._fetch:
                    addresses = self._addresses()
                    self._put(grown)
                    self._put(more_codes)
                    if self._addresses() != addresses:
                        self._follow()
                    self.alive = alive
                    if names is not None:
                        self._hold_names(names)
                    self._move_log(grown)
        return torch.arange(before, before + count, device=self.factors.device)

    def _with_more_codes(self, grown: dict[str, Tensor], before: int) -> dict[str, Tensor]:
        """Parts of the codes for tensors that have grown."""
        held = self.codes()
        if held is None:
            return {}
        items = grown.get("encoded", grown["factors"])
        blocks = len(items) // BLOCK
        more = {"code_blocks": self._with_room("code_blocks", blocks)}
        if held.fine is not None:
            more["code_fine"] = self._with_room("code_fine", blocks * BLOCK)
        codes = held._replace(blocks=more["code_blocks"], fine=more.get("code_fine"))
        if (cells := held.cells) is not None:
            more |= {"code_order": self._with_room("code_order", blocks * BLOCK)}
            count = blocks * BLOCK // cells.rows
            more |= {"code_cells": self._with_room("code_cells", blocks_of_cells(blocks * BLOCK, cells.rows))}
            if cells.bias is not None:
                more |= {"code_bias": self._with_room("code_bias", blocks * BLOCK)}
                more |= {"code_cell_most": self._with_room("code_cell_most", count)}
            grown_cells = (more["code_order"], more.get("code_bias"), more["code_cells"], cells.reference)
            codes = codes._replace(cells=Cells(*grown_cells, more.get("code_cell_most"), cells.rows))
        self._codes_of_more(codes, items, grown.get("row_scale"), grown.get("bias"), before)
        return more

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
            self._log = UpdateLog(held, self._log.items, self._own_write, self._write_codes_of)

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
            moved = torch.full((rows,), -1, dtype=torch.int64, device=device)
            moved[kept] = torch.arange(len(kept), device=device)
            order = None if self.code_order is None else order_of_moved(self.code_order, moved, len(kept))
            with self._fetch:
                self._put(packed)
                self.alive = None
                self._room.clear()
                if names is not None:
                    self._hold_names(names)
                self._begin(order=order)
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
